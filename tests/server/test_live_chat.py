"""The openai package's chats with a live server: text, tools, structured output, errors.

The engine is the product's, with scripted responses (tests/agents/scripted_model.py).
"""

import json
import math
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from osmium.errors import EngineStopped
from osmium.server.limits import Limits
from tests.agents.script import ANSWER, QUESTION, task
from tests.agents.scripted_model import NAME
from tests.server.live import CONTEXT, FILE_TOOLS, PARIS, WORD, City, live_client, user
from tests.server.running import run_limited
from tests.server.scripted import PATIENCE_S, ScriptedEngine

openai: Any = pytest.importorskip("openai", reason="openai is in the dev extra")

FILES: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
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


# -- text and reasoning ----------------------------------------------------------------------------


def test_a_response_has_content_reasoning_and_usage(client: Any) -> None:
    done = client.chat.completions.create(model="any", messages=user(QUESTION))
    choice = done.choices[0]
    assert ANSWER in choice.message.content and choice.finish_reason == "stop"
    assert choice.message.reasoning_content == "I look at what is asked."
    assert done.model == NAME and done.usage.completion_tokens > 0
    assert done.usage.prompt_tokens_details.cached_tokens == 0


def test_a_stream_has_the_same_text_and_ends_with_the_usage(client: Any) -> None:
    with client.chat.completions.create(
        model="any", messages=user(QUESTION), stream=True, stream_options={"include_usage": True}
    ) as stream:
        found = list(stream)
    deltas = [chunk.choices[0].delta for chunk in found if chunk.choices]
    assert deltas[0].role == "assistant"
    assert ANSWER in "".join(delta.content or "" for delta in deltas)
    reasoning = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    assert "".join(reasoning) == "I look at what is asked."
    assert found[-1].usage.total_tokens > found[-1].usage.prompt_tokens
    assert len({chunk.id for chunk in found}) == 1


def test_log_probabilities_cover_the_content(client: Any) -> None:
    done = client.chat.completions.create(
        model="any", messages=user(QUESTION), logprobs=True, top_logprobs=2,
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )  # fmt: skip
    tokens = done.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == done.choices[0].message.content
    for token in tokens:
        assert math.isclose(token.logprob, 0, abs_tol=1e-3) and len(token.top_logprobs) == 2
        assert token.top_logprobs[0].token == token.token
        assert bytes(token.bytes).decode() == token.token


# -- tools -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
def test_rounds_of_tools_end_in_a_text(client: Any, streams: bool) -> None:
    messages, names = user(task("/tmp/a", "/tmp/b")), []
    for _ in range(3):
        if streams:
            with client.chat.completions.stream(
                model="any", messages=messages, tools=FILES
            ) as stream:
                choice = stream.get_final_completion().choices[0]
        else:
            done = client.chat.completions.create(model="any", messages=messages, tools=FILES)
            choice = done.choices[0]
        messages.append(choice.message)
        for call in choice.message.tool_calls or ():
            assert choice.finish_reason == "tool_calls"
            names.append((call.function.name, json.loads(call.function.arguments)))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": WORD})
    assert names == [
        ("read_file", {"path": "/tmp/a"}),
        ("write_file", {"path": "/tmp/b", "content": f"{WORD}\n"}),
    ]
    assert WORD in choice.message.content and choice.finish_reason == "stop"


def test_arguments_of_a_call_are_streamed_as_they_come(client: Any) -> None:
    with client.chat.completions.create(
        model="any", messages=user(task("/tmp/" + "long" * 20, "/tmp/b")), tools=FILES, stream=True
    ) as stream:
        calls = [c.choices[0].delta.tool_calls[0] for c in stream if c.choices[0].delta.tool_calls]
    pieces = [call.function.arguments for call in calls]
    assert len([piece for piece in pieces if piece]) > 5
    assert json.loads("".join(pieces)) == {"path": "/tmp/" + "long" * 20}


# -- structured output -----------------------------------------------------------------------------


def test_parse_returns_the_type(client: Any) -> None:
    done = client.chat.completions.parse(model="any", messages=user(PARIS), response_format=City)
    message = done.choices[0].message
    assert message.parsed == City(city="Paris", population=2100000)
    assert message.reasoning_content == "I look at what is asked."


def test_a_streamed_parse_returns_the_type(client: Any) -> None:
    with client.chat.completions.stream(
        model="any", messages=user(PARIS), response_format=City
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.parsed == City(city="Paris", population=2100000)


def test_parse_of_a_tool_returns_its_arguments(client: Any) -> None:
    done = client.chat.completions.parse(
        model="any", messages=user(PARIS), tools=[openai.pydantic_function_tool(City)]
    )
    (call,) = done.choices[0].message.tool_calls
    assert call.function.parsed_arguments == City(city="Paris", population=2100000)


def test_a_response_whose_model_writes_no_json_is_still_of_the_type(client: Any) -> None:
    """The script's text is no JSON: the mask alone makes it one."""
    schema = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": City.model_json_schema()},
    }
    done = client.chat.completions.create(
        model="any", messages=user(QUESTION), response_format=schema, max_tokens=80, temperature=0
    )
    City.model_validate_json(done.choices[0].message.content)


# -- cancelling ------------------------------------------------------------------------------------


def test_closing_a_stream_cancels_the_request() -> None:
    engine = ScriptedEngine("the end " * 400, context=10_000, pace_s=0.005)
    with run_limited(engine, Limits()) as server, connected(server.port) as client:
        stream = client.chat.completions.create(model="any", messages=user("Hello"), stream=True)
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        stream.close()
        request = engine.wait_for_request()
        assert request.cancelled.wait(PATIENCE_S) and request.wait().reason == "cancelled"


# -- errors ----------------------------------------------------------------------------------------


def test_a_wrong_value_is_a_bad_request(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="any", messages=user("Hello"), temperature=-1)
    assert wrong.value.param == "temperature" and wrong.value.status_code == 400
    with pytest.raises(openai.BadRequestError) as image:
        parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
        client.chat.completions.create(model="any", messages=[{"role": "user", "content": parts}])
    assert image.value.param == "messages[0].content[0]"


def test_an_unknown_route_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.moderations.create(input="x")
    assert missing.value.code == "unsupported_endpoint"


def test_a_prompt_longer_than_the_context_has_the_code_that_agents_look_for(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as overflow:
        client.chat.completions.create(model="any", messages=user("word " * CONTEXT), stream=True)
    assert overflow.value.code == "context_length_exceeded" and overflow.value.param == "messages"
    assert f"maximum context length is {CONTEXT} tokens" in str(overflow.value)


def test_a_wrong_key_is_an_authentication_error() -> None:
    with run_limited(ScriptedEngine(), Limits(), api_key="right-key-of-the-test") as server:
        with connected(server.port) as client, pytest.raises(openai.AuthenticationError) as wrong:
            client.models.list()
        assert wrong.value.status_code == 401
        with connected(server.port, "right-key-of-the-test") as client:
            assert [model.id for model in client.models.list()] == ["scripted"]


def test_a_stopped_engine_is_an_internal_server_error_at_once() -> None:
    engine = ScriptedEngine()
    with run_limited(engine, Limits()) as server, connected(server.port) as client:
        engine.stopped = EngineStopped("The card is gone.")
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as stopped:
                client.chat.completions.create(model="any", messages=user("Hi"), stream=stream)
            assert stopped.value.status_code == 503 and "card is gone" in str(stopped.value)
            assert stopped.value.response.headers["retry-after"]


def test_an_error_in_a_stream_is_raised_after_the_text_so_far() -> None:
    engine = ScriptedEngine("the end of it", fails_after=3)
    with run_limited(engine, Limits()) as server, connected(server.port) as client:
        stream = client.chat.completions.create(model="any", messages=user("Hello"), stream=True)
        text = ""
        with pytest.raises(openai.APIError) as failed:
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
        assert text and "the end of it".startswith(text) and "card is gone" in str(failed.value)
