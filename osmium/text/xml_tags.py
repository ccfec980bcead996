"""The tags of calls in Qwen's XML, whole and damaged."""

from osmium.text.tags import skip_space, tag_at
from osmium.text.tool_schema import Tool

__all__ = [
    "CALL",
    "CALL_END",
    "CLOSERS",
    "FUNCTION",
    "FUNCTION_END",
    "OPENERS",
    "PARAMETER",
    "PARAMETER_END",
    "THINK_END",
    "body_start",
    "closer_end",
    "function_header",
    "opens_call",
    "parameter_header",
    "skip_openers",
]

CALL, CALL_END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter", "</parameter"
OPENERS = (CALL, FUNCTION)
THINK_END = "</think>"
CLOSERS = (PARAMETER_END + ">", FUNCTION_END, CALL_END)

MAX_REPEATS = 4
"""Tags <tool_call> that count as one."""

MAX_NAME = 256
"""Characters of a name of a function or parameter."""

MAX_CLOSER = 16
"""Characters between "</parameter" and its ">" in a damaged tag."""


def skip_openers(text: str, at: int, final: bool) -> tuple[int | None, bool]:
    """The position after <tool_call> and white space, and whether there was one.

    None if a longer text decides.  A repeated <tool_call> counts as one.
    """
    wrapped = False
    for _ in range(MAX_REPEATS):
        tag = tag_at(text, at, OPENERS, final)
        if tag is None:
            return None, wrapped
        if tag != CALL:
            break
        wrapped, at = True, skip_space(text, at + len(CALL))
        if at == len(text) and not final:
            return None, wrapped
    return at, wrapped


def function_header(text: str, at: int, final: bool) -> tuple[str, int] | bool:
    """The name in <function=NAME> and the position after it; False, or True if more text decides.

    Instead of ">", the line may end.
    """
    tag = tag_at(text, at, (FUNCTION,), final)
    if not tag:
        return tag is None
    start = at + len(FUNCTION)
    end = _line_or(">", text, start)
    if end is None:
        return not final and len(text) - start <= MAX_NAME
    name = _unquoted(text[start:end])
    if not name or any(c in "<>{}()[]\"'`,;= \t" for c in name) or not any(map(str.isalnum, name)):
        return False
    return name, end + 1


def body_start(text: str, at: int, final: bool) -> bool | None:
    """Whether a function's name is followed by what a body starts with; None if unknown yet."""
    after = skip_space(text, at)
    if after == len(text):
        return True if final else None
    if text[after] == "{":
        return True
    tag = tag_at(text, after, (PARAMETER, FUNCTION_END, CALL_END), final)
    return None if tag is None else bool(tag)


def opens_call(text: str, at: int, final: bool) -> bool | None:
    """Whether a call's opening tags are at `at`; None if a longer text decides."""
    start, wrapped = skip_openers(text, at, final)
    if start is None:
        return None
    if wrapped and text.startswith("{", start):
        return True
    header = function_header(text, start, final)
    if not isinstance(header, tuple):
        return None if header else False
    return body_start(text, header[1], final)


def _line_or(char: str, text: str, start: int) -> int | None:
    """The position of `char` or of the line's end within MAX_NAME characters, the first of both."""
    places = [text.find(one, start, start + MAX_NAME) for one in (char, "\n")]
    return min((place for place in places if place >= 0), default=None)


def _unquoted(name: str) -> str:
    return name.strip().strip("\"'").strip()


def parameter_header(text: str, at: int, final: bool, tool: Tool) -> tuple[str, int] | None:
    """The name in <parameter=NAME> and the position of what follows; None if unknown yet.

    The name is empty if there is none.  Of a damaged tag, as `<parameter=NAME: VALUE`, the value is
    what is behind the name.
    """
    start = at + len(PARAMETER)
    end = _line_or(">", text, start)
    if end is None and not final and len(text) - start < MAX_NAME:
        return None
    whole = end is not None and text[end] == ">"
    end = min(len(text), start + MAX_NAME) if end is None else end
    raw = text[start:end]
    offset = len(raw) - len(raw.lstrip())
    offset += len("name") if raw.startswith("name", offset) else 0
    if not raw.startswith("=", offset):
        return "", (end if whole or end == len(text) else start)
    name = _unquoted(raw[offset + 1 :])
    if whole:
        fits = name in tool.types or not any(c in "<:=" or c.isspace() for c in name)
        if fits:
            return name, end + 1
        if end + 1 == len(text) and not final:
            return None
        if text.startswith("\n", end + 1) and "<" not in name and name[-1:] not in (":", "="):
            return name, end + 1
    rest = raw[offset + 1 :].lstrip(" \"'")
    name = rest[: next((i for i, c in enumerate(rest) if not (c.isalnum() or c in "_.$-")), None)]
    value = rest[len(name) :].lstrip(" :=\"'")
    if not value and whole:
        end += 1
    return name, end - len(value)


def closer_end(text: str, at: int, final: bool) -> int | None:
    """The position after the </parameter> at `at`; -1 if it is another word, None if unknown yet.

    A damaged tag counts, as </parameter1> or one without its ">".
    """
    start = at + len(PARAMETER_END)
    for i in range(start, min(len(text), start + MAX_CLOSER)):
        if text[i] == ">":
            return i + 1
        if text[i] in "\r\n<":
            return i
        if text[i].isspace() or text[i] in "\"'`":
            return -1
    if len(text) >= start + MAX_CLOSER:
        return -1
    return len(text) if final else None
