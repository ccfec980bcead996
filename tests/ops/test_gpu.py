"""Every operation on a GPU against its reference: the interpreter's cases, and larger ones."""

from collections.abc import Callable

import numpy as np
import pytest

from osmium.ops.gpu import GpuOps
from osmium.ops.reference import ReferenceOps
from tests.ops.cases import CASES, DECODE, LAB, TINY, Case, allowed, compare, run, sized
from tests.ptx import cases_attention, cases_linear, cases_making

pytestmark = pytest.mark.gpu

ALL: dict[str, Callable[[np.random.Generator], Case]] = {
    **{name: sized(name, TINY) for name in CASES},
    **{f"{name}, lab": sized(name, LAB) for name in CASES},
    **{f"{name}, 122b": sized(name, DECODE) for name in CASES},
    **cases_linear.CASES,
    **cases_attention.CASES,
    **cases_making.CASES,
    **cases_making.LARGE,
    **cases_attention.LONG,
}


@pytest.mark.parametrize("name", ALL)
def test_a_kernel_computes_its_reference_operation(
    rng: np.random.Generator, gpu: GpuOps, name: str
) -> None:
    seed = int(rng.integers(1 << 32))
    case = ALL[name](np.random.default_rng(seed))
    wanted = run(ALL[name](np.random.default_rng(seed)), ReferenceOps(keep=0))
    found = run(case, gpu)
    again = run(case, gpu)
    for output, kind in case.writes.items():
        assert compare(found[output], wanted[output], kind) <= allowed(kind), output
        assert found[output].tobytes() == again[output].tobytes(), f"{output}: other bits"


def test_place_agrees_with_the_reference_over_many_calls(
    rng: np.random.Generator, gpu: GpuOps
) -> None:
    for seed in rng.integers(1 << 32, size=200):
        case = CASES["place"](np.random.default_rng(seed), LAB)
        wanted = run(CASES["place"](np.random.default_rng(seed), LAB), ReferenceOps())
        found = run(case, gpu)
        for output, kind in case.writes.items():
            assert compare(found[output], wanted[output], kind) <= allowed(kind), (seed, output)
