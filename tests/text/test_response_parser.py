"""Responses split into reasoning, answer and calls: one test per fault that a parser can have."""

import json
import random
from typing import Any

import pytest

from osmium.text.response_parser import (
    ResponseParser,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from tests.text.responses import (
    HERMES,
    TOOLS,
    XML,
    Result,
    collect,
    fuzz,
    parse,
    random_calls,
    splits,
    tool,
    write_hermes,
    write_xml,
)

HEAD = "<tool_call>\n<function=write>\n"
END = "\n</parameter>\n</function>\n</tool_call>"
CALL = HEAD + "<parameter=path>\na.txt" + END
WRITTEN = ("write", {"path": "a.txt"})
LIST = "<tool_call>\n<function=list>\n</function>\n</tool_call>"


def both(text: str, **options: Any) -> Result:
    """The result of a response, which every split gives."""
    whole = parse(text, **options)
    for pieces in splits(text, random.Random(1), 3):
        assert parse(pieces, **options) == whole
    return whole


def value(text: str, key: str = "content", **options: Any) -> Any:
    """A parameter's value, written as the template writes it."""
    result = both(f"{HEAD}<parameter={key}>\n{text}{END}", **options)
    assert len(result.calls) == 1 and result.complete == [True] and result.content == ""
    return result.calls[0][1][key]


# -- reasoning and answer --------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, XML, HERMES])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("so it is\n</think>\n\nParis.", "so it is", "Paris."),
        ("</think>Paris.", "", "Paris."),
        ("\nline\n\nline\n</think>\n\nA\n\nB\n", "line\n\nline", "A\n\nB\n"),
        ("a < b </thin </think>x", "a < b </thin ", "x"),
        ("never ends", "never ends", ""),
        ("ends in </thi", "ends in </thi", ""),
        ("a</think>b</think>c", "a", "b</think>c"),
        ("a\n</think>\n</think>\nb", "a", "b"),
        ("<think>\na</think>b", "a", "b"),
        ("the tag `</think>` ends it\n</think>\nb", "the tag `</think>` ends it", "b"),
        ('the tag "</think>" ends it</think>b', 'the tag "</think>" ends it', "b"),
        ("it is `</think>b", "it is `", "b"),
    ],
)
def test_a_response_that_starts_in_reasoning(
    form: Any, tools: Any, text: str, reasoning: str, content: str
) -> None:
    assert both(text, form=form, tools=tools, reasoning=True) == Result(reasoning, content)


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("\n    return x", "", "\n    return x"),
        ("plain\n\n", "", "plain\n\n"),
        ("a </think> b <think> c", "", "a </think> b <think> c"),
        ("<think>\nhm\n</think>\n\nParis.", "hm", "Paris."),
        ("\n<think>hm</think>Paris.", "hm", "Paris."),
        ("</think>\n\nParis.", "", "Paris."),
        ("<thi", "", "<thi"),
        ("", "", ""),
        ("\n\n", "", "\n\n"),
    ],
)
def test_a_response_that_starts_in_the_answer(
    tools: Any, text: str, reasoning: str, content: str
) -> None:
    result = both(text, tools=tools)
    assert (result.reasoning, result.content) == (reasoning, content)


def test_text_is_returned_as_it_arrives() -> None:
    parser = ResponseParser(XML, TOOLS, True)
    assert collect(parser.push("one two")).reasoning == "one two"
    assert collect(parser.push("</think>three")).content == "three"
    assert collect(parser.push(" four < five")).content == " four < five"


# -- calls -----------------------------------------------------------------------------------------


def test_reasoning_text_and_two_calls_are_told_apart() -> None:
    result = both(f"hm\n</think>\n\nLet me look.\n\n{CALL}\n{LIST}", reasoning=True)
    assert (result.reasoning, result.content) == ("hm", "Let me look.")
    assert result.calls == [WRITTEN, ("list", {})]
    assert result.complete == [True, True]


def test_text_between_and_after_calls_is_content() -> None:
    result = both(f"One.\n{CALL}\nTwo.\n\n{LIST}\n\nThree.\n")
    assert result.content == "One.\nTwo.\n\nThree.\n"
    assert result.calls == [WRITTEN, ("list", {})]


def test_calls_alone_leave_no_content() -> None:
    assert both(f"\n\n{CALL}\n{LIST}\n").content == ""


@pytest.mark.parametrize("tools", [None, [], [{"type": "web_search"}], ["x"]])
@pytest.mark.parametrize("form", [XML, HERMES])
def test_without_offered_tools_calls_are_text(tools: Any, form: Any) -> None:
    text = f"See\n{CALL}\n{write_hermes([WRITTEN])}"
    assert both(text, tools=tools, form=form) == Result(content=text)


def test_without_a_format_calls_are_text() -> None:
    assert both(CALL, form=None) == Result(content=CALL)


@pytest.mark.parametrize(
    "entry",
    [
        {
            "type": "function",
            "name": "write",
            "parameters": {"properties": {"size": {"type": "integer"}}},
        },
        {"name": "write", "input_schema": {"properties": {"size": {"type": "integer"}}}},
    ],
)
def test_tools_may_be_written_as_responses_and_messages_write_them(entry: Any) -> None:
    assert value("3", "size", tools=[entry]) == 3


def test_ids_differ_and_indexes_count() -> None:
    parser = ResponseParser(XML, TOOLS, False)
    starts = [d for d in parser.push(CALL + LIST) + parser.finish() if isinstance(d, ToolCallStart)]
    assert len({start.id for start in starts}) == 2
    assert [start.index for start in starts] == [0, 1]
    assert all(start.id.startswith("call_") for start in starts)


# -- streaming -------------------------------------------------------------------------------------


def arguments_of(parser: ResponseParser, text: str) -> str:
    return "".join(d.fragment for d in parser.push(text) if isinstance(d, ToolCallArguments))


def test_the_name_comes_first_and_a_string_streams() -> None:
    parser = ResponseParser(XML, TOOLS, False)
    assert collect(
        [*parser.push("<tool_call>\n<function=write>\n<parameter="), ToolCallEnd(0, True)]
    ).names == ["write"]
    assert arguments_of(parser, "content>\nline one\nline") == '{"content": "line one\\nline'
    assert arguments_of(parser, ' "two"\n') == ' \\"two\\"'
    assert arguments_of(parser, "</parameter>\n</function>\n</tool_call>") == '"}'
    assert arguments_of(parser, "\n") == ""


def test_a_nullable_string_streams_once_it_is_no_null() -> None:
    parser = ResponseParser(XML, TOOLS, False)
    head = "<tool_call>\n<function=write>\n<parameter=note>\nnu"
    assert arguments_of(parser, head) == ""
    assert arguments_of(parser, "mber") == '{"note": "number'


def test_a_list_streams() -> None:
    parser = ResponseParser(XML, TOOLS, False)
    head = '<tool_call>\n<function=write>\n<parameter=edits>\n[{"old": "a", "new": "b'
    assert arguments_of(parser, head) == '{"edits": [{"old": "a", "new": "b'


def test_arguments_in_json_stream() -> None:
    parser = ResponseParser(HERMES, TOOLS, False)
    assert (
        arguments_of(parser, '<tool_call>\n{"name": "write", "arguments": {"content": "a b')
        == '{"content": "a b'
    )


def test_an_unknown_parameter_streams_as_a_string() -> None:
    parser = ResponseParser(XML, TOOLS, False)
    assert (
        arguments_of(parser, "<tool_call>\n<function=write>\n<parameter=zzz>\nabc")
        == '{"zzz": "abc'
    )


# -- calls inside the reasoning --------------------------------------------------------------------


@pytest.mark.parametrize("rest", ["", "\n</think>", "\n</think>\n\n", "</tool_call>\n</think>"])
def test_a_call_inside_reasoning_is_a_call(rest: str) -> None:
    result = both(f"I need it.\n{CALL}{rest}", reasoning=True)
    assert (result.reasoning, result.content) == ("I need it.", "")
    assert result.calls == [WRITTEN]


def test_calls_inside_reasoning_with_text_between_are_calls() -> None:
    result = both(f"First\n{CALL}\nthen\n{LIST}", reasoning=True)
    assert result.reasoning == "First\nthen"
    assert result.calls == [WRITTEN, ("list", {})]


def test_a_call_inside_json_format_reasoning_is_a_call() -> None:
    result = both("hm\n" + write_hermes([WRITTEN]), form=HERMES, reasoning=True)
    assert result.reasoning == "hm" and result.calls == [WRITTEN]


def test_a_call_that_is_only_considered_is_not_run_twice() -> None:
    result = both(f"I could write\n{CALL}\nright.\n</think>\n\n{CALL}", reasoning=True)
    assert result.calls == [WRITTEN]
    assert CALL in result.reasoning and result.content == ""


@pytest.mark.parametrize(
    "thought",
    [
        "The format is `<tool_call>\n`.",
        "An unclosed <tool_call>\n<function=function_name>\nand <tool_call> again",
        "<tool_call>\n<function=write>\n<parameter=path>\nunclosed",
        "<tool_call>\n<function=write>\nand so on",
        '<tool_call>\n{"name": "write", "arguments": {"path": "unclosed',
        "```xml\n" + CALL + "\n```",
    ],
)
@pytest.mark.parametrize("form", [XML, HERMES])
def test_an_opening_tag_in_the_reasoning_does_not_swallow_the_call(form: Any, thought: str) -> None:
    call = CALL if form is XML else write_hermes([WRITTEN])
    result = both(f"{thought}\n</think>\n\n{call}", reasoning=True, form=form)
    assert result.calls == [WRITTEN] and result.complete == [True]
    assert result.reasoning.split() == thought.split()


# -- tags in answers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "A call starts with <tool_call> and ends with </tool_call>.",
        "The token `<tool_call>` means a call; `<function=write>` names it.",
        "Inline `<tool_call><function=list></function></tool_call>` is code.",
        "```xml\n" + CALL + "\n```\nThat is the format.",
        "~~~~\n```\n" + LIST + "\n~~~~\nend",
        "In text <function=write> is no call.",
        "Write <tool_call>\n<function=NAME>\n<parameter=x>\n1\n</parameter> mid-line".replace(
            "Write ", "Write: "
        ),
        "</tool_call> alone, </function> too",
        "ends in <tool_call>",
        "ends in <tool_call>\n",
        "ends in <tool_ca",
        "ends in <",
        "<function=other>\n</function>",
        "<tool_call>\n<function=...>\n</function>\n</tool_call>",
        "a <b> c <!-- d --> </e>",
    ],
)
def test_tags_in_an_ordinary_answer_are_text(text: str) -> None:
    assert both(text) == Result(content=text)


def test_a_tag_in_prose_does_not_stop_the_stream() -> None:
    parser = ResponseParser(XML, TOOLS, False)
    out = collect(parser.push("The literal token <tool_call> means a call, and")).content
    assert out == "The literal token <tool_call> means a call, and"


@pytest.mark.parametrize(
    "before", ["The tag <tool_call> opens.\n", "It's `one` backtick: `\n", "```\nls\n```\n"]
)
def test_a_call_after_prose_with_tags_is_found(before: str) -> None:
    result = both(before + CALL)
    assert result.calls == [WRITTEN] and result.content == before.rstrip()


def test_a_call_behind_text_in_the_same_line_is_found() -> None:
    result = both("Let me check: " + CALL)
    assert result.calls == [WRITTEN] and result.content == "Let me check:"


# -- damaged tags ----------------------------------------------------------------------------------

MISSING = {
    "no </tool_call>": CALL.removesuffix("\n</tool_call>"),
    "no </function>": CALL.replace("\n</function>", ""),
    "no </parameter>": CALL.replace("\n</parameter>", ""),
    "no </parameter>, no </function>": CALL.replace("\n</parameter>\n</function>", ""),
    "no </parameter>, no </tool_call>": CALL.replace(END, "\n</function>"),
    "no closing tags but </parameter>": CALL.removesuffix("\n</function>\n</tool_call>"),
    "no <tool_call>": CALL.removeprefix("<tool_call>\n"),
    "no <tool_call>, no </tool_call>": CALL[len("<tool_call>\n") : -len("\n</tool_call>")],
    "a second <tool_call>": "<tool_call>\n" + CALL,
    "a second </tool_call>": CALL + "\n</tool_call>",
    "a second </function>": CALL.replace("</function>", "</function>\n</function>"),
    "one line": CALL.replace("\n", ""),
    "spaces": CALL.replace("\n<", "\n  <").replace("a.txt\n  </", "a.txt\n</"),
    "carriage returns": CALL.replace("\n", "\r\n"),
    "</parameter1>": CALL.replace("</parameter>", "</parameter1>"),
    "</parameter/>": CALL.replace("</parameter>", "</parameter/>"),
    "</parameter": CALL.replace("</parameter>", "</parameter"),
    "name in quotes": CALL.replace("=path>", '="path">'),
    "name as an attribute": CALL.replace("<parameter=path>", '<parameter name="path">'),
    "function in quotes": CALL.replace("=write>", '="write">'),
    "function without >": CALL.replace("=write>", "=write"),
    "parameter without >": CALL.replace("=path>", "=path"),
    "parameter with a colon": CALL.replace("=path>\n", "=path: "),
    "JSON inside": '<tool_call>\n<function=write>\n{"path": "a.txt"}\n</function>\n</tool_call>',
    "JSON inside, no closing tags": '<tool_call>\n<function=write>\n{"path": "a.txt"}',
    "Hermes": write_hermes([WRITTEN]),
    "a parameter twice": CALL.replace("</function>", "<parameter=path>\nb" + END[:24]),
    "a parameter without a name": CALL.replace("</function>", "<parameter=\nb" + END[:24]),
}  # fmt: skip


@pytest.mark.parametrize("fault", MISSING)
def test_a_damaged_call_is_recovered(fault: str) -> None:
    result = both(MISSING[fault])
    assert result.calls == [WRITTEN] and result.content == ""


@pytest.mark.parametrize("fault", MISSING)
def test_the_call_behind_a_damaged_call_is_found(fault: str) -> None:
    result = both(f"{MISSING[fault]}\n{LIST}\nDone.")
    assert result.calls == [WRITTEN, ("list", {})] and result.content == "Done."


def test_a_parameter_behind_one_without_its_end_is_found() -> None:
    text = CALL.replace("\n</parameter>", "\n<parameter=size>\n3\n</parameter>")
    assert both(text).calls == [("write", {"path": "a.txt", "size": 3})]


def test_a_damaged_parameter_leaves_valid_arguments() -> None:
    text = (
        "<tool_call>\n<function=write>\n<parameter=content>\ntimeout 7\n</parameter>\n"
        "<parameter=\necho $A;\n</parameter>\n<parameter=note=\n</parameter>\n"
        "<parameter=edits: [1, 2]\n</parameter>\n</function>\n</tool_call>"
    )
    wanted = {"content": "timeout 7", "note": "", "edits": [1, 2]}
    assert both(text).calls == [("write", wanted)]


def test_a_model_that_begins_anew_inside_a_value_makes_two_calls() -> None:
    text = "<tool_call>\n<function=write>\n<parameter=path>\na.txt\n" + LIST
    assert both(text).calls == [WRITTEN, ("list", {})]


def test_an_unknown_tool_is_called_for_the_client_to_refuse() -> None:
    text = CALL.replace("=write>", "=mcp__x.delete-all>")
    assert both(text).calls == [("mcp__x.delete-all", {"path": "a.txt"})]


# -- responses that are cut off --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "write", "last"), [(XML, write_xml, "</function>"), (HERMES, write_hermes, "}}")]
)
def test_a_call_cut_off_anywhere_has_valid_arguments_and_is_not_complete(
    form: Any, write: Any, last: str
) -> None:
    edits = [{"old": "x", "new": [1, None]}]
    arguments = {"path": "a\nb", "size": 31, "edits": edits, "note": None, "force": True}
    text = write([("write", arguments)])
    assert both(text, form=form).calls == [("write", arguments)]
    for end in range(len(text)):
        result = parse(text[:end], form=form)
        for _, cut in result.calls:
            assert set(cut) <= set(arguments) and "</" not in json.dumps(cut)
            assert "path" not in cut or "a\nb".startswith(cut["path"])
            assert result.complete == [last in text[:end]]


def test_a_call_whose_response_ends_behind_a_value_is_not_complete() -> None:
    assert both(CALL.removesuffix("\n</function>\n</tool_call>")).complete == [False]
    assert both(CALL.removesuffix("\n</tool_call>")).complete == [True]


@pytest.mark.parametrize(
    ("cut", "wanted"),
    [
        ("x\n", "x"), ("x\n\n", "x\n"), ("x\n<", "x"), ("x\n</par", "x"), ("x\n</tool_call", "x"),
        ("x <", "x <"), ("x\n<div", "x\n<div"), ("x\n</div>", "x\n</div>"), ("x </", "x "),
        ("x\n</parameter>\n</func", "x"), ("x\n</parameter>\n<para", "x"),
    ],
)  # fmt: skip
def test_a_string_that_is_cut_off_ends_before_its_closing_tag(cut: str, wanted: str) -> None:
    result = both(HEAD + "<parameter=content>\n" + cut)
    assert result.calls == [("write", {"content": wanted})] and result.complete == [False]


def test_a_call_of_an_unknown_tool_at_the_end_of_a_value_is_part_of_it() -> None:
    example = LIST.replace("list", "f")
    for inner in (example, f"{example}\n{LIST}", f"{LIST}\n{example}"):
        text = f"{HEAD}<parameter=content>\nSee\n{inner}"
        assert both(text).calls == [("write", {"content": f"See\n{inner}"})]
    again = f"{HEAD}<parameter=content>\nSee\n{example}\nand\n{LIST}"
    assert both(again).names == ["write", "list"]


def test_a_json_call_follows_one_without_its_end() -> None:
    text = CALL.replace(END, "\n</parameter>\n") + write_hermes([("list", {})])
    assert both(text).calls == [WRITTEN, ("list", {})]


def test_a_parameter_may_have_a_space_in_its_name() -> None:
    text = CALL.replace("=path>", "=my key>")
    assert both(text).calls == [("write", {"my key": "a.txt"})]
    assert both(CALL.replace("=path>", "=" + "k" * 400 + ">")).names == ["write"]


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "\nx\n\n",
        "  indented\n\tx  ",
        "A block ends with </parameter> here.",
        'return "</parameter>"',
        "A call ends with </tool_call> on its own.",
        "</function> ends a function",
        "x\n</parameter>\ny",
        "x\n</parameter>",
        "<parameter=zzz>\nx\n</parameter>",
        f"Example:\n{LIST}\nEnd",
        f"Example:\n{CALL}\nEnd",
        f"{CALL}\n{LIST}\nEnd",
        "Example:\n<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>\nEnd",
        "a\n<parameter=zzz>\n1\n</parameter>\n<parameter=yyy>\n2\n</parameter>",
        "x</parameter>\n<parameter=zzz> </function>",
        "x</parameter> <parameter=zzz>\n</tool_call>;",
        "  <parameter=zzz>\n  1\n  </parameter>\n  <parameter=yyy>",
        "<think>\n</think>",
        "<tool_call> is a tag, <function=list> too",
        'if "<function=" in text and "<parameter=" in text:',
        'quote " backslash \\ tab \t nul \x00 é 漢 😀 \u2028',
        "a\r\nb\r",
        "<!DOCTYPE html>\n<p>1 < 2</p>",
        "null",
        "5",
        '{"a": 1}',
        "```\n</parameter\n```",
    ],
)
def test_a_string_holds_anything(text: str) -> None:
    assert value(text) == text
    assert both(write_hermes([("write", {"content": text})]), form=HERMES).calls == [
        ("write", {"content": text})
    ]


@pytest.mark.parametrize(
    "text",
    [
        "</tool_call>", "</tool_call> <tool_call>", "</tool_call><tool_call>{",
        "</tool_call>\n<tool_call>",
    ],
)  # fmt: skip
def test_a_json_string_holds_the_tags_of_calls(text: str) -> None:
    call = json.dumps({"name": "write", "arguments": {"content": text}})
    found = both(f"<tool_call>\n{call}\n</tool_call>", form=HERMES)
    assert (found.calls, found.complete) == ([("write", {"content": text})], [True])


@pytest.mark.parametrize(
    ("key", "text", "wanted"),
    [
        ("size", "5", 5), ("size", " 5 ", 5), ("size", "5.0", 5), ("size", "1e3", 1000),
        ("size", "-0", 0), ("size", "+7", 7), ("size", "5.5", 5.5), ("size", "five", "five"),
        ("size", "2026-01-15", "2026-01-15"), ("size", "", ""), ("size", "1_000", "1_000"),
        ("size", "٣", "٣"), ("size", "12345678901234567890123", 12345678901234567890123),
        ("size", "9" * 5000, "9" * 5000), ("size", "null", "null"), ("size", "0x10", "0x10"),
        ("ratio", "0.5", 0.5), ("ratio", ".5", 0.5), ("ratio", "2.", 2.0), ("ratio", "3", 3),
        ("ratio", "NaN", "NaN"), ("ratio", "Infinity", "Infinity"), ("ratio", "1e3", 1000.0),
        ("force", "true", True), ("force", "True", True), ("force", "FALSE", False),
        ("force", "yes", "yes"), ("force", "1", "1"),
        ("edits", "[]", []), ("edits", "['a', True, None]", ["a", True, None]),
        ("edits", "[1, 2,]", [1, 2]), ("edits", "a, b", "a, b"), ("edits", '"[1]"', [1]),
        ("edits", '[{"a": "x </parameter> y"}]', [{"a": "x </parameter> y"}]),
        ("edits", '["</parameter></function></tool_call>"]',
         ["</parameter></function></tool_call>"]),
        ("edits", '["\\"</parameter> <parameter=size>", 1]', ['"</parameter> <parameter=size>', 1]),
        ("edits", '[\n "</parameter></function></tool_call><tool_call>"]',
         ["</parameter></function></tool_call><tool_call>"]),
        ("edits", f"[0.{'3' * 400}, 2]", [float(f"0.{'3' * 298}"), 2]),
        ("ratio", f"0.{'3' * 400}", float(f"0.{'3' * 298}")),
        ("edits", "[1, 2", [1, 2]), ("edits", "[{'a': 'it's'}]", [{"a": "it's"}]),
        ("options", '{"a": {"b": [1]}}', {"a": {"b": [1]}}), ("options", "{}", {}),
        ("options", "{a: 1}", {"a": 1}), ("options", '{"a": "\n"}', {"a": "\n"}),
        ("options", "[1]", [1]), ("options", "none", "none"),
        ("note", "null", None), ("note", "None", None), ("note", "nullable", "nullable"),
        ("note", "", ""), ("note", "5", "5"), ("note", "{", "{"),
        ("limit", "null", None), ("limit", "None", None), ("limit", "", None), ("limit", "3", 3),
        ("mode", "new", "new"), ("mode", "other", "other"),
        ("any", "text", "text"), ("any", "5", "5"), ("any", '{"a": 1}', {"a": 1}),
        ("any", "[1", "[1"), ("any", "[see] it", "[see] it"), ("any", "true", "true"),
        ("zzz", "5", "5"), ("zzz", "[1, 2]", [1, 2]), ("zzz", "a\nb", "a\nb"),
    ],
)  # fmt: skip
def test_a_value_gets_the_type_of_the_schema(key: str, text: str, wanted: Any) -> None:
    found = value(text, key)
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(
    ("schema", "text", "wanted"),
    [
        ({"type": ["string", "integer"]}, "5", 5),
        ({"type": ["string", "integer"]}, "007", "007"),
        ({"type": ["string", "boolean"]}, "true", True),
        ({"type": ["string", "array"]}, '["a"]', ["a"]),
        ({"type": ["string", "array"]}, "[a] b", "[a] b"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "4", 4),
        ({"oneOf": [{"type": "boolean"}, {"type": "number"}]}, "1.5", 1.5),
        ({"allOf": [{"type": "integer"}]}, "4", 4),
        ({"$ref": "#/$defs/Size"}, "4", 4),
        ({"$ref": "#/$defs/Loop"}, "4", "4"),
        ({"anyOf": [{"$ref": "#/$defs/Many"}, {"type": "integer"}]}, "4", 4),
        ({"$ref": "elsewhere.json"}, "4", "4"),
        ({"enum": [1, 2]}, "2", 2),
        ({"enum": ["1", 2]}, "1", "1"),
        ({"enum": ["1", 2]}, "2", 2),
        ({"const": True}, "true", True),
        ({"type": "integer", "nullable": True}, "null", None),
        ({"type": "int"}, "3", 3),
        ({"type": "float"}, "3.5", 3.5),
        ({"type": "dict"}, "{}", {}),
        ({"type": 5}, "3", "3"),
        ({"type": None}, "3", "3"),
        ({"type": "money"}, "3", "3"),
        ({"anyOf": "x", "enum": 3}, "3", "3"),
        (True, "3", "3"),
        (None, "3", "3"),
        ({"type": "string", "enum": ["null"]}, "null", "null"),
    ],
)
def test_types_of_unions_references_and_unusual_schemas(
    schema: Any, text: str, wanted: Any
) -> None:
    one = tool("write", x=schema)
    one["function"]["parameters"]["$defs"] = {
        "Size": {"type": "integer"},
        "Loop": {"$ref": "#/$defs/Loop"},
        "Many": {"anyOf": [{"$ref": "#/$defs/Many"} for _ in range(20)]},
    }
    assert value(text, "x", tools=[one]) == wanted


@pytest.mark.parametrize(
    "parameters", [None, {}, True, [], {"properties": []}, {"type": "object"}, "x"]
)
def test_a_tool_without_a_usable_schema_takes_strings(parameters: Any) -> None:
    tools = [{"type": "function", "function": {"name": "write", "parameters": parameters}}]
    assert value("5", tools=tools) == "5"
    assert value('["a"]', tools=tools) == ["a"]


# -- JSON ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "write", "arguments": {"path": "a.txt"}}',
        '{"arguments": {"path": "a.txt"}, "name": "write"}',
        '{"name": "write", "parameters": {"path": "a.txt"}}',
        '{"id": "x", "function": {"name": "write", "arguments": {"path": "a.txt"}}}',
        '{"name": "write", "arguments": "{\\"path\\": \\"a.txt\\"}"}',
        "{'name': 'write', 'arguments': {'path': 'a.txt'}}",
        '{"name": "write", "arguments": {"path": "a.txt",}}',
        '{"name": "write", "arguments": {"path": "a.txt"}',
        '{"name": "write", "arguments": {"path": "a.txt"',
        '{"name": "write", "arguments": {"path": "a.txt"}}}',
        '{{"name": "write", "arguments": {"path": "a.txt"}}}',
        '[{"name": "write", "arguments": {"path": "a.txt"}}]',
        '```json\n{"name": "write", "arguments": {"path": "a.txt"}}\n```',
        '{"name": "write", "arguments": {path: "a.txt"}}',
    ],
)
@pytest.mark.parametrize("end", ["\n</tool_call>", ""])
def test_json_calls_in_any_order_and_damaged_ones(body: str, end: str) -> None:
    result = both(f"<tool_call>\n{body}{end}", form=HERMES)
    assert result.calls == [WRITTEN] and result.content == ""


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("null", {}), ("[]", {}), ('""', {}), ("[1]", {"arguments": [1]}),
        ('"x"', {"arguments": "x"}),
        ('{"a": "line\nline\t"}', {"a": "line\nline\t"}),
        ('{"a": "say "hi" now"}', {"a": 'say "hi" now'}),
        ('{"a": "\\d+ \\x41 \\u12 \\\'"}', {"a": "\\d+ \\x41 \\u12 '"}),
        ('{"a": NaN, "b": undefined, "c": 01}', {"a": None, "b": None, "c": "01"}),
        ('{"a": [1 2], "b"}', {"a": [1, 2], "b": None}),
        ('{"a": "</tool_call> in", "b": 1}', {"a": "</tool_call> in", "b": 1}),
        ('{"a": "<tool_call>"}', {"a": "<tool_call>"}),
        ('{"a": "\\ud83d\\ude00 é"}', {"a": "😀 é"}),
        ('{"a": "\\ud83d", "b": "\\uDE00!"}', {"a": "\ufffd", "b": "\ufffd!"}),
        ('{"\\ud83d\\ud83d\\ude00": "\\ud83d\\u0041\\ud7ff"}',
         {"\ufffd😀": "\ufffdA\ud7ff"}),
        ('"{\\"a\\": \\"\\ud83d\\"}"', {"a": "\ufffd"}),
        ('"{\\"a\\": \\"\\\\ud83d\\"}"', {"a": "\ufffd"}),
    ],
)  # fmt: skip
def test_json_arguments_become_a_valid_object(arguments: str, wanted: Any) -> None:
    text = f'<tool_call>\n{{"name": "write", "arguments": {arguments}}}\n</tool_call>'
    assert both(text, form=HERMES).calls == [("write", wanted)]


def test_half_a_surrogate_pair_in_a_call_becomes_a_replacement_character() -> None:
    text = '<tool_call>\n{"name": "wri\\ud83dte", "arguments": {}}\n</tool_call>'
    assert both(text, form=HERMES).calls == [("wri\ufffdte", {})]
    assert value('["\\ud83d", "\\ud83d\\ude00"]', "edits") == ["\ufffd", "😀"]
    assert value('"[\\"\\ud83d\\"]"', "edits") == ["\ufffd"]


def test_several_json_objects_in_one_block_are_calls() -> None:
    text = write_hermes([WRITTEN]).replace("{", '{"name": "list"}\n{', 1) + "\nend"
    result = both(text, form=HERMES)
    assert result.calls == [("list", {}), WRITTEN] and result.content == "end"


def test_a_json_object_without_a_name_is_text() -> None:
    text = 'See\n<tool_call>\n{"a": 1}\n</tool_call>\nend'
    assert both(text, form=HERMES) == Result(content=text)


def test_nesting_beyond_the_limit_becomes_null() -> None:
    deep = "[" * 5000 + "]" * 5000
    found = value(deep, "edits")
    for _ in range(99):
        found = found[0]
    assert found == [None]
    text = f'<tool_call>\n{{"name": "write", "arguments": {{"a": {deep}, "b": 1}}}}\n</tool_call>'
    assert parse(text, form=HERMES).calls[0][1]["b"] == 1


# -- every split, any text -------------------------------------------------------------------------


def test_calls_come_back_as_they_were_written() -> None:
    for case in range(150):
        random_ = random.Random(case)
        calls = random_calls(random_)
        for form, write in ((XML, write_xml), (HERMES, write_hermes)):
            text = write(calls)
            for pieces in (text, *splits(text, random_, 1)):
                result = parse(pieces, form=form)
                assert result.calls == calls and result.content == "" and all(result.complete)


def test_random_responses_give_the_same_result_at_every_split() -> None:
    fuzz(seed=18, cases=1000)


@pytest.mark.parametrize(
    "unit",
    [
        "<", "<tool_call>", "\n", " ", "`", "</parameter>\n", "\n</parameter>",
        "<parameter=x>\n", "[", '"a ',
        "</tool_call> ", "\n<tool_call>\n<function=write>\n<parameter=content>\n", "n", "1", "\\",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "head",
    [
        "", "<tool_call>", "<tool_call>\n<function=write>\n<parameter=content>\n",
        HEAD + '<parameter=edits>\n["', HEAD + "<parameter=any>\n",
        '<tool_call>{"name": "write", "arguments": {"a": "',
    ],
)  # fmt: skip
def test_time_is_linear_in_the_text(head: str, unit: str) -> None:
    parser = ResponseParser(XML, TOOLS, False)
    text = head + unit * (8000 // len(unit))
    kept = 0
    for i in range(0, len(text), 4):
        parser.push(text[i : i + 4])
        kept += parser.unparsed
    parser.finish()
    assert kept <= 150 * len(text)
