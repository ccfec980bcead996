"""What tools/kernel_report reads from machine code, and its page."""

from collections import Counter
from pathlib import Path

import pytest

from osmium.kernels.ptx import kernel
from tests.ptx.geforce import (
    CARDS,
    H200,
    MODELS,
    Card,
    assemble_all,
    blocks_per_sm,
    expected_tiles,
    launches,
    mma_per_chunk,
    report_kernels,
)
from tests.ptx.geforce_page import loop_rows, resource_rows, table
from tests.ptx.sass import Assembled, find_tool, inner_loop, instruction_class, parse_sass

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels-on-geforce.md"

SASS = """
.L_x_0:
        /*0000*/                   LDG.E.128 R4, [R2.64] ;
        /*0010*/                   IADD3 R2, R2, 0x10, RZ ;
        /*0020*/               @P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   LDSM.16.M88.4 R8, [R3] ;
.L_x_2:
        /*0040*/                   IMMA.16832.S8.S8 R8, R8.ROW, R4.COL, RZ ;
        /*0050*/              @!PT LDGSTS.E.BYPASS.128 [R7], [R8.64], P2 ;
        /*0060*/                   I2FP.F32.S32 R8, R8 ;
        /*0070*/                   FFMA R9, R8, R8, R9 ;
        /*0080*/               @P0 BRA `(.L_x_2) ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/              @!P0 BRA `(.L_x_1) ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
"""


def card(name: str) -> Card:
    return next(card for card in CARDS if card.name == name)


def test_the_shortest_loop_with_all_mma_is_the_inner_one() -> None:
    opcodes, loops = parse_sass(SASS)
    assert len(opcodes) == 12 and loops == [(0, 2), (4, 8), (3, 10)], "not the jump to itself"
    assert inner_loop(opcodes, loops) == opcodes[4:9]
    assert Counter(map(instruction_class, opcodes[4:9])) == {
        "mma": 1, "global": 1, "integer": 1, "float": 1, "control": 1,
    }  # fmt: skip
    assert [instruction_class(op) for op in opcodes[9:]] == ["barrier", "control", "control"]
    assert instruction_class("LDSM.16.M88.4") == "shared"


def test_without_mma_the_longest_innermost_loop_counts() -> None:
    opcodes, loops = parse_sass(SASS.replace("IMMA", "IMAD"))
    assert inner_loop(opcodes, loops) == opcodes[4:9]
    assert inner_loop(opcodes, []) == opcodes


@pytest.mark.parametrize(
    ("target", "registers", "dynamic", "blocks"),
    [
        ("sm_86", 224, 55_808, 1),  # int4_moe_gemm_up_f32 of the 122B
        ("sm_86", 224, 50_176, 2),  # exactly 100 KiB with 1 KiB more for each
        ("sm_86", 224, 50_177, 1),
        ("sm_90", 224, 80_640, 2),
        ("sm_90", 128, 0, 4),
        ("sm_90", 16, 0, 16),
        ("sm_86", 16, 0, 12),
    ],
)
def test_registers_shared_memory_and_warps_limit_blocks(
    target: str, registers: int, dynamic: int, blocks: int
) -> None:
    made = Assembled(registers, 0, 0, Counter(), 0)
    assert blocks_per_sm(kernel("int4_gemm_f32"), made, dynamic, target) == blocks


def test_specified_rates_follow_from_operations_per_clock() -> None:
    """The papers' TOPS and TFLOP/s of dense int8, and of f16 with sums in f32."""
    for name, int8, f16 in (
        ("RTX 3090", 284, 71), ("RTX 4090", 660.6, 165.2), ("RTX 5090", 838, 209.5),
    ):  # fmt: skip
        assert card(name).tera_ops(True) == pytest.approx(int8, rel=0.005)
        assert card(name).tera_ops(False) == pytest.approx(f16, rel=0.005)
        assert (card(name).clocks(True), card(name).clocks(False)) == (16, 32)
    assert H200.tera_ops(True) == pytest.approx(1270, rel=0.001)


@pytest.mark.parametrize("model", MODELS)
def test_recorded_launches_are_those_of_a_prefill_step(model: str) -> None:
    made = launches(model, card("RTX 3090"), 4096, 0)
    counts = Counter(one.name for one, _, _ in made)
    assert counts["gqa_prefill_fp8_256"] == 1 and counts["delta_chunk_scan_f32"] == 3
    assert counts["int4_gemm_f32"] == 8 and counts["int4_moe_gemm_up_f32"] == 4
    with_mma = {name for name in counts if "gemm" in name or "gqa_prefill" in name}
    assert with_mma <= report_kernels().keys()
    (grid,) = {grid for one, grid, _ in made if one.name == "gqa_prefill_fp8_256"}
    assert grid == ({"122B": 1024, "35B": 512}[model], 2, 1), "64 rows of heads and tokens a block"


def test_each_experts_last_tile_is_half_full_on_average() -> None:
    ups = [
        one for one in launches("122B", card("RTX 3090"), 4096, 0) if "_moe_gemm_up" in one[0].name
    ]
    tiles = sum(expected_tiles(one, 4096) for one in ups) / 4
    assert tiles == pytest.approx(4096 * 8 / 64 + 128)


def test_a_chunks_mma_are_counted() -> None:
    """The scan's warps are equal: their unrolled loop has as many in machine code."""
    assert mma_per_chunk("delta_chunk_scan_f32") == 576
    assert 624 < mma_per_chunk("delta_chunk_prepare_f32") < 864, "its two loops run up to twice"


@pytest.mark.skipif(find_tool("ptxas") is None, reason="ptxas is not installed (dev extra)")
def test_the_page_has_what_ptxas_makes_now() -> None:
    """Of two kernels; tests/long/test_kernel_page.py compares the whole page."""
    disassembler = find_tool("nvdisasm")
    kernels = {
        name: one for name, one in report_kernels().items()
        if name in ("gather_add_f32", "int4_moe_gemm_up_f32")
    }  # fmt: skip
    made = assemble_all(kernels, find_tool("ptxas") or "", disassembler)
    text = PAGE.read_text()
    for name, one in kernels.items():
        rows = resource_rows(name, one, made)
        if disassembler is not None:
            rows += loop_rows(name, made)
        for line in table((), rows).splitlines()[2:]:
            assert line in text.splitlines(), f"{line}: run tools/kernel_report --write"
