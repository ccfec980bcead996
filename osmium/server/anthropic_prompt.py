"""Anthropic's system and messages as the messages of a chat.

A user turn's tool results become messages of the role `tool`; its texts around them keep their
order.  An assistant's thinking becomes `reasoning_content`.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from osmium.errors import RequestError
from osmium.server.anthropic_signature import signed_thinking
from osmium.server.limits import shown

__all__ = ["chat_messages", "invalid"]

Message = dict[str, Any]

BILLING_HEADER = "x-anthropic-billing-header:"
"""Claude Code's first line of a system prompt.  It changes between conversations, so that the
same prompt would not be found in a cache."""


def chat_messages(
    system: str | Sequence[Any] | None, messages: Sequence[Mapping[str, Any]]
) -> list[Message]:
    """The messages of a chat.  Raises: RequestError that names the path of a wrong block."""
    if not messages:
        raise invalid("messages", [], "a list with at least one message")
    found: list[Message] = []
    text = _system_text(system, "system") if system else ""
    if text:
        found.append({"role": "system", "content": text})
    names: dict[str, str] = {}
    """Names of tools by the ids of their calls."""
    for i, message in enumerate(messages):
        role, content, path = message.get("role"), message.get("content"), f"messages[{i}]"
        if role == "system":
            text = _system_text(content, f"{path}.content")
            found += [{"role": "system", "content": text}] if text else []
        elif role == "user":
            found += _user_messages(content, f"{path}.content", names)
        elif role == "assistant":
            found.append(_assistant_message(content, f"{path}.content", names))
        else:
            raise invalid(f"{path}.role", role, "'user', 'assistant' or 'system'")
    found = found or [{"role": "user", "content": ""}]
    if found[-1].get("tool_calls"):
        raise RequestError(
            f"messages[{len(messages) - 1}] is the last message and has tool_use blocks; a call "
            "is followed by its tool_result in a user message.",
            param=f"messages[{len(messages) - 1}].content",
            code="invalid_value",
        )
    return found


def _system_text(content: object, path: str) -> str:
    """The text of a system prompt, without Claude Code's billing header."""
    if isinstance(content, str):
        head, _, rest = content.partition("\n")
        return rest.lstrip("\n") if head.startswith(BILLING_HEADER) else content
    texts = [_text(block, f"{path}[{j}]") for j, block in enumerate(_blocks(content, path))]
    return "\n\n".join(text for text in texts if text and not text.startswith(BILLING_HEADER))


def _user_messages(content: object, path: str, names: Mapping[str, str]) -> list[Message]:
    """Messages of the roles user and tool, in the order of the blocks."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    found: list[Message] = []
    for is_result, group in groupby(enumerate(_blocks(content, path)), _is_result):
        if is_result:
            found += [_tool_message(block, f"{path}[{j}]", names) for j, block in group]
        else:
            text = "".join(_text(block, f"{path}[{j}]") for j, block in group)
            found.append({"role": "user", "content": text})
    return found or [{"role": "user", "content": ""}]


def _is_result(item: tuple[int, Mapping[str, Any]]) -> bool:
    return bool(item[1]["type"] == "tool_result")


def _tool_message(block: Mapping[str, Any], path: str, names: Mapping[str, str]) -> Message:
    """A tool's result; that of a failed call says so."""
    name = block.get("tool_use_id")
    if not isinstance(name, str):
        raise invalid(f"{path}.tool_use_id", name, "the id of a tool_use block")
    failed = block.get("is_error")
    if not isinstance(failed, bool | None):
        raise invalid(f"{path}.is_error", failed, "true or false")
    content, where = block.get("content"), f"{path}.content"
    if content is None or isinstance(content, str):
        text = content or ""
    else:
        parts = [_text(part, f"{where}[{j}]") for j, part in enumerate(_blocks(content, where))]
        text = "\n".join(parts)
    if failed and not text.lstrip("<").lower().startswith(("error", "tool_use_error")):
        text = f"Error: {text}" if text else "Error"
    message = {"role": "tool", "tool_call_id": name, "content": text}
    return {**message, "name": names[name]} if name in names else message


def _assistant_message(content: object, path: str, names: dict[str, str]) -> Message:
    """One message with the reasoning, the text and the calls of an assistant's blocks."""
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for j, block in enumerate(_blocks(content, path)):
        where = f"{path}[{j}]"
        match block["type"]:
            case "thinking":
                thinking = block.get("thinking")
                if not isinstance(thinking, str):
                    raise invalid(f"{where}.thinking", thinking, "a text")
                signature = block.get("signature")
                if not isinstance(signature, str | None):
                    raise invalid(f"{where}.signature", signature, "a text")
                reasoning.append(thinking or signed_thinking(signature))
            case "redacted_thinking":
                pass  # encrypted by another server
            case "tool_use":
                calls.append(_call(block, where))
                names[calls[-1]["id"]] = calls[-1]["function"]["name"]
            case _:
                texts.append(_text(block, where))
    message: Message = {"role": "assistant", "content": "".join(texts)}
    if any(reasoning):
        message["reasoning_content"] = "\n\n".join(filter(None, reasoning))
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: Mapping[str, Any], path: str) -> dict[str, Any]:
    for key in ("id", "name"):
        if not isinstance(block.get(key), str) or not block[key]:
            raise invalid(f"{path}.{key}", block.get(key), "a text that is not empty")
    arguments = block.get("input")
    if not isinstance(arguments, Mapping | None):
        raise invalid(f"{path}.input", arguments, "an object")
    function = {"name": block["name"], "arguments": dict(arguments or {})}
    return {"id": block["id"], "type": "function", "function": function}


def _blocks(content: object, path: str) -> list[dict[str, Any]]:
    """The blocks of a content, each an object with a type.  Raises: RequestError."""
    if not isinstance(content, list):
        raise invalid(path, content, "a text or a list of content blocks")
    for j, block in enumerate(content):
        if not isinstance(block, dict):
            raise invalid(f"{path}[{j}]", block, "a content block, which is an object")
        if not isinstance(block.get("type"), str):
            raise invalid(f"{path}[{j}].type", block.get("type"), "a text, such as 'text'")
    return content


def _text(block: Mapping[str, Any], path: str) -> str:
    """The text of a block, or of a document of plain text.  Raises: RequestError for others."""
    kind = block["type"]
    if kind == "text":
        text = block.get("text")
        if not isinstance(text, str):
            raise invalid(f"{path}.text", text, "a text")
        return text
    source = block.get("source") if kind == "document" else None
    if isinstance(source, Mapping):
        text = _document(source, f"{path}.source")
        if text is not None:
            heads = [block.get(key) for key in ("title", "context")]
            return "\n".join([*(head for head in heads if isinstance(head, str) and head), text])
    raise RequestError(
        f"{path} has the type {shown(kind)}, which is not supported here: the served model takes "
        "text, tool_use in assistant messages and tool_result in user messages.",
        param=path,
        code="unsupported_content",
    )


def _document(source: Mapping[str, Any], path: str) -> str | None:
    """The plain text of a document; None for other media."""
    if source.get("type") == "text" and isinstance(source.get("data"), str):
        return str(source["data"])
    if source.get("type") != "content":
        return None
    content = source.get("content")
    if isinstance(content, str):
        return content
    path = f"{path}.content"
    return "\n".join(_text(part, f"{path}[{j}]") for j, part in enumerate(_blocks(content, path)))


def invalid(path: str, value: object, rule: str) -> RequestError:
    """The error of a wrong value at a path."""
    found = "missing" if value is None else shown(value)
    return RequestError(f"{path} is {found}; it must be {rule}.", param=path, code="invalid_value")
