"""Chat templates: the same output as transformers, from messages in any form that clients send."""

import json
from pathlib import Path
from typing import Any

import pytest

from osmium.errors import CheckpointError, RequestError
from osmium.text.chat import ChatTemplate, normalise
from tests.text.templates import CONVERSATIONS, SOURCES, TOKENS, by_transformers

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "chat"
"""Written by `python -m tests.text.make_golden` with transformers."""

USER = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_rendered_conversation_equals_its_golden_text(source: str, case: str) -> None:
    messages, options = CONVERSATIONS[case]
    options = dict(options)
    tools = options.pop("tools", None)
    text = ChatTemplate(SOURCES[source](), TOKENS).render(messages, tools, **options)
    assert text == (GOLDEN / f"{source}_{case}.txt").read_bytes().decode()


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_rendered_conversation_equals_that_of_transformers(source: str, case: str) -> None:
    pytest.importorskip("transformers", reason="transformers is in the dev extra")
    messages, options = CONVERSATIONS[case]
    wanted = by_transformers(SOURCES[source](), messages, dict(options))
    options = dict(options)
    tools = options.pop("tools", None)
    assert ChatTemplate(SOURCES[source](), TOKENS).render(messages, tools, **options) == wanted


# -- sources of the template -----------------------------------------------------------------------


def test_the_template_file_takes_precedence_over_the_configuration() -> None:
    found = ChatTemplate.find(b"from the file", {"chat_template": "from the configuration"})
    assert found is not None
    assert found.render([USER]) == "from the file"


def test_the_default_of_a_list_of_templates_is_used() -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    found = ChatTemplate.find(None, {"chat_template": named})
    assert found is not None
    assert found.render([USER]) == "yes"


def test_special_tokens_come_from_the_configuration_as_text_or_as_object() -> None:
    config = {
        "chat_template": "{{ bos_token }}|{{ eos_token }}|{{ unk_token is defined }}",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True},
        "unk_token": None,
    }
    found = ChatTemplate.find(None, config)
    assert found is not None
    assert found.render([USER]) == "<s>|</s>|False"


def test_without_a_template_the_result_is_none() -> None:
    assert ChatTemplate.find(None, None) is None
    assert ChatTemplate.find(None, {"bos_token": "<s>"}) is None


@pytest.mark.parametrize("source", ["{% if %}", "{{ messages", "{% nothing %}"])
def test_an_invalid_template_is_refused(source: str) -> None:
    with pytest.raises(CheckpointError, match="template"):
        ChatTemplate(source)


@pytest.mark.parametrize("value", [7, {"default": "x"}])
def test_a_template_of_a_wrong_type_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match="chat_template"):
        ChatTemplate.find(None, {"chat_template": value})


@pytest.mark.parametrize("broken", [[7], [None], ["x"], [], [{"name": "a", "template": "b"}]])
def test_a_list_without_a_default_template_is_refused(broken: object) -> None:
    with pytest.raises(CheckpointError, match="chat_template"):
        ChatTemplate.find(None, {"chat_template": broken})


def test_a_file_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        ChatTemplate.find(b"\xff\xfe", None)


def test_an_option_has_the_models_default_unless_given() -> None:
    found = ChatTemplate.find(b"{{ enable_thinking }}", None, {"enable_thinking": False})
    assert found is not None
    assert found.render([USER]) == "False"
    assert found.render([USER], enable_thinking=True) == "True"


# -- limits of templates ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no ' ~ messages[0].role) }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[9].role }}",
        "{{ messages[0].content | tojson(no_such=1) }}",
    ],
)
def test_an_error_raised_by_a_template_is_a_request_error(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(source).render([USER])
    assert caught.value.param == "messages"
    assert caught.value.status == 400


def test_a_template_can_format_the_date() -> None:
    year = ChatTemplate("{{ strftime_now('%Y') }}").render([USER])
    assert year.isdigit()
    assert len(year) == 4


@pytest.mark.parametrize("name", ["messages", "tools", "self", "documents"])
def test_an_option_of_any_name_is_harmless(name: str) -> None:
    options: dict[str, Any] = {name: "mine"}
    text = ChatTemplate("{{ messages[0].content }}").render([USER], **options)
    assert text == "Hello"


# -- normalised messages ---------------------------------------------------------------------------


def test_leading_system_and_developer_messages_become_one() -> None:
    found = normalise(
        [
            {"role": "developer", "content": "A"},
            {"role": "system", "content": [{"type": "text", "text": "B"}]},
            USER,
        ]
    )
    assert found == [{"role": "system", "content": "A\n\nB"}, USER]


def test_a_later_system_message_becomes_a_user_message() -> None:
    found = normalise([USER, {"role": "system", "content": "now"}])
    assert [one["role"] for one in found] == ["user", "user"]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]
    assert normalise([{"role": "user", "content": parts}])[0]["content"] == "abc"


def test_absent_content_is_empty() -> None:
    for message in ({"role": "assistant"}, {"role": "assistant", "content": None}):
        assert normalise([USER, message])[1] == {"role": "assistant", "content": ""}


def test_reasoning_is_accepted_under_all_its_names() -> None:
    for name in ("reasoning", "reasoning_content", "thinking"):
        found = normalise([USER, {"role": "assistant", "content": "4", name: "2 + 2"}])
        assert found[1]["reasoning_content"] == "2 + 2"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ('{"a": [1, "x"]}', {"a": [1, "x"]}),
        ("", {}),
        ("  ", {}),
        ({"a": 1}, {"a": 1}),
        (json.dumps('{"a": 1}'), {"a": 1}),
        (json.dumps(json.dumps('{"a": 1}')), {"a": 1}),
        (json.dumps("a text"), {}),
        ('{"a": ', {}),
        ("a text", {}),
        ("[1]", {}),
        ("null", {}),
        ("[" * 100_000, {}),
        ("1" * 5000, {}),
        (None, {}),
        ([{"a": 1}], {}),
        (7, {}),
        (1.5, {}),
        (True, {}),
    ],
)
def test_call_arguments_become_an_object(arguments: object, wanted: object) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    before = json.dumps(call)
    found = normalise([USER, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert found[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": wanted}
    assert json.dumps(call) == before, "the caller's message is unchanged"


def calls_of(call: object) -> Any:
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    return normalise([USER, message])[1]["tool_calls"]


def test_a_flat_call_is_a_function_too() -> None:
    for arguments in ({"a": 1}, '{"a": 1}'):
        (call,) = calls_of({"id": "1", "name": "f", "arguments": arguments})
        assert call["function"] == {"name": "f", "arguments": {"a": 1}}
        assert call["arguments"] == {"a": 1}
    (call,) = calls_of({"name": "f", "function": None})
    assert call["function"] == {"name": "f", "arguments": {}}


@pytest.mark.parametrize("name", [None, 7, ["f"]])
def test_a_call_without_a_name_has_an_empty_one(name: object) -> None:
    (call,) = calls_of({"function": {"name": name, "arguments": "{}"}})
    assert call["function"] == {"name": "", "arguments": {}}
    assert calls_of({"function": {}}) == [{"function": {"name": "", "arguments": {}}}]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("arguments", [None, [1], 7, "{", '"x"', '{"a": 1}', '"{\\"a\\": 1}"'])
def test_a_call_with_any_arguments_renders_like_one_with_an_object(
    source: str, arguments: object
) -> None:
    template = ChatTemplate(SOURCES[source](), TOKENS)

    def render(call: object) -> str:
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        return template.render([USER, message, {"role": "tool", "content": "x"}])

    wanted: dict[str, int] = {"a": 1} if "a" in str(arguments) else {}
    right = render({"function": {"name": "f", "arguments": wanted}})
    assert render({"function": {"name": "f", "arguments": arguments}}) == right
    assert render({"name": "f", "arguments": arguments}) == right
    assert ("a=1" in right or "<parameter=a>" in right) == bool(wanted)


@pytest.mark.parametrize("source", SOURCES)
def test_half_a_surrogate_pair_becomes_a_replacement_character(source: str) -> None:
    half = "a\ud83d b\udc00"
    conversation: list[dict[str, Any]] = [
        {"role": "system", "content": half},
        {"role": "user", "content": [{"type": "text", "text": half}]},
        {"role": "assistant", "content": half, "reasoning_content": half, "tool_calls": [
            {"function": {"name": half, "arguments": {half: half}}}]},
        {"role": "tool", "content": half},
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "description": half}}]
    text = ChatTemplate(SOURCES[source](), TOKENS).render(conversation, tools)
    text.encode()
    assert text.count("a\ufffd b\ufffd") >= 7


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_url", "image_url": {"url": "data:,"}}, "messages[1].content[1]"),
        ({"type": "input_audio", "input_audio": {}}, "messages[1].content[1]"),
        ({"type": "text", "text": 7}, "messages[1].content[1]"),
        ({"type": "text"}, "messages[1].content[1]"),
        (7, "messages[1].content[1]"),
    ],
)
def test_a_part_without_text_is_refused_by_its_path(part: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        normalise([USER, {"role": "user", "content": [{"type": "text", "text": "see"}, part]}])
    assert caught.value.param == param


@pytest.mark.parametrize("content", [7, {"type": "text", "text": "a"}, True])
def test_content_of_a_wrong_type_is_refused(content: object) -> None:
    with pytest.raises(RequestError) as caught:
        normalise([{"role": "user", "content": content}])
    assert caught.value.param == "messages[0].content"


@pytest.mark.parametrize("calls", ["x", 7, [7], [{"function": "f"}], [{"function": [1]}]])
def test_calls_of_a_wrong_type_are_refused(calls: object) -> None:
    template = ChatTemplate("{{ messages | tojson }}")
    with pytest.raises(RequestError) as caught:
        template.render([USER, {"role": "assistant", "content": "", "tool_calls": calls}])
    assert (caught.value.param or "").startswith("messages")


def test_no_messages_are_refused() -> None:
    with pytest.raises(RequestError) as caught:
        normalise([])
    assert caught.value.param == "messages"
