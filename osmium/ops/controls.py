"""SamplingControls: what `Ops.sample_controlled` reads and writes beside the decode state.

Penalties, logit bias, token masks and log-probabilities.  Letters, and how to read shapes, are in
types.py; `slots` is the number of sequences, `slices` as in `DecodeState.scratch`.
"""

import math
from dataclasses import dataclass, fields, replace

import numpy as np

from osmium.kernels.adjust_logits import HAS_BIAS, HAS_MASK, HAS_PENALTIES, PROMPT_BIT
from osmium.kernels.top_logprobs import MAX_LOGPROBS
from osmium.ops.types import Array, DecodeState

__all__ = [
    "HAS_BIAS", "HAS_MASK", "HAS_PENALTIES", "MAX_LOGPROBS", "PROMPT_BIT", "SamplingControls",
    "controls_bytes", "mask_words",
]  # fmt: skip


@dataclass(frozen=True)
class SamplingControls:
    """Adjustments of logits, and log-probabilities, of up to R rows.

    Tables with an entry per state slot keep their contents while rows change.  `token_mask`,
    `logprobs` and `logprob_tokens` are mapped host memory.  The arrays from `adjusted` on are
    scratch.
    """

    flags: Array
    """i32 [R, 3]: flags, prompt_tokens, num_logprobs.

    flags are HAS_PENALTIES, HAS_BIAS and HAS_MASK.  num_logprobs is below 0 for a row without
    log-probabilities, else at most MAX_LOGPROBS and vocab."""
    penalties: Array
    """f32 [R, 3]: repetition, presence, frequency."""
    token_counts: Array
    """u32 [slots, vocab], tokens of the sequence in a state slot before the step's own.

    PROMPT_BIT: the prompt has the token.  The other bits count it among the generated tokens."""
    logit_bias: Array
    """f32 [slots, vocab], added to the logits of the sequence in a state slot."""
    token_mask: Array
    """i32 [R, mask_words], bit t % 32 of word t // 32: 1 if the row may continue with token t."""
    logprobs: Array
    """f32 [ring_size, R, 21], log-probabilities of the sampled token and of the likeliest ones."""
    logprob_tokens: Array
    """i32 [ring_size, R, 21], the ids of these tokens."""
    adjusted: Array
    """f32 [R, vocab], the adjusted logits."""
    raw_max: Array
    """f32 [R, slices], the largest logit of a slice before adjustment."""
    raw_argmax: Array
    """i32 [R, slices], the first token that has it."""
    raw_sums: Array
    """f32 [R, slices], the slice's sum of exp(logit - raw_max)."""
    top_logits: Array
    """f32 [R, 20, 20], the likeliest tokens of each slice that may have one of the row's."""
    top_tokens: Array
    """i32 [R, 20, 20], the ids of these tokens, or -1."""
    blocks_done: Array
    """i32 [R], slices whose likeliest tokens are stored."""

    @staticmethod
    def shapes(
        rows: int, slots: int, vocab: int, ring_size: int
    ) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Shape and dtype of each array."""
        slices = DecodeState.scratch(rows, vocab)["slice_max"][0][1]
        return {
            "flags": ((rows, 3), np.int32),
            "penalties": ((rows, 3), np.float32),
            "token_counts": ((slots, vocab), np.uint32),
            "logit_bias": ((slots, vocab), np.float32),
            "token_mask": ((rows, mask_words(vocab)), np.int32),
            "logprobs": ((ring_size, rows, 1 + MAX_LOGPROBS), np.float32),
            "logprob_tokens": ((ring_size, rows, 1 + MAX_LOGPROBS), np.int32),
            "adjusted": ((rows, vocab), np.float32),
            "raw_max": ((rows, slices), np.float32),
            "raw_argmax": ((rows, slices), np.int32),
            "raw_sums": ((rows, slices), np.float32),
            "top_logits": ((rows, MAX_LOGPROBS, MAX_LOGPROBS), np.float32),
            "top_tokens": ((rows, MAX_LOGPROBS, MAX_LOGPROBS), np.int32),
            "blocks_done": ((rows,), np.int32),
        }

    def first_rows(self, rows: int) -> "SamplingControls":
        """A view for fewer rows.  Rings are re-cut, so their contents do not carry over."""
        views = {
            field.name: getattr(self, field.name)[:rows]
            for field in fields(self)
            if field.name not in ("token_counts", "logit_bias", "logprobs", "logprob_tokens")
        }
        for name in ("logprobs", "logprob_tokens"):
            ring = getattr(self, name)
            size, entries = ring.shape[0], ring.shape[2]
            views[name] = ring.reshape(-1)[: size * rows * entries].reshape(size, rows, entries)
        return replace(self, **views)


def mask_words(vocab: int) -> int:
    """32-bit words of a row's token mask."""
    return -(-vocab // 32)


def controls_bytes(rows: int, slots: int, vocab: int, ring_size: int) -> int:
    """Bytes of all arrays of SamplingControls."""
    shapes = SamplingControls.shapes(rows, slots, vocab, ring_size)
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
