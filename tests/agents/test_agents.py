"""The scripted model in the engine, its script, the page's settings, and `tools/agents`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from starlette.testclient import TestClient

from osmium.engine.engine import Engine
from osmium.server.app import BackgroundLoader, create_app
from tests.agents.clients import CLIENTS, PAGE, PAGE_URL, settings_of
from tests.agents.results import Result, as_json, lines
from tests.agents.script import ANSWER, QUESTION, answer_prompt, arguments_of, task
from tests.agents.scripted_model import scripted_engine
from tests.server.scripted import BASE_URL, chunks

ROOT = Path(__file__).resolve().parents[2]

STRING = {"type": "string"}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


READ, WRITE = tool("Read", filePath=STRING), tool("Write", filePath=STRING, content=STRING)
SHELL = tool("exec_command", cmd=STRING, timeout={"type": "integer", "minimum": 5})

TASK = {"role": "user", "content": task("/tmp/a.txt", "/tmp/b.txt")}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return scripted_engine(answer_prompt, context=4096)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    app = create_app(BackgroundLoader(lambda progress: engine))
    with TestClient(app, base_url=BASE_URL) as made:
        while made.get("/health").status_code == 503:
            pass
        yield made


def ask(client: TestClient, *messages: dict[str, Any], **fields: Any) -> Any:
    answer = client.post("/v1/chat/completions", json={"messages": messages, **fields})
    assert answer.status_code == 200, answer.text
    return answer


def message_of(client: TestClient, *messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return cast(dict[str, Any], ask(client, *messages, **fields).json()["choices"][0]["message"])


def call_of(message: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    (call,) = message["tool_calls"]
    return call["function"]["name"], json.loads(call["function"]["arguments"])


# -- the model and its script ----------------------------------------------------------------------


def test_a_question_gets_reasoning_and_an_answer(client: TestClient) -> None:
    message = message_of(client, {"role": "user", "content": QUESTION})
    assert ANSWER in message["content"] and message["reasoning_content"]
    plain = message_of(client, {"role": "user", "content": QUESTION}, enable_thinking=False)
    assert ANSWER in plain["content"] and "reasoning_content" not in plain


def test_the_task_is_read_write_tell(client: TestClient) -> None:
    conversation = [TASK]
    for expected, result in (
        (("Read", {"filePath": "/tmp/a.txt"}), "1: osmium-0123456789ab\n"),
        (("Write", {"filePath": "/tmp/b.txt", "content": "osmium-0123456789ab\n"}), "written"),
    ):
        message = message_of(client, *conversation, tools=[READ, WRITE])
        assert call_of(message) == expected
        call_id = message["tool_calls"][0]["id"]
        conversation += [message, {"role": "tool", "tool_call_id": call_id, "content": result}]
    final = message_of(client, *conversation, tools=[READ, WRITE])
    assert "tool_calls" not in final and "osmium-0123456789ab" in final["content"]


def test_a_streamed_call_has_the_shape_that_agents_need(client: TestClient) -> None:
    found = chunks(ask(client, TASK, tools=[SHELL], stream=True).text)
    deltas = [one["choices"][0]["delta"] for one in found]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["id"] and calls[0]["type"] == "function"
    assert calls[0]["function"] == {"name": "exec_command", "arguments": ""}
    assert all("id" not in call and "name" not in call["function"] for call in calls[1:])
    text = "".join(call["function"]["arguments"] for call in calls)
    assert json.loads(text) == {"cmd": "cat '/tmp/a.txt'", "timeout": 5}
    assert found[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert len({(one["id"], one["created"]) for one in found}) == 1


def test_a_request_for_a_title_gets_text(client: TestClient) -> None:
    message = message_of(client, TASK)
    assert message["content"] and "tool_calls" not in message


def test_structured_output_has_the_json_of_the_prompt(client: TestClient) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    prompt = {"role": "user", "content": 'Count. As JSON: {"n": 5}'}
    message = message_of(client, prompt, response_format=wanted)
    assert json.loads(message["content"]) == {"n": 5}
    assert call_of(message_of(client, prompt, tools=[tool("result", n={"type": "integer"})])) == (
        "result", {"n": 5},
    )  # fmt: skip


def test_requests_at_once_do_not_mix(client: TestClient) -> None:
    body = ask(client, {"role": "user", "content": QUESTION}, n=8).json()
    assert [ANSWER in one["message"]["content"] for one in body["choices"]] == [True] * 8


@pytest.mark.parametrize(
    ("properties", "arguments"),
    [
        ({"absolute_path": STRING}, {"absolute_path": "/a"}),
        ({"paths": {"type": "array", "items": STRING}}, {"paths": ["/a"]}),
        (
            {"files": {"type": "array",
                       "items": {"type": "object", "properties": {"path": STRING}}}},
            {"files": [{"path": "/a"}]},
        ),
        ({"command": {"type": "array", "items": STRING}}, {"command": ["bash", "-c", "ls"]}),
        ({"commands": {"type": "array", "items": STRING}}, {"commands": ["ls"]}),
        ({"command": {"enum": ["view", "create"]}, "path": STRING},
         {"command": "create", "path": "/a"}),
        ({"new_text": STRING, "old_text": STRING}, {"new_text": "x"}),
    ],
)  # fmt: skip
def test_arguments_follow_the_schema_of_a_tool(
    properties: dict[str, Any], arguments: dict[str, Any]
) -> None:
    assert arguments_of({"properties": properties}, "/a", "ls", "x") == arguments


def test_required_arguments_without_a_known_name_have_a_value_of_their_type() -> None:
    properties = {
        "why": STRING, "deep": {"type": "boolean"}, "kind": {"enum": ["b", "a"]},
        "n": {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 3}]},
    }  # fmt: skip
    found = arguments_of({"properties": properties, "required": [*properties]}, "/a", "ls")
    assert isinstance(found.pop("why"), str)
    assert found == {"deep": False, "kind": "b", "n": 1}
    assert arguments_of({"properties": properties}, "/a", "ls") == {}


# -- clients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("client_name", [one.name for one in CLIENTS.values()])
def test_the_page_has_settings_of_each_agent(client_name: str) -> None:
    settings = settings_of(client_name)
    texts = [settings.script, *settings.files.values()]
    assert any(PAGE_URL in text for text in texts), "the server's address is replaced in tests"
    assert settings.script.strip().endswith('"')
    for path, text in settings.files.items():
        if path.endswith(".json"):
            json.loads(text)


def test_the_page_names_no_agent_that_is_not_run() -> None:
    headings = [line[3:] for line in PAGE.read_text().splitlines() if line.startswith("## ")]
    assert {one.name for one in CLIENTS.values()} <= {*headings}
    assert {*headings} - {one.name for one in CLIENTS.values()} == {"Cursor", "Python packages"}


def test_a_result_is_a_row_with_the_output_of_failed_steps() -> None:
    result = Result("x", "1.0")
    result.add("text", True, "fine")
    result.add("tools", False, "broken\nhere")
    row, *output = lines(result)
    assert row.split() == ["x", "1.0", "ok", "FAILED", "-", "0.0"] and result.failed
    assert [line.strip() for line in output] == ["tools:", "broken", "here"]
    assert as_json(result)["output"] == {"tools": "broken\nhere"}
    absent = Result("y", not_run="npm is not installed")
    assert [*lines(absent)] == [f"{'y':24}not run: npm is not installed"] and not absent.failed


def run_tool(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "agents"), *arguments], capture_output=True,
        text=True, env={**os.environ, **environment},
    )  # fmt: skip


def test_without_npm_an_agent_is_not_run_and_the_reason_is_reported(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = run_tool(
        "--only", "opencode", "--folder", str(tmp_path / "new"), "--json", str(report),
        PATH=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "OpenCode                not run: node is not installed" in done.stdout
    (row,) = json.loads(report.read_text())["clients"]
    assert row == {"name": "OpenCode", "not_run": "node is not installed"}


def test_wrong_arguments_are_one_line(tmp_path: Path) -> None:
    for arguments in (["--only", "openco"], ["--only", "pi", "--folder", str(ROOT / "x")]):
        done = run_tool(*arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
