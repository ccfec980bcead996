"""The openai package's responses with a live server: text, tools, structured output, errors.

The engine is the product's, with scripted responses (tests/agents/scripted_model.py).
"""

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from osmium.errors import EngineStopped
from osmium.server.limits import Limits
from tests.agents.script import ANSWER, QUESTION, task
from tests.agents.scripted_model import NAME
from tests.server.live import CONTEXT, FILE_TOOLS, PARIS, WORD, City, live_client
from tests.server.running import run_limited
from tests.server.scripted import PATIENCE_S, ScriptedEngine

openai: Any = pytest.importorskip("openai", reason="openai is in the dev extra")

FILES: list[Any] = [
    {"type": "function", "name": name, "strict": False, "parameters": schema}
    for name, schema in FILE_TOOLS.items()
]


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """A client of a server with the scripted model."""
    with live_client(connected) as made:
        yield made


def connected(port: int, key: str = "x") -> Any:
    """A client that does not repeat failed requests."""
    return closing(
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)
    )


def calls_of(response: Any) -> list[Any]:
    return [item for item in response.output if item.type == "function_call"]


# -- text and reasoning ----------------------------------------------------------------------------


def test_a_response_has_reasoning_text_and_usage(client: Any) -> None:
    done = client.responses.create(model="any", input=QUESTION, instructions="Be brief.")
    assert [item.type for item in done.output] == ["reasoning", "message"]
    assert ANSWER in done.output_text and done.status == "completed" and done.model == NAME
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens
    assert done.usage.input_tokens_details.cached_tokens == 0


def test_a_stream_has_numbered_events_and_the_same_text(client: Any) -> None:
    with client.responses.create(model="any", input=QUESTION, stream=True) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == events[-1].response.output_text and ANSWER in text
    with client.responses.stream(model="any", input=QUESTION) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == text


def test_a_limit_of_tokens_makes_a_response_incomplete(client: Any) -> None:
    done = client.responses.create(model="any", input=QUESTION, max_output_tokens=2)
    assert done.status == "incomplete"
    assert done.incomplete_details.reason == "max_output_tokens"


# -- tools -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
def test_rounds_of_tools_end_in_a_text(client: Any, streams: bool) -> None:
    items: list[Any] = [{"role": "user", "content": task("/tmp/a", "/tmp/b")}]
    calls = []
    options: dict[str, Any] = {"model": "any", "tools": FILES, "store": False}
    for _ in range(3):
        if streams:
            with client.responses.stream(input=items, **options) as stream:
                for _ in stream:
                    pass
                response = stream.get_final_response()
        else:
            response = client.responses.create(input=items, **options)
        items += response.output
        for call in calls_of(response):
            calls.append((call.name, json.loads(call.arguments)))
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": WORD})
    assert calls == [
        ("read_file", {"path": "/tmp/a"}),
        ("write_file", {"path": "/tmp/b", "content": f"{WORD}\n"}),
    ]
    assert WORD in response.output_text


def test_arguments_of_a_call_are_streamed_as_they_come(client: Any) -> None:
    path = "/tmp/" + "long" * 20
    with client.responses.create(
        model="any", input=task(path, "/tmp/b"), tools=FILES, stream=True
    ) as stream:
        pieces = [
            event.delta for event in stream
            if event.type == "response.function_call_arguments.delta"
        ]  # fmt: skip
    assert len(pieces) > 5 and json.loads("".join(pieces)) == {"path": path}


# -- structured output -----------------------------------------------------------------------------


def test_parse_returns_the_type(client: Any) -> None:
    done = client.responses.parse(model="any", input=PARIS, text_format=City)
    assert done.output_parsed == City(city="Paris", population=2100000)


def test_a_streamed_parse_returns_the_type(client: Any) -> None:
    with client.responses.stream(model="any", input=PARIS, text_format=City) as stream:
        for _ in stream:
            pass
        done = stream.get_final_response()
    assert done.output_parsed == City(city="Paris", population=2100000)


# -- cancelling ------------------------------------------------------------------------------------


def test_closing_a_stream_cancels_the_request() -> None:
    engine = ScriptedEngine("the end " * 400, context=10_000, pace_s=0.005)
    with run_limited(engine, Limits()) as server, connected(server.port) as client:
        stream = client.responses.create(model="any", input="Hello", stream=True)
        for event in stream:
            if event.type == "response.output_text.delta":
                break
        stream.close()
        request = engine.wait_for_request()
        assert request.cancelled.wait(PATIENCE_S) and request.wait().reason == "cancelled"


# -- errors ----------------------------------------------------------------------------------------


def test_a_wrong_value_is_a_bad_request(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.responses.create(model="any", input="Hello", temperature=-1)
    assert wrong.value.param == "temperature"
    image = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="any", input=[{"role": "user", "content": [image]}])
    assert refused.value.param == "input[0].content[0]"


def test_a_prompt_longer_than_the_context_has_the_code_that_agents_look_for(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as overflow:
        client.responses.create(model="any", input="word " * CONTEXT)
    assert overflow.value.code == "context_length_exceeded"


def test_a_wrong_key_is_an_authentication_error() -> None:
    with run_limited(ScriptedEngine(), Limits(), api_key="right-key-of-the-test") as server:
        with connected(server.port) as client, pytest.raises(openai.AuthenticationError):
            client.responses.create(model="any", input="Hello")
        with connected(server.port, "right-key-of-the-test") as client:
            assert client.responses.create(model="any", input="Hi").output_text == "the end"


def test_a_stopped_engine_is_an_internal_server_error_at_once() -> None:
    engine = ScriptedEngine()
    with run_limited(engine, Limits()) as server, connected(server.port) as client:
        engine.stopped = EngineStopped("The card is gone.")
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as stopped:
                client.responses.create(model="any", input="Hi", stream=stream)
            assert stopped.value.status_code == 503 and "card is gone" in str(stopped.value)


def test_an_error_in_a_stream_is_raised_or_an_event_after_the_text_so_far() -> None:
    engine = ScriptedEngine("the end of it", fails_after=3)
    with run_limited(engine, Limits()) as server, connected(server.port) as client:
        stream = client.responses.create(model="any", input="Hello", stream=True)
        text, problem = "", ""
        try:
            for event in stream:
                if event.type == "response.output_text.delta":
                    text += event.delta
                if event.type == "response.failed":
                    problem = event.response.error.message
                if event.type == "error":
                    problem = event.message
        except openai.APIError as error:
            problem = str(error)
        assert text and "the end of it".startswith(text) and "card is gone" in problem
