"""Sampling in NumPy: the specification of the sampling operations, and the host's sampler."""

from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.ops.controls import (
    HAS_BIAS,
    HAS_MASK,
    HAS_PENALTIES,
    PROMPT_BIT,
    SamplingControls,
)
from osmium.ops.types import DecodeState, StepInputs

__all__ = [
    "adjust_logits", "adjust_tokens", "advance_step", "allowed_tokens", "largest_tokens",
    "log_softmax", "sample", "sample_controlled", "sample_from_logits", "store_logprobs",
]  # fmt: skip

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def sample(logits: F32, decode_state: DecodeState) -> None:
    """See ops.Ops.sample."""
    uniforms = decode_state.uniforms[int(decode_state.decode_step[0]) % decode_state.ring_size]
    for row, row_logits in enumerate(logits):
        if not np.isfinite(row_logits.max()):
            decode_state.token[row] = -1
            continue
        temperature, top_k, top_p, min_p = (float(x) for x in decode_state.sampler_params[row])
        logits64, uniform = row_logits.astype(np.float64), float(uniforms[row])
        token = sample_from_logits(logits64, temperature, top_k, top_p, min_p, uniform)
        decode_state.token[row] = token


def sample_controlled(
    logits: F32, step: StepInputs, decode_state: DecodeState, controls: SamplingControls
) -> None:
    """See ops.Ops.sample_controlled."""
    adjust_logits(logits, step, controls)
    sample(controls.adjusted, decode_state)
    decode_state.token[~np.isfinite(logits.max(axis=1))] = -1
    entry = int(decode_state.decode_step[0]) % decode_state.ring_size
    store_logprobs(logits, step.state_slots, decode_state.token, entry, controls)


def adjust_logits(logits: F32, step: StepInputs, controls: SamplingControls) -> None:
    """The first part of `sample_controlled`: write controls.adjusted and token_counts."""
    controls.adjusted[:] = logits
    for row in np.flatnonzero(step.state_slots >= 0):
        flags, slot = int(controls.flags[row, 0]), int(step.state_slots[row])
        counts = np.zeros(logits.shape[1], np.uint32)
        bias = np.zeros(logits.shape[1], np.float32)
        if flags & HAS_PENALTIES:
            counts = controls.token_counts[slot]  # a view
            if step.positions[row] < controls.flags[row, 1]:
                counts[step.ids[row]] |= np.uint32(PROMPT_BIT)
            else:
                counts[step.ids[row]] += np.uint32(1)
        if flags & HAS_BIAS:
            bias = controls.logit_bias[slot]
        if flags & (HAS_PENALTIES | HAS_BIAS):
            generated = counts & np.uint32(PROMPT_BIT - 1)
            controls.adjusted[row] = adjust_tokens(
                logits[row], counts != 0, generated, controls.penalties[row], bias
            )
        if flags & HAS_MASK:
            allowed = allowed_tokens(controls.token_mask[row], logits.shape[1])
            controls.adjusted[row, ~allowed] = -np.inf


def store_logprobs(
    logits: F32,
    state_slots: npt.NDArray[np.int32],
    token: npt.NDArray[np.int32],
    entry: int,
    controls: SamplingControls,
) -> None:
    """The last part of `sample_controlled`: write an entry of the rings of log-probabilities."""
    for row in np.flatnonzero((state_slots >= 0) & (token >= 0)):
        count = int(controls.flags[row, 2])
        if count >= 0:
            logprobs = log_softmax(logits[row])
            tokens = np.array([token[row], *largest_tokens(logits[row], count)])
            controls.logprobs[entry, row, : 1 + count] = logprobs[tokens]
            controls.logprob_tokens[entry, row, : 1 + count] = tokens


def adjust_tokens(logits: F32, seen: Any, generated: Any, penalties: F32, bias: F32) -> F32:
    """Logits of some tokens with penalties and bias: f32, computed in f64 and rounded once.

    seen: l = l / repetition if l > 0 else l * repetition.
    generated > 0: l = l - (presence + frequency * generated).
    All tokens: l = l + bias.

    logits, bias f32 [n]    seen bool [n]: in prompt or response    generated [n]: times in it
    penalties f32 [3]: repetition, presence, frequency
    """
    repetition, presence, frequency = penalties.astype(np.float64)
    exact = logits.astype(np.float64)
    repeated = np.where(exact > 0, exact / repetition, exact * repetition)
    exact = np.where(seen, repeated, exact)
    exact = np.where(
        np.greater(generated, 0), exact - (presence + frequency * np.asarray(generated)), exact
    )
    with np.errstate(over="ignore"):  # beyond f32: infinite, so no token is sampled
        return np.asarray(exact + bias).astype(np.float32)


def allowed_tokens(mask: npt.NDArray[np.int32], vocab: int) -> npt.NDArray[np.bool_]:
    """The bits of a token mask, i32 [mask_words], as bool [vocab]."""
    bits = np.unpackbits(np.ascontiguousarray(mask).view(np.uint8), bitorder="little")
    return bits[:vocab].astype(bool)


def largest_tokens(logits: F32, count: int) -> npt.NDArray[np.intp]:
    """The ids of the `count` largest logits, largest first, ties to the lower id."""
    if count <= 0:
        return np.empty(0, np.intp)
    if count < len(logits):
        threshold = np.partition(logits, len(logits) - count)[len(logits) - count]
        # the sort keeps the lower ids among those equal to the threshold
        candidates = np.flatnonzero(logits >= threshold)
    else:
        candidates = np.arange(len(logits))
    return candidates[np.lexsort((candidates, -logits[candidates]))][:count]


def log_softmax(logits: npt.NDArray[Any]) -> F64:
    """log(softmax(logits)) along the last axis, in f64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


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
    step.state_slots[ended] = -1
    step.page_table[ended, 0] = decode_state.null_page
    step.ids[continues] = tokens[continues]
    step.positions[continues] += 1
    step.context_lens[continues] += 1
    decode_state.tokens_left[continues] -= 1
    rows, decode_step = len(tokens), int(decode_state.decode_step[0])
    start = 1 + decode_step % decode_state.ring_size * rows
    decode_state.token_ring[start : start + rows] = tokens
    decode_state.decode_step[0] = decode_state.token_ring[0] = decode_step + 1
