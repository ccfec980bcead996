"""The openai package against the fields of the API, with the scripted engine on a socket."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from osmium.server.limits import Limits
from tests.server.running import run_limited
from tests.server.scripted import ScriptedEngine

openai: Any = pytest.importorskip("openai", reason="openai is in the dev extra")

HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client() -> Iterator[Any]:
    with run_limited(ScriptedEngine("the end"), Limits()) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        with closing(openai.OpenAI(base_url=url, api_key="x", max_retries=0)) as made:
            yield made


def test_several_choices_whole_and_streamed(client: Any) -> None:
    whole = client.chat.completions.create(model="m", messages=HELLO, n=3)
    assert [choice.message.content for choice in whole.choices] == ["the end"] * 3
    texts = {0: "", 1: ""}
    with client.chat.completions.create(model="m", messages=HELLO, n=2, stream=True) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    assert texts == {0: "the end", 1: "the end"}
    plain = client.completions.create(model="m", prompt="Hello", n=2, best_of=2)
    assert [choice.text for choice in plain.choices] == ["the end"] * 2


def test_prompts_are_completed_and_scored_together(client: Any) -> None:
    prompts = ["in the", "of the end"]
    found = client.completions.create(
        model="m", prompt=prompts, echo=True, logprobs=1, max_tokens=0, temperature=0
    )
    assert [choice.text for choice in found.choices] == prompts
    for choice in found.choices:
        assert "".join(choice.logprobs.tokens) == choice.text
        assert choice.logprobs.token_logprobs[0] is None
        assert all(one < 0 for one in choice.logprobs.token_logprobs[1:])
    texts = dict.fromkeys(range(4), "")
    with client.completions.create(
        model="m", prompt=prompts, n=2, echo=True, stream=True
    ) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    assert [*texts.values()] == [prompt + "the end" for prompt in prompts for _ in range(2)]
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="m", prompt=["fine", "x" * 999])
    assert (refused.value.param, refused.value.code) == ("prompt[1]", "context_length_exceeded")


def test_any_model_can_be_retrieved(client: Any) -> None:
    model = client.models.retrieve("gpt-4o")
    assert (model.id, model.max_model_len) == ("scripted", 200)


def test_an_ignored_field_is_in_the_raw_responses_headers(client: Any) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="m", messages=HELLO, store=False, metadata={"a": "b"}, verbosity="low",
        extra_body={"temprature": 1},
    )  # fmt: skip
    assert raw.headers["x-osmium-ignored"] == "verbosity, temprature"
    assert raw.parse().choices[0].message.content == "the end"


def test_unsupported_endpoints_and_fields_are_the_packages_errors(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.embeddings.create(model="m", input="x")
    assert missing.value.code == "unsupported_endpoint"
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="x")
    with pytest.raises(openai.NotFoundError):
        client.audio.speech.create(model="m", voice="alloy", input="x")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="m", messages=HELLO, modalities=["text", "audio"])
    assert refused.value.param == "modalities"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="m", messages=HELLO, reasoning_effort="banana")
    assert refused.value.param == "reasoning_effort"


def test_extra_fields_of_the_body_are_honoured(client: Any) -> None:
    body = {"min_tokens": 2, "return_progress": True, "include_reasoning": True}
    options = {"include_usage": True}
    with client.chat.completions.create(
        model="m", messages=HELLO, stream=True, stream_options=options, stop="the", extra_body=body
    ) as stream:
        found = list(stream)
    text = "".join(one.choices[0].delta.content or "" for one in found if one.choices)
    assert text == "the end", "stop texts do not count before min_tokens"
    assert found[-1].usage.completion_tokens > 0
    assert found[-1].timings["predicted_n"] == found[-1].usage.completion_tokens
