"""One case per operation with new random inputs, for reference, interpreter and GPU.

A case makes NumPy arrays from a generator and a size, calls one method of an Ops, and names the
written arrays. `run` does that on any backend and returns outputs as NumPy.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from osmium.experts.cache import DECAY
from osmium.kernels.logit_histogram import BINS, SLICE
from osmium.ops import (
    AttentionWeights,
    AttentionWorkspace,
    DecodeState,
    DeltaNetWorkspace,
    DeltaWeights,
    ExpertCache,
    HostExperts,
    LinearWeight,
    MatmulInput,
    Ops,
    PagedKV,
    PrefetchState,
    SamplingControls,
    SharedExpert,
    SlotAssignment,
    StepInputs,
)
from osmium.ops.controls import MAX_LOGPROBS, PROMPT_BIT, mask_words
from osmium.ops.formulas import normed, rope
from osmium.ops.grouped import ExpertGroups, GroupedExperts
from osmium.ops.tiling import (
    MATVEC_MAX_TOKENS,
    SPLIT_KV_MAX_SEQS,
    delta_chunk_words,
    prefill_attention_tokens,
    supports_gemm,
    supports_grouped_experts,
)
from osmium.ops.types import ROUTER_BARRIER_SHAPE
from osmium.quant import int4, int8
from osmium.quant.expert_layout import ExpertLayout, group_of
from osmium.quant.floats import bf16_from_f32, f32_from_bf16, f32_from_e4m3, quantize_e4m3_rows

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Size:
    """Sizes of a case."""

    name: str
    lengths: tuple[int, ...]
    """Rows of each sequence of a step."""
    past: tuple[int, ...]
    """Context tokens before them."""
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    experts: int
    top_k: int
    inner: int
    outputs: int
    """Output rows of a matrix."""
    slots: int
    """Expert slots per layer."""
    page: int


TINY = Size("tiny", (5, 1, 3), (0, 4, 9), 64, 4, 2, 32, 8, 1, 2, 32, 32, 7, 2, 32, 37, 5, 4)
LAB = Size(
    "lab", (1, 150, 37), (300, 0, 11), 256, 4, 2, 64, 16, 4, 8, 64, 64, 32, 4, 64, 1000, 32, 16
)
DECODE = Size(
    "122b decode", (1,), (1000,), 3072, 32, 2, 256, 64, 16, 64, 128, 128, 64, 8, 1024, 4096, 24, 64
)
PREFILL = Size(
    "35b prefill", (61,), (130,), 2048, 16, 2, 256, 64, 16, 32, 128, 128, 64, 8, 512, 4099, 48, 64
)


@dataclass(frozen=True)
class Case:
    """One operation: its inputs, the call, and its outputs with their tolerance."""

    arrays: Arrays
    call: Callable[[Ops, dict[str, Any]], None]
    writes: dict[str, str] = field(default_factory=dict)
    """Array name to row of tests/tolerance.py, or "exact"."""


def run(case: Case, ops: Ops) -> Arrays:
    """Call the operation on `ops`; returns its outputs as NumPy arrays."""
    arrays = {name: ops.to_device(np.array(array)) for name, array in case.arrays.items()}
    case.call(ops, arrays)
    ops.synchronize()
    return {name: np.array(ops.copy_d2h(arrays[name])) for name in case.writes}


def _f32(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.float32]:
    return rng.standard_normal(shape, np.float32)


def _nan(*shape: int) -> npt.NDArray[np.float32]:
    return np.full(shape, np.nan, np.float32)


def matrix_tolerance(form: str, tokens: int, columns: int, group: int = 0, rows: int = 2) -> str:
    """Row of tests/tolerance.py for a matrix [rows, columns] that reads f32 as two bf16, or for
    many tokens and quantised weights as two digits."""
    weight = LinearWeight(form, rows, columns, None, None, group)  # type: ignore[arg-type]
    has_digits = tokens > MATVEC_MAX_TOKENS and form != "bf16" and supports_gemm(weight)
    return "digits" if has_digits else "rows"


def expert_tolerance(layout: ExpertLayout, tokens: int, num_experts: int, form: str) -> str:
    """Row of tests/tolerance.py for the experts of a layer and a shared one of size 64 or 128."""
    if tokens <= MATVEC_MAX_TOKENS:
        return "f32"
    has_digits = form == "int8" and layout.hidden % 128 == 0
    is_grouped = supports_grouped_experts(layout, num_experts)
    if has_digits or (is_grouped and layout.bits != 16):
        return "expert digits"
    return "rows" if is_grouped else "f32"


def rows_of(ops: Ops, x: Any) -> MatmulInput:
    """Matmul input [T, K] from an f32 array, not normalised."""
    result = new_rows(ops, x.shape[0], x.shape[1])
    ops.copy(result.f32, x)
    ops.prepare_input(result)
    return result


def normed_rows(ops: Ops, x: Any, w: Any, eps: float = 1e-6) -> MatmulInput:
    """The RMS norm of x [T, K] as matmul input."""
    result = new_rows(ops, x.shape[0], x.shape[1], eps)
    ops.rms_norm(result, x, w)
    return result


def new_rows(ops: Ops, tokens: int, width: int, eps: float | None = None) -> MatmulInput:
    """An unwritten matmul input: NaN in every format."""
    result = ops.empty_input(tokens, width, eps)
    for array in (result.f32, result.hi_lo, result.square_sums, result.digits, result.units):
        if array is not None:
            ops.memset(array, 0xFF)
    return result


def read_rows(ops: Ops, out: Any, rows: MatmulInput) -> None:
    """out = the rows in f32."""
    merged = getattr(ops, "merge_hi_lo", lambda rows: rows.f32)(rows)
    ops.copy(out.reshape(*merged.shape), merged)


def step_arrays(rng: np.random.Generator, size: Size) -> Arrays:
    """Arrays of a step, with a shuffled page table and shuffled state slots."""
    lengths, past = np.array(size.lengths), np.array(size.past)
    pages = -(-(lengths + past).max() // size.page)
    order = rng.permutation(len(lengths) * pages).astype(np.int32)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return {
        "positions": (np.arange(len(rows)) - starts[rows] + past[rows]).astype(np.int32),
        "sequence": rows.astype(np.int32),
        "starts": starts.astype(np.int32),
        "past": past.astype(np.int32),
        "slots": rng.permutation(len(lengths)).astype(np.int32),
        "pages": order.reshape(len(lengths), pages),
        "ids": rng.integers(0, 50, len(rows), dtype=np.int32),
    }


def _step(size: Size, a: dict[str, Any]) -> StepInputs:
    return StepInputs(
        sum(size.lengths), len(size.lengths), size.page, a["ids"], a["positions"], a["sequence"],
        a["starts"], a["past"], a["slots"], a["pages"],
        max(x + n for x, n in zip(size.past, size.lengths, strict=True)),
    )  # fmt: skip


# -- rows ------------------------------------------------------------------------------------------


def embed(rng: np.random.Generator, size: Size) -> Case:
    table = bf16_from_f32(_f32(rng, 50, size.hidden))
    ids = rng.integers(0, 50, sum(size.lengths), dtype=np.int32)
    arrays: Arrays = {"out": _nan(len(ids), size.hidden), "ids": ids, "table": table}
    return Case(arrays, lambda ops, a: ops.embed(a["out"], a["ids"], a["table"]), {"out": "exact"})


def gather_rows(rng: np.random.Generator, size: Size) -> Case:
    tokens = sum(size.lengths)
    rows = rng.integers(0, tokens, max(1, tokens // 2), dtype=np.int32)
    arrays: Arrays = {
        "out": _nan(len(rows), size.hidden),
        "x": _f32(rng, tokens, size.hidden),
        "rows": rows,
    }
    return Case(
        arrays, lambda ops, a: ops.gather_rows(a["out"], a["x"], a["rows"]), {"out": "exact"}
    )


def add(rng: np.random.Generator, size: Size) -> Case:
    shape = (sum(size.lengths), size.hidden)
    arrays: Arrays = {"out": _f32(rng, *shape), "x": _f32(rng, *shape)}
    return Case(arrays, lambda ops, a: ops.add(a["out"], a["x"]), {"out": "exact"})


def rms_norm(rng: np.random.Generator, size: Size) -> Case:
    shape = (sum(size.lengths), size.hidden)
    arrays: Arrays = {"out": _nan(*shape), "x": _f32(rng, *shape) * 3, "w": _f32(rng, size.hidden)}

    def call(ops: Ops, a: dict[str, Any]) -> None:
        read_rows(ops, a["out"], normed_rows(ops, a["x"], a["w"]))

    return Case(arrays, call, {"out": "f32"})


def prepare_input(rng: np.random.Generator, size: Size) -> Case:
    shape = (sum(size.lengths), size.hidden)
    arrays: Arrays = {"out": _nan(*shape), "x": _f32(rng, *shape)}

    def call(ops: Ops, a: dict[str, Any]) -> None:
        read_rows(ops, a["out"], rows_of(ops, a["x"]))

    return Case(arrays, call, {"out": "f32"})


def _linear(form: str) -> Callable[[np.random.Generator, Size], Case]:
    def make(rng: np.random.Generator, size: Size) -> Case:
        rows, columns, tokens = size.outputs, size.hidden, sum(size.lengths)
        w = _f32(rng, rows, columns) * np.float32(0.02)
        arrays: Arrays = {"out": _nan(tokens, rows), "x": _f32(rng, tokens, columns)}
        group = 0
        if form == "bf16":
            arrays["w"] = bf16_from_f32(w)
        elif form == "int8":
            arrays["w"], arrays["scale"] = int8.quantize(w)
        else:
            group = group_of(columns)
            w[0, :group] = 0
            arrays["w"], arrays["scale"] = int4.quantize(w, group)

        def call(ops: Ops, a: dict[str, Any]) -> None:
            matrix = LinearWeight(form, rows, columns, a["w"], a.get("scale"), group)  # type: ignore[arg-type]
            ops.linear(a["out"], rows_of(ops, a["x"]), matrix)

        has_digits = matrix_tolerance(form, tokens, columns, group, rows) == "digits"
        return Case(arrays, call, {"out": "digits" if has_digits else "f32"})

    return make


# -- attention -------------------------------------------------------------------------------------


def _pages(rng: np.random.Generator, size: Size, table: npt.NDArray[Any], kv_format: str) -> Arrays:
    """Keys and values in bf16, or in fp8 with every e4m3 but NaN."""
    shape = (table.size, size.page, size.kv_heads, size.head_dim)
    if kv_format == "bf16":
        return {name: bf16_from_f32(_f32(rng, *shape)) for name in ("k_pages", "v_pages")}
    result: Arrays = {}
    for name in "kv":
        code = rng.integers(0, 256, shape, dtype=np.uint8)
        result[f"{name}_pages"] = np.where(code & 0x7F == 0x7F, np.uint8(0x83), code)
        result[f"{name}_scales"] = rng.uniform(1e-3, 1e-2, shape[:3]).astype(np.float16)
    return result


def _kv(a: dict[str, Any]) -> PagedKV:
    return PagedKV(a["k_pages"], a["v_pages"], a.get("k_scales"), a.get("v_scales"))


def kept_rows(a: Arrays, name: str) -> npt.NDArray[np.float32]:
    """The pages of "k" or "v" in f32."""
    pages = a[f"{name}_pages"]
    if pages.dtype == np.uint16:
        return f32_from_bf16(pages)
    return f32_from_e4m3(pages) * a[f"{name}_scales"].astype(np.float32)[..., None]


def rope_append(rng: np.random.Generator, size: Size, kv_format: str = "bf16") -> Case:
    arrays = step_arrays(rng, size)
    tokens, heads, dim = sum(size.lengths), size.heads, size.head_dim
    arrays |= _pages(rng, size, arrays["pages"], kv_format)
    arrays |= {
        "q": _nan(tokens, heads, dim),
        "qgkv": _f32(rng, tokens, 2 * (heads + size.kv_heads) * dim),
        "norms": _f32(rng, 2, dim),
        "frequencies": _frequencies(size),
    }

    def call(ops: Ops, a: dict[str, Any]) -> None:
        ops.rope_append(
            a["q"], _kv(a), a["qgkv"], a["norms"], a["frequencies"], _step(size, a), 1e-6,
        )  # fmt: skip

    writes = {"q": "f32", "k_pages": "bf16 bits", "v_pages": "exact"}
    if kv_format == "fp8":
        writes |= {"k_pages": "e4m3 bits", "k_scales": "e4m3", "v_scales": "exact"}
        new = arrays["qgkv"].reshape(tokens, -1, dim)
        new[0, -1], new[-1, -1] = 0, new[-1, -1] * np.float32(1e-6)  # values of zero and tiny ones
        new[tokens // 2, -size.kv_heads] *= np.float32(1e9)  # and too large ones
    return Case(arrays, call, writes)


def attention(rng: np.random.Generator, size: Size, kv_format: str = "bf16") -> Case:
    arrays = step_arrays(rng, size)
    shape = (sum(size.lengths), size.heads, size.head_dim)
    arrays |= _pages(rng, size, arrays["pages"], kv_format)
    arrays |= {"out": _nan(*shape), "q": _f32(rng, *shape) * 2}
    arrays |= {
        "turns": np.zeros((shape[0], size.kv_heads), np.int32),
        "sums": _nan(shape[0], 2, size.heads, 2),
    }

    def call(ops: Ops, a: dict[str, Any]) -> None:
        step, scale = _step(size, a), size.head_dim**-0.5
        ops.attention(a["out"], a["q"], _kv(a), step, scale, a["turns"], a["sums"])

    has_f16 = kv_format == "fp8" and prefill_attention_tokens(
        arrays["q"], _kv(arrays), _step(size, arrays)
    )
    kind = "f16 attention" if has_f16 else "f32"
    return Case(arrays, call, {"out": kind, "turns": "exact"})


def gated_attention(rng: np.random.Generator, size: Size, kv_format: str = "bf16") -> Case:
    """One row per sequence, with contexts from one tile of 32 to several tiles per split."""
    more = 300 if size.hidden < 256 else 5000
    rows = min(3, len(size.past))
    one = replace(size, lengths=(1,) * rows, past=(*size.past[: rows - 1], size.past[0] + more))
    return shared_context(rng, one, 3 * rows + 1, kv_format)


def shared_context(
    rng: np.random.Generator, one: Size, num_partials: int, kv_format: str, turns: int = 1
) -> Case:
    """One row per sequence, with `room` partial results of split-KV blocks; runs `turns` times."""
    rows, hidden, width = len(one.past), one.hidden, one.heads * one.head_dim
    arrays, group = step_arrays(rng, one), group_of(width)
    arrays |= _pages(rng, one, arrays["pages"], kv_format)
    out = int4.quantize(_f32(rng, hidden, width) * np.float32(width**-0.5), group)
    arrays |= {
        "x": _f32(rng, rows, hidden) * np.float32(0.1),
        "h": _nan(rows, hidden),
        "scale": _f32(rng, hidden) * np.float32(0.1),
        "q": _nan(rows, one.heads, one.head_dim),
        "qgkv": _f32(rng, rows, 2 * (one.heads + one.kv_heads) * one.head_dim) * 4,
        "norms": _f32(rng, 2, one.head_dim) / 4,
        "frequencies": _frequencies(one),
        "out": out[0],
        "out_scale": out[1],
        "partial": _nan(num_partials, one.heads, one.head_dim + 2),
        "turns": np.zeros((rows, one.kv_heads), np.int32),
        "sums": _nan(rows, 2, one.heads, 2),
        "parts": np.zeros((SPLIT_KV_MAX_SEQS, one.heads, 8), np.int32),
    }
    _off_ties(rng, arrays, one, kv_format)

    def call(ops: Ops, a: dict[str, Any]) -> None:
        matrix = LinearWeight("int4", hidden, width, a["out"], a["out_scale"], group)
        normed_out, h = new_rows(ops, rows, width), new_rows(ops, rows, hidden, 1e-6)
        weights = AttentionWeights(
            a["norms"], a["frequencies"], matrix, 1e-6, one.head_dim**-0.5
        )  # fmt: skip
        workspace = AttentionWorkspace(
            a["q"], normed_out, a["partial"], a["turns"], a["sums"], a["parts"]
        )
        for _ in range(turns):
            ops.gated_attention(
                a["x"], h, a["scale"], a["qgkv"], weights, _kv(a), workspace, _step(one, a)
            )
        read_rows(ops, a["h"], h)

    pages = {name: "exact" for name in arrays if name.startswith(("k_", "v_"))}
    kind = matrix_tolerance("int4", rows, width, group, hidden)
    return Case(arrays, call, {"x": kind, "h": kind, "parts": "exact", **pages})


def _frequencies(size: Size) -> npt.NDArray[np.float32]:
    return (1e7 ** -(np.arange(0, size.rotary, 2) / size.rotary)).astype(np.float32)


def _off_ties(rng: np.random.Generator, a: Arrays, one: Size, kv_format: str) -> None:
    """Sample new keys until none is near a rounding tie, because kernels are exact to 2^-20.

    A key that rounds differently changes a short context's output by more than the tolerance.
    """
    new = a["qgkv"].reshape(len(one.past), -1, one.head_dim)
    keys = slice(2 * one.heads, 2 * one.heads + one.kv_heads)
    remaining = list(range(len(one.past)))
    while remaining:
        new[remaining, keys] = _f32(rng, len(remaining), one.kv_heads, one.head_dim) * 4
        angle = a["positions"][:, None, None].astype(np.float32) * a["frequencies"]
        k = rope(normed(new[:, keys], 1e-6) * (1 + a["norms"][1]), np.cos(angle), np.sin(angle))
        rounded = [_rounded(k * np.float32(1 + e) + d, kv_format) for e in NEAR for d in NEAR]
        remaining = [
            s for s in remaining if any((one[s] != rounded[0][s]).any() for one in rounded)
        ]


NEAR = (np.float32(-3e-6), np.float32(3e-6))


def _rounded(x: npt.NDArray[np.float32], kv_format: str) -> npt.NDArray[np.float32]:
    if kv_format == "bf16":
        return f32_from_bf16(bf16_from_f32(x))
    codes, scales = quantize_e4m3_rows(x)
    return f32_from_e4m3(codes) * scales.astype(np.float32)[..., None]


def sigmoid_gate(rng: np.random.Generator, size: Size) -> Case:
    tokens, heads, dim = sum(size.lengths), size.heads, size.head_dim
    arrays: Arrays = {
        "out": _f32(rng, tokens, heads, dim),
        "qgkv": _f32(rng, tokens, 2 * (heads + size.kv_heads) * dim) * 4,
    }
    return Case(arrays, lambda ops, a: ops.sigmoid_gate(a["out"], a["qgkv"]), {"out": "f32"})


# -- gated delta net -------------------------------------------------------------------------------


def _channels(size: Size) -> int:
    return 2 * size.key_heads * size.key_dim + size.value_heads * size.value_dim


def causal_conv1d(rng: np.random.Generator, size: Size) -> Case:
    arrays = step_arrays(rng, size)
    tokens, channels = sum(size.lengths), _channels(size)
    arrays |= {
        "out": _nan(tokens, channels),
        "u": _f32(rng, tokens, channels + size.value_heads * size.value_dim),
        "w": _f32(rng, channels, 4),
        "state": _f32(rng, len(size.lengths), channels, 4),
    }

    def call(ops: Ops, a: dict[str, Any]) -> None:
        ops.causal_conv1d(a["out"], a["u"], a["w"], a["state"], _step(size, a))

    return Case(arrays, call, {"out": "f32", "state": "exact"})


def delta_gates(rng: np.random.Generator, size: Size) -> Case:
    tokens, heads = sum(size.lengths), size.value_heads
    arrays: Arrays = {
        "decay": _nan(tokens, heads),
        "beta": _nan(tokens, heads),
        "ab": _f32(rng, tokens, 2 * heads) * 8,
        "a_log": _f32(rng, heads),
        "dt_bias": _f32(rng, heads),
    }

    def call(ops: Ops, a: dict[str, Any]) -> None:
        ops.delta_gates(a["decay"], a["beta"], a["ab"], a["a_log"], a["dt_bias"])

    return Case(arrays, call, {"decay": "f32", "beta": "f32"})


def _chunk_scratch(size: Size) -> Arrays:
    """Scratch of the chunked delta rule, where it takes the head sizes: NaN in every format."""
    heads = size.key_heads, size.value_heads, size.key_dim, size.value_dim
    words = delta_chunk_words(sum(size.lengths), *heads)
    return {"scratch": np.full(words, 0xFFFFFFFF, np.uint32)} if words else {}


def _delta(name: str) -> Callable[[np.random.Generator, Size], Case]:
    def make(rng: np.random.Generator, size: Size) -> Case:
        arrays = step_arrays(rng, size)
        tokens, heads = sum(size.lengths), size.value_heads
        decay = -np.exp(_f32(rng, tokens, heads) * 2 - 1)
        decay[rng.random(decay.shape) < 0.02] = -60  # decays to zero: no overflow either
        arrays |= {
            "out": _nan(tokens, heads, size.value_dim),
            "qkv": _f32(rng, tokens, _channels(size)),
            "decay": decay.astype(np.float32),
            "beta": rng.random((tokens, heads), np.float32),
            "state": _f32(rng, len(size.lengths), heads, size.key_dim, size.value_dim),
            **_chunk_scratch(size),
        }

        def call(ops: Ops, a: dict[str, Any]) -> None:
            arguments = (a["out"], a["qkv"], a["decay"], a["beta"], a["state"], _step(size, a))
            if name == "delta_rule_chunk":
                ops.delta_rule_chunk(*arguments, a.get("scratch"))
            else:
                ops.delta_rule_recurrent(*arguments)

        return Case(arrays, call, {"out": "f32", "state": "f32"})

    return make


def gated_rms_norm(rng: np.random.Generator, size: Size) -> Case:
    tokens, shape = sum(size.lengths), (size.value_heads, size.value_dim)
    channels = _channels(size)
    arrays: Arrays = {
        "out": _nan(tokens, *shape),
        "x": _f32(rng, tokens, *shape),
        "z": _f32(rng, tokens, channels + shape[0] * shape[1]) * 3,
        "w": _f32(rng, size.value_dim),
    }

    def call(ops: Ops, a: dict[str, Any]) -> None:
        ops.gated_rms_norm(a["out"], a["x"], a["z"], channels, a["w"], 1e-6)

    return Case(arrays, call, {"out": "f32"})


def _delta_net(chunks: bool) -> Callable[[np.random.Generator, Size], Case]:
    def make(rng: np.random.Generator, size: Size) -> Case:
        arrays = step_arrays(rng, size)
        tokens, channels, num_states = sum(size.lengths), _channels(size), len(size.lengths)
        heads, hidden, width = size.value_heads, size.hidden, size.value_heads * size.value_dim
        group = group_of(width)
        out = int4.quantize(_f32(rng, hidden, width) * np.float32(width**-0.5), group)
        arrays |= {
            "x": _f32(rng, tokens, hidden) * 3,
            "scale": _f32(rng, hidden) * np.float32(0.1),
            "u": _f32(rng, tokens, channels + width) * 2,
            "conv": _f32(rng, channels, 4),
            "inputs": _f32(rng, num_states, channels, 4),
            "ab_matrix": bf16_from_f32(_f32(rng, 2 * heads, hidden) * np.float32(2 * hidden**-0.5)),
            "a_log": _f32(rng, heads),
            "dt_bias": _f32(rng, heads),
            "state": _f32(rng, num_states, heads, size.key_dim, size.value_dim),
            "norm": _f32(rng, size.value_dim),
            "out": out[0],
            "out_scale": out[1],
            "qkv": _nan(tokens, channels),
            "ab": _nan(tokens, 2 * heads),
            "decay": _nan(tokens, heads),
            "beta": _nan(tokens, heads),
            **_chunk_scratch(size),
        }

        def call(ops: Ops, a: dict[str, Any]) -> None:
            ab = LinearWeight("bf16", 2 * heads, hidden, a["ab_matrix"])
            matrix = LinearWeight("int4", hidden, width, a["out"], a["out_scale"], group)
            weights = DeltaWeights(a["conv"], ab, a["a_log"], a["dt_bias"], a["norm"], matrix, 1e-6)
            normed_out, h = new_rows(ops, tokens, width), normed_rows(ops, a["x"], a["scale"])
            workspace = DeltaNetWorkspace(
                a["qkv"], a["ab"], a["decay"], a["beta"], normed_out, a.get("scratch")
            )
            ops.delta_net(
                a["x"], h, a["scale"], a["u"], weights, a["inputs"], a["state"], workspace,
                _step(size, a), chunks,
            )  # fmt: skip

        kind = matrix_tolerance("int4", tokens, width, group, hidden)
        return Case(arrays, call, {"x": kind, "state": "rows", "inputs": "exact"})

    return make


# -- experts ---------------------------------------------------------------------------------------


def topk_softmax(rng: np.random.Generator, size: Size) -> Case:
    tokens = sum(size.lengths)
    logits = _f32(rng, tokens, size.experts + 1)
    logits[:, -1] = 50  # the shared expert's gate is not an expert
    logits[0, :3] = 9  # ties go to the lower id
    arrays: Arrays = {
        "ids": np.full((tokens, size.top_k), 999, np.uint16),
        "weights": _nan(tokens, size.top_k),
        "logits": logits,
        "counters": np.zeros(4, np.int64),
    }

    def call(ops: Ops, a: dict[str, Any]) -> None:
        ops.topk_softmax(a["ids"], a["weights"], a["logits"], size.experts, a["counters"])

    return Case(arrays, call, {"ids": "exact", "weights": "f32", "counters": "exact"})


def router(
    rng: np.random.Generator, size: Size, equal: int = 1, form: Literal["bf16", "int8"] = "bf16"
) -> Case:
    """Scores are far enough apart that rounding changes no choice, except `equal` identical ones.

    Runs twice without prefetch and three times with it, by a matrix of `form`. A launch leaves its
    barrier words unchanged. Prefetch arrays have space for one more token.
    """
    tokens, count, calls = min(5, sum(size.lengths)), size.experts + 1, 5
    x = np.zeros((tokens, size.hidden), np.float32)
    x[:, :tokens] = np.eye(tokens, dtype=np.float32) * np.float32(size.hidden**0.5)

    def matrix() -> npt.NDArray[np.float32]:
        ranks = np.argsort(rng.random((tokens, count)), axis=1)
        w = np.zeros((count, size.hidden), np.float32)
        w[:, :tokens] = (ranks.T // equal * equal - count / 2) / 16
        return w

    arrays: Arrays = {
        "x": x,
        "norm": np.zeros(size.hidden, np.float32),
        "w": bf16_from_f32(matrix()),
        "positions": rng.integers(0, 1 << 18, tokens).astype(np.int32),
    }
    for name in ("trace", "predicted"):
        arrays[name] = rng.integers(0, size.experts, (7, 5, size.top_k)).astype(np.uint16)
    if form == "int8":
        arrays["next_router"], arrays["next_router_scale"] = int8.quantize(matrix())
    else:
        arrays["next_router"] = bf16_from_f32(matrix())
    for prefix, rows in (("", tokens), ("prefetch_", tokens + 1)):
        arrays[f"{prefix}ids"] = np.full((calls, rows, size.top_k), 999, np.uint16)
        arrays[f"{prefix}weights"] = _nan(calls, rows, size.top_k)
        arrays[f"{prefix}scores"] = _nan(calls, rows, count)
        arrays[f"{prefix}counters"] = np.zeros(4, np.int64)
        arrays[f"{prefix}barrier"] = np.zeros(ROUTER_BARRIER_SHAPE, np.int32)
    for name in ("prefetch_weights", "prefetch_scores"):  # outside of what the kernel writes
        arrays[name][:2] = arrays[name][:, tokens:] = 1e-3

    def call(ops: Ops, a: dict[str, Any]) -> None:
        h = normed_rows(ops, a["x"], a["norm"])
        w = LinearWeight("bf16", count, size.hidden, a["w"])
        next_router = LinearWeight(
            form, count, size.hidden, a["next_router"], a.get("next_router_scale")
        )
        trace, predicted = a["trace"], a["predicted"]
        routing = (
            (trace, None),
            (None, None),
            (None, predicted),
            (trace, None),
            (trace, predicted),
        )
        for i, (current_trace, next_predictions) in enumerate(routing):
            prefetch = PrefetchState(
                a["prefetch_ids"][i], a["prefetch_weights"][i], a["prefetch_scores"][i],
                a["prefetch_counters"], a["prefetch_barrier"], *[None] * 5,
            )  # fmt: skip
            ops.router(
                a["ids"][i], a["weights"][i], a["scores"][i], h, w, size.experts,
                a["counters"], a["barrier"], current_trace, 3, a["positions"],
                *((prefetch, next_router, next_predictions) if i > 1 else ()),
            )  # fmt: skip

    writes = {"ids": "exact", "weights": "f32", "scores": "f32", "counters": "exact",
              "barrier": "exact"}  # fmt: skip
    return Case(arrays, call, writes | {f"prefetch_{name}": kind for name, kind in writes.items()})


def replay_routing(rng: np.random.Generator, size: Size) -> Case:
    tokens = sum(size.lengths)
    arrays: Arrays = {
        "ids": np.full((tokens, size.top_k), 999, np.uint16),
        "trace": rng.integers(0, size.experts, (7, 5, size.top_k)).astype(np.uint16),
        "positions": rng.integers(0, 1 << 18, tokens).astype(np.int32),
    }

    def call(ops: Ops, a: dict[str, Any]) -> None:
        ops.replay_routing(a["ids"], a["trace"], 3, a["positions"])

    return Case(arrays, call, {"ids": "exact"})


def packed_experts(
    rng: np.random.Generator, layout: ExpertLayout, count: int
) -> npt.NDArray[np.uint8]:
    """Random packed experts, u8 [count, nbytes]: every bit pattern of a nibble or a byte."""
    out = np.zeros((count, layout.nbytes), np.uint8)
    for start, n, k, scales in (
        (0, 2 * layout.inner, layout.hidden, layout.up_scale),
        (layout.down, layout.hidden, layout.inner, layout.down_scale),
    ):
        nbytes = n * k * layout.bits // 8
        if layout.bits == 16:
            w = bf16_from_f32(_f32(rng, count, n * k) * np.float32(k**-0.5))
            out[:, start : start + nbytes] = w.view(np.uint8)
            continue
        out[:, start : start + nbytes] = rng.integers(0, 256, (count, nbytes), dtype=np.uint8)
        size = n if layout.bits == 8 else n * (k // group_of(k))
        scale = (rng.random((count, size)) - 0.5) * k**-0.5 / (60 if layout.bits == 8 else 4)
        scale_values = scale.astype(np.float32 if layout.bits == 8 else np.float16)
        out[:, scales : scales + scale_values[0].nbytes] = scale_values.view(np.uint8).reshape(
            count, -1
        )
    return out


def cache_arrays(rng: np.random.Generator, size: Size, nbytes: int) -> Arrays:
    """A one-layer cache with half of its slots taken, with counts and steps of last use."""
    resident_ids = rng.permutation(size.experts)[: size.slots // 2].astype(np.int32)
    expert_to_slot = np.full((1, size.experts), -1, np.int32)
    slot_to_expert = np.full((1, size.slots), -1, np.int32)
    slot_to_expert[0, : len(resident_ids)] = resident_ids
    expert_to_slot[0, resident_ids] = np.arange(len(resident_ids))
    return {
        "cache_slots": np.zeros((1, size.slots, nbytes), np.uint8),
        "expert_to_slot": expert_to_slot,
        "slot_to_expert": slot_to_expert,
        "short_count": rng.random((1, size.experts), np.float32) * 5,
        "long_count": rng.random((1, size.experts), np.float32) * 50,
        "last_used": rng.integers(1, 40, (1, size.experts), dtype=np.int32),
        "step": np.array([40], np.int32),
        "counters": np.zeros(7, np.int64),
    }


def _cache(size: Size, layout: ExpertLayout, a: dict[str, Any]) -> ExpertCache:
    return ExpertCache(
        layout, size.experts, DECAY, a["cache_slots"], a["expert_to_slot"], a["slot_to_expert"],
        a["short_count"], a["long_count"], a["last_used"], a["step"], a["counters"],
    )  # fmt: skip


PLAN = ("count", "expert", "slot", "fetch_flags", "uses", "pair_slots", "fetch_progress")


def _plan(a: dict[str, Any]) -> SlotAssignment:
    arrays = {name: a[f"plan_{name}"] for name in PLAN}
    return SlotAssignment(**arrays, partial_out=a.get("plan_partial_out"))


def _plan_arrays(most: int, ids: npt.NDArray[Any]) -> Arrays:
    sizes = dict.fromkeys(PLAN, (most,)) | {
        "count": (1,),
        "pair_slots": ids.shape,
        "fetch_progress": (2,),
    }
    return {f"plan_{name}": np.full(size, -7, np.int32) for name, size in sizes.items()}


def _chosen(rng: np.random.Generator, size: Size) -> npt.NDArray[np.uint16]:
    """Experts for as many tokens as fit the slots, u16 [T, A]."""
    tokens = max(1, min(sum(size.lengths), size.slots // size.top_k))
    return np.stack([rng.permutation(size.experts)[: size.top_k] for _ in range(tokens)]).astype(
        np.uint16
    )


def assign_slots(rng: np.random.Generator, size: Size) -> Case:
    ids = _chosen(rng, size)
    layout = ExpertLayout(4, 64, 32)
    arrays = cache_arrays(rng, size, layout.nbytes) | _plan_arrays(min(size.experts, ids.size), ids)
    arrays["routed_ids"] = ids

    def call(ops: Ops, a: dict[str, Any]) -> None:
        ops.assign_slots(_plan(a), _cache(size, layout, a), 0, a["routed_ids"])

    exact = ("expert_to_slot", "slot_to_expert", "last_used", "step", "counters", "plan_count",
             "plan_pair_slots", "plan_fetch_progress")  # fmt: skip
    approximate = ("short_count", "long_count")
    return Case(
        arrays, call, {**dict.fromkeys(exact, "exact"), **dict.fromkeys(approximate, "f32")}
    )


def _experts(bits: int) -> Callable[[np.random.Generator, Size], Case]:
    """Slot assignment, fetch, and both expert kernels: output, counters, the slots' bytes."""

    def make(rng: np.random.Generator, size: Size) -> Case:
        layout = ExpertLayout(bits, size.hidden, size.inner)
        # the shared expert's format
        form = "bf16" if size.hidden % 16 or size.inner % 16 else "int8"
        ids = _chosen(rng, size)
        arrays = cache_arrays(rng, size, layout.nbytes)
        arrays |= _plan_arrays(min(size.experts, ids.size), ids)
        experts = packed_experts(rng, layout, size.experts)
        resident_ids = arrays["slot_to_expert"][0]
        arrays["cache_slots"][0, resident_ids >= 0] = experts[resident_ids[resident_ids >= 0]]
        w = rng.random(ids.shape, np.float32)
        arrays |= {
            "host_experts": experts[None],
            "routed_ids": ids,
            "out": _f32(rng, len(ids), size.hidden),
            "next": _nan(len(ids), size.hidden),
            "norm": _f32(rng, size.hidden),
            "x": _f32(rng, len(ids), size.hidden),
            "weights": w / w.sum(axis=1, keepdims=True),
            "plan_partial_out": np.full((len(ids), size.hidden), -7, np.int64),
            **shared_arrays(rng, form, len(ids), size.hidden, size.inner, 2),
        }

        def call(ops: Ops, a: dict[str, Any]) -> None:
            cache, plan = _cache(size, layout, a), _plan(a)
            ops.assign_slots(plan, cache, 0, a["routed_ids"])

            def fetch() -> None:
                ops.fetch_experts(cache, plan, HostExperts(layout, a["host_experts"]), 0)

            experts_call(ops, a, form, plan, cache, ("hits", "rest"), 1, fetch=fetch)

        writes = {"out": "f32", "next": "f32", "counters": "exact", "cache_slots": "exact"}
        return Case(arrays, call, writes)

    return make


def shared_arrays(
    rng: np.random.Generator, form: str, tokens: int, hidden: int, inner: int, columns: int
) -> Arrays:
    """A shared expert, and what it and the routed ones leave on the way."""
    up = _f32(rng, 2 * inner, hidden) * np.float32(hidden**-0.5)
    down = _f32(rng, hidden, inner) * np.float32(inner**-0.5)
    arrays: Arrays = {
        "scores": _f32(rng, tokens, columns) * 3,
        "both": _nan(tokens, 2 * inner),
        "shared_out": _nan(tokens, hidden),
        "y": _nan(tokens, hidden),
    }
    for name, w in (("up", up), ("down", down)):
        if form == "int8":
            arrays[f"shared_{name}"], arrays[f"shared_{name}_scale"] = int8.quantize(w)
        else:
            arrays[f"shared_{name}"] = bf16_from_f32(w)
    return arrays


def experts_call(
    ops: Ops, a: dict[str, Any], form: Any, plan: Any, cache: Any, parts: tuple[Any, ...],
    column: int, norm: bool = False, fetch: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Both expert kernels, the first in parts; the fetch runs before the last part.

    Writes `out` and the next norm's rows.
    """
    (tokens, top_k), (_, hidden) = a["routed_ids"].shape, a["x"].shape
    inner = a["both"].shape[1] // 2
    shared = SharedExpert(
        LinearWeight(form, 2 * inner, hidden, a["shared_up"], a.get("shared_up_scale")),
        LinearWeight(form, hidden, inner, a["shared_down"], a.get("shared_down_scale")),
        column,
    )
    h = normed_rows(ops, a["x"], a["norm"]) if norm else rows_of(ops, a["x"])
    grouped = ops.empty_grouped(tokens, top_k, cache.num_experts, cache.layout)
    inputs = (new_rows(ops, tokens * top_k, cache.layout.inner), new_rows(ops, tokens, inner))
    for part in parts:
        if part == parts[-1]:
            fetch()
        with ops.on_side_stream():
            ops.expert_up(
                *inputs, h, a["routed_ids"], plan, cache, 0, part, shared, a["both"], grouped
            )
        ops.join_side_stream()
    next_rows = new_rows(ops, tokens, hidden, 1e-6)
    for part in parts:
        ops.expert_down(
            a["out"], *inputs, a["routed_ids"], a["weights"], plan, cache, 0, part, shared,
            a["scores"], a["shared_out"], a["y"], next_rows, a["norm"], grouped,
        )  # fmt: skip
    read_rows(ops, a["next"], next_rows)


def silu_and_mul(rng: np.random.Generator, size: Size) -> Case:
    tokens = sum(size.lengths)
    arrays: Arrays = {"out": _nan(tokens, size.inner), "x": _f32(rng, tokens, 2 * size.inner) * 4}
    return Case(arrays, lambda ops, a: ops.silu_and_mul(a["out"], a["x"]), {"out": "f32"})


def add_sigmoid_gated(rng: np.random.Generator, size: Size) -> Case:
    tokens = sum(size.lengths)
    arrays: Arrays = {
        "out": _f32(rng, tokens, size.hidden),
        "x": _f32(rng, tokens, size.hidden),
        "gate": _f32(rng, tokens, size.experts + 1) * 3,
    }

    def call(ops: Ops, a: dict[str, Any]) -> None:
        ops.add_sigmoid_gated(a["out"], a["x"], a["gate"], size.experts)

    return Case(arrays, call, {"out": "f32"})


def routed_ids(
    rng: np.random.Generator, size: Size, used: Literal["all", "some", "one"] = "all"
) -> npt.NDArray[np.uint16]:
    """Expert ids [T, A] of random experts: of all, of every third, or of one alone.

    A token's experts are distinct, if that many are used."""
    experts = {
        "all": np.arange(size.experts),
        "some": np.arange(size.experts)[1::3],
        "one": rng.integers(0, size.experts, 1),
    }[used]
    shape = (sum(size.lengths), size.top_k)
    if len(experts) < size.top_k:
        return rng.choice(experts, shape).astype(np.uint16)
    order = np.argsort(rng.random((shape[0], len(experts))), axis=1)
    return experts[order[:, : size.top_k]].astype(np.uint16)


def group_by_expert(
    rng: np.random.Generator,
    size: Size,
    used: Literal["all", "some", "one"] = "all",
    has_slots: bool = True,
) -> Case:
    """A third of the experts are not resident, unless expert e is in slot e."""
    ids = routed_ids(rng, size, used)
    shapes = ExpertGroups.shapes(len(ids) + 5, size.top_k, size.experts)
    arrays: Arrays = {name: np.full(shape, 77, dtype) for name, (shape, dtype) in shapes.items()}
    slots = rng.permutation(size.experts).astype(np.int32)
    arrays |= {"ids": ids, "slots": np.where(slots % 3 == 2, np.int32(-1), slots)}

    def call(ops: Ops, a: dict[str, Any]) -> None:
        groups = ExpertGroups(*(a[name] for name in shapes))
        ops.group_by_expert(groups, a["ids"], size.experts, a["slots"] if has_slots else None)

    return Case(arrays, call, dict.fromkeys(("order", "position", "tiles", "num_tiles"), "exact"))


def expert_part(
    rng: np.random.Generator, size: Size, bits: int = 4, staged: int = 2, used: Any = "all"
) -> Case:
    """Experts in shuffled slots, then the others in parts of `staged` from a staging buffer."""
    hidden, inner = size.hidden, size.inner
    if bits != 16:
        hidden, inner = max(256, hidden // 128 * 128), max(128, inner // 128 * 128)
    layout = ExpertLayout(bits, hidden, inner)
    ids, experts = routed_ids(rng, size, used), packed_experts(rng, layout, size.experts)
    shuffled = rng.permutation(size.experts)
    held = shuffled[: -(-size.experts // 2)]
    missing = np.sort(shuffled[len(held) :])
    parts = [missing[i : i + staged].tolist() for i in range(0, len(missing), staged)]
    part_slots = np.full((1 + len(parts), size.experts), -1, np.int32)
    part_slots[0, held] = np.arange(len(held))
    for number, part in enumerate(parts, 1):
        part_slots[number, part] = np.arange(len(part))
    shapes = ExpertGroups.shapes(len(ids) + 3, size.top_k, size.experts)
    arrays: Arrays = {name: np.full(shape, 77, dtype) for name, (shape, dtype) in shapes.items()}
    arrays |= {
        "ids": ids,
        "x": _f32(rng, len(ids), hidden),
        "norm": _f32(rng, hidden),
        "part_slots": part_slots,
        "resident": experts[held],
        "host_experts": experts[None],
        "staging": np.zeros((2, staged, layout.nbytes), np.uint8),
        "pair_out": np.full((ids.size, hidden), np.nan, np.float32),
    }

    def call(ops: Ops, a: dict[str, Any]) -> None:
        grouped = GroupedExperts(ExpertGroups(*(a[name] for name in shapes)), a["pair_out"])
        host_experts = HostExperts(layout, a["host_experts"])
        with ops.prefill():
            h = normed_rows(ops, a["x"], a["norm"])
        ops.group_by_expert(grouped.groups, a["ids"], size.experts, a["part_slots"][0])
        rows = (grouped, new_rows(ops, ids.size, inner), h, a["ids"], layout)
        ops.expert_part(*rows, a["resident"], a["part_slots"][0])
        for number, part in enumerate(parts, 1):
            half = number % 2
            ops.stage_experts(a["staging"][half], half, host_experts, 0, part, range(len(part)))
            ops.wait_staged(half)
            ops.expert_part(*rows, a["staging"][half], a["part_slots"][number])
            ops.release_staged(half)

    kind = "rows" if bits == 16 else "expert digits"
    return Case(arrays, call, {"pair_out": kind, "staging": "exact"})


def count_uses(
    rng: np.random.Generator,
    size: Size,
    used: Literal["all", "some", "one"] = "all",
) -> Case:
    """Pairs of resident and of missing experts; counts as of several steps."""
    ids = routed_ids(rng, size, used)
    layout = ExpertLayout(4, 64, 32)
    shapes = ExpertGroups.shapes(len(ids), size.top_k, size.experts)
    arrays: Arrays = {name: np.full(shape, 77, dtype) for name, (shape, dtype) in shapes.items()}
    arrays |= cache_arrays(rng, size, layout.nbytes) | {"ids": ids}

    def call(ops: Ops, a: dict[str, Any]) -> None:
        cache, groups = _cache(size, layout, a), ExpertGroups(*(a[name] for name in shapes))
        ops.group_by_expert(groups, a["ids"], size.experts, a["expert_to_slot"][0])
        ops.count_uses(groups, cache, 0, a["ids"])

    exact = ("last_used", "step", "counters")
    return Case(
        arrays,
        call,
        dict.fromkeys(exact, "exact") | dict.fromkeys(("short_count", "long_count"), "f32"),
    )


def gather_add(
    rng: np.random.Generator,
    size: Size,
    used: Literal["all", "some", "one"] = "all",
    parts: int = 1,
    has_shared: bool = True,
) -> Case:
    """Sums in one call, or in `parts` calls of which each has the rows of consecutive positions."""
    ids = routed_ids(rng, size, used)
    position = np.empty(ids.size + 3, np.int32)
    position[np.argsort(ids.reshape(-1), kind="stable")] = np.arange(ids.size)
    position[ids.size :] = 0
    cuts = [ids.size * i // parts for i in range(parts + 1)]
    arrays: Arrays = {
        "out": _f32(rng, len(ids), size.hidden),
        "weights": rng.random(ids.shape, np.float32),
        "position": position,
        "shared_out": _f32(rng, len(ids), size.hidden),
        "router_logits": _f32(rng, len(ids), size.experts + 1) * 3,
    }
    y = _f32(rng, ids.size, size.hidden)
    arrays |= {f"y{i}": y[cuts[i] : cuts[i + 1]] for i in range(parts)}

    def call(ops: Ops, a: dict[str, Any]) -> None:
        for i in range(parts):
            shared = (a["shared_out"], a["router_logits"], size.experts)
            has_gate = has_shared and i == parts - 1
            ops.gather_add(
                a["out"], a[f"y{i}"], a["weights"], a["position"], cuts[i],
                *(shared if has_gate else ()),
            )  # fmt: skip

    return Case(arrays, call, {"out": "f32"})


# -- decode state ----------------------------------------------------------------------------------

RING = 3


def decode_arrays(rng: np.random.Generator, rows: int, vocab: int) -> Arrays:
    """Arrays of DecodeState, whose rows cover every combination of sampling parameters."""
    combinations = np.array(
        [(0, 0, 1, 0), (1, 0, 1, 0), (0.7, 20, 0.95, 0), (1.5, 0, 0.8, 0.02), (0.3, 5, 1, 0),
         (2, 0, 1, 0.1), (1e-3, 0, 0.5, 0), (100, 0, 1, 0)],
        np.float32,
    )  # fmt: skip
    slices = max(4, -(-vocab // SLICE))
    return {
        "sampler_params": combinations[
            rng.permutation(np.resize(np.arange(len(combinations)), rows))
        ],
        "uniforms": rng.random((RING, rows)),
        "token": np.full(rows, -7, np.int32),
        "tokens_left": np.full(rows, 9, np.int32),
        "stop_on_eos": np.ones(rows, np.int32),
        "eos": np.array([3, vocab - 1], np.int32),
        "decode_step": np.array([4], np.int32),
        "token_ring": np.full(1 + RING * rows, -7, np.int32),
        "slice_max": _nan(rows, slices),
        "slice_argmax": np.full((rows, slices), -7, np.int32),
        "bin_counts": np.full((rows, BINS), 7, np.uint32),
        "bin_weights": np.full((rows, BINS + 1), 7, np.uint64),
        "slice_bin_ends": np.full((rows, slices, BINS), 7, np.uint16),
        "bin_order": np.full((rows, vocab), 7, np.uint16),
    }


def as_decode_state(a: dict[str, Any]) -> DecodeState:
    names = (
        "sampler_params",
        "uniforms",
        "token",
        "tokens_left",
        "stop_on_eos",
        "eos",
        "decode_step",
        "token_ring",
        "slice_max",
        "slice_argmax",
        "bin_counts",
        "bin_weights",
        "slice_bin_ends",
        "bin_order",
    )
    return DecodeState(RING, 99, *(a[name] for name in names))


def sample(rng: np.random.Generator, size: Size) -> Case:
    """Logits are multiples of 1/16, so that many are equal and few samples are near a border."""
    rows, vocab = min(8, sum(size.lengths)), size.outputs
    logits = np.round(_f32(rng, rows, vocab) * 48) / np.float32(16)
    logits[:, rng.integers(0, vocab, 2)] = -np.inf
    if rows > 2:
        logits[rng.integers(0, rows), rng.integers(0, vocab)] = rng.choice([np.nan, np.inf])
        logits[rng.integers(0, rows)] = 5  # all equal: the lowest ids win
    arrays = {"logits": logits, **decode_arrays(rng, rows, vocab)}

    def call(ops: Ops, a: dict[str, Any]) -> None:
        ops.sample(a["logits"], as_decode_state(a))

    return Case(arrays, call, {"token": "exact"})


def control_arrays(rng: np.random.Generator, rows: int, slots: int, vocab: int) -> Arrays:
    """Arrays of SamplingControls; flags and penalties differ between rows."""
    slices = max(4, -(-vocab // SLICE))
    seen = rng.random((slots, vocab)) < 0.3
    counts = seen * rng.integers(0, 4, (slots, vocab), dtype=np.uint32)
    counts[rng.random((slots, vocab)) < 0.1] |= np.uint32(PROMPT_BIT)
    mask = rng.integers(-(1 << 31), 1 << 31, (rows, mask_words(vocab)), dtype=np.int64)
    mask |= rng.integers(-(1 << 31), 1 << 31, mask.shape, dtype=np.int64)
    if rows > 3:
        mask[rng.integers(0, rows)] = 0  # no token is allowed
    return {
        "flags": np.stack([
            rng.permutation(np.resize(np.arange(8), rows)), rng.integers(0, rows + 2, rows),
            np.minimum(rng.choice([-1, 0, 1, 5, MAX_LOGPROBS], rows), vocab),
        ], axis=1).astype(np.int32),
        "penalties": np.stack([
            rng.choice([1, 0.5, 1.3, 2], rows), rng.choice([0, 1.5, -0.3], rows),
            rng.choice([0, 0.7, -2], rows),
        ], axis=1).astype(np.float32),
        "token_counts": counts,
        "logit_bias": np.where(
            rng.random((slots, vocab)) < 0.2, rng.integers(-16, 17, (slots, vocab)) / 8, 0
        ).astype(np.float32),
        "token_mask": mask.astype(np.int32),
        "logprobs": np.full((RING, rows, 1 + MAX_LOGPROBS), 7, np.float32),
        "logprob_tokens": np.full((RING, rows, 1 + MAX_LOGPROBS), -7, np.int32),
        "adjusted": _nan(rows, vocab),
        "raw_max": _nan(rows, slices),
        "raw_argmax": np.full((rows, slices), -7, np.int32),
        "raw_sums": _nan(rows, slices),
        "top_logits": _nan(rows, MAX_LOGPROBS, MAX_LOGPROBS),
        "top_tokens": np.full((rows, MAX_LOGPROBS, MAX_LOGPROBS), 7, np.int32),
        "blocks_done": np.full(rows, 7, np.int32),
    }  # fmt: skip


def as_controls(a: dict[str, Any]) -> SamplingControls:
    return SamplingControls(**{f.name: a[f.name] for f in fields(SamplingControls)})


def sample_controlled(rng: np.random.Generator, size: Size) -> Case:
    """Rows with every combination of penalties, bias and mask, and one that has ended."""
    rows, vocab = min(8, sum(size.lengths)), size.outputs
    arrays = sample(rng, size).arrays
    if vocab > 10_000:  # a penalty in a row of equal logits puts many samples near a border
        flat = (arrays["logits"] == 5).all(axis=1)
        arrays["logits"][flat] = np.round(_f32(rng, int(flat.sum()), vocab) * 48) / np.float32(16)
    one = replace(size, lengths=(1,) * rows, past=tuple(range(rows)))
    arrays |= step_arrays(rng, one) | control_arrays(rng, rows, rows + 1, vocab)
    arrays["ids"] = rng.integers(0, vocab, rows, dtype=np.int32)
    arrays["slots"] = rng.permutation(rows + 1)[:rows].astype(np.int32)
    if rows > 1:
        arrays["slots"][rng.integers(0, rows)] = -1

    def call(ops: Ops, a: dict[str, Any]) -> None:
        ops.sample_controlled(a["logits"], _step(one, a), as_decode_state(a), as_controls(a))

    writes = dict.fromkeys(("token", "adjusted", "token_counts", "logprob_tokens"), "exact")
    return Case(arrays, call, {**writes, "logprobs": "logprobs"})


def advance_step(rng: np.random.Generator, size: Size) -> Case:
    """Rows that continue, that have ended, and that end now, by end token or by length."""
    rows = min(8, sum(size.lengths))
    one = replace(size, lengths=(1,) * rows, past=tuple(range(rows)))
    arrays = step_arrays(rng, one) | decode_arrays(rng, rows, size.outputs)
    arrays["token"] = rng.choice(np.array([-1, 3, 5, 6], np.int32), rows)
    arrays["tokens_left"] = rng.choice(np.array([0, 1, 2, 9], np.int32), rows)
    arrays["stop_on_eos"] = rng.integers(0, 2, rows, dtype=np.int32)

    def call(ops: Ops, a: dict[str, Any]) -> None:
        ops.advance_step(_step(one, a), as_decode_state(a))

    names = (
        "ids",
        "positions",
        "past",
        "slots",
        "pages",
        "tokens_left",
        "decode_step",
        "token_ring",
    )
    return Case(arrays, call, dict.fromkeys(names, "exact"))


CASES: dict[str, Callable[[np.random.Generator, Size], Case]] = {
    "embed": embed,
    "gather_rows": gather_rows,
    "add": add,
    "rms_norm": rms_norm,
    "prepare_input": prepare_input,
    "linear bf16": _linear("bf16"),
    "linear int8": _linear("int8"),
    "linear int4": _linear("int4"),
    "rope_append": rope_append,
    "attention": attention,
    "gated_attention": gated_attention,
    "rope_append fp8": partial(rope_append, kv_format="fp8"),
    "attention fp8": partial(attention, kv_format="fp8"),
    "gated_attention fp8": partial(gated_attention, kv_format="fp8"),
    "sigmoid_gate": sigmoid_gate,
    "causal_conv1d": causal_conv1d,
    "delta_gates": delta_gates,
    "delta_rule_recurrent": _delta("delta_rule_recurrent"),
    "delta_net": _delta_net(chunks=False),
    "delta_net, chunks": _delta_net(chunks=True),
    "delta_rule_chunk": _delta("delta_rule_chunk"),
    "gated_rms_norm": gated_rms_norm,
    "router": router,
    "topk_softmax": topk_softmax,
    "replay_routing": replay_routing,
    "assign_slots": assign_slots,
    "experts bf16": _experts(16),
    "experts int8": _experts(8),
    "experts int4": _experts(4),
    "silu_and_mul": silu_and_mul,
    "add_sigmoid_gated": add_sigmoid_gated,
    "group_by_expert": group_by_expert,
    "expert_part": expert_part,
    "expert_part bf16": partial(expert_part, bits=16),
    "count_uses": count_uses,
    "gather_add": gather_add,
    "sample": sample,
    "sample_controlled": sample_controlled,
    "advance_step": advance_step,
}


def sized(name: str, size: Size) -> Callable[[np.random.Generator], Case]:
    """An operation's case at one size."""
    return lambda rng: CASES[name](rng, size)


def compare(out: npt.NDArray[Any], ref: npt.NDArray[Any], kind: str) -> float:
    """The distance of an output from its reference; infinity if "exact" does not hold."""
    from tests.tolerance import distance

    if kind == "exact":
        return 0.0 if np.array_equal(out, ref, equal_nan=out.dtype.kind == "f") else float("inf")
    if kind == "bf16 bits":
        return distance(f32_from_bf16(out), f32_from_bf16(ref))
    if kind == "e4m3 bits":
        return distance(f32_from_e4m3(out), f32_from_e4m3(ref))
    if kind == "logprobs":  # of tokens whose logit is minus infinity, too
        impossible = np.isneginf(ref)
        if not np.array_equal(np.isneginf(out), impossible):
            return float("inf")
        return distance(np.where(impossible, 0, out), np.where(impossible, 0, ref))
    return distance(out, ref)


def allowed(kind: str) -> float:
    """The largest distance that passes."""
    from tests.tolerance import TOLERANCE

    return 0.0 if kind == "exact" else TOLERANCE[kind.removesuffix(" bits")]
