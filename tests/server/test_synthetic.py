"""A synthetic model behind the server, for measurements in real shapes.

It has the bundled model's tokenizer and template, and text for every id.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

import osmium
from osmium.cli import main
from osmium.server.app import BackgroundLoader, create_app
from osmium.weights import synthetic
from tests.server.scripted import BASE_URL, chunks

VOCAB = 24_000
"""Most ids are beyond the tokenizer's 8,192, like in the published shapes."""

HELLO = {"messages": [{"role": "user", "content": "Hello, how are you?"}]}

ID = re.compile("⟨([0-9]+)⟩")


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synthetic._SHAPES, "tiny", {**synthetic._SHAPES["tiny"], "vocab": VOCAB})
        engine = osmium.load("Synthetic:Tiny", "cpu", context=512, prefill_chunk=64)
    assert engine.name == "synthetic:tiny"
    with TestClient(
        create_app(BackgroundLoader(lambda progress: engine)), base_url=BASE_URL
    ) as made:
        while made.get("/health").status_code == 503:
            pass
        yield made


def streamed(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    body = {**HELLO, "stream": True, "stream_options": {"include_usage": True}, **fields}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    answer.content.decode("utf-8")
    assert answer.text.rstrip().endswith("data: [DONE]")
    return chunks(answer.text)


def test_every_token_of_a_stream_has_its_text(client: TestClient) -> None:
    *parts, usage = streamed(client, max_tokens=40)
    assert usage["usage"]["completion_tokens"] == 40
    assert 0 < usage["usage"]["prompt_tokens"] < 60
    assert parts[-1]["choices"][0]["finish_reason"] == "length"
    deltas = [one["choices"][0]["delta"] for one in parts]
    assert not any("reasoning_content" in one for one in deltas), "random output has no reasoning"
    text = "".join(one.get("content", "") for one in deltas)
    ids = [int(one) for one in ID.findall(text)]
    # Two thirds of the vocabulary: 26 of 40 expected; 10 or fewer occur once in 10^7 runs.
    assert len(ids) > 10 and all(8192 <= one < VOCAB for one in ids)
    assert len([one for one in deltas if one.get("content")]) >= len(ids)


def test_a_stream_equals_the_unstreamed_response(client: TestClient) -> None:
    asked = {"max_tokens": 30, "seed": 5}
    whole = client.post("/v1/chat/completions", json={**HELLO, **asked}).json()
    parts = [one["choices"][0]["delta"] for one in streamed(client, **asked)[:-1]]
    text = whole["choices"][0]["message"]["content"]
    assert "".join(one.get("content", "") for one in parts) == text != ""


def test_a_request_without_a_length_ends(client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", json=HELLO).json()
    assert answer["usage"]["completion_tokens"] == 256
    assert answer["choices"][0]["finish_reason"] == "length"
    longer = client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 300}).json()
    assert longer["usage"]["completion_tokens"] == 300


def test_ids_beyond_the_tokenizer_have_names_in_log_probabilities(client: TestClient) -> None:
    asked = {"prompt": "Once", "max_tokens": 12, "logprobs": 3}
    (choice,) = client.post("/v1/completions", json=asked).json()["choices"]
    tokens = choice["logprobs"]["tokens"]
    assert len(tokens) == 12 and any(ID.fullmatch(one) for one in tokens)


def test_a_synthetic_model_generates_on_the_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for more in ([], ["--raw"]):
        asked = ["run", "--device", "cpu", "--context", "256", "--max-tokens", "9", *more]
        assert main([*asked, "SYNTHETIC:tiny:2", "hi"]) == 0
        assert capsys.readouterr().out.strip()
