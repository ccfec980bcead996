"""The anthropic package against /v1/messages, with the scripted engine on a socket."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from osmium.server.limits import Limits
from tests.server.running import run_limited
from tests.server.scripted import ScriptedEngine, client_of
from tests.server.test_messages import HELLO, THINKING, WEATHER, post
from tests.server.test_tool_calls import CALL, TWO_CALLS, engine_of

anthropic: Any = pytest.importorskip("anthropic", reason="anthropic is in the dev extra")
pydantic: Any = pytest.importorskip("pydantic", reason="anthropic needs it")


@contextmanager
def sdk_of(engine: ScriptedEngine) -> Iterator[Any]:
    with run_limited(engine, Limits()) as server:
        url = f"http://127.0.0.1:{server.port}"
        with closing(anthropic.Anthropic(base_url=url, api_key="x", max_retries=0)) as client:
            yield client


def create(client: Any, **fields: Any) -> Any:
    return client.messages.create(model="m", max_tokens=1000, messages=HELLO, **fields)


def validated(kind: Any, value: dict[str, Any]) -> Any:
    """A value as one of the package's types, without conversions."""
    return pydantic.TypeAdapter(kind).validate_python(value, strict=True)


# -- types -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "fields"),
    [
        ("the end", {}),
        ("", {}),
        ("the end", {"stop_sequences": ["end"]}),
        ("the end", {"max_tokens": 2}),
        (f"I see</think>{TWO_CALLS}", {"tools": [WEATHER], **THINKING}),
    ],
)
def test_messages_and_events_are_of_the_packages_types(said: str, fields: Any) -> None:
    types = anthropic.types
    with client_of(engine_of(said)) as client:
        message = validated(types.Message, post(client, **fields).json())
        streamed = post(client, stream=True, **fields).text
        error = post(client, max_tokens=0).json()
    assert message.model_extra == {}
    for block in message.content:
        assert block.model_extra == {}
    events = [line for line in streamed.split("\n") if line.startswith("data:")]
    for event in events:
        value = json.loads(event.removeprefix("data: "))
        if value["type"] != "ping":
            assert validated(types.RawMessageStreamEvent, value).model_extra == {}
    assert validated(types.ErrorResponse, error).error.type == "invalid_request_error"


# -- the client ------------------------------------------------------------------------------------


def test_a_message_whole_and_streamed() -> None:
    with sdk_of(ScriptedEngine("the end")) as client:
        message = create(client, system="Be brief.")
        with client.messages.stream(model="m", max_tokens=99, messages=HELLO) as stream:
            streamed = "".join(stream.text_stream)
            final = stream.get_final_message()
    assert message.content[0].text == streamed == final.content[0].text == "the end"
    assert (message.stop_reason, final.stop_reason) == ("end_turn", "end_turn")
    assert message._request_id.startswith("req_")
    assert final.usage.input_tokens > 0 and final.usage.output_tokens > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_round_with_a_tool(stream: bool) -> None:
    engine = engine_of(f"I see</think>{CALL}")
    with sdk_of(engine) as client:
        fields: Any = {"model": "m", "max_tokens": 1000, "tools": [WEATHER], **THINKING}
        if stream:
            with client.messages.stream(messages=HELLO, **fields) as events:
                message = events.get_final_message()
        else:
            message = client.messages.create(messages=HELLO, **fields)
        thinking, text, call = message.content
        assert (thinking.thinking, text.text) == ("I see", "I look it up.")
        assert (call.name, call.input) == ("weather", {"city": "Paris", "days": 3})
        assert message.stop_reason == "tool_use"
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
        turns = [
            *HELLO,
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [result, {"type": "text", "text": "Well?"}]},
        ]
        client.messages.create(messages=turns, **fields)
        counted = client.messages.count_tokens(
            model="m", messages=turns, tools=[WEATHER], **THINKING
        )
    prompt = engine.requests[1].prompt
    assert prompt.endswith(
        "user: Hello\nassistant: I look it up.\ntool: sunny\nuser: Well?\nassistant:<think>\n"
    )
    assert counted.input_tokens == len(engine.requests[1].ids)


def test_the_beta_endpoint_and_a_stop_sequence() -> None:
    with sdk_of(ScriptedEngine("the end")) as client:
        message = client.beta.messages.create(
            model="m", max_tokens=99, messages=HELLO, stop_sequences=["end"],
            betas=["context-management-2025-06-27"],
        )  # fmt: skip
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "end")


def test_errors_are_the_packages_classes() -> None:
    engine = ScriptedEngine("the end " * 50, context=100, fails_after=3)
    with sdk_of(engine) as client:
        with pytest.raises(anthropic.BadRequestError) as long:
            create(client, system="a " * 100)
        assert "prompt is too long" in long.value.message
        assert long.value.body["error"]["type"] == "invalid_request_error"
        with pytest.raises(anthropic.BadRequestError):
            create(client, stop_sequences=[""])
        with pytest.raises(anthropic.NotFoundError):
            client.messages.batches.list()
        with pytest.raises(anthropic.InternalServerError):
            create(client)
        with pytest.raises(anthropic.APIStatusError) as failed:
            with client.messages.stream(model="m", max_tokens=99, messages=HELLO) as stream:
                for _ in stream:
                    pass
        assert failed.value.body["error"]["type"] == "overloaded_error"


def test_models_are_listed_and_retrieved() -> None:
    with sdk_of(ScriptedEngine()) as client:
        (entry,) = client.models.list()
        one = client.models.retrieve("claude-anything")
    assert (entry.id, entry.type, entry.max_input_tokens) == ("scripted", "model", 200)
    assert one == entry and one.created_at.year >= 2026


def test_leaving_a_stream_cancels_the_message() -> None:
    engine = ScriptedEngine("the end " * 200, context=10**6, pace_s=0.005)
    with sdk_of(engine) as client:
        with client.messages.stream(model="m", max_tokens=999, messages=HELLO) as stream:
            next(stream.text_stream)
        assert engine.requests[0].wait().completion_tokens < 999
        assert engine.requests[0].cancelled.is_set()
