"""Qwen3.5-MoE, text: embed -> layers -> head.

    x = embed[ids];  every layer: x += mixer(norm(x));  x += moe(norm(x))
    logits = norm(x) Whead

The mixer is a gated delta net in three layers of four and attention in the fourth.  The model type
is that of transformers; the formulas are those of its modules of that name.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from osmium.config import ModelConfig
from osmium.experts.runner import ExpertRunner
from osmium.models.attention import Attention, rotary_frequencies
from osmium.models.delta_net import DeltaNet
from osmium.models.moe import MoeBlock
from osmium.models.state import ModelState
from osmium.models.weights import WeightView
from osmium.models.workspace import make_workspace
from osmium.ops import Array, LinearWeight, Ops, StepInputs

__all__ = ["Model"]


class _Layer:
    """A mixer and experts, and the norm before each."""

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        weights: WeightView,
        store: ExpertRunner,
        index: int,
        frequencies: Array,
    ) -> None:
        self.mixer_norm = weights.array("mixer_norm", config.hidden_size)
        self.moe_norm = weights.array("moe_norm", config.hidden_size)
        # State.layers holds the mixer's own kind of state at the same index.
        self.mixer: Any = (
            Attention(ops, config, weights, frequencies)
            if config.layer_types[index] == "attention"
            else DeltaNet(ops, config, weights)
        )
        self.moe = MoeBlock(ops, config, weights, store, index)


class Model:
    """The whole model on one backend."""

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        weights: Mapping[str, LinearWeight | Array],
        store: ExpertRunner,
        rows: int,
    ) -> None:
        """`weights` by the names of models/weights.py, where `ops` reaches them; steps have at
        most `rows` tokens.  Raises: CheckpointError, OutOfMemory."""
        taken = WeightView(weights)
        self.ops, self.config, self.rows, self.store = ops, config, rows, store
        self.embed = taken.array("embed", config.vocab_size, config.hidden_size, dtype=np.uint16)
        self.norm = taken.array("norm", config.hidden_size)
        self.head_matrix = (
            taken.linear("head", config.vocab_size, config.hidden_size)
            if taken.has("head")
            else LinearWeight("bf16", config.vocab_size, config.hidden_size, self.embed)
        )
        frequencies = ops.to_device(rotary_frequencies(config))
        self.layers = [
            _Layer(ops, config, taken.layer(i), store, i, frequencies)
            for i in range(config.num_layers)
        ]
        for layer, after in pairwise(self.layers):
            layer.moe.next_router = after.moe.router
        self.work = make_workspace(ops, config, rows)

    def forward(self, step: StepInputs, state: ModelState) -> None:
        """Compute a step: `head` then knows its rows, until the next.  Allocates nothing."""
        assert step.tokens <= self.rows, f"a step of {step.tokens} rows, room for {self.rows}"
        work = self.work.first_rows(step.tokens)
        x = work.x
        self.ops.embed(x, step.ids, self.embed)
        self.ops.rms_norm(work.h, x, self.layers[0].mixer_norm)
        after = [(layer.mixer_norm, layer.mixer.first_weight.data) for layer in self.layers[1:]]
        after.append((self.norm, self.head_matrix.data))
        with self.store.step(step.tokens):
            for layer, own, (norm, l2_prefetch) in zip(
                self.layers, state.layers, after, strict=True
            ):
                layer.mixer.forward(x, step, own, work, layer.moe_norm)
                layer.moe.forward(x, step, work, norm, l2_prefetch)

    def head(self, out: Array, rows: Array | None = None) -> None:
        """The logits of some rows of the last step; of its first ones, if right after it.

        out f32 [R, vocab]    rows i32 [R]    R at most the model's rows
        """
        ops, h = self.ops, self.work.h[: out.shape[0]]
        if rows is not None:
            ops.gather_rows(h.f32, self.work.x, rows)
            ops.rms_norm(h, h.f32, self.norm)
        ops.linear(out, h, self.head_matrix)
