"""The host arena: every routed expert of the model as one record each.

Who reads the records from where is the caller's: see Begin.  Reading never waits for a layer's end:
the next part is begun before the one before it is waited for.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.config import Progress
from osmium.cuda.memory import Waits, waited_for
from osmium.errors import CheckpointError, DeviceError
from osmium.ops import Array, HostExperts, Ops
from osmium.quant.expert_layout import ExpertLayout

__all__ = ["StartRead", "load_host_experts", "load_resident_experts", "wrap_host_experts"]

StartRead = Callable[[int, int, npt.NDArray[np.uint8]], Callable[[], None]]
"""begin(layer, first, out) begins to write the records of a layer from expert `first` on into
u8 [n, nbytes]; what it returns waits until they are there, and raises what went wrong."""


def load_host_experts(
    ops: Ops,
    layout: ExpertLayout,
    layers: int,
    num_experts: int,
    begin: StartRead,
    progress: Progress | None,
) -> HostExperts:
    """All experts in mapped host memory.  Raises: OutOfMemory, and what reading raises; then
    nothing is kept."""
    shape = (layers, num_experts, layout.nbytes)

    def fill(memory: npt.NDArray[np.uint8]) -> None:
        view, waits = memory.reshape(shape), Waits()
        with waited_for(waits):
            for layer in range(layers + 1):
                if layer < layers:
                    waits.append(begin(layer, 0, view[layer]))
                if layer:
                    waits[0]()
                    waits.pop(0)
                    if progress:
                        progress("experts", layer, layers)

    return HostExperts(layout, ops.empty_mapped(shape, np.uint8, fill))


def load_resident_experts(
    ops: Ops,
    layout: ExpertLayout,
    layers: int,
    num_experts: int,
    begin: StartRead,
    progress: Progress | None,
) -> Array:
    """A slot for every expert, u8 [L, E, nbytes] on the device, for a model that needs no arena.

    Read through one layer's worth of mapped memory, in two halves: one is copied to the device
    while the other is read.  Raises: OutOfMemory, and what reading raises; then nothing is kept.
    """
    slots = ops.empty((layers, num_experts, layout.nbytes), np.uint8)
    flat = slots.reshape(layers * num_experts, layout.nbytes)
    half = -(-num_experts // 2)
    staging = ops.empty_mapped((2, half, layout.nbytes), np.uint8)
    waits: Waits = []
    with _given_back_if_it_fails(ops, staging), waited_for(waits):
        rooms = np.asarray(ops.host_view(staging), np.uint8)
        parts = [(layer, first) for layer in range(layers) for first in range(0, num_experts, half)]
        for number in range(len(parts) + 1):
            if number < len(parts):
                layer, first = parts[number]
                waits.append(begin(layer, first, rooms[number % 2][: num_experts - first]))
            if number:
                layer, first = parts[number - 1]
                room = rooms[(number - 1) % 2][: num_experts - first]
                waits[0]()
                waits.pop(0)
                at = layer * num_experts + first
                ops.copy_h2d(flat[at : at + len(room)], room)
                ops.synchronize()  # the part after the next is read into it
                if progress and first + half >= num_experts:
                    progress("experts", layer + 1, layers)
    ops.release(staging)
    return slots


@contextlib.contextmanager
def _given_back_if_it_fails(ops: Ops, memory: Array) -> Iterator[None]:
    """Where what is inside fails: `memory` is given back."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(DeviceError):
            ops.synchronize()
        ops.release(memory)
        raise


def wrap_host_experts(layout: ExpertLayout, packed: npt.NDArray[Any]) -> HostExperts:
    """An arena over records that are already in memory, or mapped from a file; nothing is copied.

    Raises: CheckpointError where they are not u8 [L, E, record.nbytes].
    """
    if packed.dtype != np.uint8 or packed.ndim != 3 or packed.shape[2] != layout.nbytes:
        raise CheckpointError(
            f"The expert records are {packed.dtype} {list(packed.shape)}; they must be uint8 "
            f"[layers, experts, {layout.nbytes}]."
        )
    return HostExperts(layout, packed)
