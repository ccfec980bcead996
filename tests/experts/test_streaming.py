"""Streamed steps on interpreted kernels: the bits of a fully resident cache, and exact counters."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.experts.cache import DECAY, make_cache, resident, verify
from osmium.experts.runner import ExpertRunner, expert_runner_bytes
from osmium.experts.streaming import (
    STREAM_MIN_TOKENS,
    ExpertStreamer,
    staging_bytes,
    staging_experts,
)
from osmium.ops import HostExperts, LinearWeight, Ops, SharedExpert
from osmium.ops.gpu import GpuOps
from osmium.ops.reference import ReferenceOps
from osmium.quant import int8
from osmium.quant.expert_layout import ExpertLayout
from tests.ops.cases import new_rows, normed_rows, packed_experts
from tests.ptx.interpreter import InterpretedRuntime
from tests.tolerance import close

LAYERS, EXPERTS, TOP_K, SHARED, ROWS = 2, 6, 2, 64, 40
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
    shared: tuple[F32, F32]
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
                    "gate": rng.standard_normal((tokens, 1), np.float32),
                }
                for p in popularity
            ]
            for tokens in counts
        ]
        up, down = (
            (rng.standard_normal(size) * size[1] ** -0.5).astype(np.float32)
            for size in ((2 * SHARED, hidden), (hidden, SHARED))
        )
        packed = np.stack(
            [packed_experts(rng, shape.layout, shape.experts) for _ in range(shape.layers)]
        )
        norm = rng.standard_normal(hidden, np.float32)
        return Inputs(shape, packed, (up, down), norm, steps)


@dataclass
class Run:
    """The outputs of every step and layer, and the cache before and after each step."""

    runner: ExpertRunner
    outputs: list[F32] = field(default_factory=list)
    residents: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    counters: list[tuple[int, ...]] = field(default_factory=list)


def run(
    ops: Ops,
    inputs: Inputs,
    slots: list[int],
    staged: int,
    is_empty: bool = False,
    prompt_end: int = -1,
) -> Run:
    """All steps, in a cache with uneven slots per layer.

    It first holds experts 0, 2, 4 .., and has a free slot, or it is empty.  Step `prompt_end` is a
    prompt's last one.
    """
    shape, hidden = inputs.shape, inputs.shape.layout.hidden
    host = ops.empty_mapped(inputs.packed.shape, np.uint8)
    ops.host_view(host)[...] = inputs.packed
    host_experts = HostExperts(shape.layout, host)
    cache = make_cache(ops, host_experts, sum(slots) // shape.layers, shape.top_k, slots)
    if max(slots) < shape.experts and not is_empty:
        for layer, count in enumerate(slots):
            held = np.arange(count, dtype=np.int32) * 2 % (shape.experts + 1)
            held[-1] = -1  # a free slot
            table = np.full(shape.experts, -1, np.int32)
            for slot, expert in enumerate(held[:-1].tolist()):
                table[expert] = slot
                ops.copy(cache.slots[layer][slot : slot + 1], host[layer][expert : expert + 1])
            ops.copy_h2d(cache.expert_to_slot[layer], table)
            ops.copy_h2d(cache.slot_to_expert[layer], held)
    runner = ExpertRunner(ops, host_experts, cache, shape.rows, shape.top_k, None, staged)
    runner.stream_min_tokens = 8
    done, routed = Run(runner), 0
    up, down = (_int8(ops, w) for w in inputs.shared)
    shared = SharedExpert(up, down, gate_column=0)
    norm = ops.to_device(inputs.norm)
    for index, step in enumerate(inputs.steps):
        tokens = len(step[0]["x"])
        runner.prompt_ends = index == prompt_end
        done.residents.append(resident(ops, cache))
        gate_up, shared_out, y = (
            ops.empty((tokens, n), np.float32) for n in (2 * SHARED, hidden, hidden)
        )
        shared_inner = new_rows(ops, tokens, SHARED)
        layers = [
            {name: ops.to_device(array.copy()) for name, array in arrays.items()} for arrays in step
        ]
        h = [normed_rows(ops, arrays["x"], norm) for arrays in layers]
        with runner.step(tokens):  # the host does not wait between layers
            for number, a in enumerate(layers):
                runner.forward(
                    a["x"], h[number], a["ids"], a["weights"], number, shared, a["gate"],
                    shared_inner, gate_up, shared_out, y, norm,
                )  # fmt: skip
                routed += tokens * shape.top_k
        done.outputs += [np.array(ops.copy_d2h(a["x"]), np.float32) for a in layers]
        counters = ops.copy_d2h(cache.counters).copy()
        counters[0] = routed  # the router's
        ops.copy_h2d(cache.counters, counters)
        counted = runner.counters()
        done.counters.append((counted.hit, counted.missed, counted.experts_copied))
    ops.synchronize()
    ops.release(host)
    return done


def _int8(ops: Ops, w: F32) -> LinearWeight:
    (rows, columns), (data, scale) = w.shape, int8.quantize(w)
    return LinearWeight("int8", rows, columns, ops.to_device(data), ops.to_device(scale))


def interpreted(rng: np.random.Generator) -> Ops:
    return GpuOps(InterpretedRuntime(int(rng.integers(1 << 32))))


def compare(done: Run, whole: Run, inputs: Inputs, streamed: int) -> None:
    """Compare with a fully resident cache; the first `streamed` steps of `inputs` are streamed."""
    shape = inputs.shape
    assert len(done.outputs) == shape.layers * len(inputs.steps)
    for number, (got, want) in enumerate(zip(done.outputs, whole.outputs, strict=False)):
        if number < streamed * shape.layers:
            np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
        else:
            assert close(got, want, "f32"), "decode adds hits and misses apart"
    for table in done.residents[1 : streamed + 1]:
        num_slots = [layer.shape[0] for layer in done.runner.cache.slots]
        assert table.sum(axis=1).tolist() == num_slots, "free slots are filled"
        assert (table >= done.residents[0]).all(), "no expert is replaced"
        np.testing.assert_array_equal(table, done.residents[1])
    assert verify(done.runner.ops, done.runner.cache, inputs.packed, 1000, 0) > 0

    hits = copied = pairs = 0
    for step, table, counters in zip(
        inputs.steps[:streamed], done.residents, done.counters, strict=False
    ):
        for layer, arrays in enumerate(step):
            hits += int(table[layer][arrays["ids"]].sum())
            pairs += arrays["ids"].size
            copied += int((~table[layer]).sum())
        assert counters == (hits, pairs - hits, copied)
        assert hits < pairs


def test_a_streamed_step_has_the_bits_of_a_fully_resident_cache(rng: np.random.Generator) -> None:
    """Parts of one, two and all missing experts; two steps in a row, then a decode step.

    Takes long: each run interprets the matrix kernels of all experts.
    """
    inputs = Inputs.make(rng, (ROWS, 9, 3))
    whole = run(interpreted(rng), inputs, [EXPERTS] * LAYERS, 0)
    for staged in (1, 2, EXPERTS):
        some = inputs if staged == 2 else replace(inputs, steps=inputs.steps[:1])
        done = run(interpreted(rng), some, [4, 2], staged, is_empty=staged == EXPERTS)
        compare(done, whole, some, min(2, len(some.steps)))


def test_a_prompts_last_step_admits_its_most_used_experts(rng: np.random.Generator) -> None:
    inputs = Inputs.make(rng, (ROWS, ROWS, 9))
    inputs.steps[0][0]["ids"][:] = [5, 3]  # missing, and no others have scores
    whole = run(interpreted(rng), inputs, [EXPERTS] * LAYERS, 0)
    done = run(interpreted(rng), inputs, [4, 2], 2, prompt_end=1)
    before, after = done.residents[1:]
    assert {3, 5} & set(np.flatnonzero(~before[0])) and after[0][[3, 5]].all()
    assert after.sum(axis=1).tolist() == [4, 2]
    for got, want in zip(done.outputs, whole.outputs, strict=True):
        np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
    copied = [counters[2] for counters in done.counters]
    replaced = int((before & ~after).sum())
    assert copied[1] - copied[0] == int((~before).sum()) + replaced
    assert copied[2] - copied[1] == int((~after).sum())
    ids = [layer["ids"] for layer in inputs.steps[1]]
    hits = sum(int(table[i].sum()) for table, i in zip(before & after, ids, strict=True))
    assert done.counters[1][0] - done.counters[0][0] == hits, "a copied expert is a miss"
    assert verify(done.runner.ops, done.runner.cache, inputs.packed, 1000, 0) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("staged", [1, 7, 40])
def test_copies_run_beside_computation_on_a_gpu(
    bits: int, staged: int, rng: np.random.Generator, gpu: GpuOps
) -> None:
    """Copies and launches of many layers and steps overlap; bits are equal if all are ordered."""
    shape = Shape(6, 40, 4, ExpertLayout(bits, 1024, 512), 400)
    inputs = Inputs.make(rng, (400, 129, 257, 10, 400, 1, 3), shape)
    whole = run(gpu, inputs, [shape.experts] * shape.layers, 0)
    for is_empty in (False, True):
        compare(run(gpu, inputs, [12, 20] * 3, staged, is_empty), whole, inputs, 5)


def test_streamed_uses_count_like_steps_of_a_token_each(rng: np.random.Generator) -> None:
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


def test_steps_of_few_tokens_and_other_layouts_are_not_streamed(rng: np.random.Generator) -> None:
    vram = 32 << 30
    assert staging_experts(LAYOUT, 256, STREAM_MIN_TOKENS, vram, 99) == 0
    assert staging_experts(ExpertLayout(16, 136, 128), 256, 512, vram, 99) == 0
    assert staging_experts(ExpertLayout(4, 64, 64), 256, 512, vram, 99) == 0
    big = ExpertLayout(4, 3072, 1024)
    assert staging_experts(big, 256, 512, vram, 138) == vram // 200 // big.nbytes
    assert staging_experts(big, 256, 512, 1 << 30, 138) == 8
    assert staging_experts(LAYOUT, 256, 512, vram, 99) == 99, "no more than are missing"
    assert staging_experts(LAYOUT, 256, 512, vram, 3) == 8
    assert staging_experts(LAYOUT, 6, 512, vram, 3) == 6
    runner = run(interpreted(rng), Inputs.make(rng, (2,)), [4, 2], 2).runner
    assert not runner.is_streamed(8) and runner.is_streamed(9)
    runner = run(ReferenceOps(), Inputs.make(rng, (9,)), [4, 2], 2).runner
    assert not runner.is_streamed(ROWS), "the CPU backend computes token by token"


def test_the_planned_bytes_of_streaming_are_the_bytes_allocated(rng: np.random.Generator) -> None:
    for staged in (1, 4, EXPERTS):
        runner = run(interpreted(rng), Inputs.make(rng, (1,)), [4, 2], staged).runner
        streamer, grouped = runner.streamer, runner.grouped
        assert streamer is not None and grouped is not None
        arrays: list[Any] = [grouped.pair_out, *vars(grouped.groups).values()]
        arrays += [x for x in vars(runner.inner).values() if hasattr(x, "nbytes")]
        arrays += vars(runner.assignment).values()
        most = expert_runner_bytes(ROWS, EXPERTS, EXPERTS, TOP_K, LAYOUT, gpu=True)
        assert 0.9 * most < sum(array.nbytes for array in arrays) <= most
        nbytes = streamer.staging.nbytes + streamer.part_slots.nbytes
        assert staging_bytes(LAYOUT, LAYERS, EXPERTS, staged) == nbytes
    assert staging_bytes(LAYOUT, LAYERS, EXPERTS, 0) == 0


def test_a_failed_step_leaves_no_expert_in_a_slot_that_was_not_copied(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 1 fails after the tables of all layers have been stored; the slots are empty then."""
    inputs, ops = Inputs.make(rng, (ROWS,)), interpreted(rng)
    runners: list[ExpertRunner] = []
    compute = ExpertStreamer.compute

    def fail_in_layer_1(streamer: ExpertStreamer, *args: Any) -> None:
        if args[-1] == 1:
            raise MemoryError("no room")
        compute(streamer, *args)

    def keep(runner: ExpertRunner, *args: Any) -> None:
        made(runner, *args)
        runners.append(runner)

    made = ExpertRunner.__init__
    monkeypatch.setattr(ExpertRunner, "__init__", keep)
    monkeypatch.setattr(ExpertStreamer, "compute", fail_in_layer_1)
    with pytest.raises(MemoryError, match="no room"):
        run(ops, inputs, [4, 4], 1, is_empty=True)
    assert not resident(ops, runners[0].cache).any()
