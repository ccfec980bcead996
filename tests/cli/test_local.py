"""`osmium list`, `rm` and models by name: a cache folder of packed files."""

import fcntl
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import osmium
from osmium.cli import main
from osmium.cli.local import named_model
from osmium.config import Progress
from osmium.errors import ConfigError
from osmium.weights import packing
from osmium.weights.local import folder_name, local_models, usage_file


@pytest.fixture
def cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder with a model in one format, one in two, and an interrupted packing."""
    folder = tmp_path / "packed"
    for arguments in (["synthetic:tiny:2"], ["synthetic:tiny:3"],
                      ["synthetic:tiny:3", "--gpu-expert-bits", "8"]):  # fmt: skip
        assert main(["pack", "--device", "cpu", "--cache-dir", str(folder), *arguments]) == 0
    stopped = folder / "synthetic-tiny-4-0123abcd-experts4-bf16-int8-int8.osmium"
    stopped.with_name(stopped.name + ".partial").write_bytes(bytes(3000))
    lines: list[dict[str, object]] = [{"key": "x", "nbytes": {"a": 1000, "b": 500}}, {"a": 1}]
    journal = "".join(json.dumps(line) + "\n" for line in lines)
    stopped.with_name(stopped.name + ".journal").write_text(journal)
    capsys.readouterr()
    return folder


def listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    assert main(["list", "--cache-dir", str(folder), "--json"]) == 0
    return {one["name"]: one for one in json.loads(capsys.readouterr().out)}


def test_list_shows_size_and_formats_of_every_file(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = listed(cache, capsys)
    assert len(found) == 4 and "synthetic-tiny-2" in found and "synthetic-tiny-4" in found
    (eight,) = [one for name, one in found.items() if "experts8" in name]
    assert eight["formats"] == {
        "expert_bits": 8, "attention": "bf16", "shared": "int8", "head": "int8",
    }  # fmt: skip
    assert eight["bytes"] == Path(str(eight["path"])).stat().st_size
    stopped = found["synthetic-tiny-4"]
    assert (stopped["bytes"], stopped["total_bytes"]) == (1000, 3000)
    assert stopped["problem"] == "not finished"
    assert main(["list", "--cache-dir", str(cache)]) == 0
    table = capsys.readouterr().out
    assert "8 bits" in table and "never" in table and "1.0 of 3.0 kB" in table


def test_a_damaged_file_is_listed_with_its_problem(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache / "bad.osmium").write_bytes(b"not a model")
    assert "not a packed file" in str(listed(cache, capsys)["bad"]["problem"])


def test_an_empty_cache_suggests_pull(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--cache-dir", str(tmp_path / "none")]) == 0
    assert "osmium pull" in capsys.readouterr().out


def test_loading_sets_the_time_of_last_use(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--device", "cpu", "--cache-dir", str(cache), "synthetic:tiny:2"]) == 0
    capsys.readouterr()
    assert listed(cache, capsys)["synthetic-tiny-2"]["last_used"] is None, (
        "planning does not count as use"
    )
    path = str(listed(cache, capsys)["synthetic-tiny-2"]["path"])
    osmium.load(path, device="cpu", cache_dir=str(cache), context=64).close()
    found = listed(cache, capsys)
    assert found["synthetic-tiny-2"]["last_used"] is not None
    assert next(iter(found)) == "synthetic-tiny-2", "the most recently used is first"
    assert main(["list", "--cache-dir", str(cache)]) == 0
    assert "today" in capsys.readouterr().out


def test_a_model_is_found_by_the_name_that_list_prints(cache: Path) -> None:
    path = named_model("synthetic-tiny-2", str(cache))
    assert path is not None and Path(path).is_file()
    for same in (None, "demo", "owner/name", "./x", "synthetic:tiny", str(cache)):
        assert named_model(same, str(cache)) == same
    with pytest.raises(ConfigError, match="did you mean synthetic-tiny-2"):
        named_model("syntetic-tiny-2", str(cache))
    with pytest.raises(ConfigError, match="not finished"):
        named_model("synthetic-tiny-4", str(cache))
    with pytest.raises(ConfigError, match='osmium run demo "why is it so"'):
        named_model("why is it so", str(cache))


def test_rm_deletes_the_file_and_its_companion_files(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model,) = [one for one in local_models(cache) if one.name == "synthetic-tiny-2"]
    assert model.fingerprint is not None
    usage = usage_file(cache, model.fingerprint)
    usage.write_bytes(b"counts")
    names = ["synthetic-tiny-2", "synthetic-tiny-4"]
    assert main(["rm", *names, "--cache-dir", str(cache), "-y"]) == 0
    assert "deleted" in capsys.readouterr().out
    assert not usage.exists()
    assert not [path for path in cache.iterdir() if "tiny-2" in path.name or "-4-" in path.name]
    assert len(listed(cache, capsys)) == 2


def test_rm_keeps_usage_counts_shared_with_another_format(cache: Path) -> None:
    first, second = [one for one in local_models(cache) if "tiny-3" in one.name]
    assert first.fingerprint == second.fingerprint and first.fingerprint is not None
    usage = usage_file(cache, first.fingerprint)
    usage.write_bytes(b"counts")
    assert main(["rm", first.name, "--cache-dir", str(cache), "-y"]) == 0
    assert usage.exists()
    assert main(["rm", second.path.name, "--cache-dir", str(cache), "-y"]) == 0
    assert not usage.exists()


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("synthetic-tiny-9", "did you mean synthetic-tiny-"),
        ("/etc/passwd", "deletes nothing elsewhere"),
        ("../packed.osmium", "deletes nothing elsewhere"),
        ("zzz", "osmium list"),
    ],
)
def test_rm_refuses_a_name_that_is_not_in_the_cache_folder(
    name: str, named: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(cache.iterdir())
    assert main(["rm", name, "--cache-dir", str(cache), "-y"]) == 2
    assert named in capsys.readouterr().err
    assert sorted(cache.iterdir()) == before


def test_rm_refuses_a_model_that_is_being_packed(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model,) = [one for one in local_models(cache) if one.name == "synthetic-tiny-2"]
    with open(model.path.with_name(model.path.name + ".lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["rm", model.name, "--cache-dir", str(cache), "-y"]) == 2
    assert "being packed" in capsys.readouterr().err and model.path.exists()


def test_rm_asks_on_a_terminal_and_needs_yes_elsewhere(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["rm", "synthetic-tiny-2", "--cache-dir", str(cache)]
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert main(arguments) == 2
    assert "-y" in capsys.readouterr().err
    for answer, there in (("n\n", True), ("\n", True), ("y\n", False)):
        stdin = io.StringIO(answer)
        monkeypatch.setattr(stdin, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(arguments) == 0
        capsys.readouterr()
        assert ("synthetic-tiny-2" in listed(cache, capsys)) is there


def test_a_hub_snapshot_is_named_by_its_repository(tmp_path: Path) -> None:
    folder = tmp_path / "models--Qwen--Qwen3.5-35B-A3B" / "snapshots" / ("0123456789" * 4)
    folder.mkdir(parents=True)
    assert folder_name(folder) == "Qwen3.5-35B-A3B"
    assert folder_name(tmp_path) == tmp_path.name


def test_pull_accepts_only_hub_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model in ("synthetic:tiny", str(tmp_path), "name"):
        assert main(["pull", model]) == 2
        assert "owner/name" in capsys.readouterr().err


def test_ctrl_c_while_packing_reports_kept_bytes_and_the_next_run_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = packing._write_parts
    first_reports: list[int] = []
    stopped_bytes: list[int] = []

    def interrupted_write(
        file: Any, notes: Any, plan: Any, source: Any, crcs: Any, progress: Progress
    ) -> None:
        reports: list[int] = []

        def report(stage: str, done: int, total: int) -> None:
            reports.append(done)
            progress(stage, done, total)
            if len(reports) == 40 and len(first_reports) == 1:
                stopped_bytes.append(done)
                raise KeyboardInterrupt

        first_reports.append(-1)
        try:
            write(file, notes, plan, source, crcs, report)
        finally:
            first_reports[-1] = reports[0]

    monkeypatch.setattr(packing, "_write_parts", interrupted_write)
    packed = []
    for folder in ("stopped", "whole"):
        words = ["pack", "synthetic:tiny", "--device", "cpu", "--cache-dir", str(tmp_path / folder)]
        if folder == "stopped":
            assert main(words) == 130
            (line,) = capsys.readouterr().err.splitlines()
            assert "stopped while packing" in line and "continues from there" in line
            (partial,) = local_models(tmp_path / folder)
            assert stopped_bytes == [partial.nbytes] and partial.nbytes < partial.total
        assert main(words) == 0
        packed.append(Path(capsys.readouterr().out.strip()).read_bytes())
    assert first_reports[0] == first_reports[2] == 0 and first_reports[1] == partial.nbytes
    assert packed[0] == packed[1]
