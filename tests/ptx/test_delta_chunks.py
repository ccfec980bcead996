"""The chunked delta rule's kernels: bits that depend on no cut, and columns of any scale."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from osmium.ops import StepInputs
from osmium.ops.gpu import GpuOps
from osmium.ops.reference import ReferenceOps
from osmium.ops.tiling import delta_chunk_words
from tests.ops.cases import CASES, TINY, allowed, compare, run
from tests.ptx.interpreter import InterpretedRuntime
from tests.tolerance import distance

F32 = npt.NDArray[np.float32]
DIM = 128


class Inputs(NamedTuple):
    """One sequence of one head: arrays of delta_rule_chunk."""

    qkv: F32
    decay: F32
    beta: F32
    state: F32


def inputs(rng: np.random.Generator, tokens: int) -> Inputs:
    def f32(*shape: int) -> F32:
        return rng.standard_normal(shape, np.float32)

    decay = -np.exp(2 * f32(tokens, 1) - 3)
    return Inputs(f32(tokens, 3 * DIM), decay, rng.random((tokens, 1), np.float32), f32(DIM, DIM))


def rule(ops: Any, sequences: list[tuple[Inputs, int]]) -> list[tuple[F32, F32]]:
    """Output and new state of each sequence, from (inputs, context tokens), in one step."""
    lengths = [len(x.qkv) for x, _ in sequences]
    tokens, count = sum(lengths), len(sequences)
    starts = np.cumsum([0, *lengths])
    past = [context for _, context in sequences]
    i32 = [np.array(x, np.int32) for x in (starts, past, range(count))]
    rest: Any = ops.to_device(np.zeros(tokens, np.int32))
    where = [ops.to_device(x) for x in i32]
    step = StepInputs(tokens, count, 1, rest, rest, rest, where[0], where[1], where[2], rest)
    rows = [np.concatenate([x[i] for x, _ in sequences]) for i in range(3)]
    state = ops.to_device(np.stack([x.state for x, _ in sequences])[:, None])
    out = ops.to_device(np.full((tokens, 1, DIM), np.nan, np.float32))
    words = delta_chunk_words(tokens, 1, 1, DIM, DIM)
    scratch = ops.to_device(np.full(words, 0xFFFFFFFF, np.uint32))
    ops.delta_rule_chunk(out, *map(ops.to_device, rows), state, step, scratch)
    outs = np.split(ops.copy_d2h(out)[:, 0], starts[1:-1])
    return list(zip(outs, ops.copy_d2h(state)[:, 0], strict=True))


def gpu() -> GpuOps:
    return GpuOps(InterpretedRuntime())


def test_a_sequence_cut_at_multiples_of_64_has_the_same_bits(rng: np.random.Generator) -> None:
    past, whole = 50, inputs(rng, 110)
    out, state = rule(gpu(), [(whole, past)])[0]
    pieces, carried = [], whole.state
    for start, end in ((0, 14), (14, 78), (78, 110)):  # positions 64 and 128
        part = slice(start, end)
        piece = Inputs(whole.qkv[part], whole.decay[part], whole.beta[part], carried)
        made, carried = rule(gpu(), [(piece, past + start)])[0]
        pieces.append(made)
    assert np.concatenate(pieces).tobytes() == out.tobytes()
    assert carried.tobytes() == state.tobytes()


def test_a_sequence_has_the_same_bits_beside_others(rng: np.random.Generator) -> None:
    one = (inputs(rng, 40), 30)
    others = [(inputs(rng, tokens), past) for tokens, past in ((3, 0), (1, 63), (17, 60))]
    alone = rule(gpu(), [one])[0]
    beside = rule(gpu(), [*others, one])[3]
    for found, wanted in zip(beside, alone, strict=True):
        assert found.tobytes() == wanted.tobytes()


def test_each_column_is_precise_at_its_own_scale(rng: np.random.Generator) -> None:
    """Columns of values and of the state from 1e-12 to 1e12, beyond f16's range, and zeros."""
    made = inputs(rng, 70)
    scale = np.float32(10) ** rng.uniform(-9, 9, DIM).astype(np.float32)
    scale[:5] = 0
    made.qkv[:, 2 * DIM :] *= scale
    made.state[...] *= scale
    wanted = rule(ReferenceOps(), [(made, 64)])[0]
    found = rule(gpu(), [(made, 64)])[0]
    for name, x, y in zip(("out", "state"), found, wanted, strict=True):
        for column in range(DIM):
            assert distance(x[:, column], y[:, column]) < 1e-5, (name, column)


def test_a_column_may_grow_from_zero_and_be_forgotten(rng: np.random.Generator) -> None:
    """A gate near exp(-200) clears the state; large values come next, then none."""
    made = inputs(rng, 192)
    made.decay[[70, 128]] = -200
    made.qkv[64:128, 2 * DIM :] *= np.float32(1e6)
    made.qkv[128:, 2 * DIM :] = 0
    wanted, found = (rule(ops, [(made, 0)])[0] for ops in (ReferenceOps(), gpu()))
    for part in (slice(0, 64), slice(64, 128)):
        assert distance(found[0][part], wanted[0][part]) < 1e-5
    assert max(np.abs(found[0][128:]).max(), np.abs(found[1]).max()) < 1e-25


def test_prefill_of_two_rows_uses_the_chunked_rule(rng: np.random.Generator) -> None:
    """So its bits are those of the same rows in a longer step."""

    class Counting(GpuOps):
        calls = 0

        def delta_rule_chunk(self, *arguments: Any) -> None:
            self.calls += 1
            super().delta_rule_chunk(*arguments)

    size = replace(TINY, key_dim=DIM, value_dim=DIM, lengths=(2, 1), past=(63, 0))
    seed, ops = int(rng.integers(1 << 32)), Counting(InterpretedRuntime())
    wanted = run(CASES["delta_net"](np.random.default_rng(seed), size), ReferenceOps(cache_bytes=0))
    case = CASES["delta_net"](np.random.default_rng(seed), size)
    found = run(case, ops)
    assert ops.calls == 1
    for name, kind in case.writes.items():
        assert compare(found[name], wanted[name], kind) <= allowed(kind), name
