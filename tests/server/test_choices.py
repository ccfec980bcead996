"""Several choices of one request, the continuation of a message, and min_tokens."""

import threading
import time
from typing import Any

import pytest

from osmium.engine.request import FinishReason, RequestTimes
from osmium.errors import EngineStopped
from osmium.server import answer
from osmium.server.choices import timings
from tests.server.scripted import TOKENIZER, ScriptedEngine, ScriptedRequest, chunks, client_of

HELLO = [{"role": "user", "content": "Hello"}]
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


def post(client: Any, path: str = CHAT, **fields: Any) -> Any:
    prompt = {"messages": HELLO} if path == CHAT else {"prompt": "Hello"}
    return client.post(path, json={**prompt, **fields})


# -- choices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, PLAIN])
@pytest.mark.parametrize("n", [1, 2, 8])
def test_a_response_has_n_choices_and_counts_the_prompt_once(path: str, n: int) -> None:
    engine = ScriptedEngine("the end")
    with client_of(engine) as client:
        body = post(client, path, n=n).json()
        one = post(client, path).json()["usage"]
    assert [choice["index"] for choice in body["choices"]] == list(range(n))
    assert {
        choice["message"]["content"] if path == CHAT else choice["text"]
        for choice in body["choices"]
    } == {"the end"}
    assert body["usage"]["prompt_tokens"] == one["prompt_tokens"]
    assert body["usage"]["completion_tokens"] == n * one["completion_tokens"]
    assert body["usage"]["total_tokens"] == sum(
        body["usage"][name] for name in ("prompt_tokens", "completion_tokens")
    )
    assert body["timings"]["predicted_n"] == body["usage"]["completion_tokens"]
    assert len(engine.requests) == n + 1


@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_choices_are_streamed_together_with_one_id(path: str) -> None:
    engine = ScriptedEngine("the end the end the end", pace_s=0.01)
    with client_of(engine) as client:
        response = post(client, path, n=3, stream=True, stream_options={"include_usage": True})
    found = chunks(response.text)
    assert len({(one["id"], one["created"], one["model"]) for one in found}) == 1
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] == 3 * (len(engine.token_ids) + 1)
    choices = [one["choices"][0] for one in found[:-1]]
    for index in range(3):
        own = [choice for choice in choices if choice["index"] == index]
        if path == CHAT:
            assert own[0]["delta"] == {"role": "assistant", "content": ""}
            text = "".join(choice["delta"].get("content", "") for choice in own)
        else:
            text = "".join(choice["text"] for choice in own)
        assert text == "the end the end the end"
        assert [one["finish_reason"] for one in own] == [None] * (len(own) - 1) + ["stop"]
    order = [choice["index"] for choice in choices]
    assert order != sorted(order), "choices are interleaved"


def test_choices_have_consecutive_seeds_or_random_ones() -> None:
    engine = ScriptedEngine()
    with client_of(engine) as client:
        post(client, n=3, seed=-1)
        post(client, n=2)
    assert [request.params.seed for request in engine.requests] == [-1, 0, 1, None, None]


@pytest.mark.parametrize("stream", [False, True])
def test_one_failed_choice_ends_the_response_and_cancels_the_others(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine("the end " * 50, context=10**6, pace_s=0.005)
    submit = engine.submit

    def failing(*args: Any, **more: Any) -> ScriptedRequest:
        engine.fails_after = 2 if len(engine.requests) == 1 else None
        request = submit(*args, **more)
        time.sleep(0.05)
        return request

    monkeypatch.setattr(engine, "submit", failing)
    with client_of(engine) as client:
        response = post(client, n=3, stream=stream)
        if stream:
            assert '"error":{"message":"The engine has stopped' in response.text.split("\n\n")[-2]
            assert "[DONE]" not in response.text
        else:
            assert response.status_code == 503
    assert all(request.cancelled.is_set() for request in engine.requests)


def test_an_engine_that_stops_between_two_choices_cancels_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = ScriptedEngine("the end " * 50, context=10**6, pace_s=0.005)
    submit = engine.submit

    def stopping(*args: Any, **more: Any) -> ScriptedRequest:
        if engine.requests:
            raise EngineStopped("The engine has stopped.")
        return submit(*args, **more)

    monkeypatch.setattr(engine, "submit", stopping)
    with client_of(engine) as client:
        assert post(client, n=2).status_code == 503
    assert engine.requests[0].wait().reason is FinishReason.CANCELLED


# -- continued messages ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "content", "wanted"),
    [
        ({"continue_final_message": True}, "the ", "assistant: the "),
        ({"continue_final_message": True, "add_generation_prompt": False}, "a", "assistant: a"),
        ({"continue_final_message": True}, [{"type": "text", "text": "a"}], "assistant: a"),
        ({"continue_final_message": True}, None, "assistant: "),
        ({"continue_final_message": True}, "", "assistant: "),
        ({"chat_template_kwargs": {"continue_final_message": True}}, "a", "assistant: a"),
        ({"continue_final_message": False}, "a", "assistant: a\nassistant:"),
        ({"add_generation_prompt": True}, "a", "assistant: a\nassistant:"),
        ({"add_generation_prompt": False}, "a", "assistant: a\n"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "a", "assistant: a\n"),
        ({"chat_template_kwargs": {"add_generation_prompt": False},
          "add_generation_prompt": True}, "a", "assistant: a\nassistant:"),
    ],
)  # fmt: skip
def test_a_prompt_ends_in_the_last_message_or_after_it(
    fields: dict[str, Any], content: Any, wanted: str
) -> None:
    template = """\
{%- for message in messages %}{{ message.role ~ ': ' ~ message.content ~ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""
    engine = ScriptedEngine(template=template)
    messages = [*HELLO, {"role": "assistant", "content": content}]
    with client_of(engine) as client:
        response = post(client, messages=messages, **fields)
        tokens = client.post("/tokenize", json={"messages": messages, **fields}).json()["tokens"]
    assert response.status_code == 200, response.text
    assert engine.requests[0].prompt == "user: Hello\n" + wanted
    assert tokens == engine.requests[0].ids


REASONING = """\
{%- for message in messages %}{{ message.role ~ ':' }}
    {%- if message.reasoning_content %}{{ '<think>' ~ message.reasoning_content ~ '</think>' }}
    {%- endif %}{{ message.content | trim }}!{% endfor %}"""


def test_reasoning_is_continued_as_reasoning() -> None:
    engine = ScriptedEngine(" more</think>yes", template=REASONING)
    last = {"role": "assistant", "reasoning_content": "I see"}
    with client_of(engine) as client:
        (choice,) = post(
            client, messages=[*HELLO, last], continue_final_message=True, stop="more"
        ).json()["choices"]
        post(client, messages=[*HELLO, {**last, "content": "so "}], continue_final_message=True)
    assert (choice["message"]["reasoning"], choice["message"]["content"]) == (" more", "yes")
    assert [request.prompt for request in engine.requests] == [
        "user:Hello!assistant:<think>I see",
        "user:Hello!assistant:<think>I see</think>so ",
    ]


@pytest.mark.parametrize(
    "last",
    [{"role": "user", "content": "a"}, {"role": "tool", "content": "a"},
     {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}],
)  # fmt: skip
def test_a_message_that_cannot_be_continued_is_refused(last: dict[str, Any]) -> None:
    with client_of() as client:
        response = post(client, messages=[*HELLO, last], continue_final_message=True)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "continue_final_message"


def test_a_template_that_leaves_out_the_last_message_cannot_continue_it() -> None:
    with client_of(ScriptedEngine(template="{{ messages[0].content }}")) as client:
        last = {"role": "assistant", "content": "a"}
        response = post(client, messages=[*HELLO, last], continue_final_message=True)
    assert response.json()["error"]["param"] == "continue_final_message"


# -- the wire --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, PLAIN])
@pytest.mark.parametrize("usage", [False, True])
def test_the_last_chunk_has_timings(path: str, usage: bool) -> None:
    with client_of(ScriptedEngine("the end", pace_s=0.002)) as client:
        whole = post(client, path).json()
        options = {"include_usage": usage}
        found = chunks(post(client, path, stream=True, stream_options=options).text)
    assert ["timings" in one for one in found] == [False] * (len(found) - 1) + [True]
    for values in (whole["timings"], found[-1]["timings"]):
        assert values["predicted_n"] == len(TOKENIZER.encode("the end")) + 1
        assert values["prompt_n"] == whole["usage"]["prompt_tokens"]
        assert values["cache_n"] == 0
        assert values["prompt_ms"] > 0 and values["predicted_ms"] > 0
        for name in ("prompt", "predicted"):
            ms, count = values[f"{name}_ms"], values[f"{name}_n"]
            assert values[f"{name}_per_second"] == pytest.approx(1000 * count / ms, rel=0.01)
            assert values[f"{name}_per_token_ms"] == pytest.approx(ms / count, abs=1e-3)


def test_every_chunk_has_timings_on_request() -> None:
    with client_of(ScriptedEngine("the end", pace_s=0.002)) as client:
        found = chunks(post(client, stream=True, timings_per_token=True).text)
    counts = [one["timings"]["predicted_n"] for one in found[1:]]
    assert counts == [*range(1, len(counts)), len(counts)]


def test_timings_of_a_request_without_tokens_are_zero() -> None:
    request = ScriptedRequest([1, 2], None)  # type: ignore[arg-type]
    for times in (RequestTimes(), RequestTimes(started=5.0)):
        request.times = times
        found = timings([request], 0)
        assert (found["prompt_n"], found["predicted_n"]) == (2, 0)
        assert set(found.values()) == {0, 2}
    request.times = RequestTimes(started=1.0, first_token=3.0, last_token=3.0)
    found = timings([request], 1)
    assert (found["prompt_ms"], found["prompt_per_second"]) == (2000, 1)
    assert (found["predicted_ms"], found["predicted_per_second"]) == (0, 0)


@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_a_stream_reports_the_progress_of_its_prefill(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osmium.server.answer.PROGRESS_INTERVAL_S", 0.01)
    engine = ScriptedEngine("the end")
    engine.prefill.clear()

    def advance() -> None:
        request = engine.wait_for_request()
        total = len(request.ids)
        time.sleep(0.1)
        request.prompt_progress = (2, total)
        time.sleep(0.1)
        engine.prefill.set()

    thread = threading.Thread(target=advance)
    thread.start()
    with client_of(engine) as client:
        found = chunks(post(client, path, stream=True, return_progress=True).text)
        thread.join()
        without = post(client, path, stream=True).text
        whole = post(client, path, return_progress=True).json()
    progress = [one["prompt_progress"] for one in found if "prompt_progress" in one]
    total = len(engine.requests[0].ids)
    assert [one["processed"] for one in progress] == [0, 2, total]
    assert {(one["total"], one["cache"]) for one in progress} == {(total, 0)}
    times = [one["time_ms"] for one in progress]
    assert times == sorted(times) and 80 < times[1] < times[2] < 10_000
    first_text = next(
        i
        for i, one in enumerate(found)
        if "the" in str(one["choices"][0].get("delta", one["choices"][0].get("text")))
    )
    assert all("prompt_progress" not in one for one in found[first_text:])
    assert "prompt_progress" not in without and "prompt_progress" not in whole


def test_comments_name_the_prefill_until_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osmium.server.answer.PING_INTERVAL_S", 0.02)
    engine = ScriptedEngine("the end", pace_s=0.1)
    engine.prefill.clear()
    with client_of(engine) as client:
        threading.Timer(0.1, engine.prefill.set).start()
        events = post(client, PLAIN, stream=True).text.split("\n\n")
    first = next(i for i, one in enumerate(events) if one.startswith("data:"))
    assert events[0] == f": prefill 0/{len(engine.requests[0].ids)}"
    comments = [one for one in events[first:] if one.startswith(":")]
    assert comments and set(comments) == {": keep-alive"}


def test_comments_come_at_least_every_ten_seconds() -> None:
    assert answer.PING_INTERVAL_S <= 8, "a busy event loop is late"
