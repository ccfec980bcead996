"""What runs in the interpreter for kernels that Numba compiles: the reference operations.

Compiled text is not interpreted; the kernels themselves run in Numba's simulator (tests/nogpu).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from osmium.ops import (
    DecayConfig,
    DecodeState,
    ExpertCache,
    PrefetchState,
    SlotAssignment,
    StepInputs,
)
from osmium.ops.reference import ReferenceOps
from osmium.quant.expert_layout import ExpertLayout

__all__ = ["STAND_INS"]


def _place(values: tuple[Any, ...]) -> None:
    """tests/nogpu/test_assign_slots.py holds the kernel to the reference."""
    arrays = [None if value == 0 else value.numpy() for value in values[:27]]
    for value in values[:7]:
        value.touch()
    step, counters, ids = arrays[12:15]
    sizes, (earlier, rate, long_rate, share) = values[27:37], values[37:]
    _, experts, capacity, _, first, _, layer, last, guessing, _ = sizes
    fading = DecayConfig(1 / rate, 1 / long_rate, 1.0, earlier)
    none: list[Any] = [None] * layer
    layers = [(*none, here) if last else (*none, here, on)
              for here, on in zip(arrays[7:12], arrays[15:20], strict=True)]  # fmt: skip
    slot_of, expert_in, heat, long_heat, stamp = cast(Any, layers)
    expert_in = [range(first - capacity), *[()] * (layer - 1)][:layer] + list(expert_in[layer:])
    cache = ExpertCache(
        ExpertLayout(16, 8, 8), experts, replace(fading, long_weight=share / fading.long_scale), (),
        slot_of, expert_in, heat, long_heat, stamp, step, counters,
    )  # fmt: skip
    likely, weights, *words = arrays[20:]
    nothing: Any = None
    guess = PrefetchState(likely, weights, *[nothing] * 3, *words)
    ReferenceOps().assign_slots(
        SlotAssignment(*arrays[:7]), cache, layer, ids, guess if guessing else None
    )


def _draw(values: tuple[Any, ...]) -> None:
    """tests/nogpu/test_sample.py holds the kernel to the reference."""
    token, logits, _, settings, chance, turn = (value.numpy() for value in values[:6])
    values[0].touch()
    nothing: Any = None
    ReferenceOps().sample(
        logits,
        DecodeState(
            values[12], 0, 0, settings, chance, token, nothing, nothing, nothing, turn,
            *[nothing] * 7,
        ),
    )  # fmt: skip


def _advance(values: tuple[Any, ...]) -> None:
    """tests/nogpu/test_sample.py holds the kernel to the reference."""
    arrays = [value.numpy() for value in values[:11]]
    ids, positions, past, slots, pages, token, left, heed, eos, turn, mail = arrays
    nothing: Any = None
    rows, _, _, ring, nobody, nowhere = values[11:]
    step = StepInputs(
        rows, rows, 1, ids, positions, nothing, nothing, past, slots, pages,
    )  # fmt: skip
    replies = DecodeState(
        ring, nobody, nowhere, nothing, nothing, token, left, heed, eos, turn, mail,
        *[nothing] * 6,
    )  # fmt: skip
    ReferenceOps().advance_step(step, replies)


STAND_INS: dict[str, Callable[[tuple[Any, ...]], None]] = {
    "assign_slots": _place,
    "slice_max": lambda values: None,
    "logit_histogram": lambda values: None,
    "sample_token": _draw,
    "advance_step": _advance,
}
