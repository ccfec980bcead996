#!/usr/bin/env python3
"""Expert-routing traces for benchmarks on random weights.

A random router picks experts uniformly, so a cache looks worthless and a benchmark on random
weights says nothing about a real model.  These traces stand in for the router: for each token and
layer, the ids of the experts it activates.  Routing recorded from a real model (--record-routing)
is better wherever there is one.

The generator is a sum of four normal variables per layer and expert: a static popularity, a slow
drift (the prompt's subject), a fast drift (the last few tokens) and noise; the top k are activated.
Deeper layers are more skewed than early ones.  Fitted to what is published about
Qwen3.5-122B-A10B (256 experts, top 8):

    statistic                                  published                  this generator
    overlap with the previous token            .33                        .31
    static hot set, 10 / 15 / 20 / 31 %        .33 / .43 / .52 / .67      .33 / .43 / .52 / .65
    LRU, 10 / 15 / 20 %                        .52 / .60 / .65            .51 / .60 / .66
    LRU, 36 / 40 / 44 / 50 %                   .80 at 36 %                .79 / .81 / .83 / .86

Above 36 % resident nothing is published for that model: those figures are an extrapolation.  The
drift's half-lives are the generator's, not a model's: a policy tuned to them must also be tried on
recorded routing, and on traces whose drift is another: --slow-kept (of 12 tokens' half-life; rc in
other notes), --slow (sc) and --fast (sf) change it.

Written: ids [T, L, K]; predicted, the same shape, what a next-layer predictor would have guessed,
sharing `--recall` of its ids with the truth; prompt_starts int64 [P].
"""

import argparse
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

POPULARITY, SLOW, SLOW_KEPT, FAST, FAST_KEPT, NOISE = 0.56, 0.78, 0.945, 0.91, 0.47, 0.41
SKEW = 0.3  # popularity and slow drift grow by this share from the first layer to the last

Ids = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Drift:
    """Sizes of the two drifts, and how much of the slow one is kept from token to token."""

    slow_kept: float = SLOW_KEPT
    slow: float = SLOW
    fast: float = FAST


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
    """ids, predicted [T, L, K] and where prompts start; prompts share the static popularity alone.

    shape is (layers, experts).
    """
    rng = np.random.default_rng(seed)
    layers, experts = shape
    depth = 1 + SKEW * (np.arange(layers)[:, None] / max(layers - 1, 1) - 0.5)
    base = depth * np.random.default_rng(base_seed).normal(0, POPULARITY, shape)
    per_prompt = tokens // prompts
    ids = np.empty((per_prompt * prompts, layers, k), np.uint16)

    def moved(x: npt.NDArray[np.float64], kept: float, size: float) -> npt.NDArray[np.float64]:
        return np.asarray(kept * x + np.sqrt(1 - kept**2) * rng.normal(0, size, shape))

    for prompt in range(prompts):
        slow, fast = rng.normal(0, drift.slow, shape), rng.normal(0, drift.fast, shape)
        for t in range(per_prompt):
            slow = moved(slow, drift.slow_kept, drift.slow)
            fast = moved(fast, FAST_KEPT, drift.fast)
            score = base + depth * slow + fast + rng.normal(0, NOISE, shape)
            ids[prompt * per_prompt + t] = np.argpartition(-score, k, axis=1)[:, :k]
    predicted = ids.copy()
    wrong = rng.random(ids.shape) >= recall
    predicted[wrong] = rng.integers(0, experts, int(wrong.sum()))
    return ids, predicted, np.arange(prompts) * per_prompt


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", help="the .npz to write")
    for flag, default in (
        ("--tokens", 3072), ("--prompts", 6), ("--layers", 48), ("--experts", 256), ("--top-k", 8),
        ("--seed", 1), ("--base-seed", 12345),
    ):  # fmt: skip
        parser.add_argument(flag, type=int, default=default, help=f"({default})")
    for flag, share, what in (
        ("--recall", 0.78, "of the predictor"),
        ("--slow-kept", SLOW_KEPT, "share of the slow drift that a token keeps"),
        ("--slow", SLOW, "size of the slow drift"),
        ("--fast", FAST, "size of the fast drift"),
    ):
        parser.add_argument(flag, type=float, default=share, help=f"{what} ({share})")
    args = parser.parse_args()
    if not 0 <= args.slow_kept < 1:
        parser.error(f"--slow-kept is {args.slow_kept}; it must be from 0 to below 1")
    shape = (args.layers, args.experts)
    ids, predicted, starts = trace(
        args.tokens, shape, args.top_k, args.prompts, args.seed, args.base_seed, args.recall,
        Drift(args.slow_kept, args.slow, args.fast),
    )  # fmt: skip
    small = np.uint8 if args.experts <= 256 else np.uint16
    with open(args.out, "wb") as file:
        np.savez_compressed(
            file, ids=ids.astype(small), predicted=predicted.astype(small), prompt_starts=starts
        )


if __name__ == "__main__":
    main()
