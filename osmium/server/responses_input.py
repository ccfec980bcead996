"""The input of /v1/responses: items checked and completed, and messages of a chat made of them.

An item that a response returned is accepted as it is, so that clients may send conversations back.
"""

import base64
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from osmium.errors import RequestError
from osmium.server.limits import MAX_MESSAGES, check_count, shown
from osmium.server.responses_tools import OfferedTools, custom_arguments
from osmium.server.responses_types import LEFT_OUT, ROLES, TEXT_PARTS
from osmium.text.json_shape import MAX_VALUES, check_json_shape

__all__ = ["InputItems", "Item", "encrypted_reasoning", "messages_of", "new_id"]

Item = dict[str, Any]

_ENCRYPTED = "osmium-reasoning-1:"
"""Begins the encrypted_content that Osmium makes; the text follows in base64."""

_MEDIA_PARTS = ("input_image", "input_file", "input_audio", "image_url", "computer_screenshot")


def new_id(prefix: str) -> str:
    """A new id, as `msg_...`."""
    return f"{prefix}_{secrets.token_hex(16)}"


def encrypted_reasoning(text: str) -> str:
    """The encrypted_content of a reasoning: clients send it back without a look at it."""
    return _ENCRYPTED + base64.urlsafe_b64encode(text.encode(errors="replace")).decode()


def _decrypted(given: Any) -> str | None:
    """The reasoning of an encrypted_content; None for one that Osmium has not made."""
    if not isinstance(given, str) or not given.startswith(_ENCRYPTED):
        return None
    try:
        return base64.b64decode(given.removeprefix(_ENCRYPTED), b"-_", validate=True).decode()
    except ValueError:
        return None


class InputItems:
    """The items of a request's input, with ids.

    Raises: RequestError that names the path of a wrong or unsupported item.
    """

    def __init__(
        self,
        given: str | Sequence[Mapping[str, Any]],
        context: Sequence[Item] = (),
        find: Callable[[str], Item | None] = lambda item_id: None,
    ) -> None:
        """`context` are the items before these, and `find` returns a stored item by its id."""
        self.items: list[Item] = []
        self.ignored: list[str] = []
        self._find = find
        self._call_ids = {item["call_id"] for item in context if _is_call(item)}
        if isinstance(given, str):
            part = {"type": "input_text", "text": given}
            self.items = [{"type": "message", "id": new_id("msg"), "role": "user",
                           "content": [part], "status": "completed"}]  # fmt: skip
            return
        check_count("input", len(given), MAX_MESSAGES)
        for i, item in enumerate(given):
            one = self._item(item, f"input[{i}]")
            if one is None:
                continue
            if _is_call(one):
                self._call_ids.add(one["call_id"])
            self.items.append(one)
        self.ignored = list(dict.fromkeys(self.ignored))

    def _item(self, item: Mapping[str, Any], path: str) -> Item | None:
        kind = item.get("type")
        if kind is None:
            kind = "message" if "role" in item else "item_reference" if "id" in item else None
        match kind:
            case "message":
                return self._message(item, path)
            case "function_call" | "custom_tool_call":
                return _call(item, path, kind)
            case "function_call_output" | "custom_tool_call_output":
                return self._output(item, path, kind)
            case "reasoning":
                return self._reasoning(item, path)
            case "item_reference":
                return self._reference(item, path)
        if kind in LEFT_OUT:
            self.ignored.append(f"input.{kind}")
            return None
        known = ("message", "reasoning", "function_call", "function_call_output",
                 "custom_tool_call", "custom_tool_call_output", "item_reference")  # fmt: skip
        raise RequestError(
            f"{path}.type is {shown(kind)}, which is not supported: use {', '.join(known)}.",
            param=f"{path}.type",
            code="unsupported_value",
        )

    def _message(self, item: Mapping[str, Any], path: str) -> Item:
        role = item.get("role")
        if role not in ROLES:
            hint = " Send a tool's result as function_call_output." if role == "tool" else ""
            raise _invalid(f"{path}.role", role, f"one of {', '.join(ROLES)}.{hint}")
        content = _parts(item.get("content"), f"{path}.content", assistant=role == "assistant")
        status = item.get("status")
        return {
            "type": "message", "id": _id(item, "msg"), "role": role, "content": content,
            "status": status if status in ("in_progress", "incomplete") else "completed",
        }  # fmt: skip

    def _output(self, item: Mapping[str, Any], path: str, kind: str) -> Item:
        call_id = _text(item, "call_id", path)
        if call_id not in self._call_ids:
            raise RequestError(
                f"{path}.call_id is {shown(call_id)}, but no call before it has this id. Send the "
                "call's item too, or name its response in previous_response_id.",
                param=f"{path}.call_id",
                code="call_not_found",
            )
        output = item.get("output")
        if isinstance(output, list):
            output = _parts(output, f"{path}.output")
        elif not isinstance(output, str):
            raise _invalid(f"{path}.output", output, "a text, or a list of input_text parts.")
        return {
            "type": kind, "id": _id(item, "fco"), "call_id": call_id, "output": output,
            "status": "completed",
        }  # fmt: skip

    def _reasoning(self, item: Mapping[str, Any], path: str) -> Item:
        """A reasoning with its text as content, whatever form it comes in."""
        texts = {}
        for name, part_type in (("content", "reasoning_text"), ("summary", "summary_text")):
            given = item.get(name)
            if not isinstance(given, str | list | None):
                raise _invalid(f"{path}.{name}", given, f"a list of {part_type} parts.")
            parts = _parts(given or [], f"{path}.{name}")
            texts[name] = [{"type": part_type, "text": part["text"]} for part in parts]
        encrypted = item.get("encrypted_content")
        text = _decrypted(encrypted)
        if text is not None and not texts["content"]:
            texts["content"] = [{"type": "reasoning_text", "text": text}]
        elif encrypted and text is None and not texts["content"]:
            self.ignored.append("input.encrypted_content")  # another server's
        return {"type": "reasoning", "id": _id(item, "rs"), **texts}

    def _reference(self, item: Mapping[str, Any], path: str) -> Item:
        item_id = _text(item, "id", path)
        found = self._find(item_id)
        if found is None:
            raise RequestError(
                f"{path}.id is {shown(item_id)}; no item with this id is kept. Items of responses "
                "with `store` false, and of the oldest ones, are not. Send the item itself.",
                param=f"{path}.id",
                code="item_not_found",
                status=404,
            )
        return found


def _is_call(item: Mapping[str, Any]) -> bool:
    return item["type"] in ("function_call", "custom_tool_call")


def _call(item: Mapping[str, Any], path: str, kind: str) -> Item:
    prefix, name = ("fc", "arguments") if kind == "function_call" else ("ctc", "input")
    arguments = item.get(name)
    if isinstance(arguments, Mapping) and kind == "function_call":
        arguments = json.dumps(arguments, ensure_ascii=False)
    else:
        arguments = _text(item, name, path, empty=True)
    if kind == "function_call":
        check_json_shape(arguments.encode(errors="replace"), MAX_VALUES, name=f"{path}.arguments")
    namespace = item.get("namespace")
    if not isinstance(namespace, str | None):
        raise _invalid(f"{path}.namespace", namespace, "a text.")
    return {
        "type": kind, "id": _id(item, prefix), "call_id": _text(item, "call_id", path),
        "name": _text(item, "name", path), name: arguments,
        **({"namespace": namespace} if namespace else {}), "status": "completed",
    }  # fmt: skip


def _parts(content: Any, path: str, assistant: bool = False) -> list[dict[str, Any]]:
    """Parts of text, each with the type of its place.  Raises: RequestError."""
    if isinstance(content, str):
        content = [{"type": "input_text", "text": content}]
    if not isinstance(content, list):
        raise _invalid(path, content, "a text or a list of parts.")
    parts: list[dict[str, Any]] = []
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind in _MEDIA_PARTS:
            raise RequestError(
                f"{path}[{j}].type is {shown(kind)}; the served model takes text alone. Send it as "
                "input_text, or leave it out.",
                param=f"{path}[{j}]",
                code="unsupported_content",
            )
        if kind == "refusal" and isinstance(refusal := part.get("refusal"), str):
            parts.append({"type": "refusal", "refusal": refusal} if assistant
                         else {"type": "input_text", "text": refusal})  # fmt: skip
        elif kind in TEXT_PARTS and isinstance(text, str):
            parts.append({"type": "output_text", "text": text, "annotations": []} if assistant
                         else {"type": "input_text", "text": text})  # fmt: skip
        else:
            raise _invalid(f"{path}[{j}]", part, "a part of type input_text with a `text`.")
    return parts


def _text(item: Mapping[str, Any], name: str, path: str, empty: bool = False) -> str:
    value = item.get(name)
    if not isinstance(value, str) or not (empty or value.strip()):
        raise _invalid(f"{path}.{name}", value, "a text." if empty else "a text that is not empty.")
    return value


def _id(item: Mapping[str, Any], prefix: str) -> str:
    given = item.get("id")
    return given if isinstance(given, str) and given else new_id(prefix)


def _invalid(path: str, value: object, rule: str) -> RequestError:
    return RequestError(
        f"{path} is {shown(value)}; it must be {rule}", param=path, code="invalid_value"
    )


# -- messages --------------------------------------------------------------------------------------


def messages_of(
    items: Sequence[Item], instructions: str | None, tools: OfferedTools
) -> list[dict[str, Any]]:
    """The messages of a chat.  Reasoning, text and calls of one turn are one message."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        match item["type"]:
            case "reasoning":
                _add_reasoning(messages, item)
            case "message" if item["role"] == "assistant":
                last = _turn(messages, ("content", "tool_calls"))
                last["content"] = _joined(item["content"])
            case "message":
                messages.append({"role": item["role"], "content": _joined(item["content"])})
            case "function_call" | "custom_tool_call":
                last = _turn(messages, ())
                last.setdefault("tool_calls", []).append(_tool_call(item, tools))
            case _:
                output = item["output"]
                text = output if isinstance(output, str) else _joined(output)
                messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": text})
    return messages


def _turn(messages: list[dict[str, Any]], before: Sequence[str]) -> dict[str, Any]:
    """The assistant's message to add to: the last one, unless it has one of these keys."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or any(key in last for key in before):
        last = {"role": "assistant"}
        messages.append(last)
    return last


def _add_reasoning(messages: list[dict[str, Any]], item: Item) -> None:
    parts = item.get("content") or item.get("summary") or []
    text = "\n".join(part["text"] for part in parts)
    if text:
        last = _turn(messages, ("content", "tool_calls"))
        before = last.get("reasoning_content")
        last["reasoning_content"] = f"{before}\n{text}" if before else text


def _joined(parts: Sequence[Mapping[str, Any]]) -> str:
    return "".join(part["refusal"] if part["type"] == "refusal" else part["text"] for part in parts)


def _tool_call(item: Item, tools: OfferedTools) -> dict[str, Any]:
    custom = item["type"] == "custom_tool_call"
    arguments = custom_arguments(item["input"]) if custom else item["arguments"]
    name = tools.prompt_name(item["name"], item.get("namespace"))
    function = {"name": name, "arguments": arguments}
    return {"id": item["call_id"], "type": "function", "function": function}
