"""schemathesis with all of its checks against /openapi.json, with the bundled model.

Every request that the document rules out must be refused.  A request that it allows may be refused
for a reason that JSON Schema cannot state; its error must name the field and one of these reasons.
"""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from osmium.config import Progress
from osmium.engine.engine import Engine
from osmium.server.app import BackgroundLoader, create_app
from osmium.server.route import ApiRoute
from tests.long.server import Server, run_server

ROOT = Path(__file__).resolve().parents[2]

REQUIREMENT = "schemathesis==4.32.*"

FOLDER = ROOT / ".cache" / "schemathesis"
"""Its environment: it needs versions of packages that the tests do not."""

EXAMPLES = int(os.environ.get("OSMIUM_SCHEMATHESIS_EXAMPLES", "60"))
"""Fuzzed requests per operation, beside those of its coverage phase."""

REASONS = {
    "call_not_found", "context_length_exceeded", "empty_prompt", "grammar_too_complex",
    "grammar_too_large", "invalid_choice", "invalid_grammar", "invalid_json", "invalid_regex",
    "invalid_schema", "invalid_text", "invalid_type", "invalid_value", "item_not_found",
    "previous_response_not_found", "response_not_found", "template_error", "too_many_items",
    "unsupported_content", "unsupported_schema", "unsupported_value",
}  # fmt: skip
"""Codes of errors for requests that the document allows."""


@pytest.fixture(scope="module")
def command() -> list[str]:
    """schemathesis in an environment of its own, installed once."""
    program = FOLDER / "bin" / "schemathesis"
    if not program.exists():
        for step in (
            [sys.executable, "-m", "venv", "--clear", str(FOLDER)],
            [str(FOLDER / "bin" / "pip"), "install", "--quiet", REQUIREMENT],
        ):
            done = subprocess.run(step, capture_output=True, text=True, timeout=600)
            if done.returncode:
                pytest.skip(f"{REQUIREMENT} cannot be installed: {done.stderr.strip()[-200:]}")
    return [str(program), "--config-file", str(ROOT / "tests" / "long" / "schemathesis.toml")]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The bundled model with a small context, so that no request runs long."""
    with run_server("--context", "256") as running:
        yield running


def fail(progress: Progress) -> Engine:
    raise AssertionError("no model is loaded for the names of routes")


def refused(report: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(operation, status, body) of refused requests that the document allows."""
    for line in report.read_text().splitlines():
        recorder = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
        for name, case in recorder.get("cases", {}).items():
            mode = case["value"].get("meta", {}).get("generation", {}).get("mode")
            response = (recorder["interactions"].get(name) or {}).get("response")
            if mode == "positive" and response and response["status_code"] >= 400:
                raw = base64.b64decode(response["content"]["$base64"])
                yield recorder["label"], response["status_code"], json.loads(raw or b"{}")


def run(command: list[str], server: Server, seed: int, folder: Path, *options: str) -> Path:
    """Run schemathesis, which must find nothing; returns its report."""
    report = folder / "report.ndjson"
    done = subprocess.run(
        [
            *command, "run", "--checks", "all", "--max-examples", str(EXAMPLES), "--seed",
            str(seed), "--request-timeout", "60", "--max-response-time", "60",
            "--continue-on-failure", "--no-color", "--report", "ndjson", "--report-ndjson-path",
            str(report), "--generation-database", "none", *options,
            f"http://127.0.0.1:{server.port}/openapi.json",
        ],
        cwd=folder, capture_output=True, text=True, timeout=850,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    return report


WITH_BODY = [
    route.path
    for route in create_app(BackgroundLoader(fail)).routes
    if isinstance(route, ApiRoute) and route.operation.body is not None
]


@pytest.mark.parametrize("path", WITH_BODY)
def test_no_check_fails_on_requests_with_a_body(
    command: list[str], server: Server, seed: int, tmp_path: Path, path: str
) -> None:
    report = run(command, server, seed, tmp_path, "--include-path", path)
    for label, status, body in refused(report):
        error = body["error"]
        assert status in (400, 404), (label, body)
        if body.get("type") == "error":  # Anthropic's form
            assert error["type"] in ("invalid_request_error", "not_found_error"), (label, body)
        else:
            assert error["code"] in REASONS and error["param"], (label, body)
    server.wait_until_idle()
    server.assert_healthy()


def test_no_check_fails_on_other_requests(
    command: list[str], server: Server, seed: int, tmp_path: Path
) -> None:
    others = [option for path in WITH_BODY for option in ("--exclude-path", path)]
    run(command, server, seed, tmp_path, *others)
    server.assert_healthy()


def test_no_check_fails_with_an_api_key(command: list[str], seed: int, tmp_path: Path) -> None:
    key, file = "a-key", tmp_path / "keys"
    file.write_text(key)
    options = ["--header", f"Authorization: Bearer {key}"]
    options += [option for path in WITH_BODY[:-1] for option in ("--exclude-path", path)]
    with run_server("--context", "256", "--api-key-file", str(file)) as server:
        run(command, server, seed, tmp_path, *options)
