"""Every hand-written kernel, run by GpuOps in the interpreter, against its reference operation.

One case per operation, and the ragged cases of every kernel.
"""

from collections.abc import Callable

import numpy as np
import pytest

from osmium.kernels import ptx
from osmium.ops.gpu import GpuOps
from osmium.ops.reference import ReferenceOps
from tests.ops.cases import CASES, TINY, Case, allowed, compare, run, sized
from tests.ops.report import RAGGED
from tests.ptx.interpreter import InterpretedRuntime

ALL: dict[str, Callable[[np.random.Generator], Case]] = {
    **{name: sized(name, TINY) for name in CASES},
    **RAGGED,
}


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check shapes, dtypes, alignment and rules of every launch against the kernel's contract."""
    monkeypatch.setattr(ptx, "CHECK", True)


@pytest.mark.parametrize("name", ALL)
def test_a_kernel_computes_its_reference_operation(rng: np.random.Generator, name: str) -> None:
    seed = int(rng.integers(1 << 32))
    case = ALL[name](np.random.default_rng(seed))
    wanted = run(ALL[name](np.random.default_rng(seed)), ReferenceOps(cache_bytes=0))
    found = run(case, GpuOps(InterpretedRuntime(seed)))
    for output, kind in case.writes.items():
        assert compare(found[output], wanted[output], kind) <= allowed(kind), output


PDL_CASES = ("router", "rope_append", "split kv", "rms_norm")
"""Cases in which a kernel waits for every earlier kernel whose output it reads.

Excluded are operations that rely on an earlier wait, like the experts for their input rows.
"""


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith(PDL_CASES)])
def test_a_kernel_with_pdl_waits_before_reading_earlier_results(
    rng: np.random.Generator, name: str
) -> None:
    seed = int(rng.integers(1 << 32))
    run(ALL[name](np.random.default_rng(seed)), GpuOps(InterpretedRuntime(seed, pdl=True)))


@pytest.mark.parametrize(
    "name",
    [
        "rms_norm",
        "router",
        "attention",
        "prefill attention bf16 128, 1 row beside 12",
        "prefill attention fp8 256, 1 row beside 12",
        "split kv 96, across tiles",
        "split kv fp8 256, short rows",
        "delta_rule_chunk",
        "linear int4",
        "delta_net 64x96, a row in one turn",
    ],
)
def test_the_order_of_warps_does_not_change_results(rng: np.random.Generator, name: str) -> None:
    seed = int(rng.integers(1 << 32))
    first, second = (
        run(ALL[name](np.random.default_rng(seed)), GpuOps(InterpretedRuntime(order)))
        for order in (1, 2)
    )
    assert all(first[output].tobytes() == second[output].tobytes() for output in first)
