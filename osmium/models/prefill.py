"""The prefill pass: all layers on many tokens, each layer on all of them before the next.

Mixers, routers and shared experts take the rows in pieces, so their scratch arrays are small.  The
routed experts take all rows at once, so a missing expert crosses the link once.  Only the residual
stream, the digits of the experts' inputs and the routing are kept for every row.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from osmium.config import ModelConfig
from osmium.experts.streaming import PrefillExperts, pair_bytes
from osmium.models.scratch import aligned_bytes
from osmium.models.state import ModelState
from osmium.models.workspace import Workspace, cut_bytes
from osmium.ops import Array, LinearWeight, MatmulInput, Ops, StepInputs
from osmium.ops.grouped import TILE_ROWS
from osmium.ops.tiling import input_shapes, supports_gemm, supports_grouped_experts
from osmium.quant.expert_layout import ExpertLayout

__all__ = [
    "PrefillPass", "PrefillRows", "PrefillSteps", "make_prefill_rows", "prefill_pairs",
    "prefill_rows_bytes", "scratch_bytes", "short_pass_tokens",
]  # fmt: skip

SHORT_PROMPT_TOKENS = 1024
"""Most tokens of a pass that runs while another waits between two layers."""

PADDING = 1024
"""Most bytes between the arrays of pairs."""

PrefillSteps = Sequence[StepInputs]
"""Consecutive rows of a pass; each has rows of one sequence."""


@dataclass(frozen=True)
class PrefillRows:
    """What a prefill pass keeps for every row."""

    x: Array
    """f32 [T, D], the residual stream."""
    h: Mapping[str, Array]
    """Fields of MatmulInput that the experts' kernels read; empty where experts take the rows of a
    piece."""
    ids: Array | None = None
    """u16 [T, A], top-k expert ids; None where experts take the rows of a piece."""
    weights: Array | None = None
    """f32 [T, A], top-k weights."""
    router_logits: Array | None = None
    """f32 [T, E + 1], of which the last one is the shared expert's gate."""

    def __getitem__(self, part: slice) -> "PrefillRows":
        """A view of some rows."""
        routing = (self.ids, self.weights, self.router_logits)
        h = {name: array[part] for name, array in self.h.items()}
        return PrefillRows(self.x[part], h, *(None if a is None else a[part] for a in routing))


Shapes = dict[str, tuple[tuple[int, ...], type[np.generic]]]


def _shapes(
    config: ModelConfig, layout: ExpertLayout, tokens: int, gpu: bool
) -> tuple[Shapes, Shapes]:
    """Shape and dtype of the arrays of PrefillRows, and of those in its `h`."""
    rows: Shapes = {"x": ((tokens, config.hidden_size), np.float32)}
    if not gpu or not supports_grouped_experts(layout, config.num_experts):
        return rows, {}
    rows["ids"] = (tokens, config.top_k), np.uint16
    rows["weights"] = (tokens, config.top_k), np.float32
    rows["router_logits"] = (tokens, config.num_experts + 1), np.float32
    shapes = input_shapes(tokens, config.hidden_size, True, gpu)
    names = ("hi_lo", "square_sums") if layout.bits == 16 else ("digits", "units")
    return rows, {name: shapes[name] for name in names}


def short_pass_tokens(pass_tokens: int) -> int:
    """Most tokens of a pass that runs while one of up to `pass_tokens` waits."""
    return min(pass_tokens, SHORT_PROMPT_TOKENS)


def make_prefill_rows(
    ops: Ops, config: ModelConfig, layout: ExpertLayout, tokens: int, gpu: bool
) -> PrefillRows:
    """Rows of a pass of up to `tokens` tokens and a short one beside it.  Raises: OutOfMemory."""
    tokens += short_pass_tokens(tokens)
    rows, h = _shapes(config, layout, tokens, gpu)
    arrays = {name: ops.empty(*shape) for name, shape in rows.items()}
    return PrefillRows(h={name: ops.empty(*shape) for name, shape in h.items()}, **arrays)


def prefill_rows_bytes(config: ModelConfig, layout: ExpertLayout, tokens: int, gpu: bool) -> int:
    """Bytes that make_prefill_rows allocates."""
    tokens += short_pass_tokens(tokens)
    rows, h = _shapes(config, layout, tokens, gpu)
    return sum(aligned_bytes(*shape) for shape in (*rows.values(), *h.values()))


def scratch_bytes(config: ModelConfig, layout: ExpertLayout, rows: int, gpu: bool) -> int:
    """Bytes of a workspace for pieces of `rows` tokens, and at least those of a tile's pairs."""
    nbytes = cut_bytes(config, rows, gpu, _shapes(config, layout, rows, gpu)[1])
    if not gpu or not supports_grouped_experts(layout, config.num_experts):
        return nbytes
    return max(nbytes, TILE_ROWS * pair_bytes(layout) + PADDING)


def prefill_pairs(layout: ExpertLayout, tokens: int, top_k: int, nbytes: int) -> int:
    """Routed pairs that a pass computes at once in `nbytes` of scratch."""
    whole = -(-tokens * top_k // TILE_ROWS) * TILE_ROWS
    fitting = (nbytes - PADDING) // pair_bytes(layout) // TILE_ROWS * TILE_ROWS
    return max(TILE_ROWS, min(whole, fitting))


class PrefillPass:
    """Runs prefill passes of a model, one layer after another."""

    def __init__(
        self, ops: Ops, rows: PrefillRows, experts: PrefillExperts | None, eps: float
    ) -> None:
        """`experts` is None where experts take the rows of a piece; `eps` is that of norms."""
        self.ops, self.rows, self.experts, self.eps = ops, rows, experts, eps

    def run(
        self,
        layers: Sequence[Any],
        embed: Array,
        work_of: Callable[[int], Workspace],
        steps: PrefillSteps,
        state: ModelState,
        first_row: int,
        admits: bool,
    ) -> Iterator[int]:
        """Run all layers on consecutive rows from `first_row` on.

        Yields after each part of a layer: the number of layers that are done.  Between two of these
        other steps may run; those that change the expert cache need `invalidate`.  Another pass may
        run where the number has just grown, in other rows.  Allocates nothing.

        work_of(T): the workspace cut to T rows    admits: of PrefillExperts.compute
        """
        total = sum(step.tokens for step in steps)
        rows, experts = self.rows[first_row : first_row + total], self.experts
        is_done = False
        try:
            for index, (layer, layer_state) in enumerate(zip(layers, state.layers, strict=True)):
                if experts is not None:
                    experts.start_layer(index)
                start = 0
                for step in steps:
                    part = slice(start, start + step.tokens)
                    start = part.stop
                    work = _work(work_of(step.tokens), rows[part])
                    with self.ops.prefill():
                        self._mix(layer, layer_state, work, step, embed if index == 0 else None)
                        if experts is None:
                            layer.moe.forward(work.x, step, work, layer.moe_norm)
                        else:
                            layer.moe.route(step, work)
                            if not self._keeps_input(layer.moe.shared.up):
                                layer.moe.add_shared(work)
                    if start < total:
                        yield index
                if experts is not None:
                    # The host reads the routing while the device computes the shared expert.
                    experts.group(index, rows.ids, admits)
                    if self._keeps_input(layer.moe.shared.up):
                        self._add_shared(layer, work_of, steps, rows)
                    h = MatmulInput(rows.x, eps=self.eps, **rows.h)
                    compute = experts.compute(index, rows.x, h, rows.ids, rows.weights, admits)
                    for goes_on in compute:
                        if goes_on:
                            yield index
                yield index + 1
            is_done = True
        finally:
            if not is_done:
                self.invalidate()

    def invalidate(self) -> None:
        """Note that another step has changed the expert cache, or that a pass ends early."""
        if self.experts is not None:
            self.experts.invalidate()

    def _keeps_input(self, w: LinearWeight) -> bool:
        """Whether a pass keeps the form of the experts' input that the shared expert reads."""
        return supports_gemm(w) and ("hi_lo" in self.rows.h) == (w.format == "bf16")

    def _add_shared(
        self,
        layer: Any,
        work_of: Callable[[int], Workspace],
        steps: PrefillSteps,
        rows: PrefillRows,
    ) -> None:
        """x += the shared expert, of all rows."""
        start = 0
        for step in steps:
            part = rows[start : start + step.tokens]
            start += step.tokens
            with self.ops.prefill():
                layer.moe.add_shared(_work(work_of(step.tokens), part))

    def _mix(
        self, layer: Any, layer_state: Any, work: Workspace, step: StepInputs, embed: Array | None
    ) -> None:
        """x += mixer(norm(x)); h = the norm for the experts.  With `embed` x is embedded first."""
        if embed is not None:
            self.ops.embed(work.x, step.ids, embed)
        self.ops.rms_norm(work.h, work.x, layer.mixer_norm)
        layer.mixer.forward(work.x, step, layer_state, work, layer.moe_norm)


def _work(work: Workspace, rows: PrefillRows) -> Workspace:
    """A workspace whose kept arrays are those of the pass."""
    if rows.ids is None or rows.weights is None:
        return replace(work, x=rows.x)
    h: Any = replace(work.h, **rows.h)
    return replace(
        work, x=rows.x, h=h, ids=rows.ids, weights=rows.weights, router_logits=rows.router_logits
    )
