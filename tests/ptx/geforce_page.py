"""The text of docs/kernels-on-geforce.md, which tools/kernel_report writes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from osmium.kernels.ptx import Kernel
from tests.ptx.geforce import (
    CARDS,
    H200,
    MEASURED_PREFILL,
    MEASURED_SHARE,
    MODELS,
    PROMPT,
    RESOURCES,
    TARGETS,
    Card,
    Made,
    blocks_per_sm,
    dynamic_bytes,
    estimate,
    is_int8,
    mma_per_chunk,
    no_overlap_share,
    report_kernels,
    share,
)
from tests.ptx.sass import CLASSES

__all__ = ["loop_rows", "page", "resource_rows"]

CARD_OF = {card.target: card for card in CARDS}
"""A GPU of each target."""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def short(targets: Iterable[str]) -> str:
    return ", ".join(target.removeprefix("sm_") for target in targets)


def merged(find: Callable[[str], Sequence[Any]]) -> list[tuple[str, Sequence[Any]]]:
    """(targets, values) of a kernel, where equal targets share a row."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for target in TARGETS:
        found.setdefault(tuple(find(target)), []).append(target)
    return [(short(targets), values) for values, targets in found.items()]


def resource_rows(name: str, one: Kernel, made: Made) -> list[list[Any]]:
    """Rows of the first table: targets, registers, spills, shared memory and blocks by model."""

    def find(target: str) -> list[Any]:
        has = made[name, target]
        values: list[Any] = [has.registers, has.spilled, has.static_shared]
        for model in MODELS:
            dynamic = dynamic_bytes(one, model, CARD_OF[target])
            fits = "-" if dynamic is None else blocks_per_sm(one, has, dynamic, target)
            values += ["-" if dynamic is None else dynamic, fits]
        return values

    return [[f"`{name}`", targets, one.contract.block, *values] for targets, values in merged(find)]


def loop_rows(name: str, made: Made) -> list[list[Any]]:
    """Rows of the second table: instructions of the inner loop by class."""

    def find(target: str) -> list[Any]:
        loop = made[name, target].loop
        return [loop.total(), *(loop[kind] for kind in CLASSES)]

    return [[f"`{name}`", targets, *values] for targets, values in merged(find)]


def rate_rows(name: str, made: Made) -> list[list[Any]]:
    """Rows of the third table: one per GPU."""
    rows = []
    for card in CARDS:
        has = made[name, card.target]
        expected, digits = share(name, card, made), 2 if "gemm" in name else 1
        rows.append([
            f"`{name}`", card.name, f"{has.loop.total() / has.loop['mma']:.1f}",
            f"{card.clocks(is_int8(name)):.1f}", f"{no_overlap_share(has, card, name):.2f}",
            f"{expected:.2f}", f"{expected * card.tera_ops(is_int8(name)) / digits:.0f}",
        ])  # fmt: skip
    return rows


def card_row(card: Card) -> list[Any]:
    spec = card.spec
    return [
        card.name, card.target, spec.sm_count, card.clock_ghz, f"{card.tera_ops(True):.0f}",
        f"{card.tera_ops(False):.0f}", f"{spec.memory_gb_s:.0f}", f"{spec.link_gb_s:.0f}",
        RESOURCES[card.target].shared >> 10,
    ]  # fmt: skip


def estimate_rows(made: Made) -> tuple[list[list[Any]], float]:
    """Rows of the last table, and the part of its estimate that the H200 reaches."""
    estimates = [(model, card, estimate(model, card, made)) for model in MODELS for card in CARDS]
    measured_model, measured_card, measured = MEASURED_PREFILL
    (reached,) = [
        measured / one.tokens_per_s()
        for model, card, one in estimates
        if one is not None and (model, card.name) == (measured_model, measured_card)
    ]
    rows: list[list[Any]] = []
    for model, card, one in estimates:
        if one is None:
            rows.append([model, card.name, *["does not fit"], *["-"] * 9])
            continue
        rows.append([
            model, card.name, one.slots, one.chunk, *(f"{us:.1f}" for us in one.us.values()),
            f"{one.link_s:.2f}", f"{one.tokens_per_s():,.0f}", f"{one.tokens_per_s(reached):,.0f}",
        ])  # fmt: skip
    return rows, reached


def blocks_text(kernels: list[str]) -> str:
    """What the blocks of matrix kernels on GeForce mean; `kernels` have one per multiprocessor."""
    if not kernels:
        return "On GeForce an SM holds two blocks or more of each matrix kernel."
    return f"""On GeForce an SM holds one block only of these matrix kernels, for shared memory:
{", ".join(f"`{name}`" for name in kernels)}.
Each of its schedulers then has one warp, so nothing hides that warp's waits. The shares below
do not count this: the H200, whose share they rest on, holds two blocks."""


def page(made: Made, versions: tuple[str, str]) -> str:
    """The page, from kernels assembled by ptxas and read by nvdisasm of these versions."""
    kernels = report_kernels()
    with_mma = [name for name in kernels if made[name, "sm_86"].loop["mma"]]
    rows, reached = estimate_rows(made)
    one_block = sorted({
        name
        for name, one in kernels.items()
        for model in MODELS
        if "gemm" in name
        and (dynamic := dynamic_bytes(one, model, CARD_OF["sm_86"])) is not None
        and blocks_per_sm(one, made[name, "sm_86"], dynamic, "sm_86") == 1
    })  # fmt: skip
    spills = sum(one.spilled for one in made.values())
    chunk = {name: mma_per_chunk(name) for name in kernels if name.startswith("delta_chunk")}
    return f"""# Prefill kernels on GeForce

None of these GeForce cards has run Osmium yet. This page has what ptxas and the disassembler show of each prefill kernel,
and the rates that follow. `tools/kernel_report --write` writes it, from ptxas {
        versions[0]
    } and nvdisasm {versions[1]}.
**Every rate and time on it is an estimate**, but for those that are called measured.

## GPUs

{
        table(
            (
                "GPU",
                "target",
                "SMs",
                "GHz",
                "int8 TOPS",
                "f16 TFLOP/s",
                "VRAM GB/s",
                "link GB/s",
                "shared KiB/SM",
            ),
            map(card_row, CARDS),
        )
    }

- GHz is the boost clock of the maker's specification. Memory, link and multiprocessors (SMs) are those of
  `osmium/engine/gpus.py`.
- int8 is dense mma: 2,048 operations per clock and SM in NVIDIA's papers on the GA102, Ada and RTX Blackwell architectures.
  f16 with sums in f32 is a quarter of that. The H200's two rates are measured, by mma alone.
- Limits of an SM are those of the CUDA programming guide.

## Registers, shared memory, blocks

Bytes. Spilled bytes in all kernels: {
        spills
    }. Dynamic shared memory is the most of a model's launches in the default formats:
INT4 experts and mixers, INT8 shared experts, FP8 KV. A dash: not launched there. Blocks are those that an SM holds at once.

{
        table(
            (
                "kernel",
                "sm_",
                "threads",
                "registers",
                "spilled",
                "static",
                "dynamic 122B",
                "blocks",
                "dynamic 35B",
                "blocks",
            ),
            [row for name, one in kernels.items() for row in resource_rows(name, one, made)],
        )
    }

{blocks_text(one_block)}

## Instructions of the inner loop

The loop with the most mma; without mma the longest loop that has no other inside. Each instruction takes an issue slot.
Conversions count as float, exchange between lanes as shared, `cp.async` as global, waits as barrier. On sm_120 ptxas adds a
NOP (control) after many mma.

{
        table(
            ("kernel", "sm_", "slots", *CLASSES),
            [row for name in kernels for row in loop_rows(name, made)],
        )
    }

## Share of the mma rate

Slots per mma are issue slots of the loop. Clocks per mma are those for which it occupies one of an SM's four tensor pipes.
The share without overlap is what remains if nothing else is issued while an mma runs. On the H200
`{MEASURED_SHARE[0]}` reaches {
        MEASURED_SHARE[1]
    } (measured, 122B's shape, 640 rows per expert). That is
{
        MEASURED_SHARE[1]
        / no_overlap_share(
            made[MEASURED_SHARE[0], H200.target], H200, MEASURED_SHARE[0]
        ):.2f} of its share without overlap. The expected share takes the same part everywhere. TFLOP/s count
a multiply-add of the matrix as two operations. Matrix kernels need two mma for it: for both digits, or for hi and lo.

{
        table(
            (
                "kernel",
                "GPU",
                "slots/mma",
                "clocks/mma",
                "without overlap",
                "expected share",
                "TFLOP/s",
            ),
            [row for name in with_mma for row in rate_rows(name, made)],
        )
    }

## A prompt of {PROMPT:,} tokens

Microseconds per token. The launches are those of the engine's own operations, recorded without a GPU. A kernel takes the
longer of two times: its mma at the expected share, or its bytes at {
        CARDS[0].spec.vram_copy_gb_s
        / CARDS[0].spec.memory_gb_s:.0%} of the VRAM rate. Bytes are those of the
contracts; for experts, each weight and each pair's rows once. The delta rule's mma per warp and chunk of 64 tokens are
counted in the interpreter: {
        ", ".join(f"{count:.0f} in `{name}`" for name, count in chunk.items())
    }. Its scan takes whole rounds of blocks.

Slots are those of `osmium plan` with `--attention-quant int4`. Where all experts are resident, steps are the default's.
Otherwise one step has the whole prompt (`--prefill-chunk {
        PROMPT
    }`), and each missing expert crosses the link once, beside the
kernels.

{
        table(
            (
                "model",
                "GPU",
                "slots",
                "step",
                *(
                    part
                    for part in ("experts", "dense matrices", "attention", "delta rule", "the rest")
                ),
                "link s",
                "tok/s by kernels",
                "tok/s expected",
            ),
            rows,
        )
    }

The {MEASURED_PREFILL[0]} on the {MEASURED_PREFILL[1]} reads {
        MEASURED_PREFILL[2]:,} tok/s (measured), {
        reached:.2f} of the estimate by kernels. What lies between kernels,
generic kernels' arithmetic and L2 take the rest. The expected rate takes the same part on each GPU, and is bound by the link
where that is slower.
"""  # noqa: E501
