#!/usr/bin/env python3
"""Generate an expert-routing trace for benchmarks on random weights.

A random router picks experts uniformly, so a cache has no effect, and a benchmark on random weights
predicts nothing about a real model.  A generated trace replaces the router: for each token and
layer it has the ids of the experts in use.  A trace recorded from a real model (--record-routing)
is better, if there is one.

The generator sums four normal variables per layer and expert: a static popularity, a slow drift
(the prompt's subject), a fast drift (the last few tokens) and noise.  The top k are used.  Deeper
layers are more skewed than early ones.  Fitted to what is published about Qwen3.5-122B-A10B (256
experts, top 8):

    statistic                                  published                  this generator
    overlap with the previous token            .33                        .31
    static hot set, 10 / 15 / 20 / 31 %        .33 / .43 / .52 / .67      .33 / .43 / .52 / .65
    LRU, 10 / 15 / 20 %                        .52 / .60 / .65            .51 / .60 / .66
    LRU, 36 / 40 / 44 / 50 %                   .80 at 36 %                .79 / .81 / .83 / .86

Above 36 % resident nothing is published for that model: those figures are an extrapolation.  The
drift's half-lives are the generator's, not a model's.  A policy tuned to them must also be tried on
recorded routing, and on traces with another drift (--slow-kept, --slow, --fast).

The file has ids [T, L, K]; predicted [T, L, K], the ids of a simulated next-layer predictor, of
which the fraction `--recall` is right; prompt_starts int64 [P].
"""

import argparse
import sys
from dataclasses import dataclass

from checkout import run_tool, use_environment

use_environment()

import numpy as np
import numpy.typing as npt

POPULARITY, SLOW, SLOW_KEPT, FAST, FAST_KEPT, NOISE = 0.56, 0.78, 0.945, 0.91, 0.47, 0.41
SKEW = 0.3  # popularity and slow drift grow by this fraction from the first layer to the last

Ids = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Drift:
    """Parameters of the two drifts."""

    slow_kept: float = SLOW_KEPT
    """Fraction of the slow drift that is kept from token to token."""
    slow: float = SLOW
    """Standard deviation of the slow drift."""
    fast: float = FAST
    """Standard deviation of the fast drift."""


def trace(
    tokens: int,
    shape: tuple[int, int],
    k: int,
    prompts: int,
    seed: int,
    base_seed: int,
    recall: float,
    drift: Drift = Drift(),
) -> tuple[Ids, Ids, npt.NDArray[np.int64]]:
    """ids and predicted u16 [T, L, K], and the first token of each prompt i64 [prompts].

    Prompts have the same static popularity and different drifts.  shape is (layers, experts).
    """
    rng = np.random.default_rng(seed)
    layers, experts = shape
    depth = 1 + SKEW * (np.arange(layers)[:, None] / max(layers - 1, 1) - 0.5)
    base = depth * np.random.default_rng(base_seed).normal(0, POPULARITY, shape)
    per_prompt = tokens // prompts
    ids = np.empty((per_prompt * prompts, layers, k), np.uint16)

    def next_drift(x: npt.NDArray[np.float64], kept: float, size: float) -> npt.NDArray[np.float64]:
        return np.asarray(kept * x + np.sqrt(1 - kept**2) * rng.normal(0, size, shape))

    for prompt in range(prompts):
        slow, fast = rng.normal(0, drift.slow, shape), rng.normal(0, drift.fast, shape)
        for t in range(per_prompt):
            slow = next_drift(slow, drift.slow_kept, drift.slow)
            fast = next_drift(fast, FAST_KEPT, drift.fast)
            score = base + depth * slow + fast + rng.normal(0, NOISE, shape)
            ids[prompt * per_prompt + t] = np.argpartition(-score, k, axis=1)[:, :k]
    predicted = ids.copy()
    wrong = rng.random(ids.shape) >= recall
    predicted[wrong] = rng.integers(0, experts, int(wrong.sum()))
    return ids, predicted, np.arange(prompts) * per_prompt


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", metavar="OUT.npz", help="the file to write")
    for flag, default, text in (
        ("--tokens", 3072, "tokens of all prompts"),
        ("--prompts", 6, "prompts, each with another drift"),
        ("--layers", 48, "layers of the model"),
        ("--experts", 256, "experts per layer"),
        ("--top-k", 8, "experts per token and layer"),
        ("--seed", 1, "seed of the drifts"),
        ("--base-seed", 12345, "seed of the popularity"),
    ):
        add(flag, type=int, default=default, metavar="N", help=f"{text} ({default})")
    for flag, value, text in (
        ("--recall", 0.78, "fraction of the predicted experts that are used"),
        ("--slow-kept", SLOW_KEPT, "fraction of the slow drift kept from token to token"),
        ("--slow", SLOW, "standard deviation of the slow drift"),
        ("--fast", FAST, "standard deviation of the fast drift"),
    ):
        add(flag, type=float, default=value, metavar="X", help=f"{text} ({value})")
    args = parser.parse_args()
    if not 0 <= args.slow_kept < 1:
        parser.error(f"--slow-kept is {args.slow_kept}; it must be from 0 to below 1")
    if not 1 <= args.prompts <= args.tokens:
        parser.error(f"--prompts is {args.prompts}; it must be from 1 to --tokens ({args.tokens})")
    if not 1 <= args.top_k < args.experts <= 1 << 16:
        parser.error(
            f"--top-k is {args.top_k} of --experts {args.experts}; --top-k must be at least 1 and "
            "below --experts, and --experts at most 65536"
        )
    if args.layers < 1:
        parser.error(f"--layers is {args.layers}; it must be at least 1")
    shape = (args.layers, args.experts)
    drift = Drift(args.slow_kept, args.slow, args.fast)
    ids, predicted, starts = trace(
        args.tokens, shape, args.top_k, args.prompts, args.seed, args.base_seed, args.recall, drift
    )
    small = np.uint8 if args.experts <= 256 else np.uint16
    try:
        with open(args.out, "wb") as file:
            np.savez_compressed(
                file, ids=ids.astype(small), predicted=predicted.astype(small), prompt_starts=starts
            )
    except OSError as error:
        print(f"make_trace.py: {args.out} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_tool(main)
