"""ExpertRunner on interpreted kernels, with uneven slots per layer.

Slots, tables, counters and outputs equal the reference; every slot holds its packed expert.
"""

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
from tests.ops.cases import new_rows, normed_rows, packed_experts
from tests.ptx.interpreter import InterpretedRuntime
from tests.tolerance import close

LAYERS, EXPERTS, TOP_K, SHARED = 3, 9, 2, 64


def steps(
    ops: Ops,
    layout: ExpertLayout,
    slots_per_layer: list[int],
    counts: tuple[int, ...],
    seed: int,
    with_prefetch: bool,
) -> tuple[list[npt.NDArray[Any]], list[npt.NDArray[Any]]]:
    """The output of every layer and step, and the final tables and counters.

    With prefetch some predictions are right; the last step's first, of one row, is wrong.
    """
    rng, hidden = np.random.default_rng(seed), layout.hidden
    packed = np.stack([packed_experts(rng, layout, EXPERTS) for _ in range(LAYERS)])
    host = ops.empty_mapped(packed.shape, np.uint8)
    ops.host_view(host)[...] = packed
    host_experts = HostExperts(layout, host)
    cache = make_cache(ops, host_experts, sum(slots_per_layer) // LAYERS, TOP_K, slots_per_layer)
    prefetch = make_prefetch_state(ops, LAYERS, EXPERTS, TOP_K) if with_prefetch else None
    store = ExpertRunner(ops, host_experts, cache, max(counts), TOP_K, prefetch)
    up, down = (
        (rng.standard_normal(shape) * shape[1] ** -0.5).astype(np.float32)
        for shape in ((2 * SHARED, hidden), (hidden, SHARED))
    )

    def matrix(w: npt.NDArray[np.float32]) -> LinearWeight:
        rows, columns = w.shape
        if layout.bits == 16:
            return LinearWeight("bf16", rows, columns, ops.to_device(bf16_from_f32(w)))
        data, scale = int8.quantize(w)
        return LinearWeight("int8", rows, columns, ops.to_device(data), ops.to_device(scale))

    shared = SharedExpert(matrix(up), matrix(down), gate_column=0)
    norm, outputs = ops.to_device(rng.standard_normal(hidden, np.float32)), []
    for number, tokens in enumerate(counts, 1):
        routed = [
            np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)])
            for _ in range(LAYERS + 1)
        ]
        with store.step(tokens):
            for layer, ids in enumerate(routed[:-1]):
                predicted = np.where(rng.random(ids.shape) < 0.6, routed[layer + 1], ids)
                if layer == 0 and number == len(counts):
                    absent = np.flatnonzero(ops.copy_d2h(cache.expert_to_slot)[layer + 1] < 0)
                    predicted[:] = np.setdiff1d(absent, routed[layer + 1])[:TOP_K]
                weights = rng.random(ids.shape, np.float32)
                if prefetch is not None:
                    ops.copy_h2d(prefetch.ids[:tokens], predicted.astype(np.uint16))
                    ops.copy_h2d(prefetch.weights[:tokens], weights)
                x = ops.to_device(rng.standard_normal((tokens, hidden), np.float32))
                both, shared_out, y = (
                    ops.empty((tokens, n), np.float32) for n in (2 * SHARED, hidden, hidden)
                )
                store.forward(
                    x, normed_rows(ops, x, norm), ops.to_device(ids.astype(np.uint16)),
                    ops.to_device(rng.random((tokens, TOP_K), np.float32)), layer, shared,
                    ops.to_device(rng.standard_normal((tokens, 1), np.float32)),
                    new_rows(ops, tokens, SHARED), both, shared_out, y, norm,
                )  # fmt: skip
                outputs.append(np.array(ops.copy_d2h(x)))
    assert verify(ops, cache, packed, 1000, 0) > LAYERS
    tables = [cache.expert_to_slot, *cache.slot_to_expert, cache.last_used, cache.counters[:6]]
    if prefetch is not None:
        tables += [prefetch.expert, prefetch.slot, prefetch.start_signal]
        _, _, _, _, packed, right, pieces = ops.copy_d2h(cache.counters)
        assert packed > right > 0
        # the reference learns of a step's prefetch after it
        assert (pieces > 0) == isinstance(ops, GpuOps)
    return outputs, [np.array(ops.copy_d2h(table)) for table in tables]


@pytest.mark.parametrize(
    ("layout", "with_prefetch"),
    [
        (ExpertLayout(16, 32, 16), True),
        (ExpertLayout(4, 128, 128), True),
        (ExpertLayout(4, 128, 128), False),
    ],
    ids=["bf16, prefetch", "int4, prefetch", "int4"],
)
def test_interpreted_kernels_equal_the_reference_with_uneven_layers(
    rng: np.random.Generator, layout: ExpertLayout, with_prefetch: bool
) -> None:
    seed, slots_per_layer, counts = int(rng.integers(1 << 32)), [4, 4, 7], (1, 2, 3, *[1] * 4)
    arguments = (layout, slots_per_layer, counts, seed)
    wanted, tables = steps(ReferenceOps(cache_bytes=0), *arguments, with_prefetch)
    found, found_tables = steps(GpuOps(InterpretedRuntime(seed)), *arguments, with_prefetch)
    for got, want in zip(found_tables, tables, strict=True):
        np.testing.assert_array_equal(got, want)
    for got, want in zip(found, wanted, strict=True):
        assert close(got, want, "rows")
    if with_prefetch:  # prefetch changes residency and nothing else
        for got, want in zip(
            wanted, steps(ReferenceOps(cache_bytes=0), *arguments, False)[0], strict=True
        ):
            np.testing.assert_array_equal(got, want)
