"""Numba kernel assign_slots against ReferenceOps.assign_slots: same plans, tables and counters.

Numba's simulator runs the kernel in a separate process, because it replaces numba.cuda there.
`python -m tests.nogpu.test_assign_slots SEED CASE` compares one random sequence of calls.
"""

import copy
import sys
import threading
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.kernels.assign_slots import ASSIGN_SLOTS
from osmium.kernels.numba_kernels import KERNELS
from osmium.ops import DecayConfig, ExpertCache, PrefetchState, SlotAssignment
from osmium.ops.reference import ReferenceOps
from osmium.ops.types import FETCH_BLOCKS, FETCH_WARPS
from osmium.quant.expert_layout import ExpertLayout
from tests import needs
from tests.nogpu.simulator import prepare_simulator, run_simulated

ROOT = Path(__file__).resolve().parents[2]

PLAN = ("count", "expert", "slot", "fetch_flags", "uses", "pair_slots", "fetch_progress")
TABLES = ("expert_to_slot", "slot_to_expert", "last_used", "step", "counters")


@dataclass(frozen=True)
class Sequence:
    """Parameters of a random sequence of calls."""

    experts: int
    slots: int
    top_k: int
    tokens: int
    """Most tokens per call; slots >= tokens * top_k, or all experts fit."""
    half_life: float
    long_half_life: float
    calls: int
    skew: float
    """0 uses all experts equally; 6 a few much more than the others."""
    threads: int = 32
    with_prefetch: bool = False


SEQUENCES = {
    "evicting": Sequence(37, 13, 3, 4, 5.3, 60, 14, 3),
    "thrashing": Sequence(20, 4, 4, 1, 1.7, 3.1, 16, 0),
    "resident": Sequence(17, 17, 2, 12, 16.0, 512, 8, 1),
    "ties": Sequence(24, 9, 3, 3, 1e9, 1e9, 16, 0),
    "past one word of bits, past one pass of the block": Sequence(130, 70, 8, 8, 9.1, 80, 24, 0),
    "more threads than experts": Sequence(9, 5, 1, 5, 3.0, 512, 20, 0, 64),
    "prefetch": Sequence(37, 13, 3, 4, 5.3, 60, 30, 3, with_prefetch=True),
    "prefetch, thrashing": Sequence(20, 4, 4, 1, 1.7, 3.1, 30, 0, with_prefetch=True),
    "prefetch, ties": Sequence(24, 9, 3, 3, 1e9, 1e9, 30, 0, with_prefetch=True),
    "prefetch, past one word": Sequence(130, 70, 8, 8, 9.1, 80, 20, 0, 64, with_prefetch=True),
}


def some_cache(rng: np.random.Generator, s: Sequence, layers: int) -> ExpertCache:
    """Three quarters of the slots are taken; counts are small integers, so that many are equal."""
    expert_to_slot = np.full((layers, s.experts), -1, np.int32)
    slot_to_expert = np.full((layers, s.slots), -1, np.int32)
    num_taken = 3 * s.slots // 4
    for layer in range(layers):
        slots, resident_ids = (
            rng.permutation(s.slots)[:num_taken],
            rng.permutation(s.experts)[:num_taken],
        )
        slot_to_expert[layer, slots], expert_to_slot[layer, resident_ids] = resident_ids, slots
    return ExpertCache(
        ExpertLayout(16, 8, 8), s.experts, DecayConfig(s.half_life, s.long_half_life, 0.35, 19),
        slots=(),
        expert_to_slot=expert_to_slot,
        slot_to_expert=tuple(slot_to_expert),
        short_count=rng.integers(0, 3, (layers, s.experts)).astype(np.float32),
        long_count=rng.integers(0, 3, (layers, s.experts)).astype(np.float32),
        last_used=rng.integers(47, 51, (layers, s.experts), dtype=np.int32),
        step=np.array([50], np.int32),
        counters=np.zeros(7, np.int64),
    )  # fmt: skip


def empty_assignment(entries: int, pairs: int) -> SlotAssignment:
    return SlotAssignment(*(np.full(n, -7, np.int32) for n in (1, *[entries] * 4, pairs, 2)))


def empty_prefetch(pairs: int, layers: int) -> PrefetchState:
    each = [np.full(layers, -1, np.int32) for _ in range(2)]
    state = np.full((layers, FETCH_BLOCKS), 1 << 15 | 1, np.int32)
    done = np.full((layers, FETCH_WARPS), 5, np.int32)
    go = np.full((layers, FETCH_BLOCKS), 7, np.int32)
    ids, weights = np.zeros(pairs, np.uint16), np.zeros(pairs, np.float32)
    return PrefetchState(ids, weights, None, None, None, each[0], each[1], state, done, go)


def some_predictions(rng: np.random.Generator, s: Sequence, ids: npt.NDArray[np.uint16]) -> Any:
    """`ids` with 40 % of the entries replaced: predictions of them."""
    wrong = rng.random(ids.shape) < 0.4
    return np.where(wrong, rng.integers(0, s.experts, ids.shape), ids).astype(np.uint16)


def some_ids(rng: np.random.Generator, s: Sequence) -> npt.NDArray[np.uint16]:
    """u16 [T, A], distinct experts per token."""
    p = rng.random(s.experts) ** s.skew
    tokens = int(rng.integers(1, s.tokens + 1))
    rows = [rng.choice(s.experts, s.top_k, replace=False, p=p / p.sum()) for _ in range(tokens)]
    return np.stack(rows).astype(np.uint16)


def compare(kernel: Any, rng: np.random.Generator, s: Sequence) -> None:
    """Run the sequence on both; everything but the last bits of the counts must be equal."""
    layers, reference = 3, ReferenceOps()
    entries = min(s.experts, s.tokens * s.top_k)
    pairs = s.tokens * s.top_k
    a = some_cache(rng, s, layers)
    b = copy.deepcopy(a)
    prefetch = empty_prefetch(pairs, layers)
    kernel_prefetch = copy.deepcopy(prefetch)
    evicted, ids = 0, some_ids(rng, s)
    for call in range(s.calls):
        layer = call % layers
        next_layer, last = (layer + 1) % layers, layer + 1 == layers
        next_ids = some_ids(rng, s) if last else some_ids(rng, s)[: len(ids)]
        if len(next_ids) < len(ids) and not last:
            ids = ids[: len(next_ids)]
        predicted = some_predictions(rng, s, next_ids).reshape(-1)
        prefetch.ids[: predicted.size] = kernel_prefetch.ids[: predicted.size] = predicted
        prefetch.weights[:] = kernel_prefetch.weights[:] = (
            rng.integers(1, 5, pairs) / 8
        )  # many are equal
        experts_before = a.slot_to_expert[layer].copy()
        x, y = empty_assignment(entries, pairs), empty_assignment(entries, pairs)
        reference.assign_slots(x, a, layer, ids, prefetch if s.with_prefetch else None)
        kernel[1 + (s.with_prefetch and not last), s.threads](
            y.count,
            y.expert,
            y.slot,
            y.fetch_flags,
            y.uses,
            y.pair_slots,
            y.fetch_progress,
            b.expert_to_slot[layer],
            b.slot_to_expert[layer],
            b.short_count[layer],
            b.long_count[layer],
            b.last_used[layer],
            b.step,
            b.counters,
            ids.reshape(-1),
            b.expert_to_slot[next_layer],
            b.slot_to_expert[next_layer],
            b.short_count[next_layer],
            b.long_count[next_layer],
            b.last_used[next_layer],
            kernel_prefetch.ids,
            kernel_prefetch.weights,
            kernel_prefetch.expert,
            kernel_prefetch.slot,
            kernel_prefetch.state.reshape(-1),
            kernel_prefetch.segments_done.reshape(-1),
            kernel_prefetch.start_signal.reshape(-1),
            ids.size,
            s.experts,
            s.slots,
            s.slots,
            next_layer * s.slots,
            entries,
            layer,
            int(last),
            int(s.with_prefetch),
            FETCH_WARPS,
            b.decay.prior_steps,
            np.float32(1 / s.half_life),
            np.float32(1 / s.long_half_life),
            np.float32(b.decay.long_scale),
        )
        for name in PLAN:
            np.testing.assert_array_equal(getattr(y, name), getattr(x, name), f"{name}, {call}")
        for name in TABLES:
            np.testing.assert_array_equal(getattr(b, name), getattr(a, name), f"{name}, {call}")
        for name in ("short_count", "long_count"):
            found, wanted = getattr(b, name), getattr(a, name)
            np.testing.assert_allclose(found, wanted, rtol=1e-6, err_msg=f"{name}, {call}")
        for name in ("expert", "slot", "state", "segments_done", "start_signal"):
            found, wanted = getattr(kernel_prefetch, name), getattr(prefetch, name)
            np.testing.assert_array_equal(found, wanted, f"prefetch.{name}, {call}")
        evicted += int(((experts_before >= 0) & (a.slot_to_expert[layer] != experts_before)).sum())
        ids = next_ids
    assert evicted or s.slots == s.experts, "nothing was evicted, so the sequence tests little"
    assert a.counters[1] > 0, "nothing hit, so the sequence tests little"
    if s.with_prefetch:
        assert a.counters[4] > a.counters[5] > 0, (
            "no prefetch was right, so the sequence tests little"
        )


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_kernel_assigns_slots_like_the_reference(name: str, rng: np.random.Generator) -> None:
    needs.numba_simulator()
    run = run_simulated("tests.nogpu.test_assign_slots", str(rng.integers(1 << 32)), name)
    assert run.returncode == 0, run.stderr


def test_the_compiled_kernel_matches_its_contract() -> None:
    needs.numba_simulator()
    contract = ASSIGN_SLOTS.contract
    assert contract.entry == "assign_slots"
    assert contract.block == 256
    assert [p.name for p in contract.params if not p.is_array] == [
        "num_pairs", "num_experts", "num_slots", "next_num_slots", "next_first_slot", "max_unique",
        "layer", "is_last_layer", "has_prefetch", "fetch_warps", "prior_steps", "rate", "long_rate",
        "long_scale",
    ]  # fmt: skip


def simulated(threads: int) -> Any:
    """The kernel for numba's simulator, launched as kernel[blocks, threads](...)."""
    from numba import cuda, float32, int32, uint32

    names = {"cuda": cuda, "float32": float32, "int32": int32, "uint32": uint32}
    names["BLOCK_THREADS"] = threads

    lock = threading.Lock()

    def atomic_add(array: Any, index: int, value: int) -> None:
        with lock:  # the simulator runs each CUDA thread as a Python thread
            array[index] += value

    names["atomic_add"] = atomic_add
    names["float_as_int"] = lambda x: np.float32(x).view(np.int32)
    function = KERNELS["assign_slots"].function
    known = {**function.__globals__, **names, "exp2": lambda x: np.exp2(np.float32(x))}
    return cuda.jit(types.FunctionType(function.__code__, known, "assign_slots"))


if __name__ == "__main__":
    prepare_simulator()
    sequence = SEQUENCES[sys.argv[2]]
    compare(simulated(sequence.threads), np.random.default_rng(int(sys.argv[1])), sequence)
