"""Seeded models with outlier channels, and matrices in the formats of prefill.

Mixers and experts are INT4 or INT8 in groups of 128, so that the kernels for many tokens take them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from osmium.config import ModelConfig
from osmium.experts.runner import ExpertRunner
from osmium.ops import Array, LinearWeight, Ops
from osmium.quant import int4, int8
from osmium.quant.floats import bf16_from_f32, f32_from_bf16
from tests.models.build import (
    Case,
    hf_config,
    hf_tensors,
    packed_experts_of,
    prompt,
    weights_of,
)
from tests.models.run import Logits, SequenceDriver
from tests.ptx.cases_prefill import OUTLIER, OUTLIER_CHANNELS

__all__ = [
    "LARGE", "LIMITS", "SMALL", "Outliers", "RecordingRunner", "logits_and_experts",
    "outlier_model", "prefill_against_decode",
]  # fmt: skip

Outliers = Literal["none", "residual", "norm"]

SMALL = Case("outliers", 11, 128, "da", (2, 1, 128), 0.25, (1, 1, 128, 128), (3, 2, 128), 128,
             False, 11, vocab=64)  # fmt: skip
"""For the interpreter."""

LARGE = Case("outliers", 12, 512, "ddadda", (8, 2, 256), 0.25, (2, 4, 128, 128), (16, 4, 256), 256,
             False, 300, vocab=512)  # fmt: skip
"""For a GPU."""

LIMITS: dict[tuple[Outliers, str], float] = {
    ("none", "bf16"): 5e-4,
    ("residual", "bf16"): 5e-4,
    ("residual", "fp8_e4m3"): 5e-4,
    # a digit is 1 / 32639 of the largest of 128 inputs: 1e-4 of a matrix's output in every layer
    ("norm", "bf16"): 1e-3,
    ("norm", "fp8_e4m3"): 1e-3,
    # keys and values near a rounding tie of e4m3, which the two paths round differently
    ("none", "fp8_e4m3"): 2e-3,
}
"""Largest median distance of a token's logits, prefill against decode, by outliers and KV dtype."""

QUANTISED = {
    "qgkv": 4, "attention_out": 4, "qkvz": 4, "delta_out": 4, "shared_up": 8, "shared_down": 8,
}  # fmt: skip
"""Bits of the matrices of a layer; router and decay stay bf16."""


def outlier_model(
    case: Case, ops: Ops, bits: int, kv_dtype: str, outliers: Outliers
) -> SequenceDriver:
    """A model with experts of `bits` bits, some of whose channels are OUTLIER times as large.

    Those of the residual stream, from the embedding on, or of each norm's output.  Routing and
    decay then read them with small weights, as in trained models: their exponentials would turn a
    relative error into a hundred times as much.
    """
    config, tensors = ModelConfig.from_hf(hf_config(case)), hf_tensors(case)
    channels = np.random.default_rng(case.seed).permutation(case.hidden)[:OUTLIER_CHANNELS]

    def scaled(w: npt.NDArray[np.uint16], factor: np.float32) -> npt.NDArray[np.uint16]:
        wide = f32_from_bf16(w)
        wide[:, channels] *= factor
        return bf16_from_f32(wide)

    weights: dict[str, Any] = weights_of(config, tensors)
    for name, value in weights.items():
        part = name.rpartition(".")[2]
        if name == "embed" and outliers == "residual":
            weights[name] = scaled(value, OUTLIER)
        elif part in ("mixer_norm", "moe_norm") and outliers == "norm":
            weights[name] = value.copy()
            weights[name][channels] = (1 + value[channels]) * OUTLIER - 1
        elif part in ("router", "ab") and outliers != "none":
            weights[name] = replace(value, data=scaled(value.data, 1 / OUTLIER))
        elif part in QUANTISED:
            weights[name] = quantised(value, QUANTISED[part])
    layout, experts = packed_experts_of(config, tensors, bits)
    return SequenceDriver(
        config, weights, layout, experts, ops, rows=max(9, case.prompt), page=16, kv_dtype=kv_dtype,
        sequences=1, context=case.prompt, store_type=RecordingRunner,
    )  # fmt: skip


def quantised(w: LinearWeight, bits: int) -> LinearWeight:
    """A bf16 matrix in INT4 or INT8."""
    wide: npt.NDArray[np.float32] = f32_from_bf16(w.data)
    if bits == 8:
        rows, row_scale = int8.quantize(wide)
        return replace(w, format="int8", data=rows, scale=row_scale)
    packed, scale = int4.quantize(wide, 128)
    return replace(w, format="int4", data=packed, scale=scale, group=128)


class RecordingRunner(ExpertRunner):
    """Records the routed experts of every layer."""

    seen: list[npt.NDArray[Any]]

    def forward(self, x: Array, h: Any, ids: Array, *more: Any) -> None:
        self.seen.append(np.sort(self.ops.copy_d2h(ids), axis=1))
        super().forward(x, h, ids, *more)


def logits_and_experts(
    model: SequenceDriver, ids: npt.NDArray[np.int32], chunk: int
) -> tuple[Logits, npt.NDArray[Any]]:
    """Logits [T, vocab], and the sorted routed experts of every token and layer [T, L, A]."""
    assert isinstance(model.expert_runner, RecordingRunner)
    model.expert_runner.seen = []
    logits = model.logits(ids, chunk)
    seen, layers = model.expert_runner.seen, model.config.num_layers
    steps = [seen[at : at + layers] for at in range(0, len(seen), layers)]
    return logits, np.concatenate([np.stack(step, axis=1) for step in steps])


def prefill_against_decode(
    case: Case, make_ops: Callable[[], Ops], bits: int, kv_dtype: str, outliers: Outliers
) -> npt.NDArray[np.float64]:
    """||prefill - decode|| / ||decode|| of the logits of each token with the same routing.

    Asserts that nine of ten tokens have it.
    """
    model, ids = outlier_model(case, make_ops(), bits, kv_dtype, outliers), prompt(case)
    found, found_experts = logits_and_experts(model, ids, case.prompt)
    wanted, wanted_experts = logits_and_experts(model, ids, 1)
    agree = (found_experts == wanted_experts).all(axis=(1, 2))
    assert agree.mean() > 0.9, f"experts agree for {agree.mean():.0%} of the tokens"
    a, b = found[agree].astype(np.float64), wanted[agree].astype(np.float64)
    assert np.isfinite(a).all()
    errors: npt.NDArray[np.float64] = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
    return errors
