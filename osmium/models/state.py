"""What a model remembers between steps: KV pages and recurrent states.

A sequence owns pages (the same page numbers in every attention layer) and one slot (the same in
every delta-net layer); who owns what is the engine's to know.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from osmium.config import ModelConfig
from osmium.ops import Array, Ops, PagedKV

__all__ = ["DeltaState", "ModelState", "make_state", "state_bytes"]

_KV: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32), "bf16": np.dtype(np.uint16), "fp8_e4m3": np.dtype(np.uint8),
}  # fmt: skip


@dataclass(frozen=True)
class DeltaState:
    """The recurrent state of one delta-net layer."""

    conv: Array
    """f32 [slots, C, 4], the last four inputs of the convolution, that of position p at p % 4."""
    delta: Array
    """f32 [slots, V, dk, dv]."""


@dataclass(frozen=True)
class ModelState:
    """All of it; contents are unspecified until a step writes them."""

    page: int
    """Tokens a page."""
    pages: int
    """Pages that sequences may share out among themselves."""
    slots: int
    """Recurrent-state slots: the most sequences that can be held."""
    layers: tuple[PagedKV | DeltaState, ...]


def make_state(
    ops: Ops, config: ModelConfig, pages: int, page: int, slots: int, kv_dtype: str
) -> ModelState:
    """A state with `pages` pages of `page` tokens in "f32", "bf16" or "fp8_e4m3".

    Raises: OutOfMemory.
    """
    layers: list[PagedKV | DeltaState] = []
    for mixer in config.layer_types:
        arrays = [ops.empty(*one) for one in _arrays(config, mixer, pages, page, slots, kv_dtype)]
        layers.append(PagedKV(*arrays) if mixer == "attention" else DeltaState(*arrays))
    return ModelState(page, pages, slots, tuple(layers))


def state_bytes(config: ModelConfig, pages: int, page: int, slots: int, kv_dtype: str) -> int:
    """Bytes that make_state asks for."""
    of = {
        mixer: sum(
            math.prod(shape) * dtype.itemsize
            for shape, dtype in _arrays(config, mixer, pages, page, slots, kv_dtype)
        )
        for mixer in set(config.layer_types)
    }
    return sum(of[mixer] for mixer in config.layer_types)


def _arrays(
    config: ModelConfig, mixer: str, pages: int, page: int, slots: int, kv_dtype: str
) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of each array of a layer."""
    if mixer == "attention":
        rows = (pages, page, config.num_kv_heads)
        kept = ((*rows, config.head_dim), _KV[kv_dtype])
        scales = [(rows, np.dtype(np.float16))] * 2 if kv_dtype == "fp8_e4m3" else []
        return [kept, kept, *scales]
    f32 = np.dtype(np.float32)
    delta = (slots, config.value_heads, config.key_dim, config.value_dim)
    return [((slots, config.channels, 4), f32), (delta, f32)]
