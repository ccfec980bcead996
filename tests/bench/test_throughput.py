"""`osmium bench` on the CPU: its rows are consistent, and settings that do not fit are refused."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import osmium
from osmium.bench import rates
from osmium.bench.environment import environment
from osmium.bench.profile import launch_bytes, profile
from osmium.bench.report import compare, header, row_line, summary
from osmium.bench.throughput import BenchConfig, measure
from osmium.cli import main
from osmium.engine.request import SamplingParams
from osmium.errors import ConfigError
from osmium.experts.cache import verify
from osmium.kernels.ptx import kernel
from osmium.kernels.sample import ADVANCE_STEP

SHORT = BenchConfig(depths=("64",), tokens=6, repeats=2, warm_up=8)


@pytest.fixture
def engine() -> Any:
    engine = osmium.load(
        "synthetic:tiny", device="cpu", expert_slots=4, context=4096, prefill_chunk=64
    )
    yield engine
    engine.close()


def test_a_row_is_consistent_with_its_counters(engine: Any) -> None:
    found = measure(engine, SHORT)
    (row,) = found["rows"]
    config = engine.config
    assert row["routed"] == 2 * 6 * config.num_layers * config.top_k
    assert row["routed"] == row["hit"] + row["missed"]
    assert row["hit_rate"] == pytest.approx(row["hit"] / row["routed"])
    expert_bytes = engine.runner.expert_runner.cache.layout.nbytes
    assert row["mb_fetched_per_token"] * 1e6 == pytest.approx(
        row["experts_copied"] * expert_bytes / 12
    )
    assert row["tokens_per_s"] > 0
    assert found["slots_verified"] == 8
    for name in ("hit_rate_cold_64", "hit_rate_warm_64", "hit_rate"):
        assert 0 <= row[name] < 1
    keys = {"commit", "driver", "cuda", "device", "date", "version", "rss", "host_memory", "vram",
            "vram_in_use"}  # fmt: skip
    assert keys <= set(found)
    assert {
        "vram_gb_s",
        "vram_utilization",
        "link_gb_s",
        "link_utilization",
        "roofline_ms",
    } <= set(row)
    assert found["expert_slots"] == [4, 8]
    assert json.loads(json.dumps(found)) == found


def test_parallel_sequences_are_counted_in_one_row(engine: Any) -> None:
    settings = BenchConfig(depths=("64",), tokens=4, repeats=1, warm_up=4, parallel=(2,))
    (row,) = measure(engine, settings)["rows"]
    assert row["routed"] == 2 * 4 * engine.config.num_layers * engine.config.top_k
    assert row["sequences"] == 2


def test_responses_are_sampled_when_a_temperature_is_given(engine: Any) -> None:
    submitted: list[Any] = []
    submit = engine.submit

    def recording_submit(prompt: Any, params: Any, *more: Any, **named: Any) -> None:
        submitted.append(params)
        submit(prompt, params, *more, **named)

    engine.submit = recording_submit
    (row,) = measure(engine, replace(SHORT, temperature=0.7))["rows"]
    assert row["temperature"] == 0.7
    assert {(one.temperature, one.top_k, one.top_p) for one in submitted} == {(0.7, 20, 0.95)}
    submitted.clear()
    measure(engine, SHORT)
    assert {one.temperature for one in submitted} == {0}


def test_a_row_starts_with_an_empty_cache(engine: Any) -> None:
    """Usage by earlier rows and responses does not carry over."""
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=60)
    list(engine.generate([1, 2, 3], params))
    settings = BenchConfig(depths=("64", "64"), tokens=4, repeats=1, warm_up=4)
    first, second = measure(engine, settings)["rows"]
    assert first["hit_rate_cold_64"] == second["hit_rate_cold_64"] < 0.9


def test_a_prefill_row_counts_fetched_experts(engine: Any) -> None:
    (row,) = measure(engine, BenchConfig(depths=(), prompts=(40,), repeats=2))["rows"]
    assert row["routed"] == 2 * 40 * engine.config.num_layers * engine.config.top_k
    expert_bytes = engine.runner.expert_runner.cache.layout.nbytes
    assert row["mb_fetched"] * 1e6 == pytest.approx(row["experts_copied"] * expert_bytes / 2)
    assert row["ttft_ms"] > 0


def test_inconsistent_counters_fail_the_benchmark(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, status = engine.runner.expert_runner, engine.status

    def dropping() -> dict[str, Any]:
        found: dict[str, Any] = status()
        half = {name: count // 2 for name, count in found["experts"].items()}
        found["experts"] = {**half, "routed": half["hit"] + half["missed"]}
        return found

    monkeypatch.setattr(engine, "status", dropping)
    with pytest.raises(AssertionError, match="route to"):
        measure(engine, SHORT)
    monkeypatch.undo()
    engine.runner.ops.copy_h2d(store.cache.counters, np.array([9, 3, 3, 3, 0, 0, 0], np.int64))
    with pytest.raises(AssertionError, match="9 routed"):
        measure(engine, SHORT)


def test_the_commit_comes_from_git_or_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSMIUM_COMMIT", "1234abc")
    assert environment("cpu")["commit"] == "1234abc"
    monkeypatch.delenv("OSMIUM_COMMIT")
    found = environment("cpu")["commit"]
    assert found is None or re.fullmatch(r"[0-9a-f]{12}\+?", found)
    assert environment("cpu")["driver"] is None


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (BenchConfig(depths=("9k",)), "9216"),
        (BenchConfig(depths=("deep",)), "'deep'"),
        (BenchConfig(tokens=1), "--tokens is 1"),
        (BenchConfig(temperature=-1), "--temperature is -1"),
        (BenchConfig(temperature=float("nan")), "--temperature is nan"),
        (BenchConfig(parallel=(9,)), "9 sequences"),
        (BenchConfig(depths=(), prompts=(5000,)), "5000"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_value(
    engine: Any, settings: BenchConfig, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        measure(engine, settings)


def test_a_profile_needs_a_gpu(engine: Any) -> None:
    with pytest.raises(ConfigError, match="GPU"):
        profile(engine, 64)


def test_launch_traffic_is_the_contracts_formula_at_the_grid_size() -> None:
    gather = kernel("gather_rows_f32")  # the launcher's size is the grid
    assert launch_bytes((gather, (3,), ("out", "x", "rows", 64))) == gather.bytes_moved(
        (3, "", "", "", 64)
    )
    assert launch_bytes((ADVANCE_STEP, (1,), ())) == 0, "the contract has no traffic formula"


def test_a_comparison_shows_ratios_and_unmatched_rows(engine: Any) -> None:
    first = measure(engine, SHORT)
    second = json.loads(json.dumps(first))
    second["rows"][0]["tokens_per_s"] = 2 * first["rows"][0]["tokens_per_s"]
    assert "2.000" in compare(first, second)
    second["rows"][0]["depth"] = 65
    assert compare(first, second).count("in one only") == 2
    second["rows"][0] |= {"depth": first["rows"][0]["depth"], "temperature": 0.7}
    assert compare(first, second).count("in one only") == 2, (
        "a sampled response is another workload"
    )
    assert "at 0.7" in compare(second, second)
    row = first["rows"][-1]
    assert "decode" in row_line(row) and len(header(row)) == len(row_line(row))
    assert first["model"] in summary(first)
    kernels = {"rows": [{"model": "m", "sequences": 1, "op": "router", "us": 4.0}]}
    other = {"rows": [{"model": "m", "sequences": 1, "op": "router", "us": 2.0}]}
    assert "2.000" in compare(kernels, other)


def test_several_kv_cache_sizes_run_in_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        "bench synthetic:tiny --device cpu --kv-cache-mb 1,2 --context 256 --depth 50% --tokens 4 "
        "--warm-up 4 --repeats 1 --prompt-tokens 16"
    )
    assert main(command.split()) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one["kv_cache_mb"] for one in found] == [1, 2]
    assert [row["what"] for row in found[0]["rows"]] == ["prefill", "decode"]
    assert found[1]["rows"][1]["depth"] > found[0]["rows"][1]["depth"]


def test_measuring_the_link_rate_changes_no_state(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A counter stands in for CUDA events."""
    list(engine.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=8)))
    runner = engine.runner
    ticks = iter(range(1000))
    monkeypatch.setattr(
        rates, "Event", lambda device: SimpleNamespace(record=lambda _: next(ticks))
    )
    monkeypatch.setattr(
        runner.ops, "runtime", SimpleNamespace(device=None, stream=None), raising=False
    )
    before = engine.status()["experts"]
    expert_bytes = runner.expert_runner.cache.layout.nbytes
    assert rates.link_rate(engine, 2) == 2 * expert_bytes / 0.25 / 1e6, (
        "4 fetches of 2 experts in one tick"
    )
    slots = runner.expert_runner.cache.slots[0].shape[0]
    assert rates.copy_rate(engine) == slots * expert_bytes / 1e6, "each slot once in one tick"
    assert engine.status()["experts"] == before
    host_bytes = runner.ops.host_view(runner.expert_runner.host_experts.packed)
    assert verify(runner.ops, runner.expert_runner.cache, host_bytes, 1000, 0) > 0
