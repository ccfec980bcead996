"""The store on kernels, in the PTX interpreter, with other numbers of slots in each layer: the same
experts in the same slots as on the reference, the records' own bytes there, the same output."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.experts.cache import make_cache, verify
from osmium.experts.prefetch import make_prefetch_state
from osmium.experts.runner import ExpertRunner
from osmium.ops import HostExperts, LinearWeight, Ops, SharedExpert
from osmium.ops.gpu import GpuOps
from osmium.ops.reference import ReferenceOps
from osmium.quant import int8
from osmium.quant.expert_layout import ExpertLayout
from osmium.quant.floats import bf16_from_f32
from tests.ops.cases import new_rows, normed_rows, records
from tests.ptx.interpreter import InterpretedRuntime
from tests.tolerance import close

LAYERS, EXPERTS, TOP_K, SHARED = 3, 9, 2, 64


def steps(
    ops: Ops,
    record: ExpertLayout,
    each: list[int],
    counts: tuple[int, ...],
    seed: int,
    guessed: bool,
) -> tuple[list[npt.NDArray[Any]], list[npt.NDArray[Any]]]:
    """What every call of `mlp` made of x, and the tables and counters at the end; with guesses,
    of which some are right, and the last step's first, of a step of one row, is wrong."""
    rng, hidden = np.random.default_rng(seed), record.hidden
    made = np.stack([records(rng, record, EXPERTS) for _ in range(LAYERS)])
    host = ops.empty_mapped(made.shape, np.uint8)
    ops.host_view(host)[...] = made
    arena = HostExperts(record, host)
    cache = make_cache(ops, arena, sum(each) // LAYERS, TOP_K, each)
    guess = make_prefetch_state(ops, LAYERS, EXPERTS, TOP_K) if guessed else None
    store = ExpertRunner(ops, arena, cache, max(counts), TOP_K, guess)
    up, down = (
        (rng.standard_normal(shape) * shape[1] ** -0.5).astype(np.float32)
        for shape in ((2 * SHARED, hidden), (hidden, SHARED))
    )

    def matrix(w: npt.NDArray[np.float32]) -> LinearWeight:
        rows, columns = w.shape
        if record.bits == 16:
            return LinearWeight("bf16", rows, columns, ops.to_device(bf16_from_f32(w)))
        data, scale = int8.quantize(w)
        return LinearWeight("int8", rows, columns, ops.to_device(data), ops.to_device(scale))

    shared = SharedExpert(matrix(up), matrix(down), column=0)
    norm, outputs = ops.to_device(rng.standard_normal(hidden, np.float32)), []
    for number, tokens in enumerate(counts, 1):
        chosen = [
            np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)])
            for _ in range(LAYERS + 1)
        ]
        with store.step(tokens):
            for layer, ids in enumerate(chosen[:-1]):
                likely = np.where(rng.random(ids.shape) < 0.6, chosen[layer + 1], ids)
                if layer == 0 and number == len(counts):
                    absent = np.flatnonzero(ops.copy_d2h(cache.expert_to_slot)[layer + 1] < 0)
                    likely[:] = np.setdiff1d(absent, chosen[layer + 1])[:TOP_K]
                weights = rng.random(ids.shape, np.float32)
                if guess is not None:
                    ops.copy_h2d(guess.ids[:tokens], likely.astype(np.uint16))
                    ops.copy_h2d(guess.weights[:tokens], weights)
                x = ops.to_device(rng.standard_normal((tokens, hidden), np.float32))
                both, said, y = (
                    ops.empty((tokens, n), np.float32) for n in (2 * SHARED, hidden, hidden)
                )
                store.forward(
                    x, normed_rows(ops, x, norm), ops.to_device(ids.astype(np.uint16)),
                    ops.to_device(rng.random((tokens, TOP_K), np.float32)), layer, shared,
                    ops.to_device(rng.standard_normal((tokens, 1), np.float32)),
                    new_rows(ops, tokens, SHARED), both, said, y, norm,
                )  # fmt: skip
                outputs.append(np.array(ops.copy_d2h(x)))
    assert verify(ops, cache, made, 1000, 0) > LAYERS
    tables = [cache.expert_to_slot, *cache.slot_to_expert, cache.last_used, cache.counters[:6]]
    if guess is not None:
        tables += [guess.expert, guess.slot, guess.start_signal]
        _, _, _, _, made, right, pieces = ops.copy_d2h(cache.counters)
        assert made > right > 0
        # the reference is told of a step's guesses when that is over
        assert (pieces > 0) == isinstance(ops, GpuOps)
    return outputs, [np.array(ops.copy_d2h(table)) for table in tables]


@pytest.mark.parametrize(
    ("record", "guessed"),
    [
        (ExpertLayout(16, 32, 16), True),
        (ExpertLayout(4, 128, 128), True),
        (ExpertLayout(4, 128, 128), False),
    ],
    ids=["bf16, prefetch", "int4, prefetch", "int4"],
)
def test_layers_with_slots_of_their_own(
    rng: np.random.Generator, record: ExpertLayout, guessed: bool
) -> None:
    seed, each, counts = int(rng.integers(1 << 32)), [4, 4, 7], (1, 2, 3, *[1] * 4)
    how = (record, each, counts, seed)
    wanted, tables = steps(ReferenceOps(keep=0), *how, guessed)
    found, own = steps(GpuOps(InterpretedRuntime(seed)), *how, guessed)
    for mine, other in zip(own, tables, strict=True):
        np.testing.assert_array_equal(mine, other)
    for mine, other in zip(found, wanted, strict=True):
        assert close(mine, other, "rows")
    if guessed:  # guesses change where experts are, and nothing else
        for mine, other in zip(wanted, steps(ReferenceOps(keep=0), *how, False)[0], strict=True):
            np.testing.assert_array_equal(mine, other)
