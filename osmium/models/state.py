"""The state of sequences between steps: KV pages and recurrent states.

A sequence has KV pages, with the same page numbers in every attention layer.  It has one state
slot, the same in every delta-net layer.  engine.KVCacheManager allocates both.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from osmium.config import ModelConfig
from osmium.ops import Array, Ops, PagedKV

__all__ = ["DeltaState", "ModelState", "make_state", "state_bytes"]

_KV_DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32), "bf16": np.dtype(np.uint16), "fp8_e4m3": np.dtype(np.uint8),
}  # fmt: skip


@dataclass(frozen=True)
class DeltaState:
    """The recurrent state of one delta-net layer."""

    conv: Array
    """f32 [slots, C, 4], the last four inputs of the convolution; position p is at p % 4."""
    delta: Array
    """f32 [slots, V, dk, dv], the state S of the delta rule."""


@dataclass(frozen=True)
class ModelState:
    """The state of all layers; contents are unspecified until a step writes them."""

    page_size: int
    """Tokens per KV page."""
    num_pages: int
    """KV pages per attention layer."""
    num_slots: int
    """State slots per delta-net layer: one per sequence."""
    layers: tuple[PagedKV | DeltaState, ...]


def make_state(
    ops: Ops, config: ModelConfig, num_pages: int, page_size: int, num_slots: int, kv_dtype: str
) -> ModelState:
    """A state with `num_pages` pages of `page_size` tokens in "f32", "bf16" or "fp8_e4m3".

    Raises: OutOfMemory.
    """
    layers: list[PagedKV | DeltaState] = []
    for layer_type in config.layer_types:
        arrays = [
            ops.empty(shape, dtype)
            for shape, dtype in _arrays(
                config, layer_type, num_pages, page_size, num_slots, kv_dtype
            )
        ]
        layers.append(PagedKV(*arrays) if layer_type == "attention" else DeltaState(*arrays))
    return ModelState(page_size, num_pages, num_slots, tuple(layers))


def state_bytes(
    config: ModelConfig, num_pages: int, page_size: int, num_slots: int, kv_dtype: str
) -> int:
    """Bytes that make_state allocates."""
    layer_bytes = {
        layer_type: sum(
            math.prod(shape) * dtype.itemsize
            for shape, dtype in _arrays(
                config, layer_type, num_pages, page_size, num_slots, kv_dtype
            )
        )
        for layer_type in set(config.layer_types)
    }
    return sum(layer_bytes[layer_type] for layer_type in config.layer_types)


def _arrays(
    config: ModelConfig,
    layer_type: str,
    num_pages: int,
    page_size: int,
    num_slots: int,
    kv_dtype: str,
) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of each array of a layer."""
    if layer_type == "attention":
        rows = (num_pages, page_size, config.num_kv_heads)
        values = ((*rows, config.head_dim), _KV_DTYPES[kv_dtype])
        scales = [(rows, np.dtype(np.float16))] * 2 if kv_dtype == "fp8_e4m3" else []
        return [values, values, *scales]
    f32 = np.dtype(np.float32)
    delta = (num_slots, config.value_heads, config.key_dim, config.value_dim)
    return [((num_slots, config.channels, 4), f32), (delta, f32)]
