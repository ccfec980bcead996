"""Experts of prefill passes on interpreted kernels: bits of a fully resident cache, counters."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.experts.cache import DECAY, make_cache, resident, verify
from osmium.experts.runner import ExpertRunner
from osmium.experts.streaming import (
    STAGING_EXPERTS,
    PrefillExperts,
    pair_bytes,
    pair_shapes,
    prefill_expert_bytes,
    staging_experts,
)
from osmium.ops import HostExperts, Ops
from osmium.ops.gpu import GpuOps
from osmium.ops.grouped import STAGING_GROUPS
from osmium.quant.expert_layout import ExpertLayout
from tests.ops.cases import normed_rows, packed_experts
from tests.ptx.interpreter import InterpretedRuntime
from tests.tolerance import close

LAYERS, EXPERTS, TOP_K, ROWS = 2, 6, 2, 40
LAYOUT = ExpertLayout(4, 128, 128)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model's experts."""

    layers: int = LAYERS
    experts: int = EXPERTS
    top_k: int = TOP_K
    layout: ExpertLayout = LAYOUT
    rows: int = ROWS


SMALL = Shape()

F32 = npt.NDArray[np.float32]


@dataclass
class Inputs:
    """Weights, and the rows of some steps: the same for every run."""

    shape: Shape
    packed: npt.NDArray[np.uint8]
    norm: F32
    steps: list[list[dict[str, npt.NDArray[Any]]]]
    """Arrays of each layer of each step."""

    @staticmethod
    def make(rng: np.random.Generator, counts: tuple[int, ...], shape: Shape = SMALL) -> "Inputs":
        hidden = shape.layout.hidden
        popularity = rng.random((shape.layers, shape.experts))
        popularity[:, 3] = 0  # an expert that no token uses
        steps: list[list[dict[str, npt.NDArray[Any]]]] = [
            [
                {
                    "ids": np.stack(
                        [
                            rng.choice(shape.experts, shape.top_k, replace=False, p=p / p.sum())
                            for _ in range(tokens)
                        ]
                    ).astype(np.uint16),
                    "weights": rng.random((tokens, shape.top_k), np.float32),
                    "x": rng.standard_normal((tokens, hidden), np.float32),
                }
                for p in popularity
            ]
            for tokens in counts
        ]
        packed = np.stack(
            [packed_experts(rng, shape.layout, shape.experts) for _ in range(shape.layers)]
        )
        norm = rng.standard_normal(hidden, np.float32)
        return Inputs(shape, packed, norm, steps)


@dataclass
class Run:
    """The outputs of every step and layer, and the cache before and after each step."""

    runner: ExpertRunner
    experts: PrefillExperts
    outputs: list[F32] = field(default_factory=list)
    residents: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    counters: list[tuple[int, ...]] = field(default_factory=list)


def no_step(done: "Run", layer: int) -> None:
    """No other step runs between two parts."""


def run(
    ops: Ops,
    inputs: Inputs,
    slots: list[int],
    staged: int,
    is_empty: bool = False,
    prompt_end: int = -1,
    pairs: int = 64,
    link_gb_s: float = 0.0,
    between: Callable[[Run, int], None] = no_step,
) -> Run:
    """All steps, in a cache with uneven slots per layer.

    It first holds experts 0, 2, 4 .., and has a free slot, or it is empty.  Step `prompt_end` is a
    prompt's last one.  `between` runs between two parts of a layer.
    """
    shape = inputs.shape
    host = ops.empty_mapped(inputs.packed.shape, np.uint8)
    ops.host_view(host)[...] = inputs.packed
    host_experts = HostExperts(shape.layout, host)
    cache = make_cache(
        ops, host_experts, sum(slots) // shape.layers, shape.top_k, slots, STAGING_GROUPS * staged
    )
    if max(slots) < shape.experts and not is_empty:
        for layer, count in enumerate(slots):
            held = np.arange(count, dtype=np.int32) * 2 % (shape.experts + 1)
            held[-1] = -1  # a free slot
            hold(ops, host, cache, layer, held)
    runner = ExpertRunner(ops, host_experts, cache, 8, shape.top_k)
    experts = PrefillExperts(ops, runner, shape.rows, pairs, ops.empty, link_gb_s)
    done, routed = Run(runner, experts), 0
    norm = ops.to_device(inputs.norm)
    for index, step in enumerate(inputs.steps):
        admits = index == prompt_end
        done.residents.append(resident(ops, cache))
        layers = [
            {name: ops.to_device(array.copy()) for name, array in arrays.items()} for arrays in step
        ]
        experts.invalidate()
        for number, a in enumerate(layers):
            with ops.prefill():
                h = normed_rows(ops, a["x"], norm)
            experts.start_layer(number)
            experts.group(number, a["ids"], admits)
            for _ in experts.compute(number, a["x"], h, a["ids"], a["weights"], admits):
                between(done, number)
            routed += a["ids"].shape[0] * shape.top_k
        done.outputs += [np.array(ops.copy_d2h(a["x"]), np.float32) for a in layers]
        counters = ops.copy_d2h(cache.counters).copy()
        counters[0] = routed  # the router's
        ops.copy_h2d(cache.counters, counters)
        counted = runner.counters()
        done.counters.append((counted.hit, counted.missed, counted.experts_copied))
    experts.invalidate()
    ops.synchronize()
    ops.release(host)
    return done


def hold(ops: Ops, host: Any, cache: Any, layer: int, held: npt.NDArray[np.int32]) -> None:
    """Fill the slots of a layer with these experts; -1: a free slot."""
    table = np.full(cache.num_experts, -1, np.int32)
    for slot, expert in enumerate(held.tolist()):
        if expert >= 0:
            table[expert] = slot
            ops.copy(cache.slots[layer][slot : slot + 1], host[layer][expert : expert + 1])
    ops.copy_h2d(cache.expert_to_slot[layer], table)
    ops.copy_h2d(cache.slot_to_expert[layer], held)


def interpreted(rng: np.random.Generator) -> Ops:
    return GpuOps(InterpretedRuntime(int(rng.integers(1 << 32))))


def same_bits(done: Run, whole: Run) -> None:
    assert done.outputs
    for got, want in zip(done.outputs, whole.outputs, strict=False):
        np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def compare(done: Run, whole: Run, inputs: Inputs) -> None:
    """Compare with a fully resident cache: bits, slots and counters."""
    same_bits(done, whole)
    assert len(done.outputs) == inputs.shape.layers * len(inputs.steps)
    assert verify(done.runner.ops, done.runner.cache, inputs.packed, 1000, 0) > 0
    hits = pairs = 0
    tables = [*done.residents, resident(done.runner.ops, done.runner.cache)]
    for step, table, after, counters in zip(
        inputs.steps, tables, tables[1:], done.counters, strict=False
    ):
        for layer, arrays in enumerate(step):
            hits += int(table[layer][arrays["ids"]].sum())
            pairs += arrays["ids"].size
            missing = np.setdiff1d(arrays["ids"], np.flatnonzero(table[layer]))
            num_free = done.runner.cache.slots[layer].shape[0] - int(table[layer].sum())
            admitted = int(after[layer].sum() - table[layer].sum())
            assert admitted == min(num_free, len(missing)), "used experts fill free slots"
            assert (after[layer] >= table[layer]).all(), "no expert is replaced"
        assert counters[:2] == (hits, pairs - hits)


def missing_used(done: Run, inputs: Inputs, index: int) -> int:
    """Missing experts that the tokens of a step use, of all layers."""
    return sum(
        len(np.setdiff1d(arrays["ids"], np.flatnonzero(done.residents[index][layer])))
        for layer, arrays in enumerate(inputs.steps[index])
    )


def test_a_pass_has_the_bits_of_a_fully_resident_cache(rng: np.random.Generator) -> None:
    """Parts of one, two and all missing experts; three passes in a row, the last of one token."""
    inputs = Inputs.make(rng, (ROWS, 9, 1))
    whole = run(interpreted(rng), inputs, [EXPERTS] * LAYERS, 0, pairs=128)
    for staged in (1, 2, EXPERTS):
        some = inputs if staged == 2 else replace(inputs, steps=inputs.steps[:1])
        done = run(interpreted(rng), some, [4, 2], staged, is_empty=staged == EXPERTS)
        compare(done, whole, some)


def test_how_many_pairs_are_computed_at_once_does_not_change_a_bit(
    rng: np.random.Generator,
) -> None:
    shape = replace(SMALL, rows=80)
    inputs = Inputs.make(rng, (80,), shape)
    inputs.steps[0][1]["ids"][:] = [4, 1]  # two experts with more pairs than are computed at once
    whole = run(interpreted(rng), inputs, [EXPERTS] * LAYERS, 0, pairs=192)
    same_bits(run(interpreted(rng), inputs, [EXPERTS] * LAYERS, 0, pairs=64), whole)
    compare(run(interpreted(rng), inputs, [4, 2], 2, pairs=64), whole, inputs)


def test_only_used_experts_are_copied_once_routing_is_known(rng: np.random.Generator) -> None:
    inputs = Inputs.make(rng, (9, 9))
    inputs.steps[1][0]["ids"][:] = inputs.steps[1][1]["ids"][:] = [5, 2]
    ahead = run(interpreted(rng), inputs, [3, 3], 1)
    late = run(interpreted(rng), inputs, [3, 3], 1, link_gb_s=1e-9)
    same_bits(late, ahead)
    copied = [counters[2] for counters in late.counters]
    wanted = [missing_used(late, inputs, index) for index in range(2)]
    assert np.diff([0, *copied]).tolist() == wanted
    assert ahead.counters[1][2] > copied[1], "the first missing experts were copied before"


def test_the_tables_may_change_between_two_parts(rng: np.random.Generator) -> None:
    """Another step puts other experts into the slots; the layer's other parts are planned anew."""
    inputs = Inputs.make(rng, (ROWS,))
    whole = run(interpreted(rng), inputs, [EXPERTS] * LAYERS, 0, pairs=128)
    changes = 0

    def other_step(done: Run, layer: int) -> None:
        nonlocal changes
        changes += 1
        held = rng.choice(EXPERTS, done.runner.cache.slots[layer].shape[0], replace=False)
        host = done.runner.host_experts
        assert host is not None
        for number, cached in enumerate(done.runner.cache.slots):
            held = rng.choice(EXPERTS, cached.shape[0], replace=False).astype(np.int32)
            hold(done.runner.ops, host.packed, done.runner.cache, number, held)
        done.experts.invalidate()

    done = run(interpreted(rng), inputs, [4, 2], 1, between=other_step)
    same_bits(done, whole)
    assert changes > LAYERS
    assert verify(done.runner.ops, done.runner.cache, inputs.packed, 1000, 0) == 6


def test_a_prompts_last_pass_admits_its_most_used_experts(rng: np.random.Generator) -> None:
    inputs = Inputs.make(rng, (ROWS, ROWS, 9))
    inputs.steps[0][0]["ids"][:] = inputs.steps[1][0]["ids"][:] = [5, 3]
    whole = run(interpreted(rng), inputs, [EXPERTS] * LAYERS, 0, pairs=128)
    done = run(interpreted(rng), inputs, [4, 2], 2, prompt_end=1)
    same_bits(done, whole)
    before, after = done.residents[1:]
    assert after[0][[3, 5]].all() and after.sum(axis=1).tolist() == [4, 2]
    scores = [
        np.bincount(
            np.concatenate([step[layer]["ids"].reshape(-1) for step in inputs.steps[:2]]),
            np.repeat(2.0 ** (-np.arange(2 * ROWS)[::-1] / DECAY.half_life), TOP_K), EXPERTS,
        )
        for layer in range(LAYERS)
    ]  # fmt: skip
    assert min(scores[1][after[1]]) >= min(scores[1][before[1]]), "no worse expert is admitted"
    hits = sum(
        int(table[arrays["ids"]].sum())
        for arrays, table in zip(inputs.steps[1], before, strict=True)
    )
    assert done.counters[1][0] - done.counters[0][0] == hits, "an admitted expert is a miss"
    assert verify(done.runner.ops, done.runner.cache, inputs.packed, 1000, 0) == 6


def test_a_pass_that_ends_early_leaves_no_wrong_expert(rng: np.random.Generator) -> None:
    inputs = Inputs.make(rng, (ROWS, ROWS))
    whole = run(interpreted(rng), inputs, [EXPERTS] * LAYERS, 0, pairs=128)

    class EndsError(Exception):
        pass

    def fail(done: Run, layer: int) -> None:
        if len(done.residents) == 1 and layer == 1:
            raised.append(done)
            raise EndsError

    raised: list[Run] = []
    ops = interpreted(rng)
    with pytest.raises(EndsError):
        run(ops, inputs, [4, 4], 1, is_empty=True, between=fail)
    (done,) = raised
    done.experts.invalidate()
    runner = done.runner
    assert verify(ops, runner.cache, inputs.packed, 1000, 0) > 0
    a = {name: ops.to_device(array.copy()) for name, array in inputs.steps[1][0].items()}
    with ops.prefill():
        h = normed_rows(ops, a["x"], ops.to_device(inputs.norm))
    done.experts.start_layer(0)
    done.experts.group(0, a["ids"], True)
    for _ in done.experts.compute(0, a["x"], h, a["ids"], a["weights"], True):
        pass
    found, wanted = np.asarray(ops.copy_d2h(a["x"]), np.float32), whole.outputs[LAYERS]
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("staged", [1, 7, 40])
def test_copies_run_beside_computation_on_a_gpu(
    bits: int, staged: int, rng: np.random.Generator, gpu: GpuOps
) -> None:
    """Copies and launches of many layers and passes overlap; bits are equal if all are ordered."""
    shape = Shape(6, 40, 4, ExpertLayout(bits, 1024, 512), 400)
    inputs = Inputs.make(rng, (400, 129, 257, 10, 400, 1, 3), shape)
    whole = run(gpu, inputs, [shape.experts] * shape.layers, 0, pairs=1600)
    for is_empty, pairs, link in ((False, 1600, 0.0), (True, 192, 0.0), (True, 64, 1e-9)):
        done = run(gpu, inputs, [12, 20] * 3, staged, is_empty, pairs=pairs, link_gb_s=link)
        compare(done, whole, inputs)
    done = run(gpu, inputs, [12, 20] * 3, staged, prompt_end=2, pairs=256)
    same_bits(done, whole)


def test_uses_count_like_steps_of_a_token_each(rng: np.random.Generator) -> None:
    inputs = Inputs.make(rng, (ROWS, 9))
    done = run(interpreted(rng), inputs, [4, 2], 3)
    ops, cache = done.runner.ops, done.runner.cache
    for layer in range(LAYERS):
        ids = np.concatenate([step[layer]["ids"] for step in inputs.steps])
        age = np.arange(len(ids))[::-1].repeat(TOP_K)
        for counts, half_life in (
            (cache.short_count, DECAY.half_life), (cache.long_count, DECAY.long_half_life),
        ):  # fmt: skip
            wanted = np.bincount(ids.reshape(-1), 2.0 ** (-age / half_life), EXPERTS)
            # counts are stored as of the last use
            unused_steps = 2 - ops.copy_d2h(cache.last_used)[layer]
            found = ops.copy_d2h(counts)[layer] * 2.0 ** (-unused_steps / half_life)
            assert close(found, wanted, "f32")
        wanted_steps = [
            max((n for n, step in enumerate(inputs.steps, 1) if (step[layer]["ids"] == e).any()),
                default=0)
            for e in range(EXPERTS)
        ]  # fmt: skip
        assert ops.copy_d2h(cache.last_used)[layer].tolist() == wanted_steps
    assert ops.copy_d2h(cache.step).tolist() == [2]


def test_other_layouts_have_no_staging_slots() -> None:
    vram, big = 32 << 30, ExpertLayout(4, 3072, 1024)
    assert staging_experts(ExpertLayout(16, 136, 128), 256, vram, 99) == 0
    assert staging_experts(ExpertLayout(4, 64, 64), 256, vram, 99) == 0
    assert staging_experts(LAYOUT, 256, vram, 0) == 0, "nothing is missing"
    assert staging_experts(big, 256, vram, 138) == STAGING_EXPERTS
    assert staging_experts(big, 256, 8 << 30, 138) == (8 << 30) * 34 // 10000 // big.nbytes
    assert staging_experts(big, 256, 1 << 29, 138) == 2
    assert staging_experts(LAYOUT, 256, vram, 3) == 3, "no more than are missing"


def test_the_planned_bytes_of_passes_are_the_bytes_allocated(rng: np.random.Generator) -> None:
    done = run(interpreted(rng), Inputs.make(rng, (1,)), [4, 2], 2)
    arrays = [*vars(done.experts.grouped.groups).values(), done.experts.index]
    planned = prefill_expert_bytes(LAYOUT, EXPERTS, TOP_K, ROWS)
    assert planned == sum(array.nbytes for array in arrays)
    inner = done.experts.inner
    pairs = [done.experts.grouped.pair_out, inner.f32, inner.digits, inner.units]
    assert 64 * pair_bytes(LAYOUT) == sum(array.nbytes for array in pairs)
    assert set(pair_shapes(LAYOUT, 1)) == {"pair_out", "f32", "digits", "units"}
