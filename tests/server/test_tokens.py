"""POST /tokenize and /detokenize."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.scripted import TOKENIZER, ScriptedEngine, client_of

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client() -> Any:
    with client_of() as made:
        yield made


def test_a_prompt_has_vllms_fields(client: TestClient) -> None:
    answer = client.post("/tokenize", json={"model": "x", "prompt": "the é<|im_start|>"})
    ids = TOKENIZER.encode("the é<|im_start|>")
    assert answer.json() == {
        "count": len(ids), "max_model_len": 200, "tokens": ids, "token_strs": None,
    }  # fmt: skip
    assert client.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []


def test_tokens_have_their_texts_on_request(client: TestClient) -> None:
    answer = client.post("/tokenize", json={"prompt": "the é", "return_token_strs": True})
    assert answer.json()["token_strs"] == ["the", " ", "\ufffd", "\ufffd"]


def test_a_whole_body_of_a_chat_may_be_tokenized(client: TestClient) -> None:
    body = {"messages": HELLO, "max_completion_tokens": 5, "logprobs": True, "top_logprobs": 2}
    answer = client.post("/tokenize", json=body)
    assert answer.status_code == 200
    assert answer.headers["x-osmium-ignored"] == "max_completion_tokens, logprobs, top_logprobs"


def test_messages_are_rendered_as_a_chats(client: TestClient) -> None:
    def tokens(**fields: Any) -> list[int]:
        answer = client.post("/tokenize", json={"messages": HELLO, **fields})
        assert answer.status_code == 200, answer.text
        return list(answer.json()["tokens"])

    assert tokens() == TOKENIZER.encode("user: Hello\nassistant:")
    assert tokens(enable_thinking=True) == TOKENIZER.encode("user: Hello\nassistant:<think>\n")
    tool = {"type": "function", "function": {"name": "find"}}
    assert len(tokens(tools=[tool])) > len(tokens())
    chat = client.post("/v1/chat/completions", json={"messages": HELLO}).json()
    assert len(tokens()) == chat["usage"]["prompt_tokens"]


def test_a_prompt_longer_than_the_context_is_counted(client: TestClient) -> None:
    assert client.post("/tokenize", json={"prompt": "the " * 500}).json()["count"] == 1000


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": HELLO}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot"}]}, "messages[0].role"),
        ({"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        ({"prompt": "a", "tools": [{}]}, "tools[0].type"),
    ],
)
def test_a_malformed_request_is_refused_by_field(
    client: TestClient, fields: dict[str, Any], param: str
) -> None:
    answer = client.post("/tokenize", json=fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_fields_without_an_effect_on_tokens_are_reported(client: TestClient) -> None:
    answer = client.post("/tokenize", json={"prompt": "a", "temperature": 1, "stop": "x"})
    assert (answer.status_code, answer.headers["x-osmium-ignored"]) == (200, "temperature, stop")


@pytest.mark.parametrize("text", ["", "the é 🙂<|im_start|>\n", "the " * 90])
def test_detokenize_is_the_inverse(client: TestClient, text: str) -> None:
    ids = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    answer = client.post("/detokenize", json={"tokens": ids, "model": "x"})
    assert answer.json() == {"prompt": text}


@pytest.mark.parametrize("tokens", ["a", [1.5], [True], [-1], [10**9], [10**400], None])
def test_tokens_that_do_not_exist_are_refused(client: TestClient, tokens: Any) -> None:
    answer = client.post("/detokenize", json={"tokens": tokens})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("tokens")


def test_without_a_tokenizer_both_are_refused() -> None:
    with client_of(ScriptedEngine(tokenizer=None)) as client:
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            answer = client.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_tokenizer")
