"""The anthropic package with a live server: text, thinking, tools, structured output, errors.

The engine is the product's, with scripted responses (tests/agents/scripted_model.py).
"""

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

anthropic: Any = pytest.importorskip("anthropic", reason="anthropic is in the dev extra")

FILES: list[Any] = [
    {"name": name, "description": "On a text file.", "input_schema": schema}
    for name, schema in FILE_TOOLS.items()
]

THINKING: Any = {"type": "adaptive"}


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """A client of a server with the scripted model."""
    with live_client(connected) as made:
        yield made


def connected(port: int, key: str = "x") -> Any:
    """A client that does not repeat failed requests."""
    return closing(
        anthropic.Anthropic(base_url=f"http://127.0.0.1:{port}", api_key=key, max_retries=0)
    )


def create(client: Any, messages: list[Any], **options: Any) -> Any:
    return client.messages.create(
        **{"model": "any", "max_tokens": 500, "messages": messages, **options}
    )


# -- text and thinking -----------------------------------------------------------------------------


def test_a_response_has_text_and_usage(client: Any) -> None:
    done = create(client, user(QUESTION), system="Be brief.")
    (block,) = done.content
    assert block.type == "text" and ANSWER in block.text
    assert done.model == NAME and done.stop_reason == "end_turn"
    counted = client.messages.count_tokens(model="any", messages=user(QUESTION), system="Be brief.")
    assert done.usage.input_tokens == counted.input_tokens and done.usage.output_tokens > 0


def test_thinking_is_a_block_before_the_text(client: Any) -> None:
    done = create(client, user(QUESTION), thinking=THINKING)
    thinking, text = done.content
    assert thinking.type == "thinking" and thinking.thinking == "I look at what is asked."
    assert text.type == "text" and ANSWER in text.text


def test_a_stream_accumulates_to_the_same_message(client: Any) -> None:
    whole = create(client, user(QUESTION), thinking=THINKING)
    with client.messages.stream(
        model="any", max_tokens=500, messages=user(QUESTION), thinking=THINKING
    ) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    assert [block.model_dump() for block in message.content] == [
        block.model_dump() for block in whole.content
    ]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert message.usage.output_tokens == whole.usage.output_tokens


def test_a_limit_of_tokens_and_a_stop_text_end_a_response(client: Any) -> None:
    assert create(client, user(QUESTION), max_tokens=2).stop_reason == "max_tokens"
    stopped = create(client, user(QUESTION), stop_sequences=[ANSWER])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", ANSWER)
    assert ANSWER not in stopped.content[0].text


# -- tools -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("thinking", [{"type": "disabled"}, THINKING])
def test_rounds_of_tools_end_in_a_text(client: Any, streams: bool, thinking: Any) -> None:
    messages, calls = user(task("/tmp/a", "/tmp/b")), []
    options: dict[str, Any] = {"tools": FILES, "thinking": thinking}
    for _ in range(3):
        if streams:
            with client.messages.stream(
                model="any", max_tokens=500, messages=messages, **options
            ) as stream:
                message = stream.get_final_message()
        else:
            message = create(client, messages, **options)
        messages.append({"role": "assistant", "content": message.content})
        results = []
        for block in message.content:
            if block.type == "tool_use":
                assert message.stop_reason == "tool_use"
                calls.append((block.name, block.input))
                results.append(
                    {"type": "tool_result", "tool_use_id": block.id,
                     "content": [{"type": "text", "text": WORD}]}
                )  # fmt: skip
        messages += user(results) if results else []
    assert calls == [
        ("read_file", {"path": "/tmp/a"}),
        ("write_file", {"path": "/tmp/b", "content": f"{WORD}\n"}),
    ]
    assert WORD in message.content[-1].text and message.stop_reason == "end_turn"


def test_the_input_of_a_tool_is_streamed_as_it_comes(client: Any) -> None:
    path = "/tmp/" + "long" * 20
    with client.messages.stream(
        model="any", max_tokens=500, messages=user(task(path, "/tmp/b")), tools=FILES
    ) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        message = stream.get_final_message()
    assert len(pieces) > 5 and message.content[-1].input == {"path": path}


def test_the_packages_own_loop_runs_the_tools(client: Any) -> None:
    calls: list[Any] = []

    @anthropic.beta_tool  # type: ignore[untyped-decorator]
    def read_file(path: str) -> str:
        """Read a text file."""
        calls.append(path)
        return WORD

    @anthropic.beta_tool  # type: ignore[untyped-decorator]
    def write_file(path: str, content: str) -> str:
        """Write a text file."""
        calls.append((path, content))
        return "written"

    final = client.beta.messages.tool_runner(
        model="any", max_tokens=500, tools=[read_file, write_file],
        messages=user(task("/tmp/a", "/tmp/b")),
    ).until_done()  # fmt: skip
    assert calls == ["/tmp/a", ("/tmp/b", f"{WORD}\n")] and WORD in final.content[-1].text


# -- structured output -----------------------------------------------------------------------------


@pytest.mark.parametrize("thinking", [{"type": "disabled"}, THINKING])
def test_parse_returns_the_type(client: Any, thinking: Any) -> None:
    done = client.messages.parse(
        model="any", max_tokens=500, messages=user(PARIS), output_format=City, thinking=thinking
    )
    assert done.parsed_output == City(city="Paris", population=2100000)


# -- cancelling ------------------------------------------------------------------------------------


def test_closing_a_stream_cancels_the_request() -> None:
    engine = ScriptedEngine("the end " * 400, context=10_000, pace_s=0.005)
    with run_limited(engine, Limits()) as server, connected(server.port) as client:
        with client.messages.stream(model="any", max_tokens=5000, messages=user("Hello")) as stream:
            next(stream.text_stream)
        request = engine.wait_for_request()
        assert request.cancelled.wait(PATIENCE_S) and request.wait().reason == "cancelled"


# -- errors ----------------------------------------------------------------------------------------


def test_a_wrong_value_is_a_bad_request(client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match="temperature") as wrong:
        create(client, user("Hello"), extra_body={"temperature": -1})
    assert wrong.value.body["error"]["type"] == "invalid_request_error"
    assert wrong.value.request_id.startswith("req_")
    image = {"type": "image",
             "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}  # fmt: skip
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\]"):
        create(client, user([image]))


def test_an_unknown_route_is_not_found(client: Any) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.batches.list()


def test_a_prompt_longer_than_the_context_has_both_numbers(client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError) as overflow:
        create(client, user("word " * CONTEXT), stream=True)
    text = overflow.value.body["error"]["message"]
    assert text.startswith("prompt is too long: ") and text.endswith(" maximum")
    assert f"> {CONTEXT} maximum" in text


def test_a_wrong_key_is_an_authentication_error() -> None:
    with run_limited(ScriptedEngine(), Limits(), api_key="right-key-of-the-test") as server:
        with connected(server.port) as client:
            with pytest.raises(anthropic.AuthenticationError) as wrong:
                create(client, user("Hello"))
        assert wrong.value.body["error"]["type"] == "authentication_error"
        with connected(server.port, "right-key-of-the-test") as client:
            assert create(client, user("Hello")).content[0].text == "the end"


def test_a_stopped_engine_is_overloaded_at_once() -> None:
    engine = ScriptedEngine()
    with run_limited(engine, Limits()) as server, connected(server.port) as client:
        engine.stopped = EngineStopped("The card is gone.")
        for stream in (False, True):
            with pytest.raises(anthropic.APIStatusError, match="card is gone") as stopped:
                create(client, user("Hi"), stream=stream)
            assert stopped.value.status_code == 503
            assert stopped.value.body["error"]["type"] == "overloaded_error"


def test_an_error_in_a_stream_is_raised_after_the_text_so_far() -> None:
    engine = ScriptedEngine("the end of it", fails_after=3)
    with run_limited(engine, Limits()) as server, connected(server.port) as client:
        text = ""
        with pytest.raises(anthropic.APIStatusError, match="card is gone"):
            with client.messages.stream(
                model="any", max_tokens=500, messages=user("Hello")
            ) as stream:
                for piece in stream.text_stream:
                    text += piece
        assert text and "the end of it".startswith(text)
