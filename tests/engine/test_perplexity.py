"""Perplexity, against the same sum written out."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import osmium
from osmium.engine.perplexity import perplexity
from osmium.errors import ConfigError, RequestError
from tests.engine.fakes import GREEDY, VOCAB, Bench, follow, scrambled, uniform

Make = Callable[..., Bench]


def surprise(window: list[int]) -> float:
    """-sum of log p(token | those before it in the window), the first token given."""
    total = 0.0
    for t in range(1, len(window)):
        row = [float(x) for x in scrambled(window[:t])]
        total -= row[window[t]] - math.log(math.fsum(math.exp(x) for x in row))
    return total


@pytest.mark.parametrize("path", ["prefill", "decode"])
@pytest.mark.parametrize("length", [20, 59, 60, 199])
def test_each_window_starts_anew_and_what_fills_no_window_is_dropped(
    bench: Make, rng: np.random.Generator, path: str, length: int
) -> None:
    ids = rng.integers(0, VOCAB, length).tolist()
    windows = [ids[i : i + 20] for i in range(0, length - 19, 20)]
    result = perplexity(bench().engine, ids, 20, path)
    nll = sum(map(surprise, windows)) / (19 * len(windows))
    assert result["tokens"] == 19 * len(windows)
    assert result["nll"] == pytest.approx(nll, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)
    assert result["tokens_per_s"] > 0
    assert (result["window"], result["path"]) == (20, path)


def test_uniform_logits_have_the_vocabulary_as_perplexity(bench: Make) -> None:
    result = perplexity(bench(uniform).engine, [3] * 50, 10, "decode")
    assert result["perplexity"] == pytest.approx(VOCAB)


@pytest.mark.parametrize(("path", "tokens"), [("prefill", {4, 8}), ("decode", {1})])
def test_the_paths_are_what_they_say(bench: Make, path: str, tokens: set[int]) -> None:
    one = bench(chunk=8)
    perplexity(one.engine, list(range(60)), 20, path)
    counts = {count for parts in one.model.steps for _, _, count in parts}
    assert counts == tokens
    together = max(len(parts) for parts in one.model.steps)
    assert together == (3 if path == "decode" else 1)


def test_progress_ends_at_its_total(bench: Make) -> None:
    seen: list[tuple[int, int]] = []
    perplexity(
        bench().engine, [1] * 65, 20, progress=lambda stage, done, total: seen.append((done, total))
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (60, 60)


def test_who_is_speaking_meanwhile_says_the_same(bench: Make, rng: np.random.Generator) -> None:
    one = bench(context=512)
    reply = one.ask([1, 2, 3], replace(GREEDY, max_tokens=300))
    reply.wait_for_tokens(3)
    perplexity(one.engine, rng.integers(0, VOCAB, 400).tolist(), 20)
    reply.wait()
    assert reply.ids == follow(scrambled, [1, 2, 3], 300)


def test_kv_in_e4m3_costs_the_demo_half_a_percent_at_most() -> None:
    text = (Path(__file__).resolve().parents[2] / "LICENSE").read_text()

    def of(kv_dtype: str, path: str) -> float:
        engine = osmium.load(device="cpu", kv_dtype=kv_dtype)
        ids = engine.tokenizer.encode(text, specials=False)[:1536]
        found = perplexity(engine, ids, 512, path)["perplexity"]
        engine.close()
        return float(found)

    wide = of("f32", "prefill")
    for kind in ("bf16", "fp8_e4m3"):
        assert abs(of(kind, "prefill") / wide - 1) < 5e-3
    assert abs(of("fp8_e4m3", "decode") / wide - 1) < 5e-3


@pytest.mark.parametrize(
    ("length", "window", "path"),
    [(30, 1, "prefill"), (30, 65, "prefill"), (19, 20, "decode"), (30, 20, "both")],
)
def test_what_cannot_be_scored_is_refused(bench: Make, length: int, window: int, path: str) -> None:
    with pytest.raises(ConfigError):
        perplexity(bench(context=64).engine, [1] * length, window, path)


def test_ids_outside_the_vocabulary_are_refused(bench: Make) -> None:
    with pytest.raises(RequestError, match=str(VOCAB)):
        perplexity(bench().engine, [1] * 19 + [VOCAB], 20)
