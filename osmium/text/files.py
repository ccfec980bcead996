"""Tokenizer, chat template and sampling defaults, from a model's small files.

Reads no weights, so that a missing tokenizer is an error before the weights are loaded.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from osmium.errors import CheckpointError
from osmium.text.added_tokens import content_of
from osmium.text.chat import ChatTemplate
from osmium.text.defaults import sampling_defaults
from osmium.text.template_files import TOOL_TEMPLATE
from osmium.text.tokenizer import Tokenizer

__all__ = ["Need", "SmallFiles", "TextFiles", "read_text_files"]

Need = Literal["tokenizer", "chat_template"]
"""A file that a command requires."""


NO_THINKING = {"enable_thinking": False}
"""Chat template variables of the demo and of synthetic models, unless a request sets them.

The demo's reasoning does not end in an answer; synthetic models have no reasoning."""

SYNTHETIC_MAX_TOKENS = 256
"""Default max_tokens of a synthetic model, which has no end-of-sequence token."""


class SmallFiles(Protocol):
    """A packed file, a checkpoint folder or a synthetic model."""

    @property
    def path(self) -> Path: ...
    def file(self, name: str) -> bytes | None: ...
    def json(self, name: str) -> dict[str, Any] | None: ...


@dataclass(frozen=True)
class TextFiles:
    """The text part of a model."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    defaults: dict[str, Any]
    """The model's recommended sampling parameters."""
    end_ids: tuple[int, ...] = ()
    """The ids of the end tokens that tokenizer_config.json names."""
    notes: tuple[str, ...] = ()
    """What in the files is repaired or ignored; the loader logs it."""


def read_text_files(
    files: SmallFiles,
    needs: Collection[Need] = (),
    *,
    demo: bool = False,
    synthetic: bool = False,
) -> TextFiles:
    """Read and check the files.  Ids that a synthetic model's tokenizer lacks become text.

    Raises: CheckpointError for a file that cannot be used, or that is needed and missing.
    """
    raw, config = files.file("tokenizer.json"), files.json("tokenizer_config.json")
    if raw is None and "tokenizer" in needs:
        raise CheckpointError(
            f"{files.path} has no tokenizer.json, which text input needs; put the file beside "
            "the model's config.json and load that folder."
        )
    variables = NO_THINKING if demo or synthetic else None
    jinja, tool_jinja = files.file("chat_template.jinja"), files.file(TOOL_TEMPLATE)
    legacy = None
    if jinja is None and (config or {}).get("chat_template") is None:
        legacy = files.json("chat_template.json")
    template = ChatTemplate.find(jinja, config, variables, legacy=legacy, tool_jinja=tool_jinja)
    if template is None and "chat_template" in needs:
        raise CheckpointError(
            f"{files.path} has no chat template; put chat_template.jinja beside the model's "
            "config.json, or continue plain text with `osmium run --raw`."
        )
    defaults, repaired = sampling_defaults(files.json("generation_config.json"))
    notes = [f"generation_config.json: {'; '.join(repaired)}."] if repaired else []
    if demo:
        defaults = {**defaults, "temperature": 0.0}  # a model this small often errs when sampled
    if synthetic:
        defaults = {"max_tokens": SYNTHETIC_MAX_TOKENS, **defaults}
    if raw is None:
        return TextFiles(None, template, defaults, notes=tuple(notes))
    tokenizer = Tokenizer(raw, unknown_ids_as_text=synthetic, config=config)
    notes += tokenizer.notes
    ends = () if synthetic else _end_ids(tokenizer, (config or {}).get("eos_token"))
    return TextFiles(tokenizer, template, defaults, ends, tuple(notes))


def _end_ids(tokenizer: Tokenizer, eos_token: Any) -> tuple[int, ...]:
    """The ids of the end tokens that tokenizer_config.json names: one, or a list."""
    tokens = eos_token if isinstance(eos_token, list) else [eos_token]
    ids = (tokenizer.id_of(content) for token in tokens if (content := content_of(token)))
    return tuple(token_id for token_id in ids if token_id is not None)
