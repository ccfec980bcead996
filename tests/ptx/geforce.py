"""What prefill kernels should reach on GPUs that nothing was run on: docs/kernels-on-geforce.md.

Resources and instructions are read from ptxas and the disassembler (sass.py).  Launches are those
of the engine's own operations, recorded without a GPU.  Rates follow from specifications and from
one share measured on an H200: every time is an estimate.
"""

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from osmium.bench.profile import launch_bytes
from osmium.config import EngineConfig
from osmium.engine.gpus import GpuSpec, find_gpu
from osmium.engine.plan import DoesNotFit
from osmium.experts.cache import resident_cache
from osmium.experts.runner import ExpertRunner
from osmium.kernels.count_uses import COUNT_USES
from osmium.kernels.group_by_expert import EXPERT_HISTOGRAM, GROUP_BY_EXPERT
from osmium.kernels.ptx import Kernel, kernel
from osmium.models import model_class
from osmium.models.state import make_state
from osmium.ops import StepInputs
from osmium.ops.gpu import GpuOps
from osmium.ops.grouped import TILE_ROWS
from osmium.ops.runtime import DeviceRuntime
from osmium.planning import plan_for
from osmium.weights.synthetic import open_synthetic
from tests.ops.cases import run
from tests.ptx.cases_attention import delta
from tests.ptx.interpreter import Instruction, InterpretedRuntime, parse_program
from tests.ptx.kernels import NAMES, kernel_text
from tests.ptx.sass import Assembled, assemble
from tests.ptx.shape_runtime import Launch, ShapeRuntime

__all__ = [
    "CARDS", "H200", "MEASURED_PREFILL", "MEASURED_SHARE", "MODELS", "PROMPT", "TARGETS", "Card",
    "Estimate", "assemble_all", "blocks_per_sm", "dynamic_bytes", "estimate", "is_int8", "launches",
    "mma_per_chunk", "no_overlap_share", "report_kernels", "share",
]  # fmt: skip

Made = Mapping[tuple[str, str], Assembled]
"""By kernel and target."""

MODELS = {"122B": "synthetic:qwen3.5-122b-a10b", "35B": "synthetic:qwen3.5-35b-a3b"}

TARGETS = ("sm_86", "sm_89", "sm_90", "sm_120")

PREFIXES = (
    "int4_gemm", "int8_gemm", "bf16_gemm", "int4_moe_gemm", "int8_moe_gemm", "bf16_moe_gemm",
    "split_digits", "gqa_prefill",
    "delta_chunk", "causal_conv1d", "gather_add", "expert_histogram", "group_by_expert",
    "count_uses",
)  # fmt: skip
"""Beginnings of the names of prefill kernels."""

MEASURED_SHARE = ("int4_moe_gemm_up_f32", 0.545)
"""Share of an H200's measured int8 mma rate: 122B's up matrices, 640 rows an expert (2026-11)."""


@dataclass(frozen=True)
class Resources:
    """What a multiprocessor has."""

    shared: int
    """Bytes of shared memory, of which each block takes 1 KiB more than it declares."""
    most_shared: int
    """Most bytes of a block."""
    warps: int
    blocks: int


RESOURCES = {
    "sm_86": Resources(100 << 10, 99 << 10, 48, 16),
    "sm_89": Resources(100 << 10, 99 << 10, 48, 24),
    "sm_90": Resources(228 << 10, 227 << 10, 64, 32),
    "sm_120": Resources(100 << 10, 99 << 10, 48, 24),
}
"""By target, from the CUDA programming guide, technical specifications per compute capability."""

REGISTERS, REGISTER_UNIT, SHARED_UNIT, RESERVED = 65_536, 256, 128, 1024


@dataclass(frozen=True)
class Card:
    """A GPU and its rates."""

    name: str
    """As in engine/gpus.py."""
    target: str
    clock_ghz: float
    """Boost clock, as specified."""
    int8_ops: int
    """Operations per clock and multiprocessor by dense int8 mma; a multiply-add is two."""
    f16_ops: int
    """The same for f16 and bf16 with sums in f32."""

    @property
    def spec(self) -> GpuSpec:
        return find_gpu(self.name)

    def clocks(self, is_int8: bool) -> float:
        """Clocks that an mma occupies one of four tensor pipes: m16n8k32 s8, or m16n8k16 f16."""
        ops = 2 * 16 * 8 * (32 if is_int8 else 16)
        return ops * 4 / (self.int8_ops if is_int8 else self.f16_ops)

    def tera_ops(self, is_int8: bool) -> float:
        """Specified rate of the whole GPU, 10^12 operations per second."""
        return (
            (self.int8_ops if is_int8 else self.f16_ops) * self.spec.sm_count * self.clock_ghz / 1e3
        )


H200 = Card("H200", "sm_90", 1.98, 1, 1)
H200 = replace(
    H200,
    int8_ops=round(1270e3 / (132 * H200.clock_ghz)),
    f16_ops=round(641e3 / (132 * H200.clock_ghz)),
)
"""Rates measured by mma.sync alone, 1,270 and 641 (2026-11)."""

CARDS = (
    Card("RTX 3060 12GB", "sm_86", 1.777, 2048, 512),
    Card("RTX 3090", "sm_86", 1.695, 2048, 512),
    Card("RTX 4090", "sm_89", 2.52, 2048, 512),
    Card("RTX 5090", "sm_120", 2.407, 2048, 512),
    H200,
)


# -- launches, recorded without a GPU --------------------------------------------------------------


@cache
def launches(model: str, card: Card, tokens: int, past: int) -> list[Launch]:
    """The launches of a prefill step of four layers, three delta nets and one attention, with all
    experts resident: INT4 experts and mixers, INT8 shared experts, FP8 KV."""
    source = open_synthetic(f"{MODELS[model]}:4", EngineConfig(attention_quant="int4"))
    config = source.config
    machine = ShapeRuntime(card.spec.sm_count, RESOURCES[card.target].most_shared)
    ops = GpuOps(cast(DeviceRuntime, machine))
    slots = ops.empty((4, config.num_experts, source.layout.nbytes), np.uint8)
    experts = ExpertRunner(
        ops, None, resident_cache(ops, source.layout, slots), tokens, config.top_k
    )
    weights = source.upload(ops)
    made = model_class(config.model_type)(ops, config, weights, experts, tokens)
    pages = -(-(past + tokens) // 64)
    state = make_state(ops, config, pages, 64, 1, "fp8_e4m3")
    i32 = ops.empty((tokens,), np.int32)
    step = StepInputs(tokens, 1, 64, i32, i32, i32, i32[:2], i32[:1], i32[:1],
                      ops.empty((1, pages), np.int32), past + tokens)  # fmt: skip
    machine.launches.clear()
    made.forward(step, state)
    return machine.launches


# -- resources -------------------------------------------------------------------------------------


def report_kernels() -> dict[str, Kernel]:
    """The prefill kernels of all targets by name, hand-written and compiled."""
    compiled = {one.name: one for one in (COUNT_USES, EXPERT_HISTOGRAM, GROUP_BY_EXPERT)}
    written = {name: kernel(name) for name in NAMES if name.startswith(PREFIXES)}
    on_all = {name: one for name, one in written.items() if {*TARGETS} <= {*one.contract.targets}}
    return on_all | compiled


def assemble_all(kernels: Mapping[str, Kernel], ptxas: str, disassembler: str | None) -> Made:
    """Each of these kernels for each target."""
    work = [(name, target) for name in kernels for target in TARGETS]

    def one(key: tuple[str, str]) -> Assembled:
        return assemble(kernels[key[0]].contract.text, key[1], ptxas, disassembler)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(work, pool.map(one, work), strict=True))


def dynamic_bytes(one: Kernel, model: str, card: Card) -> int | None:
    """Most dynamic shared memory of its launches in a model's prefill; None if it is not launched.

    A kernel for INT8 experts, bf16 KV or heads of 128 is not launched in the default formats."""
    if one.contract.dynamic is None:
        return 0
    found = [
        one.contract.dynamic({p.name: v for p, v in zip(one.contract.params, values, strict=True)})
        for other, _, values in launches(model, card, 4096, 0)
        if other.name == one.name
    ]
    return max(found, default=None)


def blocks_per_sm(one: Kernel, made: Assembled, dynamic: int, target: str) -> int:
    """Blocks that a multiprocessor holds at once."""
    has, warps = RESOURCES[target], one.contract.block // 32
    registers = -(-made.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT * warps
    shared = -(-(made.static_shared + dynamic + RESERVED) // SHARED_UNIT) * SHARED_UNIT
    return min(has.blocks, has.warps // warps, REGISTERS // registers, has.shared // shared)


# -- rates -----------------------------------------------------------------------------------------


def is_int8(name: str) -> bool:
    """Whether a kernel's mma are int8."""
    return "gemm" in name and not name.startswith("bf16")


def no_overlap_share(made: Assembled, card: Card, name: str) -> float:
    """Share of the mma rate if no other instruction of the loop were issued while an mma runs."""
    mma = made.loop["mma"]
    clocks = mma * card.clocks(is_int8(name))
    return clocks / (clocks + made.loop.total() - mma)


def share(name: str, card: Card, assembled: Made) -> float:
    """Expected share of the mma rate: no_overlap_share times what an H200 reaches of its own."""
    measured_name, measured = MEASURED_SHARE
    factor = measured / no_overlap_share(assembled[measured_name, H200.target], H200, measured_name)
    return factor * no_overlap_share(assembled[name, card.target], card, name)


@cache
def mma_per_chunk(name: str) -> float:
    """mma of a warp per whole chunk of 64 tokens, counted in the interpreter."""
    counted: Counter[str] = Counter()
    machine, program = InterpretedRuntime(), parse_program(kernel_text(name))

    def counting(one: Instruction) -> Instruction:
        execute = one.run
        if execute is None or not one.text.startswith("mma"):
            return one

        def count(w: Any, mask: Any) -> None:
            counted[name] += 1
            execute(w, mask)

        return replace(one, run=count)

    machine.stream.programs[name] = replace(program, code=[counting(x) for x in program.code])
    case = delta("delta_rule_chunk", (1, 1), (128, 128), (64,), (64,))
    run(case(np.random.default_rng(0)), GpuOps(machine))
    blocks = 2 if name.startswith("delta_chunk_scan") else 1
    return counted[name] / (4 * blocks)


def mma_seconds(
    launch: Launch, tokens: int, past: int, card: Card,
    assembled: Made,
) -> float:  # fmt: skip
    """Time of the mma of a launch at the kernel's expected share; 0 for kernels without."""
    one, grid, values = launch
    name = one.name
    made = assembled.get((name, card.target))
    if made is None or not made.loop["mma"]:
        return 0.0
    named = SimpleNamespace(**{p.name: v for p, v in zip(one.contract.params, values, strict=True)})
    at_once = card.spec.sm_count
    if "gemm" in name:
        tiles = expected_tiles(launch, tokens) if "moe" in name else grid[0]
        rows, columns = (32, 64) if "small" in name else (64, 128)
        macs = rows * columns * named.k * 2  # two digits, or hi and lo
        per_warp = tiles * grid[1] * macs / (16 * 8 * (32 if is_int8(name) else 16)) / 4
    elif name.startswith("gqa_prefill"):
        rows = 64 if "fp8" in name else 32
        per_warp = grid[0] * grid[1] * ((past + tokens / 2) / rows + 0.5) * made.loop["mma"]
    elif name == "delta_chunk_prepare_f32":
        per_warp = -(-tokens // 64) * grid[1] * mma_per_chunk(name)
    else:  # the scan: blocks run through the chunks one after another
        blocks = grid[0] * grid[1] * grid[2]
        per_warp = -(-blocks // at_once) * at_once * -(-tokens // 64) * mma_per_chunk(name)
    clocks = per_warp / at_once * card.clocks(is_int8(name)) / share(name, card, assembled)
    return float(clocks / (card.clock_ghz * 1e9))


TOP_K = 8
"""Experts per token of both models."""


def expected_tiles(launch: Launch, tokens: int) -> float:
    """Expected tiles of 64 rows of a launch: the last tile of each expert is half full.

    The grid has room for as many last tiles as there are experts.
    """
    one, grid, values = launch
    named = {p.name: v for p, v in zip(one.contract.params, values, strict=True)}
    whole, experts = tokens * TOP_K / TILE_ROWS, len(named["expert_slots"])
    return float(grid[0] * (whole + experts / 2) / (whole + experts))


def memory_seconds(launch: Launch, tokens: int, card: Card) -> float:
    """Time of the bytes that the contract counts; for experts, of each weight and pair once."""
    one, grid, values = launch
    named = SimpleNamespace(**{p.name: v for p, v in zip(one.contract.params, values, strict=True)})
    pairs = tokens * TOP_K
    if "moe_gemm" in one.name:
        experts, columns = len(named.expert_slots), named.n * (2 if "_up_" in one.name else 1)
        bits = {"int4": 4, "int8": 8, "bf16": 16}[one.name[:4]]
        nbytes = experts * columns * named.k * bits // 8 + pairs * (named.n * 4 + named.k * 2)
        nbytes *= grid[0] / (pairs / TILE_ROWS + experts)
    elif "of_tiles" in one.name:
        nbytes = pairs * 6 * named.width * grid[0] / (pairs / TILE_ROWS + len(named.expert_slots))
    else:
        nbytes = launch_bytes(launch)
    return float(nbytes) / (card.spec.vram_copy_gb_s * 1e9)


GROUPS = {
    "experts": ("int4_moe", "int8_moe", "bf16_moe"),
    "dense matrices": ("int4_gemm", "int8_gemm", "bf16_gemm"),
    "attention": ("gqa_prefill",),
    "delta rule": ("delta_chunk",),
}
"""Parts of a prefill by kernels; all others are bound by memory."""


PROMPT = 4096
"""Tokens of the estimated prompt."""

MEASURED_PREFILL = ("35B", "H200", 28_218)
"""Model, GPU and tokens per second of such a prompt: how much of an estimate a prefill reaches.
Source: docs/experiments/2026-11-30-resident-prefill.md."""


@dataclass(frozen=True)
class Estimate:
    """A prompt of PROMPT tokens."""

    model: str
    card: Card
    chunk: int
    """Tokens per pass over the layers."""
    slots: int
    """Expert slots per layer."""
    us: dict[str, float]
    """Microseconds per token, by part, if kernels reach their shares and follow at once."""
    link_s: float
    """Seconds of the link for the experts without a slot."""

    def tokens_per_s(self, reached: float = 1.0) -> float:
        """Tokens per second if kernels take 1 / reached of their time; copies run beside them."""
        return PROMPT / max(self.link_s, PROMPT * 1e-6 * sum(self.us.values()) / reached)


def estimate(model: str, card: Card, assembled: Made) -> Estimate | None:
    """Times of a prompt by the slots of `osmium plan`; None if the model does not fit.

    Steps are the default's where all experts are resident, else one step has the whole prompt.
    """
    options: dict[str, Any] = {"attention_quant": "int4", "ram": 128 << 30}
    try:
        plan = plan_for(MODELS[model], "gpu", gpu=card.name, **options)
        if not plan.resident:
            plan = plan_for(MODELS[model], "gpu", gpu=card.name, prefill_chunk=PROMPT, **options)
    except DoesNotFit:
        return None
    tokens = min(plan.prefill_chunk, PROMPT)
    past = (PROMPT - tokens) // 2  # so that the mean context is that of the whole prompt
    source = open_synthetic(MODELS[model], EngineConfig(attention_quant="int4"))
    layers = source.config.num_layers
    us = dict.fromkeys([*GROUPS, "the rest"], 0.0)
    for launch in launches(model, card, tokens, past):
        seconds = max(
            mma_seconds(launch, tokens, past, card, assembled), memory_seconds(launch, tokens, card)
        )
        part = next((k for k, v in GROUPS.items() if launch[0].name.startswith(v)), "the rest")
        us[part] += seconds * 1e6 / tokens * layers / 4
    missing = (source.config.num_experts - plan.expert_slots) * layers * source.layout.nbytes
    link_s = missing / (card.spec.link_gb_s * 1e9)
    return Estimate(model, card, tokens, plan.expert_slots, us, link_s)
