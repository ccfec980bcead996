"""End to end: the bundled demo model behind the server, on the CPU."""

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

import osmium
from osmium.server.app import BackgroundLoader, create_app
from tests.server.scripted import BASE_URL, chunks

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    engine = osmium.load(device="cpu")
    host = BackgroundLoader(lambda progress: engine)
    with TestClient(create_app(host), base_url=BASE_URL) as made:
        while made.get("/health").status_code == 503:
            pass
        yield made
    assert engine.stopped is not None, "the server closes its engine"


def ask(client: TestClient, **fields: Any) -> Any:
    answer = client.post(
        "/v1/chat/completions",
        json={"messages": FRANCE, "temperature": 0, "max_tokens": 60, **fields},
    )
    assert answer.status_code == 200, answer.text
    return answer


def test_the_readmes_question_gets_its_answer(client: TestClient) -> None:
    body = ask(client, model="demo", chat_template_kwargs={"enable_thinking": False}).json()
    assert body["model"] == "demo"
    assert "Paris" in body["choices"][0]["message"]["content"]
    assert body["choices"][0]["finish_reason"] == "stop"


def test_without_settings_the_demo_samples_greedily(client: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    for _ in range(3):
        made = client.post("/v1/chat/completions", json=body).json()
        assert made["choices"][0]["message"]["content"] == "Paris."


@pytest.mark.parametrize("fields", [{}, {"enable_thinking": True}])
def test_a_stream_equals_the_unstreamed_response(
    client: TestClient, fields: dict[str, Any]
) -> None:
    message = ask(client, **fields).json()["choices"][0]["message"]
    deltas = [one["choices"][0]["delta"] for one in chunks(ask(client, stream=True, **fields).text)]
    for name in ("content", "reasoning_content"):
        assert "".join(one.get(name, "") for one in deltas) == message.get(name, "")
    assert ("reasoning_content" in message) == bool(fields), (
        "the demo reasons when the template asks for it"
    )


QUESTIONS = (
    "What is the capital of France?", "Hello!", "Who are you?", "What is 2 + 2?",
    "Why is the sky blue?", "Write a haiku about the sea.", "What is the largest planet?",
    "Tell me a joke.",
)  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_request_without_settings_succeeds(
    client: TestClient, question: str, stream: bool
) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": question}]}
    answer = client.post(
        "/v1/chat/completions", json={**body, **({"stream": True} if stream else {})}
    )
    assert answer.status_code == 200, answer.text
    if stream:
        choices = [one["choices"][0] for one in chunks(answer.text)]
        text = "".join(one["delta"].get("content", "") for one in choices)
        finish = choices[-1]["finish_reason"]
    else:
        (choice,) = answer.json()["choices"]
        text, finish = choice["message"]["content"], choice["finish_reason"]
    assert text.strip() and "think>" not in text
    assert finish in ("stop", "length")


@pytest.mark.parametrize(
    "switch", [{"enable_thinking": True}, {"chat_template_kwargs": {"enable_thinking": True}}]
)
def test_a_client_can_enable_reasoning(client: TestClient, switch: dict[str, Any]) -> None:
    message = ask(client, **switch).json()["choices"][0]["message"]
    assert message["reasoning_content"]


def test_logprobs_list_the_tokens_of_the_text(client: TestClient) -> None:
    answer = client.post(
        "/v1/completions",
        json={"prompt": "The capital of", "temperature": 0, "max_tokens": 8, "logprobs": 3},
    ).json()
    choice = answer["choices"][0]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    for own, top in zip(
        choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"], strict=True
    ):
        assert own == max(top.values()), "greedy sampling takes the most likely token"
        assert len(top) == 3


def test_scored_prompts_have_the_log_probabilities_that_generating_them_gave(
    client: TestClient,
) -> None:
    """Two prompts of different lengths, generated greedily and then scored in one request."""
    starts = ["The capital of", "Once upon a time, there was a"]
    made = client.post(
        "/v1/completions", json={"prompt": starts, "temperature": 0, "max_tokens": 6, "logprobs": 1}
    ).json()["choices"]
    texts = [start + one["text"] for start, one in zip(starts, made, strict=True)]
    ids = [client.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in texts]
    scoring = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1, "prompt_logprobs": 0}
    scored = client.post("/v1/completions", json=scoring).json()
    for text, one, generated in zip(texts, scored["choices"], made, strict=True):
        assert one["text"] == text
        found, tokens = one["logprobs"], generated["logprobs"]["tokens"]
        assert found["tokens"][-len(tokens) :] == tokens
        assert found["token_logprobs"][-len(tokens) :] == pytest.approx(
            generated["logprobs"]["token_logprobs"], abs=1e-3
        )
        ranks = [next(iter(entry.values()))["rank"] for entry in one["prompt_logprobs"][1:]]
        assert ranks[-len(tokens) :] == [1] * len(tokens), "each was the likeliest"
        assert max(ranks) > 1
    assert scored["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_the_demo_has_no_tokens_to_fill_in_the_middle(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"prompt": "a", "suffix": "b"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "suffix"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [999_999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "x", "logit_bias": {"999999": 1}}, "logit_bias"),
        ({"prompt": "word " * 20_000}, "prompt"),
    ],
)
def test_the_engines_errors_reach_the_client(
    client: TestClient, fields: dict[str, Any], param: str
) -> None:
    answer = client.post("/v1/completions", json=fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_the_same_seed_gives_the_same_response(client: TestClient) -> None:
    def once(seed: int) -> str:
        fields = {"prompt": "Once", "temperature": 1.5, "max_tokens": 30, "seed": seed}
        return str(client.post("/v1/completions", json=fields).json()["choices"][0]["text"])

    assert once(-7) == once(-7) != once(8)


def test_a_message_is_continued(client: TestClient) -> None:
    last = {"role": "assistant", "content": "The capital of"}
    body = ask(client, messages=[*FRANCE, last], continue_final_message=True).json()
    assert body["choices"][0]["message"]["content"] == " France is Paris."


@pytest.mark.parametrize("stream", [False, True])
def test_min_tokens_and_n_reach_the_engine(client: TestClient, stream: bool) -> None:
    fields = {"n": 2, "min_tokens": 12, "max_tokens": 16, "stop": "Paris"}
    options = {"stream": stream, "stream_options": {"include_usage": True}}
    answer = ask(client, **fields, **options)
    usage = chunks(answer.text)[-1]["usage"] if stream else answer.json()["usage"]
    assert 24 <= usage["completion_tokens"] <= 32


def test_tokens_of_messages_are_those_of_the_prompt(client: TestClient) -> None:
    counted = client.post("/tokenize", json={"messages": FRANCE}).json()
    assert counted["count"] == ask(client).json()["usage"]["prompt_tokens"]
    text = client.post("/detokenize", json={"tokens": counted["tokens"]}).json()["prompt"]
    prompt = {"prompt": text, "temperature": 0, "max_tokens": 60}
    assert client.post("/v1/completions", json=prompt).json()["choices"][0]["text"] == "Paris."
