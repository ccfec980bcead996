"""GET /openapi.json: it has every route and field, and real requests and responses satisfy it."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import msgspec
import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from osmium.engine.request import INTEGER_LIMITS, NUMBER_LIMITS, SamplingParams
from osmium.errors import CheckpointError, RequestError
from osmium.server.app import create_app
from osmium.server.openapi import document
from osmium.server.route import ApiRoute
from osmium.server.thinking import EFFORTS
from tests.server.scripted import ScriptedEngine, client_of, host_of

HELLO = [{"role": "user", "content": "Hello"}]

APP = create_app(host_of(ScriptedEngine()))

DOCUMENT = document(APP.routes, has_keys=True)

SCHEMAS = DOCUMENT["components"]["schemas"]

ROUTES = [route for route in APP.routes if isinstance(route, Route) and route.include_in_schema]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with client_of(ScriptedEngine('<think>a</think>{"a": 1}', context=4000)) as made:
        yield made


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(path, method, operation) of the document."""
    for path, item in DOCUMENT["paths"].items():
        for method, operation in item.items():
            if method != "parameters":
                yield path, method, operation


def schema_of(reference: dict[str, Any]) -> dict[str, Any]:
    """A schema with all components, for jsonschema."""
    return {**reference, "components": {"schemas": SCHEMAS}}


def check(value: Any, reference: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(schema_of(reference)).validate(value)


def refusal(value: Any, reference: dict[str, Any]) -> bool:
    return not jsonschema.Draft202012Validator(schema_of(reference)).is_valid(value)


# -- routes ----------------------------------------------------------------------------------------


def test_every_route_and_method_is_in_the_document_and_no_other_is() -> None:
    in_app = {(r.path_format, method.lower()) for r in ROUTES for method in r.methods or ()}
    assert {(path, method) for path, method, _ in operations()} == in_app
    names = [operation["operationId"] for _, _, operation in operations()]
    assert len(names) == len(set(names))


def test_every_route_declares_its_bodies() -> None:
    for route in ROUTES:
        assert isinstance(route, ApiRoute), f"{route.path} is no ApiRoute"
        operation = route.operation
        if route.path != "/openapi.json":
            assert operation.response is not None or operation.text is not None, route.path
        assert (route.endpoint.__doc__ or "").strip(), route.path
        if operation.events is not None:
            assert operation.body is not None and "stream" in operation.body.__struct_fields__


def test_unsupported_endpoints_are_not_in_the_document() -> None:
    assert "/v1/embeddings" not in DOCUMENT["paths"]


def test_the_document_is_valid() -> None:
    """Form of OpenAPI 3.1: references exist, schemas are JSON Schemas, parameters are declared."""
    assert re.fullmatch(r"3\.1\.\d+", DOCUMENT["openapi"])
    assert {"title", "version"} <= set(DOCUMENT["info"])
    for reference in re.findall(r'"\$ref": "([^"]+)"', json.dumps(DOCUMENT)):
        prefix, _, name = reference.rpartition("/")
        assert prefix == "#/components/schemas" and name in SCHEMAS, reference
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for path, item in DOCUMENT["paths"].items():
        declared = {one["name"] for one in item.get("parameters", ())}
        assert declared == set(re.findall(r"{(\w+)}", path))
    for path, method, operation in operations():
        assert operation["summary"], path
        assert operation["responses"]["200"]["description"]
        assert ("requestBody" in operation) <= (method == "post")
        for status, response in operation["responses"].items():
            assert re.fullmatch("[1-5][0-9][0-9]", status) and response["description"]
            assert ("content" in response) is (method != "head")


def test_the_document_is_served_while_the_model_loads_and_after() -> None:
    with client_of(ScriptedEngine()) as client:
        answer = client.get("/openapi.json")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    ready = answer.json()
    with client_of(CheckpointError("none")) as client:
        loading = client.get("/openapi.json").json()
    tokens = [
        made["components"]["schemas"]["DetokenizeRequest"]["properties"]["tokens"]["items"]
        for made in (loading, ready)
    ]
    assert "maximum" not in tokens[0]
    assert tokens[1]["maximum"] == ScriptedEngine().config.vocab_size - 1


def test_keys_are_in_the_document_if_the_server_has_them() -> None:
    with client_of(ScriptedEngine(), api_key="k") as client:
        assert client.get("/openapi.json").status_code == 401
        made = client.get("/openapi.json", headers={"Authorization": "Bearer k"}).json()
    assert made["components"]["securitySchemes"]["bearer"] == {"type": "http", "scheme": "bearer"}
    assert made["paths"]["/v1/models"]["get"]["security"][0] == {"bearer": []}
    assert "401" in made["paths"]["/v1/models"]["get"]["responses"]
    assert "security" not in made["paths"]["/health"]["get"]
    with client_of(ScriptedEngine()) as client:
        assert '"security' not in client.get("/openapi.json").text


# -- requests --------------------------------------------------------------------------------------


def test_every_field_of_a_body_is_in_its_schema() -> None:
    for route in ROUTES:
        assert isinstance(route, ApiRoute)
        body = route.operation.body
        if body is None:
            continue
        fields = set(body.__struct_encode_fields__)
        if route.operation.fields is not None:
            fields &= set(route.operation.fields)
        assert set(SCHEMAS[body.__name__]["properties"]) == fields


def test_docstrings_are_descriptions() -> None:
    chat = SCHEMAS["ChatRequest"]
    assert chat["properties"]["repeat_penalty"]["description"].startswith("llama-server's name")
    assert SCHEMAS["Usage"]["properties"]["completion_tokens"]["description"]
    assert SCHEMAS["StreamOptions"]["properties"]["include_obfuscation"]["description"]


@pytest.mark.parametrize("name", [*NUMBER_LIMITS, *INTEGER_LIMITS])
def test_limits_of_the_document_are_those_that_are_enforced(name: str) -> None:
    schema = SCHEMAS["CompletionRequest"]["properties"][name]
    (number,) = (one for one in schema["anyOf"] if one["type"] in ("integer", "number"))
    least = number.get("minimum", number.get("exclusiveMinimum"))
    step = 1 if number["type"] == "integer" else 1e-3
    for value in (least, number["maximum"]):
        if value != number.get("exclusiveMinimum"):
            SamplingParams(**{name: value})
    for value in (least - step, number["maximum"] + step):
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{name: value})
        assert caught.value.param == name


REFUSED_FIELDS: list[dict[str, Any]] = [
    {"temperature": -1}, {"temperature": 101}, {"temperature": "1"}, {"top_p": 0},
    {"top_k": 1.5}, {"n": 0}, {"n": 9}, {"seed": "x"}, {"stop": ""}, {"stop": [""]},
    {"stop": ["a"] * 65}, {"stop": "a" * 1025}, {"stop_token_ids": [-1]}, {"max_tokens": -1},
    {"logit_bias": {"x": 1}}, {"logit_bias": {"1": 101}}, {"stream": 1}, {"stream": "true"},
    {"stream_options": []}, {"logprobs": 1}, {"logprobs": True, "top_logprobs": 21},
    {"tools": [{}]}, {"tools": [{"type": "function"}]},
    {"tools": [{"type": "function", "function": {"name": " "}}]},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
    {"tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]},
    {"reasoning_effort": "huge"}, {"thinking": {"type": "on"}}, {"thinking": {}},
    {"thinking": {"type": "enabled", "other": 1}}, {"reasoning": {"effort": "huge"}},
    {"reasoning": {"exclude": 1}}, {"thinking_token_budget": -2},
    {"response_format": {}}, {"response_format": {"type": "xml"}},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "json_schema", "json_schema": {"strict": True}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": 5, "schema": {}}}},
    {"structured_outputs": {"choice": ["a"], "whitespace_pattern": {}}},
    {"structured_outputs": {"xml": "x"}}, {"structured_outputs": {"json_object": 1}},
]  # fmt: skip

CASES: list[tuple[str, dict[str, Any]]] = [
    ("ChatRequest", {}),
    ("ChatRequest", {"messages": []}),
    ("ChatRequest", {"messages": [{"content": "x"}]}),
    ("ChatRequest", {"messages": [{"role": "robot", "content": "x"}]}),
    ("ChatRequest", {"messages": [{"role": "user", "content": 5}]}),
    ("ChatRequest", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ("ChatRequest", {"messages": [{"role": "assistant", "tool_calls": {}}]}),
    ("ChatRequest", {"messages": [{"role": "assistant", "tool_calls": [7]}]}),
    *(("ChatRequest", {"messages": HELLO, **fields}) for fields in REFUSED_FIELDS),
    *(("ResponsesRequest", {"input": "a", "tools": [tool]}) for tool in (
        {"type": "namespace", "name": "n", "description": 0, "tools": []},
        {"type": "namespace", "name": "n", "description": "d", "tools": [
            {"type": "custom", "name": "c", "description": False}]},
        {"type": "namespace", "name": "n", "description": "d", "tools": [
            {"type": "function", "name": "f", "description": {}}]},
        {"type": "custom", "name": "c", "description": []},
    )),
    ("ResponsesRequest", {}),
    ("ResponsesRequest", {"input": "a", "truncation": "yes"}),
    ("CompletionRequest", {"prompt": 5}),
    ("CompletionRequest", {"prompt": "a", "logprobs": 21}),
    ("TokenizeRequest", {}),
    ("TokenizeRequest", {"prompt": "a", "messages": HELLO}),
    ("DetokenizeRequest", {"tokens": "a"}),
    ("DetokenizeRequest", {"tokens": [-1]}),
]  # fmt: skip

PATHS = {
    "ChatRequest": "/v1/chat/completions", "CompletionRequest": "/v1/completions",
    "ResponsesRequest": "/v1/responses", "TokenizeRequest": "/tokenize",
    "DetokenizeRequest": "/detokenize",
}  # fmt: skip


@pytest.mark.parametrize(("name", "body"), CASES)
def test_what_the_document_rules_out_is_refused(
    client: TestClient, name: str, body: dict[str, Any]
) -> None:
    assert refusal(body, {"$ref": f"#/components/schemas/{name}"})
    answer = client.post(PATHS[name], json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"]


ACCEPTED_FIELDS: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 100.0}, {"top_p": 1}, {"top_k": 5.0}, {"n": 2.0},
    {"seed": -(2**70)}, {"stop": "é" * 1024}, {"stop": []}, {"logit_bias": {"7": -100}},
    {"max_tokens": 3.0}, {"tools": []}, {"reasoning_effort": EFFORTS[-1]},
    {"thinking": True}, {"thinking": {"type": "adaptive", "budget_tokens": -1}},
    {"reasoning": {"effort": None, "exclude": True}}, {"thinking_budget": 0},
    {"response_format": {"type": "text"}}, {"logprobs": True, "top_logprobs": 3},
    {"top_logprobs": 0}, {"response_format": None, "guided_json": None, "ignore_eos": True},
    {"no_such_field": 5}, dict.fromkeys(SCHEMAS["ChatRequest"]["properties"].keys()
                                        - {"messages"}),
]  # fmt: skip

ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    *(("ChatRequest", {"messages": HELLO, **fields}) for fields in ACCEPTED_FIELDS),
    ("ChatRequest", {"messages": [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"text": "b"}, "c"]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": [{"type": "refusal", "refusal": "no"}]},
    ]}),
    ("ResponsesRequest", {"input": "a", "tools": [
        {"type": "namespace", "name": "n", "tools": [{"type": "web_search"}]}, {"type": "mcp"},
    ]}),
    ("CompletionRequest", {"prompt": [1, 2.0]}),
    ("CompletionRequest", {"prompt": "a", "logprobs": 20}),
    ("TokenizeRequest", {"prompt": "a", "messages": None}),
    ("TokenizeRequest", {"messages": HELLO}),
    ("DetokenizeRequest", {"tokens": []}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "body"), ACCEPTED)
def test_what_the_document_allows_is_accepted(
    client: TestClient, name: str, body: dict[str, Any]
) -> None:
    check(body, {"$ref": f"#/components/schemas/{name}"})
    answer = client.post(PATHS[name], json=body)
    assert answer.status_code == 200, answer.text


# -- responses -------------------------------------------------------------------------------------


def strict(kind: Any, value: Any) -> None:
    """Check a response against its type, without fields that the type lacks."""
    assert msgspec.convert(value, kind) == value


def response_types() -> dict[str, Any]:
    return {
        route.path: route.operation.response
        for route in ROUTES
        if isinstance(route, ApiRoute) and route.operation.response is not None
    }


@pytest.mark.parametrize("path", ["/", "/health", "/version", "/props", "/v1/models"])
def test_responses_of_status_routes_have_their_types(client: TestClient, path: str) -> None:
    strict(response_types()[path], client.get(path).json())


def test_the_model_and_tokens_have_their_types(client: TestClient) -> None:
    strict(response_types()["/v1/models/{id:any}"], client.get("/v1/models/a/b").json())
    body = {"messages": HELLO, "return_token_strs": True}
    counted = client.post("/tokenize", json=body).json()
    strict(response_types()["/tokenize"], counted)
    text = client.post("/detokenize", json={"tokens": counted["tokens"]}).json()
    strict(response_types()["/detokenize"], text)


FORMS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {"messages": HELLO, "n": 2, "max_tokens": 3}),
    ("/v1/completions", {"prompt": "a", "logprobs": 2, "return_progress": True}),
]


@pytest.mark.parametrize(("path", "body"), FORMS)
def test_responses_of_the_model_have_their_types(
    client: TestClient, path: str, body: dict[str, Any]
) -> None:
    strict(response_types()[path], client.post(path, json=body).json())


@pytest.mark.parametrize(("path", "body"), FORMS)
def test_each_event_of_a_stream_satisfies_its_schema(
    client: TestClient, path: str, body: dict[str, Any]
) -> None:
    usage = {"include_usage": True}
    text = client.post(path, json={**body, "stream": True, "stream_options": usage}).text
    content = DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]
    done, chunk = content["text/event-stream"]["schema"]["anyOf"]
    kind, _ = chunk["properties"]["data"]["contentSchema"]["anyOf"]
    events = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data")]
    assert len(events) > 3
    check({"data": events[-1]}, done)
    for event in events[:-1]:
        check({"data": event}, chunk)
        check(json.loads(event), kind)


def test_errors_satisfy_their_schema(client: TestClient) -> None:
    for answer in (client.post("/v1/completions", json={}), client.get("/v1/nothing")):
        strict(dict[str, dict[str, Any]], answer.json())
        check(answer.json(), {"$ref": "#/components/schemas/ErrorResponseBody"})
