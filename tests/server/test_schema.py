"""Request bodies: a field of a wrong type is refused by name."""

import json
from typing import Any

import pytest

from osmium.engine.request import SamplingParams
from osmium.errors import RequestError
from osmium.server.messages import UNSUPPORTED
from osmium.server.schema import (
    ChatRequest,
    CompletionRequest,
    parse,
    prompts,
    sampling_params,
)
from osmium.server.thinking import thinking_budget, thinking_options

MESSAGES = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> ChatRequest:
    return parse(json.dumps({"messages": MESSAGES, **fields}).encode(), ChatRequest)


def completion(**fields: Any) -> CompletionRequest:
    return parse(json.dumps({"prompt": "Hello", **fields}).encode(), CompletionRequest)


NUMBER: list[Any] = ["1", [1], {}, True]
INTEGER: list[Any] = ["1", 1.5, [1], True]
FLAG: list[Any] = ["true", 1, []]
BOTH: dict[str, list[Any]] = {
    "model": [7, ["a"]],
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": INTEGER,
    "min_p": NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "repetition_penalty": NUMBER,
    "repeat_penalty": NUMBER,
    "seed": INTEGER,
    "stop": [7, {}, ["a", 7], [["a"]]],
    "stop_token_ids": [7, {}, "7", ["7"], [1.5], [None], [True]],
    "max_tokens": INTEGER,
    "min_tokens": INTEGER,
    "return_progress": FLAG,
    "timings_per_token": FLAG,
    "logit_bias": ["a", [1], {"5": "x"}, {"5": None}],
    "ignore_eos": FLAG,
    "n": INTEGER,
    "stream": FLAG,
    "stream_options": [True, [], {"include_usage": "yes"}],
    "user": [7, []],
    "response_format": ["text", 7],
    "guided_json": [7, []],
    "prompt_logprobs": [1.5, "1", [], {}],
    "guided_regex": [7, []],
    "guided_choice": ["a", [7], {}],
    "guided_grammar": [7, []],
    "structured_outputs": [[], "x"],
    "json_schema": [7, []],
    "grammar": [7, []],
    "regex": [7, []],
    "ebnf": [7, []],
}
CHAT: dict[str, list[Any]] = {
    "messages": [None, "Hello", {}, [7], ["Hello"], [None]],
    "max_completion_tokens": INTEGER,
    "logprobs": FLAG,
    "top_logprobs": INTEGER,
    "tools": [{}, "x", [7]],
    "tool_choice": [7, ["auto"]],
    "chat_template_kwargs": ["x", [1]],
    "enable_thinking": FLAG,
    "reasoning_effort": [1, ["low"]],
    "thinking": ["enabled", 1, []],
    "reasoning": ["high", True, []],
    "thinking_token_budget": INTEGER,
    "reasoning_budget_tokens": INTEGER,
    "thinking_budget": INTEGER,
    "include_reasoning": FLAG,
    "add_generation_prompt": FLAG,
    "continue_final_message": FLAG,
    "parallel_tool_calls": FLAG,
}
COMPLETION: dict[str, list[Any]] = {
    "prompt": [None, 7, {}, [None], [1.5], [{"a": 1}], [["a"]], [True]],
    "logprobs": INTEGER,
    "echo": FLAG,
    "suffix": [7, []],
    "best_of": INTEGER,
}


def each(tables: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in tables.items() for value in values]


@pytest.mark.parametrize(("name", "value"), each(BOTH | CHAT))
def test_a_chat_field_of_a_wrong_type_is_refused_by_its_path(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**{name: value})
    assert caught.value.status == 400
    assert (caught.value.param or "").startswith(name)


@pytest.mark.parametrize(("name", "value"), each(BOTH | COMPLETION))
def test_a_completion_field_of_a_wrong_type_is_refused_by_its_path(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        completion(**{name: value})
    assert caught.value.status == 400
    assert (caught.value.param or "").startswith(name)


def test_wrong_types_are_tested_for_every_field() -> None:
    for kind, tried in ((ChatRequest, BOTH | CHAT), (CompletionRequest, BOTH | COMPLETION)):
        assert set(tried) == set(kind.__struct_fields__)


@pytest.mark.parametrize(
    ("name", "value", "param"),
    [
        ("stop", ["a", 7], "stop[1]"),
        ("stream_options", {"include_usage": 7}, "stream_options.include_usage"),
        ("messages", [MESSAGES[0], 7], "messages[1]"),
        ("messages", [{"role": "robot", "content": ""}], "messages[0].role"),
        ("messages", [MESSAGES[0], {"content": ""}], "messages[1].role"),
        ("messages", [{"role": ["user"], "content": ""}], "messages[0].role"),
        ("messages", [{"role": "user", "reasoning": {"a": 1}}], "messages[0].reasoning"),
        ("messages", [{"role": "user", "thinking": []}], "messages[0].thinking"),
        ("messages", [{"role": "user", "refusal": 5}], "messages[0].refusal"),
        ("messages", [{"role": "user", "images": ["aGk="]}], "messages[0].images"),
        ("messages", [{"role": "assistant", "audio": {"id": "a"}}], "messages[0].audio"),
        (
            "messages",
            [MESSAGES[0], {"role": "assistant", "function_call": {"name": "f"}}],
            "messages[1].function_call",
        ),
        ("messages", [{"role": "assistant", "content": "a", "prefix": True}], "messages[0].prefix"),
    ],
)
def test_an_error_path_leads_to_the_wrong_value(name: str, value: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**{name: value})
    assert caught.value.param == param


@pytest.mark.parametrize("key", sorted(UNSUPPORTED))
@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_a_key_of_a_message_that_asks_for_nothing_is_accepted(key: str, value: Any) -> None:
    chat(messages=[{"role": "assistant", "content": "Hello", key: value}])


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"messages": [}', b'{"a": \xff}', b'"\xff"', b"\x00", b"[" * 100_000,
     b'{"messages": NaN}', b'{"messages": "\\ud800'],
)  # fmt: skip
def test_invalid_json_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse(body, ChatRequest)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (rb"a\ud800b", "a\ufffdb"),
        (rb"\uDBff", "\ufffd"),
        (rb"\udc00\ud800", "\ufffd\ufffd"),
        (rb"\ud83d\ude00\ud83d", "\U0001f600\ufffd"),
        (rb"\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
        (rb"\\ud800 \ud800", "\\ud800 \ufffd"),
        (rb"\\\ud800\n", "\\\ufffd\n"),
        (rb"\"\ud800\"", '"\ufffd"'),
        (b"a\xed\xa0\xbdb\xed\x9f\xbf", "a\ufffdb\ud7ff"),
    ],
)
def test_half_a_surrogate_pair_becomes_a_replacement_character(written: bytes, wanted: str) -> None:
    found = parse(b'{"messages": [{"role": "user", "content": "%s"}]}' % written, ChatRequest)
    assert found.messages[0]["content"] == wanted
    assert parse(b'{"prompt": "%s"}' % written, CompletionRequest).prompt == wanted


WHOLE: dict[str, Any] = {
    **dict.fromkeys([name for name, wrong in BOTH.items() if wrong is INTEGER], 1.0),
    **dict.fromkeys([name for name, wrong in CHAT.items() if wrong is INTEGER], 1.0),
    "n": 2.0, "stop_token_ids": [5.0], "prompt_logprobs": 2e0, "logprobs": True,
    "thinking": {"type": "enabled", "budget_tokens": 1024.0},
    "reasoning": {"max_tokens": 5e2},
}  # fmt: skip
"""Every field that is an integer, as JavaScript's numbers may be written."""


@pytest.mark.parametrize("text", ["Hello", "\ud83d"])
def test_a_whole_number_with_a_decimal_point_is_an_integer(text: str) -> None:
    messages = [{"role": "user", "content": text}]
    given = {**WHOLE, "messages": messages}
    found = chat(**given)
    integers = json.loads(json.dumps(given), parse_float=lambda digits: int(float(digits)))
    assert thinking_budget(found) == thinking_budget(chat(**integers))
    assert type(found.max_tokens) is int and thinking_budget(found) == 1
    params = sampling_params(found, {})
    assert (params.max_tokens, params.top_k, params.stop_token_ids) == (1, 1, (5,))
    assert completion(prompt=[1.0, 2.0], logprobs=2.0, suffix=text).prompt == [1, 2]


@pytest.mark.parametrize("name", ["thinking", "reasoning"])
@pytest.mark.parametrize("budget", [1.5, True, "5", -2.0])
def test_a_budget_that_is_no_whole_number_is_refused(name: str, budget: Any) -> None:
    key = {"thinking": "budget_tokens", "reasoning": "max_tokens"}[name]
    kind = {"type": "enabled"} if name == "thinking" else {}
    with pytest.raises(RequestError) as caught:
        thinking_options(chat(**{name: {**kind, key: budget}}))
    assert caught.value.param == f"{name}.{key}"


@pytest.mark.parametrize("body", [b"[]", b"7", b"null", b'"text"'])
def test_a_body_that_is_not_an_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse(body, ChatRequest)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("kind", "param"), [(ChatRequest, "messages"), (CompletionRequest, "prompt")]
)
def test_a_missing_field_is_named(kind: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(b"{}", kind)
    assert caught.value.param == param


def test_unknown_fields_and_nulls_are_ignored() -> None:
    found = chat(store=False, metadata={"a": [1]}, temperature=None, stop=None, tools=None, n=1)
    assert sampling_params(found, {}) == SamplingParams()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}},
         "tool_choice.function.name"),
        ({"messages": []}, "messages"),
    ],
)  # fmt: skip
def test_unsupported_chat_fields_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"echo": True, "suffix": "x"}, "echo"), ({"best_of": 9}, "best_of"),
     ({"best_of": 0}, "best_of"), ({"best_of": -1}, "best_of"), ({"best_of": 1, "n": 2}, "best_of"),
     ({"best_of": 2, "stream": True}, "best_of"), ({"n": 9}, "n"), ({"n": -1}, "n"),
     ({"prompt_logprobs": True}, "prompt_logprobs"),
     ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs")],
)  # fmt: skip
def test_unsupported_completion_fields_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        completion(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 10**400}, "min_tokens"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop_token_ids": [5, -1]}, "stop_token_ids"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ],
)
def test_an_out_of_range_value_is_refused_by_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        sampling_params(chat(**fields), {})
    assert caught.value.param == param
    assert caught.value.status == 400


def test_every_sampling_field_reaches_the_engine() -> None:
    found = sampling_params(
        chat(
            temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=1,
            frequency_penalty=-1, repetition_penalty=1.5, seed=-3, stop=["a", "b"],
            max_tokens=9, logit_bias={"5": -1, "6": 2.5}, ignore_eos=True,
            logprobs=True, top_logprobs=4, stop_token_ids=[3, 4], min_tokens=2,
        ),
        {},
    )  # fmt: skip
    assert found == SamplingParams(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=1.0,
        frequency_penalty=-1.0, repetition_penalty=1.5, seed=-3, stop=("a", "b"),
        max_tokens=9, logit_bias={5: -1.0, 6: 2.5}, ignore_eos=True, logprobs=4,
        stop_token_ids=(3, 4), min_tokens=2,
    )  # fmt: skip


def test_the_models_defaults_hold_for_absent_fields() -> None:
    defaults = {"temperature": 0.6, "top_k": 20}
    assert sampling_params(chat(), defaults) == SamplingParams(temperature=0.6, top_k=20)
    request = sampling_params(chat(temperature=0, top_k=0), defaults)
    assert request == SamplingParams(temperature=0.0, top_k=0)


def test_one_stop_string_may_be_given_without_a_list() -> None:
    assert sampling_params(chat(stop="END"), {}).stop == ("END",)


def test_the_models_default_length_holds_unless_a_request_sets_one() -> None:
    defaults = {"max_tokens": 256}
    assert sampling_params(chat(), defaults).max_tokens == 256
    assert sampling_params(chat(max_tokens=5), defaults).max_tokens == 5
    assert sampling_params(chat(max_completion_tokens=7), defaults).max_tokens == 7


def test_max_completion_tokens_takes_precedence_over_max_tokens() -> None:
    assert sampling_params(chat(max_tokens=5, max_completion_tokens=7), {}).max_tokens == 7


def test_logprobs_of_completions_are_an_integer() -> None:
    assert sampling_params(completion(logprobs=3), {}).logprobs == 3
    assert sampling_params(completion(logprobs=0), {}).logprobs == 0
    assert sampling_params(completion(), {}).logprobs is None


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a", ["a"]), (["a"], ["a"]), ([1, 2], [[1, 2]]), ([[1, 2]], [[1, 2]]), ([], [[]]),
        ("", [""]), (["a", "b"], ["a", "b"]), ([[1], [2]], [[1], [2]]), ([[1], "a"], [[1], "a"]),
        (["", []], ["", []]),
    ],
)  # fmt: skip
def test_prompts_are_texts_or_token_ids(prompt: Any, wanted: Any) -> None:
    assert prompts(completion(prompt=prompt)) == wanted


@pytest.mark.parametrize(
    ("prompt", "code"),
    [([1, "a"], "invalid_type"), ([1, [2]], "invalid_type"), (["a"] * 129, "too_many_items"),
     ([[1]] * 129, "too_many_items")],
)  # fmt: skip
def test_mixed_or_too_many_prompts_are_refused(prompt: Any, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        prompts(completion(prompt=prompt))
    assert (caught.value.param, caught.value.code) == ("prompt", code)


@pytest.mark.parametrize("fields", [{}, {"echo": True}, {"logprobs": 1}, {"prompt_logprobs": 0}])
def test_a_completion_may_compute_its_prompt_alone(fields: dict[str, Any]) -> None:
    assert sampling_params(completion(max_tokens=0, **fields), {}).max_tokens == 0


def test_llama_servers_name_of_the_repetition_penalty_counts_without_the_other() -> None:
    assert sampling_params(chat(repeat_penalty=1.5), {}).repetition_penalty == 1.5
    both = chat(repeat_penalty=1.5, repetition_penalty=1.25)
    assert sampling_params(both, {}).repetition_penalty == 1.25


def test_template_options_come_from_the_request() -> None:
    request = chat(chat_template_kwargs={"preserve_thinking": True})
    assert thinking_options(request) == {"preserve_thinking": True}
    assert thinking_options(chat(enable_thinking=False)) == {"enable_thinking": False}
    assert thinking_options(chat(reasoning_effort="low")) == {"reasoning_effort": "low"}
    none = thinking_options(chat(reasoning_effort="none"))
    assert none == {"reasoning_effort": "none", "enable_thinking": False}
