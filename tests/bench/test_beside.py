"""A prompt beside a decode stream in `osmium bench`: counts, gaps, and settings that do not fit."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import osmium
from osmium.bench.beside import SHORT_TOKENS, STREAM_CONTEXT, longest_gap
from osmium.bench.report import header, row_line
from osmium.bench.throughput import BenchConfig, measure
from osmium.errors import ConfigError

ROW = BenchConfig(depths=(), tokens=4, repeats=2, warm_up=4, beside=(100,))


def load(**options: Any) -> Any:
    sizes = {"expert_slots": 4, "context": 2048, "prefill_chunk": 64, "max_num_seqs": 3}
    return osmium.load("synthetic:tiny", device="cpu", **sizes | options)


@pytest.fixture
def engine() -> Iterator[Any]:
    engine = load()
    yield engine
    engine.close()


def test_a_prompt_beside_a_stream_has_the_speed_of_both(engine: Any) -> None:
    submitted: list[tuple[int, int]] = []
    submit = engine.submit

    def recording(prompt: Any, *more: Any, computed_tokens: int) -> Any:
        submitted.append((len(prompt), computed_tokens))
        return submit(prompt, *more, computed_tokens=computed_tokens)

    engine.submit = recording
    (row,) = measure(engine, ROW)["rows"]
    one_round = [(STREAM_CONTEXT + 1, STREAM_CONTEXT), (164, SHORT_TOKENS), (SHORT_TOKENS, 0)]
    assert submitted == 3 * one_round
    assert row["what"] == "beside" and row["tokens"] == 100
    per_token = engine.config.num_layers * engine.config.top_k
    prompts = 2 * (100 + SHORT_TOKENS)
    assert row["routed"] >= per_token * (prompts + 2 * 8)
    assert row["routed"] == row["hit"] + row["missed"]
    assert row["tokens_per_s"] == pytest.approx(1e5 / row["ttft_ms"])
    assert row["stream_before"] > 0 and row["stream_during"] >= 0
    assert row["longest_gap_ms"] == pytest.approx(max(row["longest_gaps_ms"]), abs=1e-3)
    assert row["longest_gap_ms"] >= 1e3 / row["stream_before"] / 2
    assert row["short_ms"] > 0 and len(row["short_samples_ms"]) == 2
    assert len(row_line(row)) == len(header(row))


def test_gaps_are_those_that_overlap_the_prompt() -> None:
    times = [0.0, 5.0, 6.0, 8.0, 9.0, 30.0]
    assert longest_gap(times, 5.5, 8.5) == 2
    assert longest_gap(times, 2.0, 5.5) == 5, "a gap that began before the prompt"
    assert longest_gap(times, 8.5, 9.5) == 21, "and one that ended behind it"
    assert longest_gap(times, 29.0, 35.0) == 21
    assert longest_gap(times, 31.0, 65.0) == 35, "a stream without another token"
    assert longest_gap([], 2.0, 5.0) == 3


def test_a_stream_that_ends_before_the_prompt_is_an_error(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osmium.bench.beside._stream_tokens", lambda engine, tokens: 12)
    with pytest.raises(ConfigError, match="ended after 12 tokens"):
        measure(engine, replace(ROW, beside=(600,)))


def test_fewer_than_three_sequences_are_refused() -> None:
    engine = load(max_num_seqs=2)
    try:
        with pytest.raises(ConfigError, match="--max-num-seqs 3"):
            measure(engine, ROW)
    finally:
        engine.close()


@pytest.mark.parametrize("tokens", [2048 - SHORT_TOKENS, 1_000_000])
def test_a_prompt_that_does_not_fit_is_refused(engine: Any, tokens: int) -> None:
    with pytest.raises(ConfigError, match=f"--prompt-beside {tokens} "):
        measure(engine, BenchConfig(depths=(), beside=(tokens,)))
