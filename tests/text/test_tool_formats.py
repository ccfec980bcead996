"""The format of calls by a chat template, and a third format in one file."""

import random
import sys
from pathlib import Path

import pytest

from osmium.text import tool_formats
from osmium.text.chat import ChatTemplate
from osmium.text.reasoning import starts_in_reasoning
from osmium.text.response_parser import ResponseParser
from osmium.text.tool_formats import find_format
from tests.text.responses import HERMES, TOOLS, XML, collect, parse, random_calls
from tests.text.templates import SOURCES

QWEN3 = """{%- if tools %}
{{- "Return a call as <tool_call>\\n{\\"name\\": NAME, \\"arguments\\": {}}\\n</tool_call>" }}
{%- endif %}"""

THIRD = """
import json

from osmium.text.tags import tag_at
from osmium.text.tool_formats import CallArguments, CallEnd, CallStart, Opening


class Third:
    name = "third"
    first = "["

    def matches(self, template):
        return "[CALL]" in template

    def opening(self, text, at, final, place):
        tag = tag_at(text, at, ("[CALL]",), final)
        return Opening(at + len(tag), Calls()) if tag else tag is None


class Calls:
    done = aborted = False

    def parse(self, text, at, final):
        end = text.find("]", at)
        if end < 0 and not final:
            return [], at
        self.done = True
        end = len(text) if end < 0 else end
        arguments = CallArguments(json.dumps({"x": 1}))
        return [CallStart(text[at:end]), arguments, CallEnd(True)], end + 1


FORMAT = Third()
"""


def test_the_demo_writes_calls_as_qwen_does() -> None:
    assert ChatTemplate(SOURCES["demo"]()).tool_format is XML


def test_calls_that_a_template_writes_come_back() -> None:
    template = ChatTemplate(SOURCES["demo"]())
    for case in range(20):
        calls = random_calls(random.Random(case))
        functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
        message = {
            "role": "assistant", "content": "I look.", "reasoning_content": "hm\n\nso",
            "tool_calls": [{"type": "function", "function": one} for one in functions],
        }  # fmt: skip
        user = {"role": "user", "content": "Go"}
        prompt = template.render([user], TOOLS)
        whole = template.render([user, message], TOOLS, add_generation_prompt=False)
        response = whole.removeprefix(prompt).removesuffix("<|im_end|>\n")
        result = parse(response, form=template.tool_format, reasoning=starts_in_reasoning(prompt))
        assert (result.reasoning, result.content) == ("hm\n\nso", "I look.")
        assert result.calls == calls


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (QWEN3, HERMES),
        (QWEN3.replace('\\"', '"').replace('{{- "', "{{- '").replace('" }}', "' }}"), HERMES),
        ("{{ '<tool_call>\\n<function=' ~ name }} \"arguments\"", XML),
        ("{{ messages[0].content }}", None),
        ("<tool_call> {{ call.arguments }}", None),
    ],
)
def test_a_template_names_its_format(source: str, wanted: object) -> None:
    assert ChatTemplate(source).tool_format is wanted


def test_the_template_for_tools_comes_first() -> None:
    template = ChatTemplate("plain", tool_source="<function=")
    assert template.tool_format is XML
    assert find_format(None, None) is None


def test_a_third_format_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "third.py").write_text(THIRD)
    monkeypatch.setattr(tool_formats, "__path__", [*tool_formats.__path__, str(tmp_path)])
    tool_formats._formats.cache_clear()
    try:
        third = find_format("a [CALL] is written so")
        assert third is not None and third.name == "third"
        assert find_format("<function=") is XML
    finally:
        sys.modules.pop("osmium.text.tool_formats.third", None)
        tool_formats._formats.cache_clear()
    for step in (1, 100):
        parser = ResponseParser(third, [{"name": "go"}], False)
        text = "hi [1] \n[CALL]go] bye"
        deltas = [d for i in range(0, len(text), step) for d in parser.push(text[i : i + step])]
        result = collect(deltas + parser.finish())
        assert result.calls == [("go", {"x": 1})] and result.content == "hi [1] \n bye"
