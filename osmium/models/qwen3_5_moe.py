"""Qwen3.5-MoE, text: embed -> layers -> head.

    x = embed[ids];  every layer: x += mixer(norm(x));  x += moe(norm(x))
    logits = norm(x) Whead

The mixer is a gated delta net in three layers of four and attention in the fourth.  Source of the
formulas: the module qwen3_5_moe of transformers.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from osmium.config import ModelConfig
from osmium.experts.runner import ExpertRunner
from osmium.experts.streaming import PrefillExperts
from osmium.models.attention import Attention, rotary_frequencies
from osmium.models.delta_net import DeltaNet
from osmium.models.moe import MoeBlock
from osmium.models.prefill import (
    PrefillPass,
    PrefillSteps,
    make_prefill_rows,
    prefill_pairs,
    scratch_bytes,
)
from osmium.models.scratch import Scratch
from osmium.models.state import ModelState
from osmium.models.weights import WeightView
from osmium.models.workspace import cut_workspace, make_workspace
from osmium.ops import Array, LinearWeight, Ops, StepInputs

__all__ = ["MODEL_CLASS", "Qwen3_5MoeModel"]


class _Layer:
    """A mixer, the experts, and the norm before each."""

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        weights: WeightView,
        expert_runner: ExpertRunner,
        index: int,
        frequencies: Array,
    ) -> None:
        self.mixer_norm = weights.array("mixer_norm", config.hidden_size)
        self.moe_norm = weights.array("moe_norm", config.hidden_size)
        # ModelState.layers[index] is the matching kind of state: PagedKV or DeltaState.
        self.mixer: Any = (
            Attention(ops, config, weights, frequencies)
            if config.layer_types[index] == "attention"
            else DeltaNet(ops, config, weights)
        )
        self.moe = MoeBlock(ops, config, weights, expert_runner, index)


class Qwen3_5MoeModel:
    """The whole model on one backend."""

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        weights: Mapping[str, LinearWeight | Array],
        expert_runner: ExpertRunner,
        rows: int,
        piece_rows: int | None = None,
        pass_tokens: int | None = None,
        link_gb_s: float = 0.0,
    ) -> None:
        """`weights` have the names of models/weights.py and are in memory that `ops` reads.  A step
        of `forward` has at most `rows` tokens, a prefill pass at most `pass_tokens`, and a piece of
        it `piece_rows`; both are `rows` if None.  `link_gb_s`: rate of copies from host memory, 0
        if unknown.  Raises: CheckpointError, OutOfMemory."""
        view = WeightView(weights)
        self.ops, self.config, self.rows, self.expert_runner = ops, config, rows, expert_runner
        self.embed = view.array("embed", config.vocab_size, config.hidden_size, dtype=np.uint16)
        self.norm = view.array("norm", config.hidden_size)
        self.head_matrix = (
            view.linear("head", config.vocab_size, config.hidden_size)
            if view.has("head")
            else LinearWeight("bf16", config.vocab_size, config.hidden_size, self.embed)
        )
        frequencies = ops.to_device(rotary_frequencies(config))
        self.layers = [
            _Layer(ops, config, view.layer(i), expert_runner, i, frequencies)
            for i in range(config.num_layers)
        ]
        for layer, next_layer in pairwise(self.layers):
            layer.moe.next_router = next_layer.moe.router
        layout, tokens = expert_runner.cache.layout, pass_tokens or rows
        self.piece_rows = piece_rows or rows
        """Most rows of a piece of a prefill pass."""
        self.work = make_workspace(ops, config, rows, self.piece_rows)
        gpu = self.work.h.hi_lo is not None
        buffer = ops.empty((scratch_bytes(config, layout, self.piece_rows, gpu),), np.uint8)
        prefill_rows = make_prefill_rows(ops, config, layout, tokens, gpu)
        self.piece_work = cut_workspace(config, self.piece_rows, buffer, self.work, prefill_rows.h)
        experts = None
        if prefill_rows.ids is not None:  # its arrays lie where the workspace has its own
            pairs = prefill_pairs(layout, tokens, config.top_k, buffer.shape[0])
            experts = PrefillExperts(
                ops, expert_runner, tokens, pairs, Scratch(buffer).empty, link_gb_s
            )
        self.pass_tokens = tokens
        """Most tokens of a prefill pass."""
        self.prefill_pass = PrefillPass(ops, prefill_rows, experts, config.eps)

    def forward(self, step: StepInputs, state: ModelState) -> None:
        """Run all layers on a step; `head` computes its logits until the next call.

        Allocates nothing.
        """
        assert step.tokens <= self.rows, f"a step of {step.tokens} rows, the maximum is {self.rows}"
        work = self.work.first_rows(step.tokens)
        x = work.x
        self.ops.embed(x, step.ids, self.embed)
        self.ops.rms_norm(work.h, x, self.layers[0].mixer_norm)
        # The norm and the first matrix after each layer: the next layer's, at the end the head's.
        following = [(one.mixer_norm, one.mixer.first_weight.data) for one in self.layers[1:]]
        following.append((self.norm, self.head_matrix.data))
        with self.expert_runner.step(step.tokens):
            for layer, layer_state, (norm, l2_prefetch) in zip(
                self.layers, state.layers, following, strict=True
            ):
                layer.mixer.forward(x, step, layer_state, work, layer.moe_norm)
                layer.moe.forward(x, step, work, norm, l2_prefetch)

    def prefill(
        self, steps: PrefillSteps, state: ModelState, first_row: int = 0, admits: bool = False
    ) -> Iterator[int]:
        """Run all layers on consecutive steps; see PrefillPass.run."""
        return self.prefill_pass.run(
            self.layers, self.embed, self.piece_work.first_rows, steps, state, first_row, admits
        )

    def head(
        self, out: Array, rows: Array | None = None, first_prefill_row: int | None = None
    ) -> None:
        """Logits of some rows of the last step, or of the pass that began at `first_prefill_row`.

        out f32 [R, vocab]    rows i32 [R]    R at most self.rows
        Without `rows` they are the first R rows; that is valid only directly after `forward`.
        """
        ops, h = self.ops, self.work.h[: out.shape[0]]
        if rows is not None:
            x = self.work.x
            if first_prefill_row is not None:
                x = self.prefill_pass.rows.x[first_prefill_row:]
            ops.gather_rows(h.f32, x, rows)
            ops.rms_norm(h, h.f32, self.norm)
        ops.linear(out, h, self.head_matrix)


MODEL_CLASS = Qwen3_5MoeModel
"""The class that models.model_class returns for this file."""
