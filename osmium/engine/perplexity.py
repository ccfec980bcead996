"""Perplexity of a text, through the prefill or the decode path of the engine.

The text's ids are cut into windows of n; the remainder is dropped.  Each window starts from an
empty state, and its tokens 2 .. n are scored.  perplexity = exp(mean negative log-likelihood).
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.config import Progress
from osmium.engine.engine import Engine
from osmium.engine.sampler import log_softmax
from osmium.errors import ConfigError

__all__ = ["perplexity"]


def perplexity(
    engine: Engine,
    ids: Sequence[int],
    window: int = 512,
    path: str = "prefill",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """perplexity, nll (nats per token), tokens scored, tokens_per_s, window and path.

    path is "prefill", windows in chunks, or "decode", one token per step and several windows per
    step.  Raises: ConfigError for an unknown path, or where no window fits.
    """
    if path not in ("prefill", "decode"):
        raise ConfigError(f"--path is {path!r}; it must be prefill or decode.")
    if not 2 <= window <= engine.context:
        raise ConfigError(
            f"--window is {window}; it must be from 2 to the context, {engine.context}."
        )
    windows = [list(ids[i : i + window]) for i in range(0, len(ids) - window + 1, window)]
    if not windows:
        raise ConfigError(f"The text has {len(ids)} tokens, fewer than one window of {window}.")
    total, scored, done = 0.0, 0, 0

    def add_logits(position: int, sequence: int, logits: npt.NDArray[np.float32]) -> None:
        nonlocal total, scored, done
        targets = windows[base + sequence][position + 1 : position + 1 + len(logits)]
        logprobs = log_softmax(logits[: len(targets)])
        total -= float(logprobs[np.arange(len(targets)), targets].sum())
        scored += len(targets)
        done += len(logits)
        if progress:
            progress("scoring", done, len(windows) * window)

    start = time.perf_counter()
    chunk = 1 if path == "decode" else min(window, engine.max_step_tokens)
    for base in range(0, len(windows), 8):  # other requests run between two groups
        engine.stream_prompt_logits(windows[base : base + 8], chunk, add_logits)
    seconds = time.perf_counter() - start
    return {
        "perplexity": math.exp(total / scored),
        "nll": total / scored,
        "tokens": scored,
        "tokens_per_s": len(windows) * window / seconds,
        "window": window,
        "path": path,
    }
