"""Documented element orders against the bytes that the reference and kernels write and read."""

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.experts.cache import resident_cache
from osmium.experts.prefetch import make_prefetch_state
from osmium.models.state import DeltaState
from osmium.ops import Ops, sampling, types
from osmium.ops.formulas import matrix, silu
from osmium.ops.gpu import GpuOps
from osmium.ops.reference import ReferenceOps
from osmium.ops.sampling import sample_from_logits
from osmium.ops.types import (
    AttentionWorkspace,
    DecodeState,
    ExpertCache,
    LinearWeight,
    MatmulInput,
    PagedKV,
    PrefetchState,
    SharedExpert,
    StepInputs,
)
from osmium.quant import expert_layout, int4, int8
from osmium.quant.expert import pack_expert
from osmium.quant.expert_layout import ExpertLayout
from osmium.quant.floats import bf16_from_f32, f32_from_bf16
from tests.models.build import CASES as MODELS
from tests.models.run import make_driver
from tests.ops import cases, layouts
from tests.ops.cases import CASES, TINY, run
from tests.ops.layouts import (
    Layout,
    Table,
    documented_index,
    evaluate,
    layouts_of,
)
from tests.ptx.interpreter import InterpretedRuntime
from tests.tolerance import close

F32 = npt.NDArray[np.float32]


# -- the input of a matrix -------------------------------------------------------------------------


def hi_lo_of(value: F32) -> npt.NDArray[np.uint16]:
    """hi_lo of values [T, K], in the order of MatmulInput's docstring."""
    names = layouts_of(MatmulInput)["hi_lo"].entries
    hi = bf16_from_f32(value)
    parts = {"hi": hi, "lo": bf16_from_f32(value - f32_from_bf16(hi))}
    out = np.empty((len(value), value.shape[1] // 2, len(names)), np.uint16)
    for part, bits in parts.items():
        for which, entry in enumerate(i for i, name in enumerate(names) if name == part):
            out[:, :, entry] = bits[:, which::2]
    return out


def squares_of(x: F32) -> F32:
    """square_sums of the norm's input, as MatmulInput's docstring says."""
    (count,) = documented_index(
        layouts.fields_of(MatmulInput)["square_sums"], r"inputs (\d) i to \1 i \+ 7 in entry i"
    )
    sums: F32 = (x * x).reshape(len(x), -1, int(count)).sum(axis=2)
    return sums


def test_kernels_split_rows_in_the_documented_order(rng: np.random.Generator) -> None:
    ops = GpuOps(InterpretedRuntime())
    x, w = rng.standard_normal((3, 40), np.float32), rng.standard_normal(40, np.float32)
    plain, normed = ops.empty_input(3, 40), ops.empty_input(3, 40, 1e-6)
    ops.copy_h2d(plain.f32, x)
    ops.prepare_input(plain)
    ops.rms_norm(normed, ops.to_device(x), ops.to_device(w))
    assert np.array_equal(ops.copy_d2h(plain.hi_lo), hi_lo_of(x))
    assert _same_hi_lo(ops.copy_d2h(normed.hi_lo), x * (1 + w))
    assert close(ops.copy_d2h(normed.square_sums), squares_of(x), "f32")


def _same_hi_lo(found: npt.NDArray[np.uint16], value: F32) -> bool:
    """Whether the halves are those of `value` but for its own last bit."""
    wanted = hi_lo_of(value)
    off = np.abs(f32_from_bf16(found) - f32_from_bf16(wanted))
    # where hi rounds the other way, lo makes up for it
    return bool((off <= np.abs(f32_from_bf16(wanted)) * 2**-7 + 2**-16).all())


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
def test_matrix_kernels_read_and_write_the_documented_order(
    rng: np.random.Generator, form: Any
) -> None:
    """hi_lo and square_sums go in as documented, and what the next matrix reads comes out so."""
    ops, (tokens, n, k) = GpuOps(InterpretedRuntime()), (2, 16, 256)
    w, x = _matrix(rng, form, n, k), rng.standard_normal((tokens, k), np.float32)
    gain, more = (rng.standard_normal(n_, np.float32) for n_ in (k, n))
    a, h = ops.empty_input(tokens, k, 1e-6), ops.empty_input(tokens, n, 1e-6)
    out = rng.standard_normal((tokens, n), np.float32)
    ops.copy_h2d(a.hi_lo, hi_lo_of(x * (1 + gain)))
    ops.copy_h2d(a.square_sums, squares_of(x))
    placed = _to(ops, w)
    x_out = ops.to_device(out)
    ops.linear_add_rms_norm(x_out, a, placed, h, ops.to_device(more))
    reference = ReferenceOps()
    rows, following = (reference.empty_input(tokens, width, 1e-6) for width in (k, n))
    reference.rms_norm(rows, x, gain)
    reference.linear_add_rms_norm(out, rows, w, following, more)
    assert close(ops.copy_d2h(x_out), out, "rows")
    found = ops.copy_d2h(x_out)
    assert _same_hi_lo(ops.copy_d2h(h.hi_lo), found * (1 + more))
    assert close(ops.copy_d2h(h.square_sums), squares_of(found), "f32")


def _matrix(rng: np.random.Generator, form: Any, n: int, k: int) -> LinearWeight:
    w = rng.standard_normal((n, k), np.float32)
    if form == "bf16":
        return LinearWeight("bf16", n, k, bf16_from_f32(w))
    if form == "int8":
        return LinearWeight("int8", n, k, *int8.quantize(w))
    return LinearWeight("int4", n, k, *int4.quantize(w, 128), group=128)


def _to(ops: Ops, w: LinearWeight) -> LinearWeight:
    scale = None if w.scale is None else ops.to_device(w.scale)
    return replace(w, data=ops.to_device(w.data), scale=scale)


# -- digits ----------------------------------------------------------------------------------------


class Digits:
    """The digits of a group, as GpuOps.matvec documents them."""

    def __init__(self) -> None:
        doc = re.sub(r"\s+", " ", inspect.getdoc(GpuOps.matvec) or "")
        found = re.search(
            r"group of (\d+) values as (\d+) bytes: (\d) x \1 i8 digits, then the f32 unit\. .*"
            r"value = (\d+) \* unit \* \(d0 \+ (\d+) d1 \+ (\d+) d2\).*in the order "
            r"([\d, ]+); row (\d) swaps neighbouring units of (\d+) bytes",
            doc,
        )
        assert found is not None, doc
        self.group, self.nbytes, rows, factor, *bases = (int(found[i]) for i in range(1, 7))
        self.bases = factor * np.array([1, *bases])
        self.unit_at = rows * self.group
        order = [int(i) for i in found[7].split(", ")]
        eights = np.arange(self.group).reshape(-1, 8)
        self.inputs = np.tile(eights[:, order].reshape(-1), (rows, 1))
        """[rows, group], the input of each byte."""
        units = self.inputs[int(found[8])].reshape(-1, 2, int(found[9]))
        self.inputs[int(found[8])] = units[:, ::-1].reshape(-1)

    def decode(self, hi_lo: npt.NDArray[Any]) -> F32:
        """Values [T, K] of hi_lo's bytes."""
        raw = hi_lo.reshape(-1).view(np.uint8).reshape(len(hi_lo), -1, self.nbytes)
        digits = raw[..., : self.unit_at].view(np.int8).reshape(*raw.shape[:2], *self.inputs.shape)
        unit = raw[..., self.unit_at : self.unit_at + 4].copy().view(np.float32)
        value = np.zeros((*raw.shape[:2], self.group))
        for row, (base, inputs) in enumerate(zip(self.bases, self.inputs, strict=True)):
            value[..., inputs] += base * digits[..., row, :].astype(np.float64)
        return (value * unit).reshape(len(hi_lo), -1).astype(np.float32)

    def encode(self, value: F32) -> npt.NDArray[np.uint16]:
        """hi_lo's bytes of values [T, K], in digits."""
        groups = value.reshape(len(value), -1, self.group).astype(np.float64)
        unit = (np.abs(groups).max(axis=2, keepdims=True) / 2**21 / self.bases[0]).astype(
            np.float32
        )
        whole = np.rint(groups / unit / self.bases[0]).astype(np.int64)
        raw = np.zeros((*groups.shape[:2], self.nbytes), np.uint8)
        for row, inputs in enumerate(self.inputs):
            digit = (whole + 128) % 256 - 128
            whole = (whole - digit) // 256
            at = slice(row * self.group, (row + 1) * self.group)
            raw[..., at] = digit[..., inputs].astype(np.int8).view(np.uint8)
        raw[..., self.unit_at : self.unit_at + 4] = unit.view(np.uint8)
        return raw.reshape(len(value), -1).view(np.uint16).reshape(len(value), -1, 4)


def test_the_matvec_kernel_reads_digits_in_the_documented_order(rng: np.random.Generator) -> None:
    ops, digits = GpuOps(InterpretedRuntime()), Digits()
    x, w = rng.standard_normal((2, 256), np.float32), _matrix(rng, "int4", 16, 256)
    a, out = ops.empty_input(2, 256), ops.empty((2, 16), np.float32)
    ops.copy_h2d(a.hi_lo, digits.encode(x))
    ops.matvec(out, a, _to(ops, w), None, None, has_digits=True)
    wanted = np.empty((2, 16), np.float32)
    rows = MatmulInput(x)
    ReferenceOps().linear(wanted, rows, w)
    assert close(ops.copy_d2h(out), wanted, "rows")


class KeepsInputs(GpuOps):
    """Keeps the input of each matvec that is in digits."""

    digits: list[npt.NDArray[Any]]

    def matvec(self, out: Any, a: Any, w: Any, h: Any, norm: Any, has_digits: bool = False) -> None:
        if has_digits:
            self.digits.append(self.copy_d2h(a.hi_lo))
        super().matvec(out, a, w, h, norm, has_digits)


@pytest.mark.parametrize("name", ["delta_net", "gated_attention", "gated_attention fp8"])
def test_kernels_store_digits_in_the_documented_order(rng: np.random.Generator, name: str) -> None:
    """What the last matrix of a mixer reads, by the reference and out of the kernel's digits."""
    size = replace(
        TINY, lengths=(1, 1), past=(5, 40), head_dim=128, rotary=32, value_dim=128, key_dim=32
    )
    seed, ops = int(rng.integers(1 << 32)), KeepsInputs(InterpretedRuntime())
    ops.digits, wanted = [], list[F32]()

    class Reference(ReferenceOps):
        def linear_add_rms_norm(self, x: Any, a: MatmulInput, *args: Any) -> None:
            wanted.append(a.f32.copy())
            super().linear_add_rms_norm(x, a, *args)

    run(CASES[name](np.random.default_rng(seed), size), Reference(cache_bytes=0))
    run(CASES[name](np.random.default_rng(seed), size), ops)
    (found,), (rows,) = ops.digits, wanted
    assert close(Digits().decode(found), rows, "rows")


# -- weights ---------------------------------------------------------------------------------------


def nibbles() -> list[tuple[int, int]]:
    """(lowest bit, input) of each nibble of a word, of quant/int4.py's table."""
    doc = int4.__doc__ or ""
    bits, inputs = (re.search(rf"^ *{name} +(.+)$", doc, re.M) for name in ("bits", "input"))
    assert bits is not None and inputs is not None
    lowest = [int(part.split("-")[0]) for part in bits[1].split()]
    return list(zip(lowest, map(int, inputs[1].split()), strict=True))


def test_int4_words_hold_their_inputs_in_the_documented_nibbles(rng: np.random.Generator) -> None:
    """What `pack` writes, and what the matrix kernels read."""
    q = rng.integers(0, 16, (8, 256), dtype=np.uint8)
    words = np.zeros((8, 32), np.uint32)
    for low, number in nibbles():
        words |= q[:, number::8].astype(np.uint32) << np.uint32(low)
    data = words.astype("<u4").view(np.uint8)
    assert np.array_equal(int4.pack(q), data)
    scale = rng.uniform(0.01, 0.1, (8, 2)).astype(np.float16)
    w = (q.astype(np.float32) - 8) * scale.astype(np.float32).repeat(128, axis=1)
    x, ops = rng.standard_normal((1, 256), np.float32), GpuOps(InterpretedRuntime())
    stored = _to(ops, LinearWeight("int4", 8, 256, data, scale, 128))
    out, generic = (ops.empty((1, 8), np.float32) for _ in range(2))
    ops.linear(out, cases.rows_of(ops, ops.to_device(x)), stored)
    ops.generic_linear(generic, ops.to_device(x), stored, 0)
    for found in (out, generic):
        assert close(ops.copy_d2h(found), x @ w.T, "rows")


def expert_parts(bits: int) -> list[Layout | None]:
    """Gate and up, their scales, down, its scales: the row of expert_layout.py's table."""
    (row,) = re.findall(rf"^{bits} +(.+)$", expert_layout.__doc__ or "", re.M)
    parts = re.split(r"\s{2,}", row)
    assert len(parts) == 4
    return [None if part == "none" else layouts.parse(part) for part in parts]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_packed_experts_have_the_documented_parts(rng: np.random.Generator, bits: int) -> None:
    """Order, alignment, dtype and shape of the four parts, written by `pack_expert`, read by the
    reference and by kernels."""
    layout, inner = ExpertLayout(bits, 192, 96), 96
    up, down = (rng.standard_normal(shape, np.float32) for shape in ((192, 192), (192, 96)))
    packed = np.empty(layout.nbytes, np.uint8)
    pack_expert(packed, layout, up, down)
    sizes = {"D": 192, "I": inner, "up_group": layout.up_group, "down_group": layout.down_group}
    at, arrays, starts = 0, list[Any](), list[int]()
    for part in expert_parts(bits):
        starts.append(at)
        if part is None:
            arrays.append(None)
            continue
        shape = tuple(layouts.value(size, sizes) for size in part.shape)
        dtype = np.dtype(layouts.DTYPES[part.dtype])
        nbytes = int(np.prod(shape)) * dtype.itemsize
        arrays.append(packed[at : at + nbytes].view(dtype).reshape(shape))
        at = -(-(at + nbytes) // 16) * 16
    assert starts == [0, layout.up_scale, layout.down, layout.down_scale]
    assert layout.nbytes == -(-at // 4096) * 4096
    form = {16: "bf16", 8: "int8", 4: "int4"}[bits]
    stored_up, stored_down = matrix(form, *arrays[:2]), matrix(form, *arrays[2:])
    for stored, w in ((stored_up, up), (stored_down, down)):
        assert np.linalg.norm(stored - w) < 0.15 * np.linalg.norm(w)
    names = documented_index(expert_layout.__doc__, r"first are (\w+), rows I to 2I - 1 (\w+)")
    halves = dict(zip(names, (stored_up[:inner], stored_up[inner:]), strict=True))
    x = rng.standard_normal((1, 192), np.float32)
    gated = silu(x @ halves["gate"].T) * (x @ halves["up"].T)
    for ops in (ReferenceOps(), GpuOps(InterpretedRuntime())):
        found_inner, found = _expert(ops, layout, packed, x)
        assert close(found_inner, gated, "rows")
        assert close(found, gated @ stored_down.T, "rows")


def _expert(
    ops: Ops, layout: ExpertLayout, packed: npt.NDArray[np.uint8], x: F32
) -> tuple[F32, F32]:
    """Both halves of a model's one expert for a row x; the shared expert is zero."""
    hidden, zero = layout.hidden, np.zeros
    cache = resident_cache(ops, layout, ops.to_device(packed[None, None]))
    shared = SharedExpert(
        LinearWeight("bf16", 128, hidden, ops.to_device(zero((128, hidden), np.uint16))),
        LinearWeight("bf16", hidden, 64, ops.to_device(zero((hidden, 64), np.uint16))),
        gate_column=1,
    )
    ids, inner, own = ops.to_device(zero((1, 1), np.uint16)), *(
        cases.new_rows(ops, 1, width) for width in (layout.inner, 64)
    )  # fmt: skip
    y, out, norm, gate_up, shared_out, logits = (
        ops.to_device(zero(shape, np.float32))
        for shape in ((1, hidden), (1, hidden), hidden, (1, 128), (1, hidden), (1, 2))
    )
    h, one = cases.rows_of(ops, ops.to_device(x)), ops.to_device(np.ones((1, 1), np.float32))
    ops.expert_up(inner, own, h, ids, None, cache, 0, "all", shared, gate_up)
    values = np.array(ops.copy_d2h(inner.f32))
    ops.expert_down(
        out, inner, own, ids, one, None, cache, 0, "all", shared, logits, shared_out, y,
        ops.empty_input(1, hidden, 1e-6), norm,
    )  # fmt: skip
    return values, np.array(ops.copy_d2h(out))


# -- state -----------------------------------------------------------------------------------------


BACKENDS = pytest.mark.parametrize(
    "backend", [ReferenceOps, lambda: GpuOps(InterpretedRuntime())], ids=["reference", "kernels"]
)


@BACKENDS
def test_keys_and_values_are_where_the_page_table_says(
    rng: np.random.Generator, backend: Callable[[], Ops]
) -> None:
    row, page = documented_index(
        StepInputs.__doc__, r"Position p of sequence s is row (.+?) of KV page (.+?)\. "
    )
    ops, case = backend(), CASES["rope_append"](rng, TINY)
    placed = {name: ops.to_device(np.array(array)) for name, array in case.arrays.items()}
    case.call(ops, placed)
    pages, a = f32_from_bf16(ops.copy_d2h(placed["v_pages"])), case.arrays
    new = a["qgkv"].reshape(len(a["positions"]), -1, TINY.head_dim)[:, -TINY.kv_heads :]
    for t, (s, p) in enumerate(zip(a["sequence"], a["positions"], strict=True)):
        names = {"s": s, "p": p, "page_size": TINY.page, "page_table": Table(a["pages"])}
        found = pages[evaluate(page, **names), evaluate(row, **names)]
        assert np.array_equal(found, f32_from_bf16(bf16_from_f32(new[t])))


@BACKENDS
def test_the_convolution_keeps_positions_where_its_docstring_says(
    rng: np.random.Generator, backend: Callable[[], Ops]
) -> None:
    (entry,) = documented_index(Ops.causal_conv1d.__doc__, r"rows of u: position p at (.+?)\. ")
    (same,) = documented_index(layouts.fields_of(DeltaState)["conv"], r"position p is at (.+?)\.")
    assert entry == same
    ops, case = backend(), CASES["causal_conv1d"](rng, TINY)
    placed = {name: ops.to_device(np.array(array)) for name, array in case.arrays.items()}
    case.call(ops, placed)
    state, a = ops.copy_d2h(placed["state"]), case.arrays
    for t, (s, p) in enumerate(zip(a["sequence"], a["positions"], strict=True)):
        if t >= a["starts"][s + 1] - 4:
            found = state[a["slots"][s], :, evaluate(entry, p=p)]
            assert np.array_equal(found, a["u"][t, : found.size])


def test_split_attention_leaves_partial_sums_as_documented(rng: np.random.Generator) -> None:
    """Sums and (largest, total) of each part give the reference's attention; counters count at the
    documented words alone."""
    docs = layouts.fields_of(AttentionWorkspace)
    shapes = re.findall(r"\[([^\]]+)\]", docs["partial"])
    assert len(shapes) == 3
    (names,) = documented_index(docs["partial"], r"\[T, H, s, 2\]: (\w+, \w+)\.")
    (word, groups) = documented_index(
        docs["split_counters"], r"Entry (.+?) counts .* head groups, (.+?)\. "
    )
    size = replace(TINY, lengths=(1, 1), past=(100, 40), page=8)
    seed, splits = int(rng.integers(1 << 32)), 3
    machine = InterpretedRuntime()
    ops, case = GpuOps(machine), cases.shared_context(np.random.default_rng(seed), size, 6, "bf16")
    placed = {name: ops.to_device(np.array(array)) for name, array in case.arrays.items()}
    counters = ops.empty(case.arrays["parts"].shape, np.int32)
    g = evaluate(
        groups.replace("ceil(H / (16 G))", "-(-H // (16 * G))"), G=size.kv_heads, H=size.heads
    )
    for t in range(2):
        for b in range(g):
            at = evaluate(word, t=t, b=b, g=g)
            ops.memset(counters.reshape(counters.nbytes // 4)[at : at + 1], 0)
    case.call(ops, placed | {"parts": counters})

    sizes = {"T": 2, "H": size.heads, "d": size.head_dim, "s": splits}
    flat, parts = ops.copy_d2h(placed["partial"]).reshape(-1), []
    for shape in shapes[1:]:
        whole = tuple(layouts.value(n.strip(), sizes) for n in shape.split(","))
        parts.append(flat[: np.prod(whole)].reshape(whole))
        flat = flat[np.prod(whole) :]
    sums, pair = parts
    marks = dict(zip(names.split(", "), np.moveaxis(pair, -1, 0), strict=True))
    reference, a = ReferenceOps(), {name: np.array(one) for name, one in case.arrays.items()}
    q = np.empty((2, size.heads, size.head_dim), np.float32)
    kv, step = PagedKV(a["k_pages"], a["v_pages"]), cases._step(size, a)
    reference.rope_append(q, kv, a["qgkv"], a["norms"], a["frequencies"], step, 1e-6)
    wanted = np.empty_like(q)
    reference.attention(wanted, q, kv, step, size.head_dim**-0.5, a["turns"], a["sums"])
    for t, length in enumerate((101, 41)):
        used = slice(0, min(splits, -(-length // 32)))
        largest, total = marks["largest"][t, :, used], marks["total"][t, :, used]
        weight = np.exp2(largest - largest.max(axis=1, keepdims=True))
        found = (sums[t, :, used] * weight[..., None]).sum(axis=1)
        found /= (total * weight).sum(axis=1)[:, None]
        assert close(found, wanted[t], "rows")


def test_the_router_meets_at_the_documented_words(rng: np.random.Generator) -> None:
    """Words of the barrier that its docstring does not name are never read."""
    source = inspect.getsource(types)
    last, count = documented_index(
        source, r"Words 0 to (\d+) of a token are logits as .*? word (\d+) counts"
    )
    ops, case = GpuOps(InterpretedRuntime()), CASES["router"](rng, TINY)
    placed = {name: ops.to_device(np.array(array)) for name, array in case.arrays.items()}
    for name in ("arrived", "guess_arrived"):
        placed[name] = ops.empty(types.ROUTER_BARRIER_SHAPE, np.int32)
        for token in range(types.ROUTER_BARRIER_SHAPE[0]):
            words = placed[name][token]
            ops.memset(words[: int(last) + 1], 0)
            ops.memset(words[int(count) : int(count) + 1], 0)
    case.call(ops, placed)
    for name in ("arrived", "guess_arrived"):
        words = placed[name].numpy()
        assert not words[:, : int(last) + 1].any() and not words[:, int(count)].any()


def test_rings_are_used_at_the_documented_entries(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which uniform numbers a step reads, where its tokens go, and the sampler's parameters."""
    (entry,) = documented_index(DecodeState.__doc__, r"Decode step i uses entry (.+?) of both")
    shapes = re.findall(r"\[([^\]]+)\]", layouts.fields_of(DecodeState)["token_ring"])
    ring, rows, vocab = cases.RING, 2, 40
    arrays = cases.decode_arrays(rng, rows, vocab) | cases.step_arrays(
        rng, replace(TINY, lengths=(1,) * rows, past=(3, 4))
    )
    state = cases.as_decode_state(arrays)
    step = cases._step(replace(TINY, lengths=(1,) * rows, past=(3, 4)), arrays)
    names = layouts_of(DecodeState)["sampler_params"].entries
    state.sampler_params[:] = 1, 2, 3, 4
    calls: list[dict[str, Any]] = []

    def sampled(logits: Any, **options: Any) -> int:
        calls.append(options)
        return 7 + len(calls)

    def record(logits: Any, *args: Any) -> int:
        parameters = list(inspect.signature(sample_from_logits).parameters)[1:]
        return sampled(logits, **dict(zip(parameters, args, strict=True)))

    monkeypatch.setattr(sampling, "sample_from_logits", record)
    state.decode_step[0], state.eos[:] = 0, -9
    for i in range(2 * ring):
        calls.clear()
        ReferenceOps().sample(np.zeros((rows, vocab), np.float32), state)
        ReferenceOps().advance_step(step, state)
        at = evaluate(entry, i=i, ring_size=ring)
        assert [call.pop("uniform") for call in calls] == state.uniforms[at].tolist()
        assert calls == [dict(zip(names, (1, 2, 3, 4), strict=True))] * rows
        behind = tuple(layouts.value(n.strip(), {"ring_size": ring, "R": rows})
                       for n in shapes[1].split(","))  # fmt: skip
        tokens = state.token_ring[-int(np.prod(behind)) :].reshape(behind)
        assert tokens[at].tolist() == state.token.tolist()


def test_counters_stand_in_the_documented_order() -> None:
    model = make_driver(MODELS[0], capacity=4)
    names = layouts_of(ExpertCache)["counters"].entries
    counted = {"routed": 9, "hit": 5, "missed": 4, "copied": 3, "prefetched": 2, "prefetch_hits": 1}
    counted["prefetched_eighths"] = 8
    model.expert_runner.cache.counters[:] = [counted[name] for name in names]
    found = model.expert_runner.counters()
    assert (found.routed, found.hit, found.missed) == (9, 5, 4)
    assert (found.experts_copied, found.prefetched, found.prefetch_hits) == (3, 2, 1)
    assert found.prefetch_bytes == types.FETCH_SEGMENT_BYTES


def test_prefetch_signals_are_the_documented_numbers() -> None:
    """After a layer's slots are assigned, after its fetch, and after its own assignment."""
    (signal,) = documented_index(
        layouts.fields_of(PrefetchState)["start_signal"], r"FETCH_BLOCKS\], (.+?)\. "
    )
    ops = ReferenceOps()
    model = make_driver(MODELS[0], ops=ops, capacity=4)
    cache, host = model.expert_runner.cache, model.expert_runner.host_experts
    state = make_prefetch_state(ops, 4, 8, 2)
    state.ids[:] = np.arange(2)
    state.weights[:] = 0.5
    for step in (1, 2):
        for layer in range(4):
            ids = np.array([[4, 5]], np.uint16)
            ops.assign_slots(model.expert_runner.assignment, cache, layer, ids, state)
            assert (state.start_signal[layer] == evaluate(signal, step=step, n=15)).all()
            if layer < 3:
                assert (state.start_signal[layer + 1] == evaluate(signal, step=step, n=0)).all()
            assert host is not None
            ops.fetch_experts(cache, model.expert_runner.assignment, host, layer, prefetch=state)
            if layer < 3:
                assert (state.start_signal[layer + 1] == evaluate(signal, step=step, n=8)).all()
