"""The cases that tools/gpu_report runs beside those of CASES: every ragged one."""

from collections.abc import Callable

import numpy as np

from tests.ops.cases import Case
from tests.ptx import cases_attention, cases_grouped, cases_linear, cases_prefill, cases_weights

__all__ = ["LARGE", "LONG", "RAGGED"]

Make = Callable[[np.random.Generator], Case]

RAGGED: dict[str, Make] = {
    **cases_linear.CASES,
    **cases_attention.CASES,
    **cases_weights.CASES,
    **cases_grouped.CASES,
    **cases_prefill.CASES,
}
"""Small cases, which the interpreter runs too."""

LARGE: dict[str, Make] = {
    **cases_weights.LARGE,
    **cases_grouped.LARGE,
    **cases_prefill.LARGE,
}
"""Cases for a GPU."""

LONG: dict[str, Make] = cases_attention.LONG
"""Cases for a GPU whose reference takes long."""
