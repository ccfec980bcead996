"""Perplexity against a direct computation."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import osmium
from osmium.engine.perplexity import perplexity
from osmium.errors import ConfigError, RequestError
from tests.engine.fakes import GREEDY, VOCAB, EngineHarness, follow, scrambled, uniform

Make = Callable[..., EngineHarness]


def window_nll(window: list[int]) -> float:
    """-sum of log p(token | earlier tokens of the window); the first token is not scored."""
    total = 0.0
    for t in range(1, len(window)):
        row = [float(x) for x in scrambled(window[:t])]
        total -= row[window[t]] - math.log(math.fsum(math.exp(x) for x in row))
    return total


@pytest.mark.parametrize("path", ["prefill", "decode"])
@pytest.mark.parametrize("length", [20, 59, 60, 199])
def test_each_window_starts_from_an_empty_state_and_a_partial_one_is_dropped(
    harness_of: Make, rng: np.random.Generator, path: str, length: int
) -> None:
    ids = rng.integers(0, VOCAB, length).tolist()
    windows = [ids[i : i + 20] for i in range(0, length - 19, 20)]
    result = perplexity(harness_of().engine, ids, 20, path)
    nll = sum(map(window_nll, windows)) / (19 * len(windows))
    assert result["tokens"] == 19 * len(windows)
    assert result["nll"] == pytest.approx(nll, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)
    assert result["tokens_per_s"] > 0
    assert (result["window"], result["path"]) == (20, path)


def test_uniform_logits_have_the_vocabulary_as_perplexity(harness_of: Make) -> None:
    result = perplexity(harness_of(uniform).engine, [3] * 50, 10, "decode")
    assert result["perplexity"] == pytest.approx(VOCAB)


@pytest.mark.parametrize(("path", "tokens"), [("prefill", {4, 8}), ("decode", {1})])
def test_prefill_scores_chunks_and_decode_scores_single_tokens(
    harness_of: Make, path: str, tokens: set[int]
) -> None:
    harness = harness_of(chunk=8)
    perplexity(harness.engine, list(range(60)), 20, path)
    counts = {count for parts in harness.model.steps for _, _, count in parts}
    assert counts == tokens
    max_sequences = max(len(parts) for parts in harness.model.steps)
    assert max_sequences == (3 if path == "decode" else 1)


def test_progress_ends_at_its_total(harness_of: Make) -> None:
    reports: list[tuple[int, int]] = []
    perplexity(
        harness_of().engine,
        [1] * 65,
        20,
        progress=lambda stage, done, total: reports.append((done, total)),
    )
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert reports[-1] == (60, 60)


def test_scoring_does_not_change_a_running_response(
    harness_of: Make, rng: np.random.Generator
) -> None:
    harness = harness_of(context=512)
    response = harness.submit([1, 2, 3], replace(GREEDY, max_tokens=300))
    response.wait_for_tokens(3)
    perplexity(harness.engine, rng.integers(0, VOCAB, 400).tolist(), 20)
    response.wait()
    assert response.ids == follow(scrambled, [1, 2, 3], 300)


def test_narrow_kv_changes_the_demos_perplexity_by_less_than_half_a_percent() -> None:
    text = (Path(__file__).resolve().parents[2] / "LICENSE").read_text()

    def ppl(kv_dtype: str, path: str) -> float:
        engine = osmium.load(device="cpu", kv_dtype=kv_dtype)
        ids = engine.tokenizer.encode(text, specials=False)[:1536]
        found = perplexity(engine, ids, 512, path)["perplexity"]
        engine.close()
        return float(found)

    wide = ppl("f32", "prefill")
    for kind in ("bf16", "fp8_e4m3"):
        assert abs(ppl(kind, "prefill") / wide - 1) < 5e-3
    assert abs(ppl("fp8_e4m3", "decode") / wide - 1) < 5e-3


@pytest.mark.parametrize(
    ("length", "window", "path"),
    [(30, 1, "prefill"), (30, 65, "prefill"), (19, 20, "decode"), (30, 20, "both")],
)
def test_invalid_lengths_windows_and_paths_are_refused(
    harness_of: Make, length: int, window: int, path: str
) -> None:
    with pytest.raises(ConfigError):
        perplexity(harness_of(context=64).engine, [1] * length, window, path)


def test_ids_outside_the_vocabulary_are_refused(harness_of: Make) -> None:
    with pytest.raises(RequestError, match=str(VOCAB)):
        perplexity(harness_of().engine, [1] * 19 + [VOCAB], 20)
