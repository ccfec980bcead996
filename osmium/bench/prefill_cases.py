"""Operations of prefill on random inputs, in shapes of real models: `PrefillCases`.

A case may run several kernels and time one of them: the others prepare its inputs.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.bench.noise import arrays, fill_noise
from osmium.bench.op_cases import INPUT_SETS_BYTES, PAGE, Calls, OpCases
from osmium.models.state import make_state
from osmium.ops import Array, GroupedExperts, MatmulInput, Ops, StepInputs
from osmium.ops.grouped import ExpertGroups

__all__ = ["PrefillCase", "PrefillCases"]

MAX_SET_BYTES = 4 << 30
"""Most bytes of one set of inputs and outputs of the grouped expert kernels."""

CHUNK_ROWS = 512
"""Rows of a chunk of prefill attention."""


@dataclass(frozen=True)
class PrefillCase:
    """Calls of one operation, and what a call computes."""

    calls: Calls
    timed: str = ""
    """Part of the names of the kernels that are timed; empty: all."""
    multiply_adds: float = 0.0
    """Multiply-adds of a call; 0: not stated."""
    digit_passes: int = 0
    """int8 multiply-adds for each of them: one per digit of an activation; 0: no int8."""
    uncounted_bytes: float = 0.0
    """Bytes that a call moves and that no contract counts."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Sizes to report."""


class PrefillCases(OpCases):
    """One operation of prefill in the shapes of `model`."""

    def __init__(
        self,
        ops: Ops,
        model: str,
        name: str,
        sets_bytes: int = INPUT_SETS_BYTES,
        max_set_bytes: int = MAX_SET_BYTES,
    ) -> None:
        """Raises: OutOfMemory."""
        super().__init__(
            ops, model, 1, sets_bytes, attention_quant="int8" if "int8" in name else "int4"
        )
        self.name, self.max_set_bytes = name, max_set_bytes

    @staticmethod
    def names() -> list[str]:
        """All operations."""
        return list(MAKERS)

    def make(self) -> PrefillCase:
        """The case of this object's name."""
        maker, *arguments = MAKERS[self.name]
        case: PrefillCase = getattr(self, maker)(*arguments)
        return case

    def _input(self, rows: int, width: int) -> MatmulInput:
        """Random rows with their digits."""
        with self.ops.prefill():
            return self._random_input(self.ops.empty_input(rows, width))

    def _gemm(self, name: str, rows: int) -> PrefillCase:
        """The matrix `name` applied to `rows` rows."""
        sets, ops = self._matrices(name), self.ops
        n, k = sets[0].out_features, sets[0].in_features
        h, out = self._input(rows, k), ops.empty((rows, n), np.float32)
        calls: Calls = [partial(ops.linear, out, h, matrix) for matrix in sets]
        sizes = {"rows": rows, "n": n, "k": k}
        return PrefillCase(calls, "gemm", float(rows * n * k), 2, sizes=sizes)

    def _grouped(self, part: str, rows: int) -> PrefillCase:
        """Up or down of experts with `rows` rows each."""
        ops, layout, top_k = self.ops, self.layout, self.config.top_k
        hidden, inner = layout.hidden, layout.inner
        experts = self.config.num_experts
        while experts > top_k and self._grouped_bytes(experts, rows) > self.max_set_bytes:
            experts = max(top_k, experts // 2)
        ids = self._balanced_ids(experts, rows)
        tokens, pairs = ids.shape[0], ids.shape[0] * top_k
        grouped = GroupedExperts(
            self._groups(tokens, experts), ops.empty((pairs, hidden), np.float32)
        )
        device_ids = ops.to_device(ids)
        slots = self._noise((experts, layout.nbytes), np.uint8)
        expert_slots = self._i32(np.arange(experts))
        ops.group_by_expert(grouped.groups, device_ids, experts, expert_slots)
        h, rows_inner = self._input(tokens, hidden), ops.empty_input(pairs, inner)
        call = partial(
            ops.expert_part, grouped, rows_inner, h, device_ids, layout, slots, expert_slots
        )
        n, k = (2 * inner, hidden) if part == "up" else (hidden, inner)
        sizes = {"experts": experts, "rows": rows, "n": n, "k": k}
        return PrefillCase([call], f"moe_gemm_{part}", float(pairs * n * k), 2, sizes=sizes)

    def _grouped_bytes(self, experts: int, rows: int) -> int:
        layout, pairs = self.layout, experts * rows
        tokens = pairs // self.config.top_k
        row_bytes = 10 * (layout.inner * pairs + layout.hidden * tokens)  # f32, hi + lo, digits
        return experts * layout.nbytes + row_bytes + 4 * layout.hidden * pairs

    def _balanced_ids(self, experts: int, rows: int) -> npt.NDArray[np.uint16]:
        """Random expert ids u16 [T, A], distinct in a token, that have each expert `rows` times."""
        top_k = self.config.top_k
        assert experts % top_k == 0, f"{experts} experts, {top_k} per token"
        order = [self.rng.permutation(experts) for _ in range(rows)]
        return np.stack(order).astype(np.uint16).reshape(-1, top_k)

    def _groups(self, tokens: int, experts: int) -> ExpertGroups:
        shapes = ExpertGroups.shapes(tokens, self.config.top_k, experts)
        return ExpertGroups(
            **{name: self.ops.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}
        )

    def _attention_rows(self, context: int) -> PrefillCase:
        """CHUNK_ROWS rows of one sequence that has `context` tokens before them."""
        ops, config, rows = self.ops, self.config, CHUNK_ROWS
        sequence_pages = -(-(context + rows) // PAGE)
        sets = self._sets(self._kv_token_bytes() * (context + rows))
        pages = len(sets) * sequence_pages
        one_layer = replace(config, layer_types=("attention",))
        kv: Any = make_state(ops, one_layer, pages, PAGE, 1, self.kv_dtype).layers[0]
        for array in arrays(kv):
            fill_noise(ops, array)
        q = self._noise((rows, config.num_heads, config.head_dim), np.float32)
        out = ops.empty((rows, config.num_heads, config.head_dim), np.float32)
        tables = self.rng.permutation(pages).reshape(len(sets), 1, sequence_pages)
        scale = config.head_dim**-0.5
        turns = self._i32(np.zeros((rows, config.num_kv_heads)))
        sums = ops.empty((rows, 2, config.num_heads, 2), np.float32)
        calls: Calls = [
            partial(
                ops.attention, out, q, kv, self._chunk(context, rows, table), scale, turns, sums
            )
            for table in tables
        ]
        keys = rows * context + rows * (rows + 1) // 2
        return PrefillCase(
            calls, "", 2.0 * keys * config.num_heads * config.head_dim,
            uncounted_bytes=self._kv_token_bytes() * (context + rows),
            sizes={"rows": rows, "context": context},
        )  # fmt: skip

    def _chunk(self, context: int, rows: int, table: npt.NDArray[np.int64]) -> StepInputs:
        i32 = self._i32
        zeros = i32(np.zeros(rows))
        return StepInputs(
            tokens=rows, sequences=1, page_size=PAGE, ids=zeros,
            positions=i32(context + np.arange(rows)), sequence_ids=zeros,
            query_start_loc=i32([0, rows]), context_lens=i32([context]), state_slots=i32([0]),
            page_table=i32(table), max_context=context + rows,
        )  # fmt: skip

    def _rms_norm(self, rows: int) -> PrefillCase:
        """The norm of rows of the hidden size, as hi + lo and as digits."""
        ops, width = self.ops, self.config.hidden_size
        x = self._noise((rows, width), np.float32)
        h = ops.empty_input(rows, width, self.config.eps)
        return PrefillCase([partial(ops.rms_norm, h, x, self.norm)] * 4, sizes={"rows": rows})

    def _group(self, tokens: int) -> PrefillCase:
        """Random experts of `tokens` tokens in order."""
        ops, experts, top_k = self.ops, self.config.num_experts, self.config.top_k
        groups, slots = self._groups(tokens, experts), self._i32(np.arange(experts))
        chosen = self.rng.random((tokens, experts)).argpartition(top_k, axis=1)[:, :top_k]
        ids = self._i32(chosen, np.uint16)
        call = partial(ops.group_by_expert, groups, ids, experts, slots)
        return PrefillCase([call] * 4, sizes={"tokens": tokens})

    def _gather_add(self, tokens: int) -> PrefillCase:
        """The experts' outputs and the shared expert's, added to each token's row."""
        ops, hidden, top_k = self.ops, self.config.hidden_size, self.config.top_k
        columns, pairs = self.config.num_experts + 1, tokens * top_k
        out, y, shared, logits = (
            self._noise(shape, np.float32)
            for shape in ((tokens, hidden), (pairs, hidden), (tokens, hidden), (tokens, columns))
        )
        weights: Array = self._noise((tokens, top_k), np.float32)
        position = self._i32(self.rng.permutation(pairs))
        arguments = (out, y, weights, position, 0, shared, logits, columns - 1)
        return PrefillCase([partial(ops.gather_add, *arguments)] * 4, sizes={"tokens": tokens})


MAKERS: dict[str, tuple[Any, ...]] = {
    "int4_gemm qkvz 512": ("_gemm", "qkvz", 512),
    "int4_gemm qkvz 2048": ("_gemm", "qkvz", 2048),
    "int4_gemm delta_out 2048": ("_gemm", "delta_out", 2048),
    "int4_gemm qgkv 2048": ("_gemm", "qgkv", 2048),
    "int4_gemm attention_out 2048": ("_gemm", "attention_out", 2048),
    "int8_gemm qkvz 2048": ("_gemm", "qkvz", 2048),
    "int8_gemm shared_up 2048": ("_gemm", "shared_up", 2048),
    "int8_gemm shared_down 2048": ("_gemm", "shared_down", 2048),
    **{
        f"int4_moe_gemm_{part} {rows}": ("_grouped", part, rows)
        for part in ("up", "down")
        for rows in (640, 128, 64)
    },
    "gqa_prefill fp8 4k": ("_attention_rows", 4096),
    "gqa_prefill fp8 32k": ("_attention_rows", 32768),
    "rms_norm 2048": ("_rms_norm", 2048),
    "group_by_expert 8192": ("_group", 8192),
    "gather_add 2048": ("_gather_add", 2048),
}
"""The method that makes each case, and its arguments: rows, or tokens of context."""
