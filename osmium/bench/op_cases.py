"""Operations of a decoded token on random inputs, in shapes of real models: `OpCases`.

The operations that only prefill uses run on a step of PREFILL_ROWS tokens.  More of them, with
other numbers of rows, are in prefill_cases.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np

from osmium.bench.noise import arrays, fill_noise
from osmium.config import EngineConfig
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
from osmium.ops.controls import (
    HAS_BIAS,
    HAS_MASK,
    HAS_PENALTIES,
    MAX_LOGPROBS,
    SamplingControls,
)
from osmium.ops.tiling import delta_chunk_words
from osmium.weights.synthetic import open_synthetic

__all__ = ["DEPTH", "INPUT_SETS_BYTES", "PAGE", "Calls", "OpCases"]

INPUT_SETS_BYTES = 512 << 20
"""Bytes of all sets of an operation's inputs: four times the L2 of the largest GPU."""

DEPTH, PAGE = 4096, 64
"""Tokens of context, and of a KV page."""

PREFILL_ROWS = 1024
"""Tokens of a step of the operations that only prefill uses."""

Calls = list[Callable[[], None]]


class OpCases:
    """Calls of each operation of a decode step in the shapes of `model`, one token a sequence."""

    def __init__(
        self,
        ops: Ops,
        model: str,
        tokens: int,
        sets_bytes: int = INPUT_SETS_BYTES,
        depth: int = DEPTH,
        attention_quant: Literal["int8", "int4"] = "int4",
    ) -> None:
        """Raises: OutOfMemory."""
        options = EngineConfig(attention_quant=attention_quant)
        opened = open_synthetic(f"synthetic:{model}", options)
        self.parts, self.config, self.layout = opened.parts, opened.config, opened.layout
        self.ops, self.tokens, self.sets_bytes, self.depth = ops, tokens, sets_bytes, depth
        self.kv_dtype, self.rng = "fp8_e4m3", np.random.default_rng(3)
        self.num_pairs = tokens * self.config.top_k
        """Routed pairs of a step."""
        self.work = w = make_workspace(ops, self.config, tokens)
        self.norm = self._noise((self.config.hidden_size,), np.float32)
        for array in (w.x, w.y, w.qgkv, w.q, w.qkvz, w.qkv, w.ab, w.decay, w.beta, w.router_logits,
                      w.weights):  # fmt: skip
            fill_noise(ops, array)
        ops.rms_norm(w.h, w.x, self.norm)
        for rows in (w.attn_out, w.delta_out, w.shared_inner):
            self._random_input(rows)

    @staticmethod
    def names() -> list[str]:
        """All operations."""
        return list(MAKERS)

    def make_calls(self, name: str) -> Calls:
        """One call per set of inputs."""
        calls: Calls = getattr(self, MAKERS[name][0])(*MAKERS[name][1:])
        return calls

    def uncounted_bytes(self, name: str) -> float:
        """Bytes that one call moves and that no contract counts."""
        counts = {
            "gated_attention": self._kv_token_bytes() * self.depth,
            "sample": 4 * self.config.vocab_size,
            "sample_controlled": 16 * self.config.vocab_size,  # also counts, biases, adjusted
        }
        return float(self.tokens * counts.get(name, 0))

    def _kv_token_bytes(self) -> int:
        """Bytes of a token's key and value in one attention layer."""
        return state_bytes(replace(self.config, layer_types=("attention",)), 1, 1, 1, self.kv_dtype)

    def _noise(self, shape: tuple[int, ...], dtype: Any) -> Any:
        array = self.ops.empty(shape, dtype)
        fill_noise(self.ops, array)
        return array

    def _random_input(self, rows: MatmulInput) -> MatmulInput:
        fill_noise(self.ops, rows.f32)
        self.ops.prepare_input(rows)
        return rows

    def _i32(self, values: Any, dtype: Any = np.int32) -> Any:
        return self.ops.to_device(np.array(values, dtype))

    def _sets(self, nbytes: int) -> range:
        return range(min(512, max(4, -(-self.sets_bytes // nbytes))))

    def _matrix(self, name: str) -> LinearWeight:
        part = self.parts[name]
        assert part.format != "f32", "matrices are bf16, int8 or int4"
        arrays = {key: self._noise(*spec) for key, spec in part.arrays.items()}
        scale, (rows, columns) = arrays.get("scale"), part.shape
        group = 0 if scale is None or part.format == "int8" else columns // scale.shape[1]
        return LinearWeight(part.format, rows, columns, arrays["data"], scale, group)

    def _matrices(self, name: str) -> list[LinearWeight]:
        """Sets of matrix `name`, in the shape of the first layer that has it."""
        full_name = next(key for key in self.parts if key.split(".")[-1] == name)
        return [self._matrix(full_name) for _ in self._sets(self.parts[full_name].nbytes)]

    def _step(self, slots: Any, pages: Any) -> StepInputs:
        """One token a sequence, the last of the context."""
        t, positions = np.arange(self.tokens), np.full(self.tokens, self.depth - 1)
        i32 = self._i32
        return StepInputs(
            tokens=self.tokens, sequences=self.tokens, page_size=PAGE, ids=i32(t),
            positions=i32(positions),
            sequence_ids=i32(t), query_start_loc=i32(np.arange(self.tokens + 1)),
            context_lens=i32(positions), state_slots=i32(slots),
            page_table=i32(pages),
        )  # fmt: skip

    def _linear(self, name: str) -> Calls:
        """The matrix `name` applied to h."""
        sets, ops = self._matrices(name), self.ops
        out = ops.empty((self.tokens, sets[0].out_features), np.float32)
        return [partial(ops.linear, out, self.work.h, m) for m in sets]

    def _router(self) -> Calls:
        w, counters = self.work, self._i32([0] * 7, np.int64)
        positions = self._i32([0] * self.tokens)
        arrays = (w.ids, w.weights, w.router_logits, w.h)
        more = (self.config.num_experts, counters, w.router_barrier, None, 0, positions)
        return [partial(self.ops.router, *arrays, m, *more) for m in self._matrices("router")]

    def _delta_net(self) -> Calls:
        w, config, t = self.work, self.config, np.arange(self.tokens)
        f32 = partial(self._noise, dtype=np.float32)
        shape = (config.value_heads, config.key_dim, config.value_dim)
        sets = self._sets(4 * int(np.prod(shape)) * self.tokens)
        state = f32((len(sets) * self.tokens, *shape))
        inputs = f32((len(sets) * self.tokens, config.channels, 4))
        ab, small = self._matrices("ab")[0], f32((config.value_heads,))
        conv, norm = f32((config.channels, 4)), f32((config.value_dim,))
        workspace = DeltaNetWorkspace(w.qkv, w.ab, w.decay, w.beta, w.delta_out, w.chunk_scratch)
        pages, matrices = np.zeros((self.tokens, 1)), self._matrices("delta_out")
        calls: Calls = []
        for i in sets:
            out = matrices[i % len(matrices)]
            weights = DeltaWeights(conv, ab, small, small, norm, out, config.eps)
            arguments = (w.x, w.h, self.norm, w.qkvz, weights, inputs, state, workspace)
            step = self._step(i * self.tokens + t, pages)
            calls.append(partial(self.ops.delta_net, *arguments, step, False))
        return calls

    def _prefill_step(self) -> StepInputs:
        """PREFILL_ROWS tokens of new sequences, divided evenly."""
        rows, count, i32 = PREFILL_ROWS, self.tokens, self._i32
        starts = np.arange(count + 1) * (rows // count)
        starts[-1] = rows
        ids = np.repeat(np.arange(count), np.diff(starts))
        zeros = i32(np.zeros(rows))
        return StepInputs(
            tokens=rows, sequences=count, page_size=PAGE, ids=zeros,
            positions=i32(np.arange(rows) - starts[ids]), sequence_ids=i32(ids),
            query_start_loc=i32(starts), context_lens=zeros[:count],
            state_slots=i32(np.arange(count)), page_table=zeros.reshape(rows, 1),
        )  # fmt: skip

    def _prefill_conv(self) -> Calls:
        config, ops, step = self.config, self.ops, self._prefill_step()
        f32 = partial(self._noise, dtype=np.float32)
        width = config.channels + config.value_heads * config.value_dim
        w, state = f32((config.channels, 4)), f32((self.tokens, config.channels, 4))
        out = ops.empty((PREFILL_ROWS, config.channels), np.float32)
        inputs = [f32((PREFILL_ROWS, width)) for _ in self._sets(4 * PREFILL_ROWS * width)]
        return [partial(ops.causal_conv1d, out, u, w, state, step) for u in inputs]

    def _prefill_delta_rule(self) -> Calls:
        config, ops, step = self.config, self.ops, self._prefill_step()
        f32, gates = partial(self._noise, dtype=np.float32), (PREFILL_ROWS, config.value_heads)
        decay = ops.to_device(-self.rng.random(gates, np.float32))
        beta = ops.to_device(self.rng.random(gates, np.float32))
        state = f32((self.tokens, config.value_heads, config.key_dim, config.value_dim))
        out = ops.empty((*gates, config.value_dim), np.float32)
        heads = config.key_heads, config.value_heads, config.key_dim, config.value_dim
        words = delta_chunk_words(PREFILL_ROWS, *heads)
        scratch = ops.empty((words,), np.uint32) if words else None
        sets = self._sets(4 * PREFILL_ROWS * config.channels)
        inputs = [f32((PREFILL_ROWS, config.channels)) for _ in sets]
        return [
            partial(ops.delta_rule_chunk, out, qkv, decay, beta, state, step, scratch)
            for qkv in inputs
        ]

    def _attention(self) -> Calls:
        f32 = partial(self._noise, dtype=np.float32)
        w, config, ops = self.work, self.config, self.ops
        sequence_pages = -(-self.depth // PAGE)
        sets = self._sets(self._kv_token_bytes() * self.depth * self.tokens)
        pages = len(sets) * self.tokens * sequence_pages
        one_layer = replace(config, layer_types=("attention",))
        kv: Any = make_state(ops, one_layer, pages, PAGE, 1, self.kv_dtype).layers[0]
        for array in arrays(kv):
            fill_noise(ops, array)
        tables = self.rng.permutation(pages).reshape(len(sets), self.tokens, sequence_pages)
        steps = [self._step(np.arange(self.tokens), table) for table in tables]
        norms, frequencies = f32((2, config.head_dim)), ops.to_device(rotary_frequencies(config))
        workspace = AttentionWorkspace(
            w.q, w.attn_out, w.partial, w.context_turns, w.context_sums, w.split_counters
        )
        weights = [
            AttentionWeights(norms, frequencies, out, config.eps, config.head_dim**-0.5)
            for out in self._matrices("attention_out")
        ]
        arrays_in = (w.x, w.h, self.norm, w.qgkv)
        return [
            partial(ops.gated_attention, *arrays_in, weights[i % len(weights)], kv, workspace, step)
            for i, step in enumerate(steps)
        ]

    def _cache(self, layers: int, capacity: int, experts: int, nbytes: int) -> types.ExpertCache:
        """A cache of empty slots that hold random bytes."""
        ops, i32, shape = self.ops, self._i32, (layers, experts)
        return types.ExpertCache(
            layout=self.layout, num_experts=experts, decay=DECAY,
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

    def _routed_ids(self, sets: int) -> list[Any]:
        """Random expert ids of `sets` steps, u16 [tokens, A] each, distinct in a step."""
        shape, experts = (self.tokens, self.config.top_k), self.config.num_experts
        chosen = (self.rng.permutation(experts)[: self.num_pairs] for _ in range(sets))
        return [self._i32(ids.reshape(shape), np.uint16) for ids in chosen]

    def _assign_slots(self) -> Calls:
        layers, experts = self.config.num_layers, self.config.num_experts
        cache = self._cache(layers, max(self.num_pairs, experts // 2), experts, 16)
        plan = self._plan([-1] * self.num_pairs, [0] * self.num_pairs, 0)
        prefetch = make_prefetch_state(self.ops, layers, experts, self.config.top_k)
        (predicted,) = self._routed_ids(1)
        self.ops.copy(prefetch.ids[: self.tokens], predicted)
        assign = partial(self.ops.assign_slots, plan, cache, prefetch=prefetch)
        for _ in range(experts // self.num_pairs):  # fills the cache, or nearly
            for layer, ids in enumerate(self._routed_ids(layers)):
                assign(layer, ids)
        return [partial(assign, layer, ids) for layer, ids in enumerate(self._routed_ids(layers))]

    def _fetch(self, count: int) -> Calls:
        count, nbytes = count or self.config.top_k, self.layout.nbytes
        sets = self._sets(count * nbytes)
        experts = len(sets) * count
        cache = self._cache(1, experts, experts, nbytes)
        packed = self.ops.empty_mapped((1, experts, nbytes), np.uint8)
        self.ops.host_view(packed)[...] = 1
        host_experts = types.HostExperts(self.layout, packed)
        plans = [self._plan(ids, ids, 1) for ids in np.arange(experts).reshape(-1, count)]
        return [partial(self.ops.fetch_experts, cache, plan, host_experts, 0) for plan in plans]

    def _experts(self, up: bool) -> Calls:
        """Routed experts, all hits, and the shared expert."""
        w, ops, experts = self.work, self.ops, self.config.num_experts
        cache = self._cache(1, experts, experts, self.layout.nbytes)
        ops.copy_h2d(cache.expert_to_slot, np.arange(experts, dtype=np.int32).reshape(1, -1))
        pairs = self._random_input(
            ops.empty_input(self.num_pairs, self.config.moe_intermediate_size)
        )
        shared = types.SharedExpert(
            self._matrix("layers.0.shared_up"), self._matrix("layers.0.shared_down"), experts
        )
        return [
            partial(
                ops.expert_up, pairs, w.shared_inner, w.h, ids, None, cache, 0, "all", shared,
                w.shared_gate_up,
            ) if up else partial(
                ops.expert_down, w.x, pairs, w.shared_inner, ids, w.weights, None, cache, 0, "all",
                shared, w.router_logits, w.shared_out, w.y, w.h, self.norm,
            )
            for ids in self._routed_ids(max(4, experts // self.num_pairs))
        ]  # fmt: skip

    def _sample(self, controlled: bool) -> Calls:
        ops, rows, vocab, ring, i32 = self.ops, self.tokens, self.config.vocab_size, 8, self._i32
        decode = types.DecodeState(
            ring_size=ring, null_page=0,
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
        logits = [self._noise((rows, vocab), np.float32) for _ in self._sets(4 * rows * vocab)]
        if not controlled:
            return [partial(ops.sample, one, decode) for one in logits]
        controls = self._controls(ring)
        step = self._step(np.arange(rows), np.zeros((rows, 1)))
        return [partial(ops.sample_controlled, one, step, decode, controls) for one in logits]

    def _controls(self, ring: int) -> SamplingControls:
        """Penalties, a bias, a mask that allows all tokens, and 20 log-probabilities a row."""
        ops, rows, vocab = self.ops, self.tokens, self.config.vocab_size
        shapes = SamplingControls.shapes(rows, rows, vocab, ring)
        mapped = ("token_mask", "logprobs", "logprob_tokens")
        controls = SamplingControls(**{
            name: (ops.zeros_mapped if name in mapped else ops.empty)(shape, dtype)
            for name, (shape, dtype) in shapes.items()
        })  # fmt: skip
        for array in (controls.token_counts, controls.logit_bias):
            ops.memset(array, 0)
        ops.host_view(controls.token_mask)[...] = -1
        flags = HAS_PENALTIES | HAS_BIAS | HAS_MASK, 0, min(MAX_LOGPROBS, vocab)
        ops.copy_h2d(controls.flags, np.tile(np.array(flags, np.int32), (rows, 1)))
        penalties = np.array((1.1, 0.5, 0.5), np.float32)
        ops.copy_h2d(controls.penalties, np.tile(penalties, (rows, 1)))
        return controls


MAKERS: dict[str, tuple[Any, ...]] = {
    "linear qkvz": ("_linear", "qkvz"), "delta_net": ("_delta_net",),
    "prefill causal_conv1d": ("_prefill_conv",),
    "prefill delta_rule_chunk": ("_prefill_delta_rule",),
    "linear qgkv": ("_linear", "qgkv"), "gated_attention": ("_attention",),
    "router": ("_router",), "assign_slots": ("_assign_slots",), "fetch 1": ("_fetch", 1),
    "fetch top-k": ("_fetch", 0), "expert_up": ("_experts", True),
    "expert_down": ("_experts", False), "linear head": ("_linear", "head"),
    "sample": ("_sample", False), "sample_controlled": ("_sample", True),
}  # fmt: skip
"""The method that makes the calls of each operation, and its arguments."""
