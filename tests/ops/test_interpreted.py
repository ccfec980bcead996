"""Every hand-written kernel, through the product's own GpuOps, in the interpreter, against its
reference operation: one case an operation, and the ragged ones of each kernel's author."""

from collections.abc import Callable

import numpy as np
import pytest

from osmium.kernels import ptx
from osmium.ops.gpu import GpuOps
from osmium.ops.reference import ReferenceOps
from tests.ops.cases import CASES, TINY, Case, allowed, compare, run, sized
from tests.ptx import cases_attention, cases_linear, cases_weights
from tests.ptx.interpreter import InterpretedRuntime

ALL: dict[str, Callable[[np.random.Generator], Case]] = {
    **{name: sized(name, TINY) for name in CASES},
    **cases_linear.CASES,
    **cases_attention.CASES,
    **cases_weights.CASES,
}


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch is held to its kernel's contract: shapes, dtypes, alignment, rules."""
    monkeypatch.setattr(ptx, "CHECK", True)


@pytest.mark.parametrize("name", ALL)
def test_a_kernel_computes_its_reference_operation(rng: np.random.Generator, name: str) -> None:
    seed = int(rng.integers(1 << 32))
    case = ALL[name](np.random.default_rng(seed))
    wanted = run(ALL[name](np.random.default_rng(seed)), ReferenceOps(cache_bytes=0))
    found = run(case, GpuOps(InterpretedRuntime(seed)))
    for output, kind in case.writes.items():
        assert compare(found[output], wanted[output], kind) <= allowed(kind), output


EARLY = ("router", "rope_append", "shared context", "gated rule", "norm")
"""Cases in which nothing is missing between what is written and who takes it for older than that,
as the experts take their rows."""


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith(EARLY)])
def test_a_kernel_that_starts_early_waits_for_what_it_reads(
    rng: np.random.Generator, name: str
) -> None:
    seed = int(rng.integers(1 << 32))
    run(ALL[name](np.random.default_rng(seed)), GpuOps(InterpretedRuntime(seed, early=True)))


@pytest.mark.parametrize(
    "name",
    [
        "norm",
        "router",
        "attention",
        "shared context 96, across tiles",
        "shared context fp8 256, short rows",
        "delta_rule_chunk",
        "linear int4",
        "delta_net 64x96, a row in one turn",
    ],
)
def test_the_order_of_warps_changes_no_bit(rng: np.random.Generator, name: str) -> None:
    seed = int(rng.integers(1 << 32))
    first, second = (
        run(ALL[name](np.random.default_rng(seed)), GpuOps(InterpretedRuntime(order)))
        for order in (1, 2)
    )
    assert all(first[output].tobytes() == second[output].tobytes() for output in first)
