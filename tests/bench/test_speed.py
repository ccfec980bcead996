"""What `osmium bench` measures, on the CPU: that it adds up, and that what does not fit is said."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import osmium
from osmium.bench import throughput
from osmium.bench.environment import environment
from osmium.bench.profile import launch_bytes, profile
from osmium.bench.report import COLUMNS, compare, row_line, summary
from osmium.bench.throughput import BenchConfig, measure
from osmium.cli import main
from osmium.engine.request import SamplingParams
from osmium.errors import ConfigError
from osmium.experts.cache import verify
from osmium.kernels.ptx import kernel
from osmium.kernels.sample import ADVANCE

SHORT = BenchConfig(depths=("64",), tokens=6, repeats=2, warm_up=8)


@pytest.fixture
def engine() -> Any:
    made = osmium.load(
        "synthetic:tiny", device="cpu", expert_slots=4, context=4096, prefill_chunk=64
    )
    yield made
    made.close()


def test_a_row_adds_up(engine: Any) -> None:
    found = measure(engine, SHORT)
    (row,) = found["rows"]
    config = engine.config
    assert row["routed"] == 2 * 6 * config.num_layers * config.top_k
    assert row["routed"] == row["hit"] + row["missed"]
    assert row["hit_rate"] == pytest.approx(row["hit"] / row["routed"])
    record = engine.runner.expert_runner.cache.record.nbytes
    assert row["mb_fetched_per_token"] * 1e6 == pytest.approx(row["experts_copied"] * record / 12)
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


def test_sequences_side_by_side_are_counted_together(engine: Any) -> None:
    settings = BenchConfig(depths=("64",), tokens=4, repeats=1, warm_up=4, parallel=(2,))
    (row,) = measure(engine, settings)["rows"]
    assert row["routed"] == 2 * 4 * engine.config.num_layers * engine.config.top_k
    assert row["sequences"] == 2


def test_replies_are_drawn_where_a_temperature_is_given(engine: Any) -> None:
    asked: list[Any] = []
    submit = engine.submit

    def seen(prompt: Any, params: Any, *more: Any, **named: Any) -> None:
        asked.append(params)
        submit(prompt, params, *more, **named)

    engine.submit = seen
    (row,) = measure(engine, replace(SHORT, temperature=0.7))["rows"]
    assert row["temperature"] == 0.7
    assert {(one.temperature, one.top_k, one.top_p) for one in asked} == {(0.7, 20, 0.95)}
    asked.clear()
    measure(engine, SHORT)
    assert {one.temperature for one in asked} == {0}


def test_a_row_starts_cold(engine: Any) -> None:
    """However warm the rows before it have left the cache."""
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=60)
    list(engine.generate([1, 2, 3], params))
    settings = BenchConfig(depths=("64", "64"), tokens=4, repeats=1, warm_up=4)
    first, second = measure(engine, settings)["rows"]
    assert first["hit_rate_cold_64"] == second["hit_rate_cold_64"] < 0.9


def test_prefill_says_what_it_fetched(engine: Any) -> None:
    (row,) = measure(engine, BenchConfig(depths=(), prompts=(40,), repeats=2))["rows"]
    assert row["routed"] == 2 * 40 * engine.config.num_layers * engine.config.top_k
    record = engine.runner.expert_runner.cache.record.nbytes
    assert row["mb_fetched"] * 1e6 == pytest.approx(row["experts_copied"] * record / 2)
    assert row["ttft_ms"] > 0


def test_counters_that_disagree_fail_the_bench(
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


def test_the_commit_is_told_of_a_checkout_and_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_what_does_not_fit_is_said(engine: Any, settings: BenchConfig, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        measure(engine, settings)


def test_a_profile_needs_a_gpu(engine: Any) -> None:
    with pytest.raises(ConfigError, match="GPU"):
        profile(engine, 64)


def test_what_a_launch_moves_is_its_contracts_with_the_grids_sizes() -> None:
    take = kernel("take_f32")  # the launcher's size is the grid
    assert launch_bytes((take, (3,), ("out", "x", "rows", 64))) == take.bytes_moved(
        (3, "", "", "", 64)
    )
    assert launch_bytes((ADVANCE, (1,), ())) == 0, "a contract that does not say"


def test_a_comparison_shows_ratios_and_what_one_lacks(engine: Any) -> None:
    first = measure(engine, SHORT)
    second = json.loads(json.dumps(first))
    second["rows"][0]["tokens_per_s"] = 2 * first["rows"][0]["tokens_per_s"]
    assert "2.000" in compare(first, second)
    second["rows"][0]["depth"] = 65
    assert compare(first, second).count("in one only") == 2
    second["rows"][0] |= {"depth": first["rows"][0]["depth"], "temperature": 0.7}
    assert compare(first, second).count("in one only") == 2, "a drawn reply is another thing"
    assert "at 0.7" in compare(second, second)
    assert "decode" in row_line(first["rows"][-1]) and len(COLUMNS) == len(
        row_line(first["rows"][-1])
    )
    assert first["model"] in summary(first)
    kernels = {"rows": [{"model": "m", "sequences": 1, "op": "router", "us": 4.0}]}
    other = {"rows": [{"model": "m", "sequences": 1, "op": "router", "us": 2.0}]}
    assert "2.000" in compare(kernels, other)


def test_several_budgets_run_in_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    asked = (
        "bench synthetic:tiny --device cpu --kv-cache-mb 1,2 --context 256 --depth 50% --tokens 4 "
        "--warm-up 4 --repeats 1 --prompt-tokens 16"
    )
    assert main(asked.split()) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one["kv_cache_mb"] for one in found] == [1, 2]
    assert [row["what"] for row in found[0]["rows"]] == ["prefill", "decode"]
    assert found[1]["rows"][1]["depth"] > found[0]["rows"][1]["depth"]


def test_the_link_is_timed_and_nothing_changes(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock instead of a GPU's."""
    list(engine.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=8)))
    runner = engine.runner
    ticks = iter(range(1000))
    monkeypatch.setattr(
        throughput, "Event", lambda device: SimpleNamespace(record=lambda _: next(ticks))
    )
    monkeypatch.setattr(
        runner.ops, "machine", SimpleNamespace(device=None, stream=None), raising=False
    )
    before = engine.status()["experts"]
    record = runner.expert_runner.cache.record.nbytes
    assert throughput.link_rate(engine, 2) == 2 * record / 0.25 / 1e6, (
        "4 fetches of 2 records a tick"
    )
    assert engine.status()["experts"] == before
    records = runner.ops.host_view(runner.expert_runner.host_experts.records)
    assert verify(runner.ops, runner.expert_runner.cache, records, 1000, 0) > 0
