"""What a model remembers between steps: KV pages and recurrent states.

A sequence owns pages (the same page numbers in every attention layer) and one slot (the same in
every delta-net layer); who owns what is the engine's to know.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from osmium.config import ModelConfig
from osmium.ops import Array, Ops

__all__ = ["AttentionState", "DeltaState", "State", "make_state", "state_bytes"]

_KV: dict[str, np.dtype[Any]] = {"f32": np.dtype(np.float32), "bf16": np.dtype(np.uint16)}


@dataclass(frozen=True)
class AttentionState:
    """The keys and values of one attention layer."""

    k_pages: Array
    """f32 or bf16 [pages, page, G, d], after norm and rotation."""
    v_pages: Array
    """f32 or bf16 [pages, page, G, d]."""


@dataclass(frozen=True)
class DeltaState:
    """The recurrent state of one delta-net layer."""

    conv: Array
    """f32 [slots, C, 3], the last three inputs of the convolution, oldest first."""
    delta: Array
    """f32 [slots, V, dk, dv]."""


@dataclass(frozen=True)
class State:
    """All of it; contents are unspecified until a step writes them."""

    page: int
    """Tokens a page."""
    pages: int
    """Pages that sequences may share out among themselves."""
    slots: int
    """Recurrent-state slots: the most sequences that can be held."""
    layers: tuple[AttentionState | DeltaState, ...]


def make_state(
    ops: Ops, config: ModelConfig, pages: int, page: int, slots: int, kv_dtype: str
) -> State:
    """A state with `pages` pages of `page` tokens in "f32" or "bf16".  Raises: OutOfMemory."""
    shapes = _shapes(config, pages, page, slots)
    kv = _KV[kv_dtype]
    layers: list[AttentionState | DeltaState] = []
    for mixer in config.mixers:
        first, second = shapes[mixer]
        if mixer == "attention":
            layers.append(AttentionState(ops.empty(first, kv), ops.empty(second, kv)))
        else:
            layers.append(DeltaState(ops.empty(first, np.float32), ops.empty(second, np.float32)))
    return State(page, pages, slots, tuple(layers))


def state_bytes(config: ModelConfig, pages: int, page: int, slots: int, kv_dtype: str) -> int:
    """Bytes that make_state asks for."""
    shapes = _shapes(config, pages, page, slots)
    values = {mixer: sum(math.prod(shape) for shape in pair) for mixer, pair in shapes.items()}
    width = {"attention": _KV[kv_dtype].itemsize, "delta_net": 4}
    return sum(values[mixer] * width[mixer] for mixer in config.mixers)


def _shapes(
    config: ModelConfig, pages: int, page: int, slots: int
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The two arrays of a layer, by its mixer."""
    kv = (pages, page, config.kv_heads, config.head_dim)
    delta = (slots, config.value_heads, config.key_dim, config.value_dim)
    return {"attention": (kv, kv), "delta_net": ((slots, config.channels, 3), delta)}
