"""Every tool runs: its --help, and without a GPU a small run."""

import ast
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from osmium.cuda.driver import cuda_version
from osmium.experts.routing import read_trace
from osmium.server.limits import DEFAULT_LIMITS
from tests.ptx.kernels import KERNEL_FILES, NAMES, kernel_text
from tests.server.running import run_limited
from tests.server.scripted import ScriptedEngine
from tests.weights.files import write

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"

FILES = sorted(path for path in TOOLS.iterdir() if path.is_file())
PYTHON = [path for path in FILES if path.read_text().startswith("#!/usr/bin/env python3")]
BASH = [path for path in FILES if path.name.endswith(".sh") or "bash\n" in path.read_text()[:30]]

ALONE = ("dma_bandwidth.py", "package_size")
"""Python tools that need no environment."""

GOLDEN = "make_golden.py"
"""Its environment takes gigabytes and imports torch."""


def name(path: Path) -> str:
    return path.name


def tool(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a Python tool in a separate process."""
    first, *rest = arguments
    return subprocess.run(
        [sys.executable, str(TOOLS / first), *map(str, rest)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def test_every_file_in_tools_is_of_a_known_kind() -> None:
    assert {*PYTHON, *BASH, TOOLS / "checkout.py"} == set(FILES)
    for path in FILES:
        runs = path.suffix != ".sh" and path.name != "checkout.py"
        assert os.access(path, os.X_OK) == runs, path


@pytest.mark.parametrize("path", [one for one in PYTHON if one.name != GOLDEN], ids=name)
def test_a_tools_help_shows_its_usage(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", [str(TOOLS), *sys.path])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(path), run_name="__main__")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert out.startswith("usage: ") and doc and doc.splitlines()[0] in out


def test_make_golden_prints_help_before_installing_torch() -> None:
    done = tool(GOLDEN, "--help")
    assert done.returncode == 0 and "golden logits" in done.stdout, done.stderr


@pytest.mark.parametrize("path", BASH, ids=name)
def test_a_shell_tool_parses(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("path", [*PYTHON, TOOLS / "checkout.py"], ids=name)
def test_a_tool_reaches_its_environment_from_any_python(path: Path) -> None:
    """Any `python3` must parse it, and it needs no package before use_environment()."""
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    if path.name in (*ALONE, "checkout.py"):
        return
    ready = False
    for node in tree.body:
        if isinstance(node, ast.Expr) and "use_environment" in ast.dump(node):
            ready = True
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [str(node.module)]
        else:
            continue
        roots = {module.partition(".")[0] for module in modules}
        assert ready or roots <= sys.stdlib_module_names | {"checkout"}, (
            f"{path.name} imports {roots} before use_environment()"
        )
    assert ready


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    sizes = "--tokens 60 --prompts 2 --layers 3 --experts 16 --top-k 2".split()
    done = tool("make_trace.py", path, *sizes)
    assert done.returncode == 0, done.stderr
    return path


def test_make_trace_writes_a_trace(trace: Path) -> None:
    found = read_trace(trace, experts=16)
    assert found.ids.shape == (60, 3, 2) and list(found.starts) == [0, 30]
    assert found.predicted is not None and found.predicted.shape == found.ids.shape
    ways = tool(
        "make_trace.py", trace.parent / "no" / "such.npz", "--tokens", "8", "--prompts", "1"
    )
    assert ways.returncode == 2 and "cannot be written" in ways.stderr
    ways = tool("make_trace.py", trace, "--top-k", "300")
    assert ways.returncode == 2 and "300" in ways.stderr


def test_simulate_cache_prints_every_policy(trace: Path) -> None:
    few = ["--warmup-tokens", "8", "--resident-fractions", ".25", ".5"]
    done = tool("simulate_cache", trace, *few)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["slots"] for row in rows} == {4, 8} and len({row["policy"] for row in rows}) > 9
    rates = {(row["policy"], row["slots"]): row["hit"] for row in rows}
    assert 0 < rates["mixed", 4] < rates["mixed", 8] < rates["belady", 8] < 1
    done = tool("simulate_cache", trace, "--warm-start", "20", *few)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3, done.stderr
    done = tool("simulate_cache", trace, "--prefetch", *few)
    assert done.returncode == 0 and "* as shipped" in done.stdout, done.stderr


def test_simulate_cache_reports_errors_in_one_line(trace: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.npz"
    data = bytearray(trace.read_bytes())
    data[100:200] = bytes(100)
    broken.write_bytes(data)
    empty = tmp_path / "empty.npz"
    np.savez(empty, ids=np.zeros((0, 1, 1), np.uint8))
    for arguments, said in (
        ([trace], "60 tokens"),
        ([broken], "broken.npz"),
        ([empty], "empty.npz"),
        ([tmp_path / "none.npz"], "none.npz"),
    ):
        done = tool("simulate_cache", *arguments)
        assert done.returncode == 2 and said in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_closed_pipe_ends_a_tool_silently(trace: Path) -> None:
    command = f"{sys.executable} tools/simulate_cache {trace} --warmup-tokens 8"
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -n 1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == ""


def test_eval_int4_clips_prints_an_error_per_variant(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    _byte_tokenizer(folder / "tokenizer.json", 64)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 3)
    done = tool("eval_int4_clips", folder, "--text", text, "--window", "16")
    assert done.returncode == 0, done.stderr
    found = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    assert list(found) == ["bf16", "nearest", "shipped", "finer"]
    assert len(set(found.values())) == 4, "each variant quantises differently"
    done = tool("eval_int4_clips", folder, "--text", tmp_path / "none.txt")
    assert done.returncode == 2 and "none.txt" in done.stderr


def _byte_tokenizer(path: Path, vocab: int) -> None:
    """tokenizer.json with an id for each of the first printable letters."""
    letters = {chr(33 + i) if i else "Ġ": i for i in range(vocab)}
    letters |= {chr(97 + i): 33 + i for i in range(26)}
    path.write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "pre_tokenizer": {
                    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                    "use_regex": False,
                },
                "decoder": {
                    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                    "use_regex": False,
                },
                "model": {"type": "BPE", "vocab": letters, "merges": []},
            }
        )
    )  # fmt: skip


def test_bench_load_measures_the_demo() -> None:
    done = tool("bench_load", "--device", "cpu", "--raw", "1M", "--context", "64")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["first_token_s"] > found["load_s"] > 0 and found["device"] == "cpu"
    done = tool("bench_load", "/no/such/model", "--device", "cpu")
    assert done.returncode == 2 and done.stderr.startswith("bench_load: /no/such/model")


def test_bench_pack_measures_on_the_cpu(tmp_path: Path) -> None:
    sizes = ["--model", "synthetic:tiny", "--layers", "2", "--devices", "cpu"]
    done = tool("bench_pack", "--checkpoint", tmp_path / "model", *sizes)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["packing"]["cpu"] >= 0
    assert list((tmp_path / "model-packed-cpu").glob("*.osmium"))


def test_bench_server_measures_a_running_server() -> None:
    with run_limited(ScriptedEngine("the end " * 20, context=2000), DEFAULT_LIMITS) as running:
        url = f"http://127.0.0.1:{running.port}"
        done = tool("bench_server", "--url", url, "--tokens", "40", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["plain"] > 0 and found["stream"] > 0
    done = tool("bench_server", "--url", url)
    assert done.returncode == 2 and "Start osmium-serve" in done.stderr


def test_bench_server_compares_the_server_with_its_engine() -> None:
    few = ["--device", "cpu", "--context", "256", "--tokens", "24", "--rounds", "1"]
    done = tool("bench_server", "demo", *few, "--streams", "2", "--pace", "60")
    assert done.returncode == 0, done.stderr
    assert "2 streams, --pace 60" in done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["model"] == "demo" and found["pace"] == 60
    rows = found["streams"]["2"]
    assert set(rows) == {"engine", "plain", "json_object", "json_schema", "penalty"}
    for kind in ("engine", "plain", "json_schema", "penalty"):
        row = rows[kind]
        # 24 tokens have 23 periods, of which late first steps may shorten some.
        assert 0 < row["tokens_per_s"] < 2 * 60 * 1.25, "the pace holds for each kind"
        assert row["tokens"] == 24 and row["cpu_us"] > 0
        ratio = row["tokens_per_s"] / rows["engine"]["tokens_per_s"]
        assert row["of_engine"] == pytest.approx(ratio), "in one round"
    assert rows["engine"]["of_engine"] == rows["plain"]["of_plain"] == 1
    assert rows["plain"]["client_tokens_per_s"] > 0
    assert rows["plain"]["loop_us"] > 2 * rows["engine"]["loop_us"], "only HTTP uses the loop"


def test_bench_server_measures_a_model_or_a_server() -> None:
    done = tool("bench_server", "demo", "--url", "http://127.0.0.1:1")
    assert done.returncode == 2 and "--url measures a running server" in done.stderr


def test_bench_sampling_compares_every_kind_of_request() -> None:
    demo = str(ROOT / "osmium" / "demo" / "demo.osmium")
    done = tool("bench_sampling", demo, "--tokens", "4", "--rounds", "1", "--depth", "8")
    assert done.returncode == 0, done.stderr
    ratios = json.loads(done.stdout.splitlines()[-1])["sequences"]["1"]
    assert {"greedy", "logprobs 20", "mask", "all"} <= set(ratios)


def test_make_demo_packs_a_checkpoint(tmp_path: Path) -> None:
    done = tool("make_demo.py", write(tmp_path / "model"), "--out", tmp_path / "made.osmium")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made.osmium").stat().st_size > 1000


def test_ptx_prints_the_text_of_a_kernel_and_lists_kernels() -> None:
    done = tool("ptx", "add_f32")
    assert done.returncode == 0 and done.stdout == kernel_text("add_f32")
    done = tool("ptx", "add_f32", "--lines")
    assert done.stdout.splitlines()[1].split()[:2] == ["2", "2"]
    done = tool("ptx", "--list")
    assert [line.split() for line in done.stdout.splitlines()] == [
        [name, f"ptx/{KERNEL_FILES[name].name}"] for name in NAMES
    ]
    done = tool("ptx", "nothing")
    assert done.returncode == 2 and "nothing; tools/ptx --list" in done.stderr


def test_ptxas_report_prints_a_kernel() -> None:
    done = tool("ptxas_report", "--filter", "embed_bf16")
    if done.returncode:
        assert "ptxas is not installed" in done.stderr
        pytest.skip("ptxas is not installed; it is of the dev extra")
    title, row = done.stdout.splitlines()
    assert (
        title.split()[0] == "kernel" and row.split()[0] == "embed_bf16" and len(row.split()) == 11
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["gpu_report"],
        ["kernel_timeline", "synthetic:tiny"],
        ["bench_pack"],
        ["dma_bandwidth.py"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_tool_without_its_gpu_fails_with_one_line(arguments: list[str]) -> None:
    if cuda_version() is not None:
        pytest.skip("there is a GPU here")
    done = tool(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{arguments[0]}: ") and ("driver" in line or "cuda-bindings" in line)


# -- the environment -------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A fresh clone whose environment.sh creates a .venv from the running Python."""
    root = tmp_path / "a clone"
    (root / "tools").mkdir(parents=True)
    for file in ("checkout.py", "make_trace.py"):
        shutil.copy(TOOLS / file, root / "tools" / file)
    shutil.copy(ROOT / "pyproject.toml", root / "pyproject.toml")
    (root / "osmium").symlink_to(ROOT / "osmium")
    environment(root, f'exec {sys.executable} "$@"')
    return root


def environment(root: Path, python: str) -> None:
    """Run make_trace.py of the clone by a Python without packages."""
    (root / "tools" / "environment.sh").write_text(
        "gpu_extra() { echo cu13; }\n"
        "environment() {\n"
        '    cd "$(dirname "${BASH_SOURCE[0]}")/.."\n'
        "    mkdir -p .venv/bin\n"
        '    echo "$1" >> asked\n'
        f"    printf '%s\\n' '#!/bin/sh' '{python}' > .venv/bin/python\n"
        "    chmod +x .venv/bin/python\n"
        "}\n"
    )


def bare(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """make_trace.py of the clone, by a Python that has no packages."""
    return subprocess.run(
        [sys.executable, "-S", "tools/make_trace.py", *arguments],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_tool_creates_its_environment_and_runs_in_it(clone: Path) -> None:
    sizes = "--tokens 8 --prompts 1 --layers 2 --experts 4 --top-k 1".split()
    done = bare(clone, "a trace.npz", *sizes)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert read_trace(clone / "a trace.npz").ids.shape == (8, 2, 1)
    assert (clone / "asked").read_text() == "cu13\n", "the extra that this machine's GPU needs"


def test_an_incomplete_environment_is_an_error_without_a_retry(clone: Path) -> None:
    environment(clone, f'exec {sys.executable} -S "$@"')
    done = bare(clone, "trace.npz")
    assert done.returncode == 1 and "numpy" in done.stderr and "Traceback" not in done.stderr
    assert (clone / "asked").read_text() == "cu13\n"


def test_an_environment_that_cannot_be_created_is_one_line(clone: Path) -> None:
    (clone / "tools" / "environment.sh").write_text(
        "environment() { echo no pip >&2; return 1; }\n"
    )
    done = bare(clone, "trace.npz")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("make_trace.py: numpy, ")
