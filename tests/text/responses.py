"""Runs of the response parser: collected results, and seeded random responses."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from osmium.text.response_parser import (
    ContentDelta,
    Delta,
    ReasoningDelta,
    ResponseParser,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from osmium.text.tool_formats import ToolFormat
from osmium.text.tool_formats.hermes import FORMAT as HERMES
from osmium.text.tool_formats.qwen_xml import FORMAT as XML

__all__ = [
    "HERMES",
    "PIECES",
    "TOOLS",
    "XML",
    "Result",
    "check_response",
    "collect",
    "fuzz",
    "parse",
    "random_calls",
    "splits",
    "tool",
    "write_hermes",
    "write_xml",
]


def tool(name: str, **properties: Any) -> dict[str, Any]:
    """A tool as OpenAI's requests have it."""
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    tool(
        "write",
        path={"type": "string"},
        content={"type": "string"},
        mode={"enum": ["new", "append"]},
        size={"type": "integer"},
        ratio={"type": "number"},
        force={"type": "boolean"},
        edits={"type": "array", "items": {"type": "object"}},
        options={"type": "object"},
        note={"anyOf": [{"type": "string"}, {"type": "null"}]},
        limit={"type": ["integer", "null"]},
        any={},
    ),
    tool("list"),
]


@dataclass
class Result:
    """The deltas of a response, joined."""

    reasoning: str = ""
    content: str = ""
    names: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    """JSON text per call."""
    complete: list[bool] = field(default_factory=list)

    @property
    def calls(self) -> list[tuple[str, Any]]:
        """Name and arguments of each call.  Raises: ValueError for JSON that is not valid."""
        return list(zip(self.names, map(strict_json, self.arguments), strict=True))


def strict_json(text: str) -> Any:
    """The value of JSON without a key twice, NaN or a depth that Python cannot read."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return dict(pairs)

    def refuse(name: str) -> Any:
        raise ValueError(name)

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def collect(deltas: Sequence[Delta]) -> Result:
    """Join deltas; checks the order of a call's deltas."""
    result = Result()
    for delta in deltas:
        match delta:
            case ReasoningDelta(text):
                assert text, "an empty delta"
                result.reasoning += text
            case ContentDelta(text):
                assert text, "an empty delta"
                result.content += text
            case ToolCallStart(index, _, name):
                assert index == len(result.names) == len(result.complete)
                result.names.append(name)
                result.arguments.append("")
            case ToolCallArguments(index, fragment):
                assert index == len(result.names) - 1 == len(result.complete) and fragment
                result.arguments[index] += fragment
            case ToolCallEnd(index, complete):
                assert index == len(result.names) - 1 == len(result.complete)
                result.complete.append(complete)
    assert len(result.complete) == len(result.names), "a call without its end"
    return result


def parse(
    pieces: str | Sequence[str],
    *,
    form: ToolFormat | None = XML,
    tools: Sequence[Any] | None = TOOLS,
    reasoning: bool = False,
) -> Result:
    """Parse a response that arrives in pieces."""
    parser = ResponseParser(form, tools, reasoning)
    deltas: list[Delta] = []
    for piece in [pieces] if isinstance(pieces, str) else pieces:
        deltas += parser.push(piece)
    result = collect(deltas + parser.finish())
    assert parser.num_calls == len(result.names)
    return result


def splits(text: str, random_: random.Random, count: int) -> Iterator[list[str]]:
    """The text in single characters, and in pieces of random lengths."""
    yield list(text)
    for _ in range(count):
        most = random_.choice((2, 5, 20, 80))
        pieces, at = [], 0
        while at < len(text):
            size = random_.randint(1, most)
            pieces.append(text[at : at + size])
            at += size
        yield pieces


# -- random responses ------------------------------------------------------------------------------

PIECES = (
    "<tool_call>", "</tool_call>", "<function=write>", "<function=list>", "<function=other>",
    "</function>", "<parameter=path>", "<parameter=content>", "<parameter=size>",
    "<parameter=edits>", "<parameter=note>", "<parameter=zzz>", "</parameter>", "<parameter=",
    "<parameter=path: x", "</parameter1>", "<parameter name=\"path\">", "<think>", "</think>",
    "<tool_response>", "\n", "\n\n", "\r\n", " ", "\t", "  \n", "`", "```", "```xml\n", "\n```\n",
    "text", "a < b", "<", "</", "<t", "{", "}", "[", "]", '"', "'", ",", ":", "\\", '\\"', "\\u12",
    "\\n", "null", "true", "None", "1", "-2.5", "1e3", "NaN", "é", "漢字", "😀", "\x00",
    '{"name": "write", "arguments": {"path": "x"}}', '{"name": ', '"arguments": ', '"write"',
    '{"arguments": {"a": [1, {}]}, "name": "list"}', '{"path": "a", "size": 3}', "[1, 2, ",
    "{'a': True}", "\n<tool_call>\n<function=write>\n<parameter=path>\n",
    "\n</parameter>\n</function>\n</tool_call>", "\n</parameter>\n<parameter=content>\n",
    "\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=list>\n</function>\n",
    "<tool_call>\n{", "}\n</tool_call>", "<tool_call>\n<function=write>\n{",
    "return '</parameter>'",
)  # fmt: skip


def random_response(random_: random.Random) -> str:
    """Tags, text and JSON in any order."""
    return "".join(random_.choice(PIECES) for _ in range(random_.randint(1, 30)))


def check_response(random_: random.Random) -> str:
    """Parse a random response whole and in pieces: equal results, and valid arguments."""
    text = random_response(random_)
    options: dict[str, Any] = {
        "form": random_.choice((XML, XML, HERMES)),
        "tools": random_.choice((TOOLS, TOOLS, TOOLS, None)),
        "reasoning": random_.random() < 0.4,
    }
    try:
        whole = parse(text, **options)
        for _, arguments in whole.calls:
            assert isinstance(arguments, dict), "arguments are an object"
        for pieces in splits(text, random_, 1):
            assert parse(pieces, **options) == whole, pieces
        if options["tools"] is None:
            assert not whole.names
    except Exception as error:
        error.add_note(f"{options}: {text!r}")
        raise
    return "calls" if whole.names else "text"


def fuzz(seed: int, cases: int) -> None:
    """`check_response` for random responses."""
    for case in range(cases):
        try:
            check_response(random.Random(f"{seed} {case}"))
        except Exception as error:
            error.add_note(f"seed {seed}, case {case}")
            raise


# -- well-formed calls -----------------------------------------------------------------------------

WORDS = (
    "x", "text ", "\n", "\n\n", " ", "<", "</", "</parameter>;", "</parameter>\nfoo",
    "</function>;", "<tool_call>", "</tool_call> on", "`", "```\n", '"', "\\", "{", "[1]",
    "<parameter=zzz>", "é😀", "\t", "'", "return '</parameter>'\n", "</think>", "null", "5", "\r\n",
)  # fmt: skip


def random_calls(random_: random.Random) -> list[tuple[str, dict[str, Any]]]:
    """Calls of TOOLS with values of their types."""

    def text() -> str:
        return "".join(random_.choice(WORDS) for _ in range(random_.randint(0, 12)))

    def value(kind: str) -> Any:
        match kind:
            case "size":
                return random_.randint(-(10**12), 10**12)
            case "limit":
                return random_.choice((None, 7))
            case "ratio":
                return random_.choice((0.5, -1e-9, 3, 1e300))
            case "force":
                return random_.random() < 0.5
            case "edits":
                return [{"old": text(), "new": text()} for _ in range(random_.randint(0, 3))]
            case "options":
                return {text(): random_.choice((text(), None, 1, [True], {})) for _ in range(2)}
            case "mode":
                return random_.choice(("new", "append"))
            case _:
                return text()

    kinds = ("path", "content", "mode", "size", "ratio", "force", "edits", "options", "limit")
    calls = []
    for _ in range(random_.randint(1, 3)):
        keys = random_.sample(kinds, random_.randint(0, len(kinds)))
        calls.append(("write", {key: value(key) for key in keys}))
    return calls


def write_xml(calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Calls as the template of Qwen3.5 writes them."""
    blocks = []
    for name, arguments in calls:
        lines = [f"<tool_call>\n<function={name}>\n"]
        for key, value in arguments.items():
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines.append(f"<parameter={key}>\n{shown}\n</parameter>\n")
        blocks.append("".join(lines) + "</function>\n</tool_call>")
    return "\n".join(blocks)


def write_hermes(calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Calls as the template of Qwen3 writes them."""
    objects = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return "\n".join(
        f"<tool_call>\n{json.dumps(one, ensure_ascii=False)}\n</tool_call>" for one in objects
    )
