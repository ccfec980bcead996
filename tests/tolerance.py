"""Tolerances of the tests: relative norm ||out - ref|| / ||ref||, one row per format, with
reasons."""

from typing import Any

import numpy as np
import numpy.typing as npt

TOLERANCE = {
    "f32": 1e-5,  # sums of up to 16 k products in another order; approximate exp and rsqrt.
    "logprobs": 1e-5,  # a sum of up to 248,320 approximate exponentials, in f32 within a slice.
    "rows": 3e-5,  # f32 as two bf16, each value exact to 2^-17; short sums with cancellation.
    "digits": 2e-4,  # x as 16 bits of the largest of 128 inputs; 1e-4 with outliers of 100 times.
    "expert digits": 5e-4,  # both matrices of an expert read digits.
    "f16 attention": 1e-3,  # q and softmax weights rounded to f16; up to 5e-4 at scores of 2.
    "bf16": 5e-3,  # one rounding to 8 bits of mantissa: at worst 2^-9, 1.7e-3 in the norm.
    "e4m3": 1e-2,  # a few values, and one scale of 2^-11, on the other side of a rounding tie.
    "e4m3 values": 4e-2,  # one rounding to 4 bits of mantissa: at worst 2^-4, 2.6e-2 in the norm.
    "int4": 5e-3,  # exact weights; allows for f16 or bf16 activations.
    "logits": 1e-4,  # float32 through all layers, against transformers in float32.
    "gpu_logits": 2e-2,  # bf16 KV through all layers; median over tokens of equal expert sets.
}


def distance(out: npt.NDArray[Any], ref: npt.NDArray[Any]) -> float:
    """||out - ref|| / ||ref|| in float64; NaN anywhere in `out` gives infinity."""
    a, b = np.asarray(out, np.float64), np.asarray(ref, np.float64)
    assert a.shape == b.shape, f"shapes differ: {a.shape} and {b.shape}"
    if not np.isfinite(a).all():
        return float("inf")
    norm = float(np.linalg.norm(b))
    return float(np.linalg.norm(a - b)) / norm if norm else float(np.linalg.norm(a))


def close(out: npt.NDArray[Any], ref: npt.NDArray[Any], kind: str) -> bool:
    """Whether `out` is within the table's row `kind` of `ref`."""
    return distance(out, ref) <= TOLERANCE[kind]
