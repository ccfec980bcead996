"""From a model's small files to what its text needs: tokenizer, chat template, sampling defaults.

Reads no weights, so that a model without a tokenizer is refused before they are loaded.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from osmium.errors import CheckpointError
from osmium.text.chat import ChatTemplate
from osmium.text.defaults import sampling_defaults
from osmium.text.tokenizer import Tokenizer

__all__ = ["Need", "SmallFiles", "TextFiles", "read_text_files"]

Need = Literal["tokenizer", "chat_template"]
"""What a command cannot do without."""


NO_THINKING = {"enable_thinking": False}
"""Switches of the chat template, unless a request sets them: of the demo, whose thinking does not
end in an answer, and of synthetic models, whose text is all answer."""

SYNTHETIC_MAX_TOKENS = 256
"""Tokens after which a reply of a synthetic model ends unless a request says: no token ends it."""


class SmallFiles(Protocol):
    """A packed file, a checkpoint folder or a synthetic model."""

    @property
    def path(self) -> Path: ...
    def file(self, name: str) -> bytes | None: ...
    def json(self, name: str) -> dict[str, Any] | None: ...


@dataclass(frozen=True)
class TextFiles:
    """What they say."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    defaults: dict[str, Any]
    """Sampling parameters that the model's makers recommend."""


def read_text_files(
    files: SmallFiles,
    needs: Collection[Need] = (),
    *,
    demo: bool = False,
    synthetic: bool = False,
) -> TextFiles:
    """Read and check them.  Ids that the tokenizer of a synthetic model lacks become text.

    Raises: CheckpointError for a file that cannot be used, or that is needed and missing.
    """
    raw, config = files.file("tokenizer.json"), files.json("tokenizer_config.json")
    if raw is None and "tokenizer" in needs:
        raise CheckpointError(
            f"{files.path} has no tokenizer.json, so text cannot become token ids; put the file "
            "beside the model's config.json and load that folder."
        )
    switches = NO_THINKING if demo or synthetic else None
    template = ChatTemplate.find(files.file("chat_template.jinja"), config, switches)
    if template is None and "chat_template" in needs:
        raise CheckpointError(
            f"{files.path} has no chat template; put chat_template.jinja beside the model's "
            "config.json, or continue plain text with `osmium run --raw`."
        )
    defaults = sampling_defaults(files.json("generation_config.json"))
    if demo:
        defaults = {**defaults, "temperature": 0.0}  # sampled, so small a model often errs
    if synthetic:
        defaults = {"max_tokens": SYNTHETIC_MAX_TOKENS, **defaults}
    tokenizer = None if raw is None else Tokenizer(raw, unknown_ids_as_text=synthetic)
    return TextFiles(tokenizer, template, defaults)
