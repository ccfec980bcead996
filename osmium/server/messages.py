"""The shape of a chat's messages: a malformed one is refused by its path.

No part of a message vanishes.  What the model cannot read is refused by its name.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from osmium.errors import RequestError
from osmium.server.field_types import REASONING, ROLES
from osmium.server.limits import MAX_MESSAGES, check_count, shown
from osmium.text.json_shape import MAX_VALUES, check_json_shape

__all__ = ["check_messages"]

_ONLY_TEXT = "this model supports only text"
UNSUPPORTED = {
    "images": _ONLY_TEXT, "audio": _ONLY_TEXT, "videos": _ONLY_TEXT, "files": _ONLY_TEXT,
    "attachments": _ONLY_TEXT, "function_call": "use tool_calls",
    "prefix": "use continue_final_message", "partial": "use continue_final_message",
}  # fmt: skip
"""Keys of other APIs that would change the prompt, and what to do instead.

Null, false and empty values ask for nothing.
"""


def check_messages(messages: Sequence[dict[str, Any]]) -> None:
    """Raises: RequestError with the path of what is wrong."""
    check_count("messages", len(messages), MAX_MESSAGES)
    for i, message in enumerate(messages):
        path = f"messages[{i}]"
        if message.get("role") not in ROLES:
            raise _invalid(f"{path}.role", message.get("role"), f"one of {', '.join(ROLES)}")
        for key in (*REASONING, "refusal"):
            value = message.get(key)
            if not isinstance(value, str | None):
                raise _invalid(f"{path}.{key}", value, "a text, or absent", "invalid_type")
        for key in UNSUPPORTED.keys() & message.keys():
            if message[key]:
                raise RequestError(
                    f"{path}.{key} is {shown(message[key])}, which is not supported: "
                    f"{UNSUPPORTED[key]}.",
                    param=f"{path}.{key}",
                    code="unsupported_value",
                )
    _check_arguments(messages)
    if not messages:
        raise RequestError(
            "messages is empty; send at least one.", param="messages", code="invalid_value"
        )


def _check_arguments(messages: Sequence[dict[str, Any]]) -> None:
    """Check the shape of JSON in texts: the chat template gets the arguments of calls decoded.

    Raises: RequestError.
    """
    left = MAX_VALUES
    for i, message in enumerate(messages):
        calls = message.get("tool_calls")
        if not isinstance(calls, list | None):
            raise _invalid(f"messages[{i}].tool_calls", calls, "a list", "invalid_type")
        for j, call in enumerate(calls or ()):
            function = call.get("function", call) if isinstance(call, dict) else None
            text = function.get("arguments") if isinstance(function, dict) else None
            name = f"messages[{i}].tool_calls[{j}].function.arguments"
            while isinstance(text, str):
                left -= check_json_shape(text.encode(errors="replace"), left, name=name)
                text = _inner_text(text)


def _inner_text(text: str) -> str | None:
    """The text that the JSON of a text stands for; None for other JSON."""
    if not text.lstrip().startswith('"'):
        return None
    try:
        return msgspec.json.decode(text, type=str)
    except (msgspec.DecodeError, UnicodeEncodeError):
        return None


def _invalid(path: str, value: object, rule: str, code: str = "invalid_value") -> RequestError:
    return RequestError(f"{path} is {shown(value)}; it must be {rule}.", param=path, code=code)
