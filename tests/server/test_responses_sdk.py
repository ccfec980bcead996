"""The Responses API with the openai package: the scripted engine, and the demo model on the CPU."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from starlette.testclient import TestClient

import osmium
from osmium.server.app import BackgroundLoader, create_app
from tests.server.scripted import BASE_URL, ScriptedEngine, client_of
from tests.server.test_responses import THOUGHT, WEATHER, engine_of
from tests.server.test_tool_calls import CALL


@contextmanager
def sdk(engine: ScriptedEngine) -> Iterator[Any]:
    with client_of(engine) as http:
        yield client_over(http)


def client_over(http: TestClient) -> Any:
    return openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key="none", http_client=http, max_retries=0)


def test_a_tool_round_ends_in_text() -> None:
    engine = engine_of(CALL)
    with sdk(engine) as client:
        first = client.responses.create(model="any", input="Weather?", tools=[WEATHER])
        (call,) = [item for item in first.output if item.type == "function_call"]
        assert json.loads(call.arguments) == {"city": "Paris", "days": 3}
        assert first.output_text == "I look it up."
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "Sun"}
        last = client.responses.create(
            model="any", input=[output], previous_response_id=first.id, tools=[WEATHER]
        )
        again = client.responses.create(
            model="any", tools=[WEATHER], store=False,
            input=[{"role": "user", "content": "Weather?"}, *first.output, output],
        )  # fmt: skip
    assert last.status == again.status == "completed"
    assert engine.requests[1].prompt == engine.requests[2].prompt, "both ways are the same chat"
    assert engine.requests[1].prompt.endswith("tool: Sun\nassistant:")


def test_the_streams_helper_assembles_text_and_calls() -> None:
    with (
        sdk(engine_of(THOUGHT + CALL)) as client,
        client.responses.stream(
            model="any", input="Weather?", tools=[WEATHER], extra_body={"enable_thinking": True}
        ) as stream,
    ):
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert final.output_text == "I look it up."
    assert final.output[0].content[0].text == "I think."
    assert final.output[2].parsed_arguments == {"city": "Paris", "days": 3}
    assert final.usage.output_tokens_details.reasoning_tokens > 0


def test_kept_responses_are_retrieved_listed_and_deleted() -> None:
    with sdk(engine_of()) as client:
        made = client.responses.create(model="any", input="Hello", metadata={"a": "b"})
        found = client.responses.retrieve(made.id)
        assert (found.output_text, found.metadata) == ("the end", {"a": "b"})
        (item,) = client.responses.input_items.list(made.id)
        assert item.content[0].text == "Hello"
        with pytest.raises(openai.BadRequestError):
            client.responses.cancel(made.id)
        client.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(made.id)
        with pytest.raises(openai.BadRequestError) as missing:
            client.responses.create(model="any", input="x", previous_response_id=made.id)
    assert missing.value.code == "previous_response_not_found"


def test_errors_are_the_packages_own() -> None:
    with sdk(engine_of(fails_after=2)) as client:
        with pytest.raises(openai.InternalServerError):
            client.responses.create(model="any", input="Hello")
        events = list(client.responses.create(model="any", input="Hello", stream=True))
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model="any", input="word " * 5000)
    assert [event.type for event in events[-2:]] == ["response.failed", "error"]
    assert "the card is gone" in events[-1].message
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "input"


@pytest.fixture(scope="module")
def demo() -> Iterator[Any]:
    engine = osmium.load(device="cpu")
    loader = BackgroundLoader(lambda progress: engine)
    with TestClient(create_app(loader), base_url=BASE_URL) as http:
        while http.get("/health").status_code == 503:
            pass
        yield client_over(http)


QUESTION = "What is the capital of France?"


def test_the_demo_answers_whole_and_streamed(demo: Any) -> None:
    whole = demo.responses.create(model="any", input=QUESTION)
    assert whole.output_text == "Paris." and whole.model == "demo"
    with demo.responses.stream(model="any", input=QUESTION) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
    assert text == whole.output_text
    counted = demo.responses.input_tokens.count(model="any", input=QUESTION)
    assert counted.input_tokens == whole.usage.input_tokens


def test_the_demo_reasons_first(demo: Any) -> None:
    made = demo.responses.create(
        model="any", input=QUESTION, reasoning={"effort": "low", "summary": "auto"},
        include=["reasoning.encrypted_content"], extra_body={"enable_thinking": True},
    )  # fmt: skip
    reasoning, message = made.output
    assert reasoning.summary[0].text == reasoning.content[0].text != ""
    details = made.usage.output_tokens_details
    assert 0 < details.reasoning_tokens < made.usage.output_tokens
    again = demo.responses.create(
        model="any", store=False, input=[{"role": "user", "content": QUESTION}, *made.output,
                                         {"role": "user", "content": "Hello!"}],
    )  # fmt: skip
    assert message.role == "assistant" and again.status == "completed"


class City(BaseModel):
    city: str
    big: bool


def test_the_demos_answer_parses_as_a_type(demo: Any) -> None:
    parsed = demo.responses.parse(model="any", input=QUESTION, text_format=City)
    assert isinstance(parsed.output_parsed, City)
    assert parsed.text.format.name == "City"
    fields = {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 40}
    made = demo.responses.create(model="any", input=QUESTION, **fields)
    assert isinstance(json.loads(made.output_text), dict)
    with pytest.raises(openai.BadRequestError) as refused:
        schema = {"type": "json_schema", "name": "x", "schema": {"not": {}}}
        demo.responses.create(model="any", input=QUESTION, text={"format": schema})
    assert str(refused.value.param).startswith("text.format.schema")


def test_the_demo_continues_a_response(demo: Any) -> None:
    first = demo.responses.create(model="any", input=QUESTION)
    second = demo.responses.create(model="any", input="Hello!", previous_response_id=first.id)
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
