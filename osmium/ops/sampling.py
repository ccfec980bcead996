"""Drawing a token from scores, in NumPy: the specification of Ops.sample, and the host's way."""

import numpy as np
import numpy.typing as npt

from osmium.ops.types import DecodeState, StepInputs

__all__ = ["advance_step", "sample_from_logits"]

F64 = npt.NDArray[np.float64]


def sample_from_logits(
    scores: F64, temperature: float, top_k: float, top_p: float, min_p: float, chance: float
) -> int:
    """A token by Ops.sample's rule; scores f64 [vocab], chance in [0, 1)."""
    if temperature == 0:
        return int(scores.argmax())
    ids, p = _filtered(scores, temperature, int(top_k), top_p, min_p)
    at = int(np.searchsorted(np.cumsum(p), chance, side="right"))
    return int(ids[min(at, len(ids) - 1)])


def _filtered(
    scores: F64, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[npt.NDArray[np.intp], F64]:
    """The tokens that may be drawn, likeliest first, and their probabilities."""
    count = len(scores)
    if 0 < top_k < count:
        least = np.partition(scores, count - top_k)[count - top_k]
        kept = np.flatnonzero(scores >= least)  # equals at the border: the lower ids stay, below
    else:
        kept = np.arange(count)
    ids = kept[np.lexsort((kept, -scores[kept]))]
    if top_k > 0:
        ids = ids[:top_k]
    with np.errstate(over="ignore"):  # far below the best at next to no temperature: exp(-inf) = 0
        p = np.exp((scores[ids] - scores[ids[0]]) / temperature)
    p /= p.sum()
    if top_p < 1:  # the token that crosses the mark is kept
        p = p[: int(np.searchsorted(np.cumsum(p), top_p)) + 1]
    if min_p > 0:
        p = p[p >= min_p * p[0]]
    return ids[: len(p)], p / p.sum()


def advance_step(step: StepInputs, replies: DecodeState) -> None:
    """See ops.Ops.advance_step."""
    said = np.where(replies.tokens_left > 0, replies.token, -2)
    over = (said == -1) | (replies.tokens_left == 1)
    over |= (replies.stop_on_eos != 0) & np.isin(said, replies.eos)
    gone, on = over & (said != -2), ~over & (said != -2)
    for array in (step.ids, step.positions, step.context_lens, replies.tokens_left):
        array[gone] = 0
    step.state_slots[gone], step.page_table[gone, 0] = replies.null_slot, replies.null_page
    step.ids[on] = said[on]
    step.positions[on] += 1
    step.context_lens[on] += 1
    replies.tokens_left[on] -= 1
    rows, turn = len(said), int(replies.decode_step[0])
    at = 1 + turn % replies.ring * rows
    replies.token_ring[at : at + rows] = said
    replies.decode_step[0] = replies.token_ring[0] = turn + 1
