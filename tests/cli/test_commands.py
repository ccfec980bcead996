"""The commands on the bundled demo model, on the CPU."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osmium.bench import throughput
from osmium.bench.throughput import BenchConfig
from osmium.cli import main
from osmium.cli.doctor import run_checks
from osmium.cli.flags import BENCH_DEFAULTS
from osmium.cli.timing import _RateLimited
from osmium.engine.request import SamplingParams
from osmium.engine.stats import IntervalStats
from osmium.server.app import BackgroundLoader
from osmium.weights import DEMO
from tests.models.build import CASES, write_checkpoint

pytestmark = pytest.mark.skipif(not DEMO.is_file(), reason="the demo model is missing")

CPU = ["--device", "cpu"]


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """The last line of stdout."""
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_run_prints_the_answer_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    options = "What is the capital of France?"
    assert main(["run", "demo", *CPU, "--temperature", "0", "--no-think", "--", options]) == 0
    assert capsys.readouterr().out == "Paris.\n"


def set_stdin(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    """Replace stdin by a text; it is not a terminal."""
    raw = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8"))


@pytest.mark.parametrize("words", [[], ["-"]])
def test_a_prompt_comes_from_a_pipe(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_stdin(monkeypatch, "What is the capital of France?\n")
    assert main(["run", "demo", *CPU, "--temperature", "0", "--no-think", *words]) == 0
    assert capsys.readouterr().out == "Paris.\n"


@pytest.mark.parametrize("text", ["", "\n", b"\xff\xfe"])
def test_a_pipe_without_text_is_refused(
    text: str | bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_stdin(monkeypatch, text)
    assert main(["run", "demo", *CPU]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1


def test_reasoning_never_reaches_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--temperature", "0", "--think", "What is the capital of France?"]
    assert main(["run", "demo", *CPU, *options]) == 0
    assert capsys.readouterr().out == "The capital of France is Paris.\n"
    assert main(["run", "demo", *CPU, "--max-tokens", "3", *options]) == 0
    output = capsys.readouterr()
    assert output.out == "\n" and "--no-think" in output.err


def test_timing_is_one_line_on_stderr_for_each_response(
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = ["--raw", "--temperature", "0", "--max-tokens", "6", "--expert-slots", "8"]
    assert main(["run", "demo", *CPU, *short, "--timing", "The Congress"]) == 0
    output = capsys.readouterr()
    (line,) = [x for x in output.err.splitlines() if x.startswith("osmium: response: ")]
    for word in ("tok/s", "hit 0.", "MB/token", "prefill", "decode", "(5 tokens)"):
        assert word in line
    assert "osmium" not in output.out


def test_serve_prints_timing_of_a_long_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    elapsed = IntervalStats(0.0, 0.0, 5.0, 840, 0, 0.5, 0.0, 0.0)
    _RateLimited()(elapsed)
    line = capsys.readouterr().err
    assert line.startswith("osmium: last 5.0 s: prompts 840 tokens (168 tok/s), generated 0 tokens")


def test_a_chat_in_a_pipe_answers_line_by_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "What is the capital of France?\n\n/nwe\nWhat is the capital of France?\n/bye\nx\n"
    set_stdin(monkeypatch, options)
    greedy = ["--temperature", "0", "--max-tokens", "8", "--no-think", "--timing"]
    assert main(["chat", "demo", *CPU, *greedy]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[0] == "Paris." and output.out.count("\n") == 2
    assert output.err.count("osmium: response: ") == 2 and "/new?" in output.err


def test_an_unknown_model_name_is_suggested_as_a_prompt(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", "why is the sky blue", *CPU]) == 2
    assert 'osmium run demo "why is the sky blue"' in capsys.readouterr().err


def test_the_same_seed_gives_the_same_response(capsys: pytest.CaptureFixture[str]) -> None:
    output = []
    for _ in range(2):
        assert (
            main(["run", "demo", *CPU, "--raw", "--seed", "7", "--max-tokens", "12", "Once"]) == 0
        )
        output.append(capsys.readouterr().out)
    assert output[0] == output[1] and len(output[0]) > 1


def test_perplexity_is_the_same_by_both_paths(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The Congress shall have power to lay and collect taxes. " * 8)
    found = []
    for path in ("prefill", "decode"):
        assert (
            main(["perplexity", *CPU, "--text", str(text), "--window", "48", "--path", path]) == 0
        )
        found.append(last_json(capsys))
    assert {"perplexity", "nll", "tokens", "tokens_per_s"} <= set(found[0])
    assert found[0]["tokens"] == found[1]["tokens"]
    assert found[0]["nll"] == pytest.approx(found[1]["nll"], rel=1e-5)


def test_logits_are_written_in_float32(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ids, out = tmp_path / "ids.json", tmp_path / "out.npy"
    ids.write_text("[5, 6, 7]")
    assert main(["logits", *CPU, "--ids", str(ids), "--out", str(out)]) == 0
    found = np.load(out)
    assert found.shape == (3, 8192) and found.dtype == np.float32 and np.isfinite(found).all()
    assert last_json(capsys)["shape"] == [3, 8192]


def test_plan_prints_the_memory_plan_without_loading(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *CPU, "--json"]) == 0
    found = last_json(capsys)
    assert found["context_tokens"] == 4096 and found["device"] == "cpu"


def test_bench_ends_with_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    short = "--prompt-tokens 8 --tokens 4 --repeats 1 --warm-up 8 --depth 64".split()
    assert main(["bench", *CPU, *short]) == 0
    found = last_json(capsys)
    rows, experts = found["rows"], found["experts"]
    assert isinstance(rows, list) and {row["what"] for row in rows} == {"prefill", "decode"}
    assert isinstance(experts, dict)
    assert experts["routed"] == experts["hit"] + experts["missed"] > 0


def test_bench_rows_are_printed_as_they_are_measured_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[str] = []
    monkeypatch.setattr("osmium.cli.benchmark._say", printed.append)
    original_decode = throughput._decode

    def decode(*arguments: Any) -> Any:
        counts.append(sum(line.startswith(("prefill", "decode")) for line in printed))
        return original_decode(*arguments)

    counts: list[int] = []
    monkeypatch.setattr(throughput, "_decode", decode)
    short = "--prompt-tokens 8 --tokens 4 --repeats 1 --warm-up 2 --depth 16,32,48 --context 1k"
    assert main(["bench", "synthetic:tiny", *CPU, *short.split()]) == 0
    assert counts == [1, 2, 3]
    time_lines = [line for line in printed if " left" in line]
    assert len(time_lines) == 3 and "about" not in time_lines[0], "no decode row has been timed yet"
    assert all("about" in line for line in time_lines[1:])


def test_benchmark_of_the_server_measures_and_then_serves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[str] = []

    def serve(host: BackgroundLoader, **_: Any) -> None:
        host.start()
        assert host._thread is not None
        host._thread.join()
        engine = host.ready()
        ids = engine.tokenizer.encode("The Congress")
        tokens = engine.generate(ids, SamplingParams(temperature=0, max_tokens=3))
        served.append("".join(token.text for token in tokens))
        host.close()

    monkeypatch.setattr("osmium.cli.serving.serve_http", serve)
    short = BenchConfig(depths=("16",), tokens=4, repeats=1, warm_up=2, prompts=(8,))
    monkeypatch.setattr("osmium.cli.serving.DEFAULTS", short)
    assert main(["serve", "demo", *CPU, "--benchmark"]) == 0
    found = last_json(capsys)
    assert found["model"] == "demo" and isinstance(found["rows"], list) and len(found["rows"]) == 2
    with_benchmark = served[0]
    assert main(["serve", "demo", *CPU]) == 0
    assert served == [with_benchmark, with_benchmark], "the benchmark leaves the engine unchanged"


def test_ctrl_c_while_the_server_packs_reports_the_kept_bytes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(host: BackgroundLoader, **_: Any) -> None:
        host.progress = ("packing", 3_000_000, 9_000_000)
        raise KeyboardInterrupt

    monkeypatch.setattr("osmium.cli.serving.serve_http", serve)
    assert main(["serve", "demo", *CPU]) == 130
    assert "at 3.0 of 9.0 MB. The finished part is kept" in capsys.readouterr().err


def test_benchmark_only_does_not_serve(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osmium.cli.serving.serve_http", None)
    small = {"depth": "16", "tokens": 4, "repeats": 1, "warm_up": 2, "prompt_tokens": (8,)}
    monkeypatch.setattr("osmium.cli.serving.BENCH_DEFAULTS", {**BENCH_DEFAULTS, **small})
    words = ["serve", "synthetic:tiny", *CPU, "--context", "1k", "--kv-cache-mb", "1"]
    assert main([*words, "--benchmark-only"]) == 0
    assert last_json(capsys)["model"] == "synthetic:tiny"


def test_a_packed_synthetic_model_is_benchmarked_from_its_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["pack", *CPU, "--cache-dir", str(tmp_path), "synthetic:tiny:3"]) == 0
    (path,) = capsys.readouterr().out.splitlines()
    assert Path(path).parent == tmp_path
    options = "--context 1k --depth 64 --tokens 4 --warm-up 4 --repeats 1 --prompt-tokens 16"
    assert main(["bench", *CPU, *options.split(), path]) == 0
    assert last_json(capsys)["model"] == "synthetic-tiny-3"


def test_doctor_runs_every_check() -> None:
    found = {finding.name for finding in run_checks()}
    assert {"system", "CUDA bindings", "memory", "swap", "huge pages", "packed models"} <= found


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "x", "y", "--model-path", "z"], "z"),
        (["perplexity", *CPU, "--text", "/no/such/file"], "/no/such/file"),
        (["plan", *CPU, "/no/such/model"], "/no/such/model"),
        (["plan", *CPU, "--expert-slots", "1"], "1"),
        (["plan", *CPU, "--kv-cache-mb", "1", "--context", "4k"], "4096"),
        (["plan", *CPU, "--context", "1g"], str(1 << 30)),
        (["plan", *CPU, "--link", "-1"], "--link"),
        (["plan", "--gpu", "RTX 9090"], "RTX 5090"),
        (["bench", *CPU, "--tokens", "9000"], "9000"),
        (["perplexity", *CPU, "--text", __file__, "--window", "9000"], "9000"),
        (["run", "--raw", "demo", ""], "prompt"),
    ],
)
def test_an_invalid_request_is_one_line_and_exit_code_two(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    line = output.err.splitlines()[-1]
    assert line.startswith(("osmium: ", f"osmium {arguments[0]}: ")) and named in line
    assert output.out == ""


def test_malformed_ids_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("{", '["a"]', "[true]", "[]", "[99999]"):
        ids = tmp_path / "ids.json"
        ids.write_text(text)
        assert main(["logits", *CPU, "--ids", str(ids), "--out", str(tmp_path / "o.npy")]) == 2
        assert capsys.readouterr().err.strip()


@pytest.mark.parametrize("command", [["run", "--raw"], ["run"], ["serve", "--port", "0"]])
def test_commands_that_need_text_refuse_a_model_without_a_tokenizer(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(CASES[0], tmp_path / "mute")
    options = ["hello"] if command[0] == "run" else []
    model_options = ["--model-path", str(tmp_path / "mute"), "--cache-dir", str(tmp_path / "cache")]
    assert main([*command, *CPU, *model_options, "--gpu-expert-bits", "16", *options]) == 2
    assert "tokenizer.json" in capsys.readouterr().err


def test_routing_is_recorded_token_by_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "routing.npz"
    short = ["--raw", "--temperature", "0", "--max-tokens", "4"]
    assert main(["run", "demo", *CPU, *short, "--record-routing", str(path), "The Congress"]) == 0
    with np.load(path) as file:
        ids, starts = file["ids"], file["prompt_starts"]
    assert ids.shape[1:] == (8, 4) and ids.shape[0] >= 4 and ids.max() < 32
    assert starts.tolist() == [0]
