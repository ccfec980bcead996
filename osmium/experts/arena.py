"""The host arena: every routed expert of the model as one record each.

Who reads the records from where is the caller's: `read(layer, out)` writes the E records of a layer
into u8 [E, nbytes].
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.config import Progress
from osmium.errors import CheckpointError
from osmium.ops import Array, ExpertArena, Ops
from osmium.quant.record import Record

__all__ = ["Read", "fill_arena", "fill_slots", "share_arena"]

Read = Callable[[int, npt.NDArray[np.uint8]], None]
"""Write the records of layer `arguments[0]` into u8 [E, nbytes]."""


def fill_arena(
    ops: Ops, record: Record, layers: int, experts: int, read: Read, progress: Progress | None
) -> ExpertArena:
    """A new arena in `ops.host` memory, read layer by layer.  Raises: OutOfMemory."""
    records = ops.host((layers, experts, record.nbytes), np.uint8)
    view = ops.host_view(records)
    for layer in range(layers):
        read(layer, view[layer])
        if progress:
            progress("experts", layer + 1, layers)
    return ExpertArena(record, records)


def fill_slots(
    ops: Ops, record: Record, layers: int, experts: int, read: Read, progress: Progress | None
) -> Array:
    """A slot for every expert, u8 [L, E, nbytes] on the device, read through one layer's worth of
    host memory: a model that fits needs no arena.  Raises: OutOfMemory."""
    slots = ops.empty((layers, experts, record.nbytes), np.uint8)
    one = np.empty((1, experts, record.nbytes), np.uint8)
    for layer in range(layers):
        read(layer, one[0])
        ops.copy_in(slots[layer : layer + 1], one)
        ops.synchronize()  # `one` is written again
        if progress:
            progress("experts", layer + 1, layers)
    return slots


def share_arena(record: Record, records: npt.NDArray[Any]) -> ExpertArena:
    """An arena over records that are already in memory, or mapped from a file; nothing is copied.

    Raises: CheckpointError where they are not u8 [L, E, record.nbytes].
    """
    if records.dtype != np.uint8 or records.ndim != 3 or records.shape[2] != record.nbytes:
        raise CheckpointError(
            f"The expert records are {records.dtype} {list(records.shape)}; they must be uint8 "
            f"[layers, experts, {record.nbytes}]."
        )
    return ExpertArena(record, records)
