"""Reference operations that replace compiled Numba kernels in the interpreter.

The interpreter does not run compiled text; Numba's simulator runs those kernels (tests/nogpu).
"""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, cast

import numpy as np

from osmium.ops import (
    DecayConfig,
    DecodeState,
    ExpertCache,
    PrefetchState,
    SamplingControls,
    SlotAssignment,
    StepInputs,
    sampling,
)
from osmium.ops.grouped import ExpertGroups
from osmium.ops.reference import ReferenceOps
from osmium.quant.expert_layout import ExpertLayout

__all__ = ["STAND_INS"]


def _assign_slots(values: tuple[Any, ...]) -> None:
    """tests/nogpu/test_assign_slots.py compares the kernel with the reference."""
    arrays = [None if value == 0 else value.numpy() for value in values[:27]]
    for value in values[:7]:
        value.touch()
    step, counters, ids = arrays[12:15]
    sizes, (prior_steps, rate, long_rate, long_scale_weight) = values[27:37], values[37:]
    _, experts, capacity, _, first, _, layer, last, with_prefetch, _ = sizes
    decay = DecayConfig(1 / rate, 1 / long_rate, 1.0, prior_steps)
    none: list[Any] = [None] * layer
    layers = [(*none, current) if last else (*none, current, next_layer)
              for current, next_layer in zip(arrays[7:12], arrays[15:20], strict=True)]  # fmt: skip
    expert_to_slot, slot_to_expert, short_count, long_count, last_used = cast(Any, layers)
    slot_to_expert = [range(first - capacity), *[()] * (layer - 1)][:layer] + list(
        slot_to_expert[layer:]
    )
    cache = ExpertCache(
        ExpertLayout(16, 8, 8),
        experts,
        replace(decay, long_weight=long_scale_weight / decay.long_scale),
        (),
        expert_to_slot,
        slot_to_expert,
        short_count,
        long_count,
        last_used,
        step,
        counters,
    )
    predicted_ids, weights, *prefetch_words = arrays[20:]
    unused: Any = None
    prefetch = PrefetchState(predicted_ids, weights, *[unused] * 3, *prefetch_words)
    ReferenceOps().assign_slots(
        SlotAssignment(*arrays[:7]), cache, layer, ids, prefetch if with_prefetch else None
    )


def _group_by_expert(values: tuple[Any, ...]) -> None:
    """tests/nogpu/test_group_by_expert.py compares the kernel with the reference."""
    order, position, tiles, num_tiles, counts, ids = (value.numpy() for value in values[:6])
    for value in values[:4]:
        value.touch()
    experts, has_slots = values[8], values[10]
    groups = ExpertGroups(order, position, tiles, num_tiles, counts)
    slots = values[6].numpy() if has_slots else None
    ReferenceOps().group_by_expert(groups, ids, experts, slots)


def _count_uses(values: tuple[Any, ...]) -> None:
    """tests/nogpu/test_count_uses.py compares the kernel with the reference."""
    short_count, long_count, last_used, step, counters, tiles, num_tiles, order = (
        value.numpy() for value in values[:8]
    )
    tokens, top_k, experts, rate, long_rate = values[8:]
    pairs = order[: tokens * top_k]
    ids = np.empty(pairs.size, np.uint16)
    for _, start, rows, expert in tiles[: num_tiles[0]].tolist():
        ids[pairs[start : start + rows]] = expert
    unused: Any = None
    cache = ExpertCache(  # of two layers: the first leaves the step as it is
        ExpertLayout(16, 8, 8), experts, DecayConfig(1 / rate, 1 / long_rate, 1.0, 0), (),
        np.empty((2, experts)), unused, short_count[None], long_count[None], last_used[None],
        step, counters,
    )  # fmt: skip
    groups = ExpertGroups(order, unused, tiles, num_tiles, unused)
    ReferenceOps().count_uses(groups, cache, 0, ids.reshape(tokens, top_k))


def _count_step(values: tuple[Any, ...]) -> None:
    """tests/nogpu/test_count_uses.py compares the kernel with the reference."""
    values[0].numpy()[0] += 1


def _sample_token(values: tuple[Any, ...]) -> None:
    """tests/nogpu/test_sample.py compares the kernel with the reference."""
    token, logits, _, settings, uniforms, decode_step = (value.numpy() for value in values[:6])
    values[0].touch()
    unused: Any = None
    ReferenceOps().sample(
        logits,
        DecodeState(
            values[12],
            0,
            settings,
            uniforms,
            token,
            unused,
            unused,
            unused,
            decode_step,
            *[unused] * 7,
        ),
    )


def _advance_step(values: tuple[Any, ...]) -> None:
    """tests/nogpu/test_sample.py compares the kernel with the reference."""
    arrays = [value.numpy() for value in values[:11]]
    (
        ids,
        positions,
        past,
        slots,
        pages,
        token,
        tokens_left,
        stop_on_eos,
        eos,
        decode_step,
        token_ring,
    ) = arrays
    unused: Any = None
    rows, _, _, ring, null_page = values[11:]
    step = StepInputs(
        rows,
        rows,
        1,
        ids,
        positions,
        unused,
        unused,
        past,
        slots,
        pages,
    )
    decode_state = DecodeState(
        ring,
        null_page,
        unused,
        unused,
        token,
        tokens_left,
        stop_on_eos,
        eos,
        decode_step,
        token_ring,
        *[unused] * 6,
    )
    ReferenceOps().advance_step(step, decode_state)


def _controls(**arrays: Any) -> SamplingControls:
    """SamplingControls with the arrays that a reference operation uses."""
    unused = {field.name: None for field in fields(SamplingControls)}
    return SamplingControls(**unused | arrays)


def _adjust_logits(values: tuple[Any, ...]) -> None:
    """tests/nogpu/test_sample_controlled.py compares the kernel with the reference."""
    arrays = [value.numpy() for value in values[:18]]
    for value in (values[0], values[9]):
        value.touch()
    adjusted, token_counts, logits, flags, penalties, bias, mask = (
        arrays[i] for i in (0, 9, 10, 11, 12, 13, 14)
    )
    unused: Any = None
    ids, positions, state_slots = arrays[15:]
    step = StepInputs(
        len(ids), len(ids), 1, ids, positions, unused, unused, unused, state_slots, unused
    )
    controls = _controls(
        flags=flags, penalties=penalties, token_counts=token_counts, logit_bias=bias,
        token_mask=mask, adjusted=adjusted,
    )  # fmt: skip
    sampling.adjust_logits(logits, step, controls)


def _top_logprobs(values: tuple[Any, ...]) -> None:
    """tests/nogpu/test_sample_controlled.py compares the kernel with the reference."""
    arrays = [value.numpy() for value in values[:13]]
    for value in values[:2]:
        value.touch()
    logprobs, logprob_tokens, token, logits, flags, state_slots, decode_step = (
        arrays[i] for i in (0, 1, 5, 6, 10, 11, 12)
    )
    token[~np.isfinite(logits.max(axis=1))] = -1  # the kernel of slice_max's place reports these
    values[5].touch()
    controls = _controls(flags=flags, logprobs=logprobs, logprob_tokens=logprob_tokens)
    entry = int(decode_step[0]) % values[15]
    sampling.store_logprobs(logits, state_slots, token, entry, controls)


STAND_INS: dict[str, Callable[[tuple[Any, ...]], None]] = {
    "adjust_logits": _adjust_logits,
    "assign_slots": _assign_slots,
    "count_step": _count_step,
    "count_uses": _count_uses,
    "expert_histogram": lambda values: None,
    "group_by_expert": _group_by_expert,
    "slice_max": lambda values: None,
    "logit_histogram": lambda values: None,
    "sample_token": _sample_token,
    "advance_step": _advance_step,
    "top_logprobs": _top_logprobs,
}
