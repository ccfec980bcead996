"""wgmma in the PTX interpreter: its product, and the faults of accesses without a wait or fence."""

import re

import numpy as np
import pytest

from osmium.kernels.ptx import Kernel, parse
from tests.ptx.interpreter import InterpretedRuntime, PtxFault

WGMMA = "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8"
SUMS = "{" + ", ".join(f"%c{i}" for i in range(32)) + "}"

TEXT = f"""//: entry snippet
//: grid 1
//: block 128
//: dynamic 8192 + 0 * size
//: param a u64 in u32[4, 128]
//: param b u64 in u8[64, 128]
//: param out u64 out u32[32, 128]
//: param size u32
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 memory[];
.visible .entry snippet(.param .u64 a, .param .u64 b, .param .u64 out, .param .u32 size)
.maxntid 128
{{
    .reg .pred %yes, %no, %first_warp, %some;
    .reg .b32 %t, %row, %unit, %at, %a<4>, %c<32>, %b<4>;
    .reg .b64 %in, %matrix, %to, %wide;
    mov.u32 %t, %tid.x;
    setp.lt.u32 %first_warp, %t, 32;
    setp.eq.u32 %yes, %t, %t;
    setp.ne.u32 %no, %t, %t;
    mov.u64 %matrix, 0x4000004000010000;

    // 16 bytes of four rows; unit u of row r goes to unit u ^ (r % 8)
    ld.param.u64 %in, [b];
    mul.wide.u32 %wide, %t, 16;
    add.u64 %in, %in, %wide;
    shr.u32 %row, %t, 3;
    xor.b32 %unit, %row, %t;
    and.b32 %unit, %unit, 7;
    setp.lt.u32 %some, %unit, 4; // in each warp
    mul.lo.u32 %at, %row, 128;
    mad.lo.u32 %at, %unit, 16, %at;
{
    "".join(
        f'''
    ld.global.v4.b32 {{%b0, %b1, %b2, %b3}}, [%in+{2048 * i}];
    st.shared.v4.b32 [%at+{2048 * i}], {{%b0, %b1, %b2, %b3}};'''
        for i in range(4)
    )
}
    fence.proxy.async.shared::cta;
    bar.sync 0;

    ld.param.u64 %in, [a];
    mul.wide.u32 %wide, %t, 4;
    add.u64 %in, %in, %wide;
{"".join(f"    ld.global.b32 %a{i}, [%in+{512 * i}];" for i in range(4))}
    add.u64 %matrix, %matrix, 4; // inputs 64 to 95
    wgmma.fence.sync.aligned;
    {WGMMA} {SUMS}, {{%a0, %a1, %a2, %a3}}, %matrix, %no;
    // second
    {WGMMA} {SUMS}, {{%a0, %a1, %a2, %a3}}, %matrix, %yes;
    wgmma.commit_group.sync.aligned;
    // flight
    wgmma.wait_group.sync.aligned 0;
    ld.param.u64 %to, [out];
    add.u64 %to, %to, %wide;
{"".join(f"    st.global.b32 [%to+{512 * i}], %c{i};" for i in range(32))}
    ret;
}}
"""


def compute(text: str, a: np.ndarray, b: np.ndarray, seed: int = 0) -> np.ndarray:
    """`out` of a text, for operands of the kernel above."""
    machine = InterpretedRuntime(seed, has_wgmma=True)
    kernel = Kernel("snippet", lambda: parse(text, "snippet.ptx"))
    arrays = [machine.empty(x.shape, x.dtype) for x in (a, b)]
    for array, value in zip(arrays, (a, b), strict=True):
        machine.copy_h2d(array, value)
    out = machine.empty((32, 128), np.uint32)
    machine.stream.launch(kernel, (1,), (*arrays, out, 0))
    return machine.copy_d2h(out)


def operands(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return (
        rng.integers(0, 1 << 32, (4, 128), np.uint32),
        rng.integers(0, 256, (64, 128), dtype=np.uint8),
    )


def test_wgmma_multiplies_fragments_by_a_swizzled_matrix(rng: np.random.Generator) -> None:
    a, b = operands(rng)
    found = compute(TEXT, a, b, int(rng.integers(99))).view(np.int32)
    rows = np.zeros((64, 32), np.int64)
    for t in range(128):
        warp, g, q = t // 32, t % 32 // 4, t % 4
        for i in range(4):
            four = a[i, t : t + 1].view(np.int8)
            rows[16 * warp + g + i % 2 * 8, i // 2 * 16 + 4 * q :][:4] = four
    wanted = 2 * rows @ b[:, 64:96].view(np.int8).astype(np.int64).T
    for t in range(128):
        warp, g, q = t // 32, t % 32 // 4, t % 4
        for i in range(32):
            row = 16 * warp + g + i % 4 // 2 * 8
            assert found[i, t] == wanted[row, i // 4 * 8 + 2 * q + i % 2]


FAULTS = {
    "a sum is read": ("// flight", "add.u32 %t, %c3, %t;", "wgmma in flight use %c3"),
    "a sum is written": ("// flight", "mov.u32 %c3, %t;", "wgmma in flight use %c3"),
    "an operand is read": ("// flight", "add.u32 %t, %a3, %t;", "wgmma in flight use %a3"),
    "an operand is written": ("// second", "mov.u32 %a0, 0;", "wgmma in flight use %a0"),
    "its matrix is stored": ("// flight", "st.shared.b32 [%at], %t;", "wgmma in flight read it"),
    "its matrix is copied": (
        "// flight", "cp.async.ca.shared.global [%at], [%in], 4;", "wgmma in flight read it",
    ),
    "no wait": ("wgmma.wait_group.sync.aligned 0;", "", "wgmma in flight use %c0"),
    "a wait for others": (
        "wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;", "in flight use %c0",
    ),
    "an open group": ("wgmma.commit_group.sync.aligned;", "", "wgmma in flight use %c0"),
    "no fence of registers": ("wgmma.fence.sync.aligned;", "", "no wgmma.fence since"),
    "registers are written after their fence": (
        "wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned; mov.u32 %a1, 0;",
        "no wgmma.fence since %a1",
    ),
    "no proxy fence": ("fence.proxy.async.shared::cta;", "", "no fence.proxy.async since"),
    "the proxy fence comes too early": (
        "bar.sync 0;", "st.shared.b32 [%at], %t; bar.sync 0;", "no fence.proxy.async since",
    ),
    "another swizzle": ("0x4000004000010000", "0x8000004000010000", "descriptor 0x800000400001"),
    "another distance of rows": ("0x4000004000010000", "0x4000002000010000", "is not known"),
    "lanes differ": ("// second", "cvt.u64.u32 %matrix, %t;", "lanes differ in the matrix"),
    "lanes are missing": ("wgmma.fence", "@%some wgmma.fence", "lanes are missing at a wgmma"),
    "a warp issues less": (
        "// second",
        f"@%first_warp bra.uni same; {WGMMA} {SUMS}, {{%a0, %a1, %a2, %a3}}, %matrix, %yes; same:",
        "different wgmma",
    ),
    "a warp leaves": ("wgmma.wait_group.sync.aligned 0;", "ret;", "a warp has left"),
    "an unknown type": ("m64n64k32.s32.s8.s8", "m64n64k16.f32.bf16.bf16", "not known"),
}  # fmt: skip
"""A part of the text, what replaces it, and the fault."""


@pytest.mark.parametrize("what", FAULTS)
def test_an_early_access_or_a_missing_fence_is_a_fault(rng: np.random.Generator, what: str) -> None:
    old, new, fault = FAULTS[what]
    with pytest.raises(PtxFault, match=re.escape(fault)):
        compute(TEXT.replace(old, new), *operands(rng))


def test_a_store_after_the_wait_is_no_fault(rng: np.random.Generator) -> None:
    line = "wgmma.wait_group.sync.aligned 0;"
    after = f"{line} bar.sync 0; st.shared.b32 [%at], %t; mov.u32 %a0, %t;"
    a, b = operands(rng)
    assert np.array_equal(compute(TEXT.replace(line, after), a, b), compute(TEXT, a, b))
