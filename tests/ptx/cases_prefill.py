"""Cases of the prefill kernels: 31, 33 and 65 rows, empty experts, borders, outlier channels.

The other modules of cases have more of them; these fill what they leave out.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.ops.cases import Case
from tests.ptx.cases_attention import conv, rope
from tests.ptx.cases_grouped import parts, uses
from tests.ptx.cases_linear import experts, fused

__all__ = ["CASES", "LARGE", "OUTLIER", "OUTLIER_CHANNELS"]

Make = Callable[[np.random.Generator], Case]

OUTLIER, OUTLIER_CHANNELS = np.float32(100), 6
"""Factor and number of channels that are much larger than the others, as in trained models."""


def add_outliers(rng: np.random.Generator, x: npt.NDArray[Any]) -> None:
    """Multiply some channels of x [T, K]."""
    x[:, rng.permutation(x.shape[1])[:OUTLIER_CHANNELS]] *= OUTLIER


def outliers(make: Make) -> Make:
    """The same case with outlier channels in x."""

    def with_outliers(rng: np.random.Generator) -> Case:
        case = make(rng)
        x = case.arrays["x"].copy()
        add_outliers(rng, x)
        return replace(case, arrays=case.arrays | {"x": x})

    return with_outliers


CASES: dict[str, Make] = {
    "int4_gemm 33x16x256": fused("int4", 33, 16, 256),
    "int8_gemm 31x16x256": fused("int8", 31, 16, 256),
    "int4_gemm of 65 rows with outliers": outliers(fused("int4", 65, 16, 384)),
    "int8_gemm of 33 rows with outliers": outliers(fused("int8", 33, 16, 384)),
    "bf16_gemm 31x16x96": fused("bf16", 31, 16, 96),
    "bf16_gemm of 65 rows with outliers": outliers(fused("bf16", 65, 264, 128)),
    "bf16_gemm of 33 rows with outliers": outliers(fused("bf16", 33, 264, 64)),
    "int4_moe_gemm 31 tokens": experts(4, 31, 2, 128, 128),
    "int4_moe_gemm 33 tokens with outliers": outliers(experts(4, 33, 1, 256, 128)),
    "int8_moe_gemm 33 tokens": experts(8, 33, 2, 128, 128),
    "int8_moe_gemm 31 tokens with outliers": outliers(experts(8, 31, 1, 256, 128)),
    "expert_part of 31 tokens, empty experts": parts(4, 31, 2, 5, 256, 128, 2, "some"),
    "expert_part of 33 tokens, empty experts, int8": parts(8, 33, 2, 7, 256, 128, 3, "some"),
    "expert_part of 65 tokens of one expert": parts(4, 65, 1, 3, 256, 128, 1, "one"),
    "expert_part of 31 tokens with outliers": outliers(parts(4, 31, 1, 3, 256, 128, 2)),
    "expert_part of 9 tokens with outliers, int8": outliers(parts(8, 9, 2, 3, 256, 128, 2)),
    "expert_part of 33 tokens with outliers, bf16": outliers(parts(16, 33, 2, 5, 96, 160, 2)),
    "count_uses of 31 tokens": uses(31, 3, 9),
    "count_uses of 33 tokens of one expert": uses(33, 1, 4, "one"),
    "causal_conv1d of 31, 33 and 65 rows": conv((1, 1), (32, 32), (31, 33, 65), (0, 2, 64)),
    "rope_append of 31 and 33 rows across pages": rope(64, 16, 2, 1, (31, 33), (3, 5)),
    "rope_append fp8 of 65 rows across pages": rope(128, 32, 2, 1, (65,), (63,), "fp8"),
}

LARGE: dict[str, Make] = {
    "int4_gemm of 300 rows with outliers": outliers(fused("int4", 300, 1024, 3072)),
    "int8_gemm of 300 rows with outliers": outliers(fused("int8", 300, 1024, 3072)),
    "expert_part of 300 tokens with outliers": outliers(parts(4, 300, 4, 40, 3072, 1024, 7)),
    "expert_part of 300 tokens with outliers, int8": outliers(parts(8, 300, 4, 40, 2048, 512, 20)),
}
"""Cases for a GPU."""
