"""Finds a model's chat template among its files, as transformers does.

chat_template.jinja comes first, then `chat_template` of tokenizer_config.json, then
chat_template.json, which older processors wrote.  The latter two hold one text, or named ones: the
template `tool_use` is for requests with tools, `default` for the others.
"""

from collections.abc import Mapping
from typing import Any

from osmium.errors import CheckpointError

__all__ = ["TEMPLATE_FILES", "TOOL_TEMPLATE", "template_sources"]

TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
"""The template for requests with tools, beside chat_template.jinja."""

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", TOOL_TEMPLATE)

MAX_TEMPLATE = 256 << 10
"""Longest template, characters; the demo's has 3,546."""


def template_sources(
    jinja: bytes | None,
    config: Mapping[str, Any],
    legacy: Mapping[str, Any] | None = None,
    tool_jinja: bytes | None = None,
) -> tuple[str, str | None] | None:
    """The template, and the one for requests with tools if there is one; None without a template.

    `legacy` is chat_template.json, `tool_jinja` the file TOOL_TEMPLATE.  Raises: CheckpointError.
    """
    if jinja is not None:
        tools = None if tool_jinja is None else _decoded(tool_jinja, TOOL_TEMPLATE)
        return _decoded(jinja, "chat_template.jinja"), tools
    for file, holder in (("tokenizer_config.json", config), ("chat_template.json", legacy or {})):
        found = holder.get("chat_template")
        if found is not None:
            return _named(found, file)
    return None


def _decoded(raw: bytes, file: str) -> str:
    try:
        return _checked(raw.decode(), file)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8: {error}.") from None


def _named(found: Any, file: str) -> tuple[str, str | None]:
    """The templates of `chat_template`: a text, a list of objects with names, or an object."""
    if isinstance(found, str):
        return _checked(found, file), None
    named: dict[Any, Any] = {}
    if isinstance(found, Mapping):
        named = dict(found)
    elif isinstance(found, list):
        items = [item for item in found if isinstance(item, Mapping)]
        named = {str(item.get("name")): item.get("template") for item in items}
    default, tools = named.get("default"), named.get("tool_use")
    if not isinstance(default, str):
        raise CheckpointError(
            f"chat_template in {file} is neither a text nor a list with a template named default."
        )
    return _checked(default, file), _checked(tools, file) if isinstance(tools, str) else None


def _checked(source: str, file: str) -> str:
    if len(source) > MAX_TEMPLATE:
        raise CheckpointError(
            f"The chat template in {file} has {len(source)} characters; at most {MAX_TEMPLATE} are "
            "supported."
        )
    return source
