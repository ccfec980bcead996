"""Prefill and turn rows of `osmium bench`: counts, parts of the trace, and what limits a row."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import osmium
from osmium.bench import prefill
from osmium.bench.operations import (
    attention_multiply_adds,
    matrix_multiply_adds,
    prompt_multiply_adds,
)
from osmium.bench.report import compare, header, row_line, summary
from osmium.bench.throughput import BenchConfig, measure
from osmium.bench.trace_parts import TraceParts
from osmium.config import EngineConfig, ModelConfig
from osmium.errors import ConfigError
from osmium.weights.synthetic import open_synthetic

RATES = {"link_gb_s": 2.0, "copy_gb_s": 4.0, "memory_gb_s": 0.0, "mma_s8_tops": 1000.0}

NO_DECODE = {"depths": (), "repeats": 2, "warm_up": 3}


@pytest.fixture
def engine() -> Iterator[Any]:
    engine = osmium.load(
        "synthetic:tiny", device="cpu", expert_slots=4, context=4096, prefill_chunk=64
    )
    yield engine
    engine.close()


def config_of(name: str) -> ModelConfig:
    return open_synthetic(f"synthetic:{name}", EngineConfig()).config


@pytest.mark.parametrize("name", ["tiny", "qwen3.5-35b-a3b", "qwen3.5-122b-a10b"])
def test_multiply_adds_of_a_token_are_those_of_the_models_matrices(name: str) -> None:
    opened = open_synthetic(f"synthetic:{name}", EngineConfig())
    config = opened.config
    matrices = sum(
        part.shape[0] * part.shape[1]
        for key, part in opened.parts.items()
        if part.format != "f32" and key not in ("embed", "head")
    )
    routed = config.num_layers * config.top_k * 3
    routed *= config.hidden_size * config.moe_intermediate_size
    assert matrix_multiply_adds(config) == matrices + routed


def test_attention_counts_each_token_and_those_before_it() -> None:
    config = config_of("tiny")
    layers = sum(mixer == "attention" for mixer in config.layer_types)
    keys = sum(position + 1 for position in range(30, 37))
    wanted = 2 * layers * config.num_heads * config.head_dim * keys
    assert attention_multiply_adds(config, 30, 7) == wanted
    matrices = 7 * matrix_multiply_adds(config)
    assert prompt_multiply_adds(config, 30, 7) == wanted + matrices


def test_a_turn_row_counts_new_tokens_only(engine: Any) -> None:
    settings = BenchConfig(**NO_DECODE, turns=((700, 33), (64, 1)))  # type: ignore[arg-type]
    first, second = measure(engine, settings)["rows"]
    config = engine.config
    for row, tokens in ((first, 33), (second, 1)):
        assert row["what"] == "turn" and row["tokens"] == tokens
        assert row["routed"] == 2 * tokens * config.num_layers * config.top_k
        assert row["tokens_per_s"] == pytest.approx(1e3 * tokens / row["ttft_ms"])
        assert len(row["samples_ms"]) == 2
    assert (first["context"], second["context"]) == (700, 64)


def test_a_turn_row_reads_seeded_state(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens before the new ones are neither computed nor zero."""
    seen: list[tuple[int, float]] = []
    start_prefill = engine.runner.start_prefill

    def recording(batch: Any, inputs: Any) -> Any:
        ((request, _),) = batch.scheduled
        state = next(s for s in engine.runner.state.layers if hasattr(s, "delta"))
        seen.append((request.num_computed_tokens, float(np.abs(state.delta).max())))
        return start_prefill(batch, inputs)

    monkeypatch.setattr(engine.runner, "start_prefill", recording)
    measure(engine, BenchConfig(**NO_DECODE, turns=((700, 33),)))  # type: ignore[arg-type]
    assert [computed for computed, _ in seen] == [700] * 3 and min(top for _, top in seen) > 0.1


def limits(engine: Any, context: int, tokens: int, seconds: float, fetched: float) -> Any:
    return prefill._limits(engine, context, tokens, seconds, fetched, RATES)


def test_the_floor_of_a_prompt_is_the_larger_of_link_and_mma(engine: Any) -> None:
    config, layout = engine.config, engine.runner.expert_runner.cache.layout
    unresident = config.num_layers * 4 * layout.nbytes  # 4 of 8 experts have a slot
    found = limits(engine, 0, 130, 0.5, 10 * unresident)
    assert found["passes"] == 3, "130 tokens in steps of 64"
    assert found["mb_unresident"] == pytest.approx(3 * unresident / 1e6)
    assert found["floor_of"] == "link"
    assert found["floor_ms"] == pytest.approx(1e3 * 3 * unresident / 4e9), "the faster of both"
    assert found["floor_fraction"] == pytest.approx(found["floor_ms"] / 500)
    assert found["link_utilization"] == pytest.approx(10 * unresident / 0.5 / 4e9)
    operations = 2 * prompt_multiply_adds(config, 0, 130)
    assert found["tflops"] == pytest.approx(operations / 0.5 / 1e12)
    assert found["mma_utilization"] == pytest.approx(2 * operations / 0.5 / 1e15)
    fewer = limits(engine, 0, 130, 0.5, unresident)
    assert fewer["floor_ms"] == pytest.approx(1e3 * unresident / 4e9), (
        "no more than what was fetched"
    )
    nothing = limits(engine, 50, 130, 0.5, 0)
    assert nothing["floor_of"] == "mma"
    assert nothing["floor_ms"] == pytest.approx(
        1e3 * 4 * prompt_multiply_adds(config, 50, 130) / 1e15
    )


def test_a_resident_model_has_no_unresident_bytes() -> None:
    engine = osmium.load("synthetic:tiny", device="cpu", context=512, prefill_chunk=64)
    try:
        (row,) = measure(engine, BenchConfig(**NO_DECODE, prompts=(40,)))["rows"]  # type: ignore
    finally:
        engine.close()
    assert row["mb_unresident"] == row["mb_fetched"] == 0 and row["hit_rate"] == 1


# -- parts of the trace ----------------------------------------------------------------------------


@pytest.fixture
def replaying(tmp_path: Path) -> Iterator[Callable[[int], Any]]:
    """An engine that replays a trace of so many tokens, and that trace u16 [N, L, A]."""
    engines = []

    def load(tokens: int) -> Any:
        config = config_of("tiny")
        shape = (tokens, config.num_layers, config.top_k)
        rng = np.random.default_rng(4)
        ids = rng.random((*shape[:2], config.num_experts)).argsort(axis=2)[:, :, : config.top_k]
        path = tmp_path / "trace.npz"
        np.savez(path, ids=ids.astype(np.uint8), predicted=ids[::-1].astype(np.uint8))
        engine = osmium.load(
            "synthetic:tiny", device="cpu", expert_slots=4, context=1024, prefill_chunk=64,
            replay_routing=str(path),
        )  # fmt: skip
        engines.append(engine)
        return engine, ids

    yield load
    for engine in engines:
        engine.close()


def routed_ids(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The expert ids of layer 0 of each step from now on."""
    steps: list[Any] = []
    forward = engine.runner.expert_runner.forward

    def recording(x: Any, h: Any, ids: Any, weights: Any, layer: int, *more: Any) -> None:
        if layer == 0:
            steps.append(np.array(ids))
        forward(x, h, ids, weights, layer, *more)

    monkeypatch.setattr(engine.runner.expert_runner, "forward", recording)
    return steps


def test_each_prompt_replays_the_next_part_of_the_trace(
    replaying: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, trace = replaying(500)
    steps = routed_ids(engine, monkeypatch)
    settings = BenchConfig(repeats=1, depths=(), warm_up=5, prompts=(100, 30), turns=((300, 20),))
    found = measure(engine, settings)
    assert [row["trace_fresh"] for row in found["rows"]] == [1.0] * 3 and not found["notes"]
    replayed = np.concatenate(steps)
    tokens = 3 * 5 + 2 * (100 + 30 + 20)
    assert (replayed == trace[:tokens, 0]).all(), "in order, each token once"


def test_decode_rows_replay_the_trace_by_position(
    replaying: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, trace = replaying(500)
    steps = routed_ids(engine, monkeypatch)
    settings = BenchConfig(("50",), tokens=4, repeats=1, warm_up=4, prompts=(30,))
    measure(engine, settings)
    decoded = [step for step in steps if len(step) == 1]
    assert (np.concatenate(decoded)[4:8] == trace[50:54, 0]).all(), "behind the prompts' warm-up"


def test_a_trace_that_is_too_short_is_reported(replaying: Any) -> None:
    engine, _ = replaying(70)
    settings = BenchConfig(repeats=1, depths=(), warm_up=5, prompts=(30, 100))
    found = measure(engine, settings)
    first, second = found["rows"]
    assert first["trace_fresh"] == 1.0
    assert second["trace_fresh"] == 0.0, "its untimed prompt took the last tokens"
    (note,) = found["notes"]
    assert "70 tokens" in note and "--tokens 270" in note and note in summary(found)


def test_parts_count_the_tokens_that_no_earlier_part_has(replaying: Any) -> None:
    engine, trace = replaying(70)
    parts = TraceParts(engine)
    device = engine.runner.expert_runner.trace
    predicted = engine.runner.expert_runner.predicted
    address = device.__array_interface__["data"][0]
    assert parts.tokens == 70 and parts.take(1000, 40) == 40
    assert (device[1000 % 70] == trace[0]).all() and (device[1005 % 70] == trace[5]).all()
    assert (predicted[1000 % 70] == trace[::-1][0]).all()
    assert parts.take(0, 40) == 30
    assert (device[0] == trace[40]).all() and (device[30] == trace[0]).all()
    assert (parts.take(0, 10), parts.taken) == (0, 90)
    parts.reset()
    assert (device == trace).all() and (predicted == trace[::-1]).all()
    assert engine.runner.expert_runner.trace is device
    assert device.__array_interface__["data"][0] == address, "captured graphs hold the address"


def test_without_a_trace_no_part_is_taken(engine: Any) -> None:
    parts = TraceParts(engine)
    assert (parts.tokens, parts.take(0, 10)) == (0, 0)
    parts.reset()
    (row,) = measure(engine, BenchConfig(**NO_DECODE, prompts=(20,)))["rows"]  # type: ignore
    assert row["trace_fresh"] is None


# -- settings and text -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (BenchConfig(depths=(), turns=((4000, 96),)), "4000\\+96"),
        (BenchConfig(depths=(), turns=((0, 96),)), "0\\+96"),
        (BenchConfig(depths=(), prompts=(4096,)), "4096"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(
    engine: Any, settings: BenchConfig, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        measure(engine, settings)


def test_a_row_of_a_prompt_has_a_column_for_each_figure(engine: Any) -> None:
    settings = BenchConfig(**NO_DECODE, prompts=(20,), turns=((64, 10),))  # type: ignore[arg-type]
    found = measure(engine, settings)
    for row in found["rows"]:
        assert len(row_line(row)) == len(header(row))
        assert header(row).split()[:3] == ["cached", "tokens", "tok/s"]
        assert len(row_line(row | {"trace_fresh": 0.5})) == len(header(row))
    text = compare(found, found)
    assert "prefill 20" in text and "turn 10 64" in text
