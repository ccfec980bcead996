"""Structured output over HTTP, with the demo model on the CPU."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

import osmium
from osmium.server.app import BackgroundLoader, create_app
from tests.server.schemas import PROMPTS, random_schema
from tests.server.scripted import BASE_URL, chunks

ASK = [{"role": "user", "content": "What is the capital of France?"}]

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def strict(schema: Any) -> dict[str, Any]:
    """The response_format that the OpenAI SDK sends."""
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    engine = osmium.load(device="cpu")
    with TestClient(
        create_app(BackgroundLoader(lambda progress: engine)), base_url=BASE_URL
    ) as made:
        while made.get("/health").status_code == 503:
            pass
        yield made


def choice(client: TestClient, **fields: Any) -> dict[str, Any]:
    body = {"messages": ASK, "max_tokens": 24, "temperature": 0, **fields}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    (found,) = answer.json()["choices"]
    assert isinstance(found, dict)
    return found


def refused(client: TestClient, path: str = "chat/completions", **fields: Any) -> dict[str, Any]:
    prompt = {"messages": ASK} if path.startswith("chat") else {"prompt": "x"}
    answer = client.post(f"/v1/{path}", json={**prompt, "max_tokens": 2, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert isinstance(error, dict)
    return error


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": strict(PERSON)},
        {"response_format": {"type": "json_schema", "schema": PERSON}},
        {"response_format": {"type": "json_object", "schema": PERSON}},
        {"guided_json": PERSON},
        {"guided_json": json.dumps(PERSON)},
        {"structured_outputs": {"json": PERSON}},
        {"structured_outputs": {"json": PERSON, "regex": None, "disable_fallback": False}},
        {"json_schema": PERSON},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_in_any_field_is_followed(
    client: TestClient, fields: dict[str, Any], stream: bool
) -> None:
    if stream:
        body = {"messages": ASK, "max_tokens": 24, "stream": True, "seed": 5, **fields}
        parts = [one["choices"][0] for one in chunks(client.post(
            "/v1/chat/completions", json=body).text)]  # fmt: skip
        text = "".join(one["delta"].get("content", "") for one in parts)
    else:
        text = choice(client, seed=5, **fields)["message"]["content"]
    jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": r"\d\d-[xy]"}, r"\d\d-[xy]"),
        ({"structured_outputs": {"regex": "(yes|no)!"}}, "(yes|no)!"),
        ({"guided_choice": ["Paris", "Rome"]}, "Paris|Rome"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "a|b"),
        ({"guided_grammar": 'root ::= "<" [a-z] ">"'}, "<[a-z]>"),
        ({"grammar": 'root ::= "<" [a-z] ">"'}, "<[a-z]>"),
        ({"structured_outputs": {"grammar": 'start: "<" /[a-z]/ ">"'}}, "<[a-z]>"),
        ({"structured_outputs": {"json_object": True}}, r"(?s)\{.*\}"),
        ({"response_format": {"type": "json_object"}}, r"(?s)\{.*\}"),
    ],
)
def test_regexes_choices_grammars_and_objects_are_followed(
    client: TestClient, fields: dict[str, Any], pattern: str
) -> None:
    found = choice(client, **fields)
    assert re.fullmatch(pattern, found["message"]["content"])
    answer = client.post(
        "/v1/completions", json={"prompt": "The capital", "max_tokens": 9, "seed": 1, **fields}
    )
    assert re.fullmatch(pattern, answer.json()["choices"][0]["text"])


def test_the_models_preference_among_choices_counts(client: TestClient) -> None:
    found = choice(client, guided_choice=["London", "Paris", "Rome"])
    assert found["message"]["content"] == "Paris" and found["finish_reason"] == "stop"


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 9])
def test_a_response_that_is_cut_is_valid_and_says_length(
    client: TestClient, max_tokens: int
) -> None:
    schema = {"type": "array", "items": PERSON, "minItems": 3}
    found = choice(client, response_format=strict(schema), max_tokens=max_tokens, temperature=1)
    jsonschema.validate(json.loads(found["message"]["content"]), schema)
    assert found["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_is_free_and_the_answer_is_not(client: TestClient, stream: bool) -> None:
    body = {
        "messages": ASK, "enable_thinking": True, "max_tokens": 150, "temperature": 0,
        "guided_choice": ["Paris", "Rome"], "stream": stream,
    }  # fmt: skip
    answer = client.post("/v1/chat/completions", json=body)
    if stream:
        deltas = [one["choices"][0]["delta"] for one in chunks(answer.text)]
        content, reasoning = (
            "".join(one.get(name, "") for one in deltas) for name in ("content", "reasoning")
        )
    else:
        message = answer.json()["choices"][0]["message"]
        content, reasoning = message["content"], message["reasoning"]
    assert content in ("Paris", "Rome") and len(reasoning) > 10


def test_penalties_bias_and_logprobs_apply_beside_a_grammar(client: TestClient) -> None:
    found = choice(
        client, guided_choice=["Paris", "Rome"], logprobs=True, top_logprobs=2,
        repetition_penalty=1.3, logit_bias={"5": 100},
    )  # fmt: skip
    assert found["message"]["content"] in ("Paris", "Rome")
    tokens = [one["token"] for one in found["logprobs"]["content"]]
    assert "".join(tokens) == found["message"]["content"]


def test_random_schemas_and_prompts_give_valid_json(client: TestClient, rng: Any) -> None:
    """tests/long has 1,000; tests/text/test_grammar.py has 200 with another sampler."""
    for i in range(24):
        schema = random_schema(rng)
        found = choice(
            client, response_format=strict(schema), max_tokens=int(rng.choice([1, 4, 12])),
            temperature=float(rng.choice([0, 1, 2])), seed=i,
            messages=[{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}],
        )  # fmt: skip
        value = json.loads(found["message"]["content"])
        jsonschema.Draft202012Validator(schema).validate(value)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": ["json_object"]}}, "response_format.type"),
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": []}},
         "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema",
                              "json_schema": {"schema": {}, "strict": "yes"}}},
         "response_format.json_schema.strict"),
        ({"response_format": strict({"not": {}})}, "response_format.json_schema.schema"),
        ({"response_format": strict({"type": "none"})}, "response_format.json_schema.schema"),
        ({"response_format": strict(7)}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object", "schema": 5}}, "response_format.schema"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_json": []}, "guided_json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_choice": ["a", 5]}, "guided_choice[1]"),
        ({"guided_grammar": "x"}, "guided_grammar"),
        ({"grammar": "x"}, "grammar"),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"whitespace_pattern": " *", "json": {}}},
         "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"unknown": 1}}, "structured_outputs.unknown"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_malformed_requests_are_refused_by_name(
    client: TestClient, fields: dict[str, Any], param: str, path: str
) -> None:
    assert refused(client, path, **fields)["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}, "guided_choice": ["a"]},
        {"response_format": None, "guided_choice": ["a"], "guided_json": None, "grammar": ""},
        {"structured_outputs": {"json_object": False, "choice": ["a"]}},
    ],
)
def test_empty_fields_restrict_nothing(client: TestClient, fields: dict[str, Any]) -> None:
    assert choice(client, **fields)["message"]["content"] == "a"


def test_an_exceeded_limit_ends_one_response_with_an_error(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from osmium.text.grammar_mask import GrammarMask

    monkeypatch.setattr(GrammarMask, "fill", lambda self, words: words.fill(0))
    answer = client.post(
        "/v1/chat/completions", json={"messages": ASK, "guided_regex": "a*", "max_tokens": 3}
    )
    assert answer.status_code == 500 and "structured output" in answer.json()["error"]["message"]
    monkeypatch.undo()
    assert choice(client, guided_choice=["a"])["message"]["content"] == "a"
