"""The command line as a user meets it: the bundled demo model, on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from osmium.cli import main
from osmium.cli.doctor import examine
from osmium.cli.flags import _NAMES
from osmium.config import EngineConfig
from osmium.weights import DEMO
from tests.models.build import CASES, write_checkpoint

pytestmark = pytest.mark.skipif(not DEMO.is_file(), reason="the demo model is not here")

CPU = ["--device", "cpu"]


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """The last line of stdout."""
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_run_prints_the_answer_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    asked = "What is the capital of France?"
    assert main(["run", *CPU, "--temperature", "0", "--no-think", "--", asked]) == 0
    assert capsys.readouterr().out == "Paris.\n"


def test_timing_is_one_line_on_stderr_for_each_reply(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--raw", "--temperature", "0", "--max-tokens", "6", "--expert-slots", "8"]
    assert main(["run", *CPU, *short, "--timing", "The Congress"]) == 0
    said = capsys.readouterr()
    (line,) = [x for x in said.err.splitlines() if x.startswith("osmium: reply: ")]
    for word in ("tok/s", "hit 0.", "MB/token", "prefill", "decode", "(5 tokens)"):
        assert word in line
    assert "osmium" not in said.out


def test_a_chat_is_timed_reply_by_reply(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter(["Hello", "Again", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(asked))
    assert main(["chat", *CPU, "--no-think", "--max-tokens", "3", "--timing"]) == 0
    assert capsys.readouterr().err.count("osmium: reply: ") == 2


def test_the_same_seed_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for _ in range(2):
        assert main(["run", *CPU, "--raw", "--seed", "7", "--max-tokens", "12", "Once"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and len(said[0]) > 1


def test_perplexity_is_the_same_by_both_paths(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The Congress shall have power to lay and collect taxes. " * 12)
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


def test_plan_loads_nothing_and_says_where_memory_goes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *CPU, "--json"]) == 0
    found = last_json(capsys)
    assert found["context_tokens"] == 4096 and found["device"] == "cpu"


def test_bench_ends_with_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--prompt-tokens", "8", "--tokens", "4", "--repeats", "1"]
    assert main(["bench", *CPU, *short]) == 0
    found = last_json(capsys)
    rows, experts = found["rows"], found["experts"]
    assert isinstance(rows, list) and {row["what"] for row in rows} == {"prefill", "decode"}
    assert isinstance(experts, dict)
    assert experts["routed"] == experts["hit"] + experts["missed"] > 0


def test_a_made_up_model_is_packed_and_measured_from_its_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["pack", *CPU, "--cache-dir", str(tmp_path), "synthetic:tiny:3"]) == 0
    (path,) = capsys.readouterr().out.splitlines()
    assert Path(path).parent == tmp_path
    asked = "--context 1k --depth 64 --tokens 4 --warm-up 4 --repeats 1 --prompt-tokens 16"
    assert main(["bench", *CPU, *asked.split(), path]) == 0
    assert last_json(capsys)["model"] == "synthetic-tiny-3"


def test_doctor_says_what_it_finds() -> None:
    found = {finding.name for finding in examine()}
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
        (["serve", *CPU, "--port", "70000"], "70000"),
        (["bench", *CPU, "--tokens", "1"], "1"),
        (["bench", *CPU, "--tokens", "9000"], "9000"),
        (["perplexity", *CPU, "--text", __file__, "--window", "1"], "1"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_two(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    (line,) = [x for x in said.err.splitlines() if not x.endswith(" %")]
    assert line.startswith("osmium: ") and named in line
    assert said.out == ""


@pytest.mark.parametrize("flag", ["--vram=much", "--context=-3", "--gpu-expert-bits=5"])
def test_a_malformed_flag_is_argparses_to_refuse(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["plan", flag])
    assert refused.value.code == 2
    assert flag.split("=")[1] in capsys.readouterr().err


def test_ids_that_are_no_ids_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("{", '["a"]', "[true]", "[]", "[99999]"):
        ids = tmp_path / "ids.json"
        ids.write_text(text)
        assert main(["logits", *CPU, "--ids", str(ids), "--out", str(tmp_path / "o.npy")]) == 2
        assert capsys.readouterr().err.strip()


@pytest.mark.parametrize("command", [["run", "--raw"], ["run"], ["serve", "--port", "0"]])
def test_a_model_without_its_tokenizer_is_refused_by_what_needs_text(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(CASES[0], tmp_path / "mute")
    asked = ["hello"] if command[0] == "run" else []
    where = ["--model-path", str(tmp_path / "mute"), "--cache-dir", str(tmp_path / "cache")]
    assert main([*command, *CPU, *where, "--gpu-expert-bits", "16", *asked]) == 2
    assert "tokenizer.json" in capsys.readouterr().err


def test_every_option_has_its_flag() -> None:
    assert set(_NAMES) == set(EngineConfig.__dataclass_fields__)


def test_help_needs_no_numpy() -> None:
    code = (
        "import sys; from osmium.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    )
    code += "assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_routing_is_recorded_token_by_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "routing.npz"
    short = ["--raw", "--temperature", "0", "--max-tokens", "4"]
    assert main(["run", *CPU, *short, "--record-routing", str(path), "The Congress"]) == 0
    with np.load(path) as file:
        ids, starts = file["ids"], file["prompt_starts"]
    assert ids.shape[1:] == (8, 4) and ids.shape[0] >= 4 and ids.max() < 32
    assert starts.tolist() == [0]
