"""`osmium bench kernels`: each operation of a decoded token by itself, in shapes of real models.

Method.  No model is loaded: an operation is called through GpuOps on random weights, states, pages
and records, on as many sets of them as are four times the largest L2 together; what a token itself
makes, its rows, is one set, as it comes from L2 in a model, too.  One call a set is recorded into
one graph, which is timed: the median of seven; the start of a graph, some 8 us, is shared among its
calls.  Bytes are those of the kernels' own contracts (`moves`), and what these leave out, a
context's keys and values; the share is of VRAM's rate as a copy has it, read and written, and for
`fetch` of the link's, both measured before.  Of what has no bytes to speak of, see the time.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from osmium.bench.environment import environment
from osmium.bench.profile import launch_bytes, time_calls
from osmium.bench.throughput import arrays, fill_noise
from osmium.config import EngineConfig
from osmium.cuda.driver import Device
from osmium.cuda.stream import CudaRuntime, measure_h2d_rates, measure_vram_rate
from osmium.errors import ConfigError, NoDevice
from osmium.experts.cache import DECAY
from osmium.experts.prefetch import make_prefetch_state
from osmium.models.attention import rotary_frequencies
from osmium.models.state import make_state, state_bytes
from osmium.models.workspace import make_workspace
from osmium.ops import (
    AttentionWeights,
    AttentionWorkspace,
    DeltaNetWorkspace,
    DeltaWeights,
    LinearWeight,
    MatmulInput,
    Ops,
    StepInputs,
    types,
)
from osmium.ops.gpu import GpuOps
from osmium.weights.synthetic import open_synthetic

__all__ = ["OpCases", "bench_kernels"]

MODELS, BATCHES = ("qwen3.5-122b-a10b", "qwen3.5-35b-a3b"), (1, 4)

ROOM = 512 << 20
"""Bytes of all sets of one operation's inputs: four times the L2 of the largest GPU."""

DEPTH, PAGE = 4096, 64
"""Tokens of context, and of a page."""

Calls = list[Callable[[], None]]


def bench_kernels(only: str | None, say: Callable[[str], None]) -> dict[str, Any]:
    """A document for JSON; `say` is told each row.  Raises: ConfigError without a GPU, or where
    no operation's name holds `only`."""
    names = OpCases.names(only)
    try:
        device = Device()
    except NoDevice as error:
        raise ConfigError(f"`osmium bench kernels` needs a GPU. {error}") from None
    rates = {
        "VRAM": measure_vram_rate(device),
        "link": measure_h2d_rates(device, ["pinned"])["pinned"],
    }
    machine, rows = CudaRuntime(device, "pinned"), []
    say(f"{'model':18}{'seq':>4}  {'operation':26}{'us':>9}{'MB':>10}{'GB/s':>9}{'share':>7}")
    try:
        ops = GpuOps(machine)
        start = time.perf_counter()
        cases = list(product(MODELS, BATCHES, names))
        for number, (model, tokens, name) in enumerate(cases, 1):
            row = _time(ops, name, OpCases(ops, model, tokens), rates)
            rows.append({"model": model, "sequences": tokens, **row})
            say(
                f"{model:18}{tokens:4}  {name:26}{row['us']:9.2f}{row['bytes'] / 1e6:10.3f}"
                f"{row['gb_s']:9.1f}{row['share']:7.2f}  {' '.join(row['kernels'])}"
            )
            gc.collect()  # its VRAM, before the next one asks for some
            if number % len(names) == 0 and number < len(cases):
                left = (time.perf_counter() - start) / number * (len(cases) - number)
                say(f"  ({len(cases) - number} of {len(cases)} rows left, about {left:.0f} s)")
        return {**environment(device.name, device), "depth": DEPTH, "rates": rates, "rows": rows}
    finally:
        machine.close()


def _time(ops: GpuOps, name: str, cases: "OpCases", rates: dict[str, float]) -> dict[str, Any]:
    calls = cases.make(name)
    us, listing = time_calls(ops, calls)
    fetched = name.startswith("fetch")
    nbytes = sum(map(launch_bytes, listing)) / len(calls) + cases.uncounted(name)
    nbytes /= 2 if fetched else 1  # the contract counts both ends
    rate, most = nbytes / us / 1e3, rates["link" if fetched else "VRAM"]
    return {
        "op": name, "kernels": list(dict.fromkeys(kernel.name for kernel, _, _ in listing)),
        "sets": len(calls), "us": round(us, 2), "bytes": round(nbytes), "gb_s": round(rate, 1),
        "share": round(rate / most, 3) if most else 0.0,
    }  # fmt: skip


class OpCases:
    """The operations of a decoded token of a model of a published shape, one token a sequence."""

    def __init__(
        self, ops: Ops, model: str, tokens: int, room: int = ROOM, depth: int = DEPTH
    ) -> None:
        """Raises: OutOfMemory."""
        opened = open_synthetic(f"synthetic:{model}", EngineConfig(attention_quant="int4"))
        self.parts, self.config, self.record = opened.parts, opened.config, opened.record
        self.ops, self.tokens, self.room, self.depth = ops, tokens, room, depth
        self.kv_dtype, self.rng = "fp8_e4m3", np.random.default_rng(3)
        self.each = tokens * self.config.top_k
        """Pairs of a token and an expert."""
        self.work = w = make_workspace(ops, self.config, tokens)
        self.norm = self._noise((self.config.hidden_size,), np.float32)
        for array in (w.x, w.y, w.qgkv, w.q, w.qkvz, w.qkv, w.ab, w.decay, w.beta, w.router_logits,
                      w.weights):  # fmt: skip
            fill_noise(ops, array)
        ops.rms_norm(w.h, w.x, self.norm)
        for rows in (w.attn_out, w.delta_out, w.shared_inner):
            self._settle(rows)

    @staticmethod
    def names(only: str | None = None) -> list[str]:
        """Of all operations, or those that hold `only`.  Raises: ConfigError where none does."""
        if found := [name for name in MAKERS if only is None or only in name]:
            return found
        raise ConfigError(f"--filter is {only!r}; the operations are {', '.join(MAKERS)}.")

    def make(self, name: str) -> Calls:
        """A call on each set of inputs."""
        calls: Calls = getattr(self, MAKERS[name][0])(*MAKERS[name][1:])
        return calls

    def uncounted(self, name: str) -> float:
        """Bytes that one call moves and no contract counts."""
        counts = {
            "gated_attention": self._kept() * self.depth,
            "sample": 4 * self.config.vocab_size,
        }
        return float(self.tokens * counts.get(name, 0))

    def _kept(self) -> int:
        """Bytes that an attention layer keeps of a token."""
        return state_bytes(replace(self.config, layer_types=("attention",)), 1, 1, 1, self.kv_dtype)

    def _noise(self, shape: tuple[int, ...], dtype: Any) -> Any:
        array = self.ops.empty(shape, dtype)
        fill_noise(self.ops, array)
        return array

    def _settle(self, rows: MatmulInput) -> MatmulInput:
        fill_noise(self.ops, rows.f32)
        self.ops.prepare_input(rows)
        return rows

    def _i32(self, values: Any, dtype: Any = np.int32) -> Any:
        return self.ops.to_device(np.array(values, dtype))

    def _sets(self, nbytes: int) -> range:
        return range(min(512, max(4, -(-self.room // nbytes))))

    def _matrix(self, name: str) -> LinearWeight:
        part = self.parts[name]
        assert part.format != "f32", "matrices are bf16, int8 or int4"
        made = {key: self._noise(*one) for key, one in part.arrays.items()}
        scale, (rows, columns) = made.get("scale"), part.shape
        group = 0 if scale is None or part.format == "int8" else columns // scale.shape[1]
        return LinearWeight(part.format, rows, columns, made["data"], scale, group)

    def _matrices(self, name: str) -> list[LinearWeight]:
        """`name` is of the first layer that has it."""
        full = next(one for one in self.parts if one.split(".")[-1] == name)
        return [self._matrix(full) for _ in self._sets(self.parts[full].nbytes)]

    def _step(self, slots: Any, pages: Any) -> StepInputs:
        """One token a sequence, the last of the context."""
        t, at = np.arange(self.tokens), np.full(self.tokens, self.depth - 1)
        i32 = self._i32
        return StepInputs(
            tokens=self.tokens, sequences=self.tokens, page_size=PAGE, ids=i32(t),
            positions=i32(at), sequence_ids=i32(t), query_start_loc=i32(np.arange(self.tokens + 1)),
            context_lens=i32(at), state_slots=i32(slots), page_table=i32(pages),
        )  # fmt: skip

    def _linear(self, name: str) -> Calls:
        """Of h."""
        sets, ops = self._matrices(name), self.ops
        out = ops.empty((self.tokens, sets[0].out_features), np.float32)
        return [partial(ops.linear, out, self.work.h, m) for m in sets]

    def _router(self) -> Calls:
        w, counters = self.work, self._i32([0] * 7, np.int64)
        at, to = self._i32([0] * self.tokens), (w.ids, w.weights, w.router_logits, w.h)
        more = (self.config.num_experts, counters, w.router_barrier, None, 0, at)
        return [partial(self.ops.router, *to, m, *more) for m in self._matrices("router")]

    def _delta_net(self) -> Calls:
        w, config, t = self.work, self.config, np.arange(self.tokens)
        f32 = partial(self._noise, dtype=np.float32)
        shape = (config.value_heads, config.key_dim, config.value_dim)
        sets = self._sets(4 * int(np.prod(shape)) * self.tokens)
        state = f32((len(sets) * self.tokens, *shape))
        inputs = f32((len(sets) * self.tokens, config.channels, 4))
        ab, small = self._matrices("ab")[0], f32((config.value_heads,))
        conv, norm = f32((config.channels, 4)), f32((config.value_dim,))
        room = DeltaNetWorkspace(w.qkv, w.ab, w.decay, w.beta, w.delta_out)
        pages, found = np.zeros((self.tokens, 1)), self._matrices("delta_out")
        calls: Calls = []
        for i in sets:
            out = found[i % len(found)]
            weights = DeltaWeights(conv, ab, small, small, norm, out, config.eps)
            of = (w.x, w.h, self.norm, w.qkvz, weights, inputs, state, room)
            step = self._step(i * self.tokens + t, pages)
            calls.append(partial(self.ops.delta_net, *of, step, False))
        return calls

    def _attention(self) -> Calls:
        f32 = partial(self._noise, dtype=np.float32)
        w, config, ops, each = self.work, self.config, self.ops, -(-self.depth // PAGE)
        sets = self._sets(self._kept() * self.depth * self.tokens)
        pages = len(sets) * self.tokens * each
        one = replace(config, layer_types=("attention",))
        kv: Any = make_state(ops, one, pages, PAGE, 1, self.kv_dtype).layers[0]
        for array in arrays(kv):
            fill_noise(ops, array)
        tables = self.rng.permutation(pages).reshape(len(sets), self.tokens, each)
        steps = [self._step(np.arange(self.tokens), table) for table in tables]
        norms, frequencies = f32((2, config.head_dim)), ops.to_device(rotary_frequencies(config))
        room = AttentionWorkspace(w.q, w.attn_out, w.partial, w.split_counters)
        weights = [
            AttentionWeights(norms, frequencies, out, config.eps, config.head_dim**-0.5)
            for out in self._matrices("attention_out")
        ]
        of = (w.x, w.h, self.norm, w.qgkv)
        return [
            partial(ops.gated_attention, *of, weights[i % len(weights)], kv, room, step)
            for i, step in enumerate(steps)
        ]

    def _cache(self, layers: int, capacity: int, experts: int, nbytes: int) -> types.ExpertCache:
        """Nobody is in it; its slots are noise."""
        ops, i32, shape = self.ops, self._i32, (layers, experts)
        return types.ExpertCache(
            layout=self.record, num_experts=experts, decay=DECAY,
            slots=self._noise((layers, capacity, nbytes), np.uint8),
            expert_to_slot=i32(np.full(shape, -1)), slot_to_expert=i32(np.full((layers, capacity),
            -1)),
            short_count=ops.to_device(np.zeros(shape, np.float32)),
            long_count=ops.to_device(np.zeros(shape, np.float32)), last_used=i32(np.zeros(shape)),
            step=i32([0]), counters=i32([0] * 7, np.int64),
        )  # fmt: skip

    def _plan(self, experts: Any, slots: Any, fetch: int) -> types.SlotAssignment:
        i32, ones = self._i32, np.ones(len(experts))
        return types.SlotAssignment(
            count=i32([len(experts)]), expert=i32(experts), slot=i32(slots),
            fetch_flags=i32(fetch * ones), uses=i32(ones),
            pair_slots=i32(np.zeros((self.tokens, self.config.top_k))), fetch_progress=i32([0, 0]),
        )  # fmt: skip

    def _chosen(self, sets: int) -> list[Any]:
        """Experts of a step, none of them twice."""
        shape, every = (self.tokens, self.config.top_k), self.config.num_experts
        chosen = (self.rng.permutation(every)[: self.each] for _ in range(sets))
        return [self._i32(ids.reshape(shape), np.uint16) for ids in chosen]

    def _place(self) -> Calls:
        layers, experts = self.config.num_layers, self.config.num_experts
        cache = self._cache(layers, max(self.each, experts // 2), experts, 16)
        plan = self._plan([-1] * self.each, [0] * self.each, 0)
        guess = make_prefetch_state(self.ops, layers, experts, self.config.top_k)
        (likely,) = self._chosen(1)
        self.ops.copy(guess.ids[: self.tokens], likely)
        place = partial(self.ops.assign_slots, plan, cache, prefetch=guess)
        for _ in range(experts // self.each):  # full by then, or nearly
            for layer, ids in enumerate(self._chosen(layers)):
                place(layer, ids)
        return [partial(place, layer, ids) for layer, ids in enumerate(self._chosen(layers))]

    def _fetch(self, count: int) -> Calls:
        count, nbytes = count or self.config.top_k, self.record.nbytes
        sets = self._sets(count * nbytes)
        held = len(sets) * count
        cache = self._cache(1, held, held, nbytes)
        records = self.ops.empty_mapped((1, held, nbytes), np.uint8)
        self.ops.host_view(records)[...] = 1
        arena = types.HostExperts(self.record, records)
        plans = [self._plan(part, part, 1) for part in np.arange(held).reshape(-1, count)]
        return [partial(self.ops.fetch_experts, cache, plan, arena, 0) for plan in plans]

    def _experts(self, up: bool) -> Calls:
        """All of them hit; the shared one beside."""
        w, ops, every = self.work, self.ops, self.config.num_experts
        cache = self._cache(1, every, every, self.record.nbytes)
        ops.copy_h2d(cache.expert_to_slot, np.arange(every, dtype=np.int32).reshape(1, -1))
        pairs = self._settle(ops.empty_input(self.each, self.config.moe_intermediate_size))
        own = types.SharedExpert(
            self._matrix("layers.0.shared_up"), self._matrix("layers.0.shared_down"), every
        )
        return [
            partial(
                ops.expert_up, pairs, w.shared_inner, w.h, ids, None, cache, 0, "all", own,
                w.shared_gate_up,
            ) if up else partial(
                ops.expert_down, w.x, pairs, w.shared_inner, ids, w.weights, None, cache, 0, "all",
                own, w.router_logits, w.shared_out, w.y, w.h, self.norm,
            )
            for ids in self._chosen(max(4, every // self.each))
        ]  # fmt: skip

    def _sample(self) -> Calls:
        ops, rows, vocab, ring, i32 = self.ops, self.tokens, self.config.vocab_size, 8, self._i32
        replies = types.DecodeState(
            ring_size=ring, null_slot=0, null_page=0,
            sampler_params=ops.to_device(np.tile(np.array([0.7, 20, 0.95, 0], np.float32), (rows,
            1))),
            uniforms=ops.zeros_mapped((ring, rows), np.float64), token=i32([0] * rows),
            tokens_left=i32([0] * rows), stop_on_eos=i32([0] * rows), eos=i32([-9]),
            decode_step=i32([0]),
            token_ring=ops.zeros_mapped((1 + ring * rows,), np.int32),
            **{
                name: ops.empty(shape, dtype)
                for name, (shape, dtype) in types.DecodeState.scratch(rows, vocab).items()
            },
        )  # fmt: skip
        sets = self._sets(4 * rows * vocab)
        return [partial(ops.sample, self._noise((rows, vocab), np.float32), replies) for _ in sets]


MAKERS: dict[str, tuple[Any, ...]] = {
    "linear qkvz": ("_linear", "qkvz"), "delta_net": ("_delta_net",),
    "linear qgkv": ("_linear", "qgkv"), "gated_attention": ("_attention",),
    "router": ("_router",), "place": ("_place",), "fetch 1": ("_fetch", 1),
    "fetch top-k": ("_fetch", 0), "expert_up": ("_experts", True),
    "expert_down": ("_experts", False), "linear head": ("_linear", "head"), "sample": ("_sample",),
}  # fmt: skip
"""What makes the calls of each operation."""
