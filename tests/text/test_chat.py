"""Chat templates: the same output as transformers, from messages in any form that clients send."""

import json
from pathlib import Path
from typing import Any

import pytest

from osmium.errors import CheckpointError, RequestError
from osmium.text.chat import ChatTemplate, normalise
from osmium.text.template_files import MAX_TEMPLATE
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


NAMED = (
    [{"name": "tool_use", "template": "with tools"}, {"name": "default", "template": "without"}],
    {"tool_use": "with tools", "default": "without"},
)


@pytest.mark.parametrize("named", NAMED)
def test_of_named_templates_tool_use_is_for_requests_with_tools(named: Any) -> None:
    for config, legacy in (({"chat_template": named}, None), ({}, {"chat_template": named})):
        found = ChatTemplate.find(None, config, legacy=legacy)
        assert found is not None
        assert found.render([USER]) == "without"
        assert found.render([USER], [{"type": "function"}]) == "with tools"
        assert found.render([USER], []) == "without"


def test_without_tool_use_the_default_is_for_all_requests() -> None:
    found = ChatTemplate.find(None, {"chat_template": [{"name": "default", "template": "yes"}]})
    assert found is not None
    assert found.render([USER], [{"type": "function"}]) == "yes"


def test_a_second_file_is_the_template_for_requests_with_tools() -> None:
    found = ChatTemplate.find(b"without", None, tool_jinja=b"with tools")
    assert found is not None
    assert found.render([USER]) == "without"
    assert found.render([USER], [{"type": "function"}]) == "with tools"


def test_chat_template_json_counts_where_it_is_the_only_one() -> None:
    legacy = {"chat_template": "legacy"}
    for jinja, config, wanted in (
        (None, None, "legacy"), (None, {"bos_token": "<s>"}, "legacy"),
        (None, {"chat_template": "config"}, "config"), (b"jinja", None, "jinja"),
    ):  # fmt: skip
        found = ChatTemplate.find(jinja, config, legacy=legacy)
        assert found is not None
        assert found.render([USER]) == wanted


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


@pytest.mark.parametrize("value", [7, {"other": "x"}, {"default": 7}])
def test_a_template_of_a_wrong_type_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match="chat_template"):
        ChatTemplate.find(None, {"chat_template": value})


@pytest.mark.parametrize("broken", [[7], [None], ["x"], [], [{"name": "a", "template": "b"}]])
def test_a_list_without_a_default_template_is_refused(broken: object) -> None:
    with pytest.raises(CheckpointError, match="chat_template"):
        ChatTemplate.find(None, {"chat_template": broken})


NESTED = {
    "statements": "{% if a %}" * 300 + "x" + "{% endif %}" * 300,
    "loops": "{% for i in [1] %}" * 300 + "x" + "{% endfor %}" * 300,
    "macros": "".join(f"{{% macro m{i}() %}}" for i in range(300)) + "{% endmacro %}" * 300,
    "parentheses": "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "signs": "{{ " + "-" * 300 + "a }}",
    "attributes": "{{ a" + ".b" * 300 + " }}",
    "filters": "{{ a" + "|upper" * 300 + " }}",
    "sums": "{{ a" + "+ a" * 300 + " }}",
    "deeper than the stack": "{{ " + "not " * 20_000 + "a }}",
    "blocks that Python refuses": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
}


@pytest.mark.parametrize("source", NESTED.values(), ids=NESTED)
@pytest.mark.timeout(5)
def test_a_template_that_is_nested_too_deep_is_refused_at_once(source: str) -> None:
    """Python takes ten seconds to refuse 300 signs or filters."""
    with pytest.raises(CheckpointError, match="template"):
        ChatTemplate(source)
    with pytest.raises(CheckpointError, match="template"):
        ChatTemplate("x", tool_source=source)


def test_a_template_of_moderate_depth_is_accepted() -> None:
    nested = "{% if messages %}" * 40 + "{{ " + "not " * 20 + "messages }}" + "{% endif %}" * 40
    assert ChatTemplate(nested).render([USER]) == "True"


@pytest.mark.parametrize(
    "source",
    ["{{ 'a' * 10**11 }}", "{{ 10**11 * 'a' }}", "{{ [1] * 10**11 }}", "{{ 2 ** 10000000000 }}",
     "{{ '%9999999999d' % 1 }}", "{{ '%*d' % (9999999999, 1) }}",
     "{% set x = 10**1000 %}{{ x * x }}"],
)  # fmt: skip
@pytest.mark.timeout(5)
def test_arithmetic_with_a_huge_result_fails_at_rendering_and_takes_no_memory(source: str) -> None:
    with pytest.raises(RequestError, match="too large"):
        ChatTemplate(source).render([USER])


def test_ordinary_arithmetic_in_a_template_works() -> None:
    source = "{{ 3 * 4 }} {{ '-' * 3 }} {{ 2 ** 10 }} {{ 7 % 4 }} {{ '%05.2f|%s' % (1.5, 'a') }}"
    assert ChatTemplate(source).render([USER]) == "12 --- 1024 3 01.50|a"


def test_a_template_of_absurd_length_is_refused() -> None:
    with pytest.raises(CheckpointError, match="characters"):
        ChatTemplate.find(b"x" * (MAX_TEMPLATE + 1), None)
    assert ChatTemplate.find(b"x" * MAX_TEMPLATE, None) is not None


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


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ({"content": None, "refusal": "No."}, "No."),
        ({"content": [], "refusal": "No."}, "No."),
        ({"content": "Yes.", "refusal": "No."}, "Yes."),
        ({"content": "Yes.", "refusal": None}, "Yes."),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"content": [{"type": "refusal", "refusal": None}]}, ""),
    ],
)
def test_a_refusal_is_the_content_of_a_message_without_another(
    message: dict[str, object], wanted: str
) -> None:
    assert normalise([USER, {"role": "assistant", **message}])[1]["content"] == wanted


@pytest.mark.parametrize("part", [{"type": "text"}, {"type": "text", "text": None}, {"text": 5}])
def test_a_part_without_a_text_is_refused_for_its_text(part: object) -> None:
    with pytest.raises(RequestError, match=r"messages\[0\]\.content\[1\]\.text is ") as caught:
        normalise([{"role": "user", "content": ["a", part]}])
    assert caught.value.param == "messages[0].content[1]"


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


@pytest.mark.parametrize("value", [0, False, [], {}, 5, True])
def test_a_refusal_part_is_a_text(value: Any) -> None:
    part = {"type": "refusal", "refusal": value}
    with pytest.raises(RequestError, match=r"messages\[0\]\.content\[0\]\.refusal is"):
        normalise([{"role": "assistant", "content": [part]}])
    absent = {"type": "refusal", "refusal": None}
    assert normalise([{"role": "assistant", "content": [absent]}])[0]["content"] == ""


def test_no_messages_are_refused() -> None:
    with pytest.raises(RequestError) as caught:
        normalise([])
    assert caught.value.param == "messages"


PRESERVING = "{{ 'kept' if preserve_thinking else 'dropped' }}"


@pytest.mark.parametrize(
    ("defaults", "tools", "variables", "wanted"),
    [
        ({}, [{"type": "function"}], {}, "kept"),
        ({}, None, {}, "dropped"),
        ({}, [{"type": "function"}], {"preserve_thinking": False}, "dropped"),
        ({}, None, {"preserve_thinking": True}, "kept"),
        ({"preserve_thinking": False}, [{"type": "function"}], {}, "dropped"),
    ],
)
def test_a_template_keeps_earlier_reasoning_when_there_are_tools(
    defaults: dict[str, Any], tools: Any, variables: dict[str, Any], wanted: str
) -> None:
    template = ChatTemplate(PRESERVING, defaults=defaults)
    assert template.render([{"role": "user", "content": "x"}], tools, **variables) == wanted


def test_a_template_without_the_variable_gets_none() -> None:
    template = ChatTemplate("{{ preserve_thinking is defined }}{{ 'x' }}".replace("preserve", "x"))
    assert template.render([{"role": "user", "content": "x"}], [{"type": "f"}]) == "Falsex"
