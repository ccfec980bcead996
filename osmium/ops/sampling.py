"""Sampling in NumPy: the specification of Ops.sample, and the sampler for logits on the host."""

import numpy as np
import numpy.typing as npt

from osmium.ops.types import DecodeState, StepInputs

__all__ = ["advance_step", "sample_from_logits"]

F64 = npt.NDArray[np.float64]


def sample_from_logits(
    logits: F64, temperature: float, top_k: float, top_p: float, min_p: float, uniform: float
) -> int:
    """A token by the rule of Ops.sample; logits f64 [vocab], uniform in [0, 1)."""
    if temperature == 0:
        return int(logits.argmax())
    ids, p = _filtered(logits, temperature, int(top_k), top_p, min_p)
    index = int(np.searchsorted(np.cumsum(p), uniform, side="right"))
    return int(ids[min(index, len(ids) - 1)])


def _filtered(
    logits: F64, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[npt.NDArray[np.intp], F64]:
    """The tokens that top-k, top-p and min-p keep, likeliest first, and their probabilities."""
    count = len(logits)
    if 0 < top_k < count:
        threshold = np.partition(logits, count - top_k)[count - top_k]
        # the sort below keeps the lower ids among those equal to the threshold
        candidates = np.flatnonzero(logits >= threshold)
    else:
        candidates = np.arange(count)
    ids = candidates[np.lexsort((candidates, -logits[candidates]))]
    if top_k > 0:
        ids = ids[:top_k]
    with np.errstate(over="ignore"):  # a tiny temperature overflows to exp(-inf) = 0
        p = np.exp((logits[ids] - logits[ids[0]]) / temperature)
    p /= p.sum()
    if top_p < 1:  # keeps the token that crosses top_p
        p = p[: int(np.searchsorted(np.cumsum(p), top_p)) + 1]
    if min_p > 0:
        p = p[p >= min_p * p[0]]
    return ids[: len(p)], p / p.sum()


def advance_step(step: StepInputs, decode_state: DecodeState) -> None:
    """See ops.Ops.advance_step."""
    tokens = np.where(decode_state.tokens_left > 0, decode_state.token, -2)
    ends = (tokens == -1) | (decode_state.tokens_left == 1)
    ends |= (decode_state.stop_on_eos != 0) & np.isin(tokens, decode_state.eos)
    ended, continues = ends & (tokens != -2), ~ends & (tokens != -2)
    for array in (step.ids, step.positions, step.context_lens, decode_state.tokens_left):
        array[ended] = 0
    step.state_slots[ended] = decode_state.null_slot
    step.page_table[ended, 0] = decode_state.null_page
    step.ids[continues] = tokens[continues]
    step.positions[continues] += 1
    step.context_lens[continues] += 1
    decode_state.tokens_left[continues] -= 1
    rows, decode_step = len(tokens), int(decode_state.decode_step[0])
    start = 1 + decode_step % decode_state.ring_size * rows
    decode_state.token_ring[start : start + rows] = tokens
    decode_state.decode_step[0] = decode_state.token_ring[0] = decode_step + 1
