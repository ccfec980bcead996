"""Host experts: every routed expert of the model, packed, in host memory.

The caller supplies the reads (StartRead).  The next read always starts before the loader waits for
the previous one, so the disk stays busy.
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
"""start_read(layer, first, out) starts to read packed experts into out, u8 [n, nbytes].

They are experts `first` .. `first + n - 1` of the layer.  The returned function waits for the read
and raises its error.
"""


def load_host_experts(
    ops: Ops,
    layout: ExpertLayout,
    layers: int,
    num_experts: int,
    start_read: StartRead,
    progress: Progress | None,
) -> HostExperts:
    """Load all experts into mapped host memory.

    Raises: OutOfMemory, and the errors of the reads; the memory is then freed.
    """
    shape = (layers, num_experts, layout.nbytes)

    def fill(memory: npt.NDArray[np.uint8]) -> None:
        view, waits = memory.reshape(shape), Waits()
        with waited_for(waits):
            for layer in range(layers + 1):
                if layer < layers:
                    waits.append(start_read(layer, 0, view[layer]))
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
    start_read: StartRead,
    progress: Progress | None,
) -> Array:
    """Load every expert into a slot, u8 [L, E, nbytes] in VRAM, without host experts.

    The staging buffer holds one layer in mapped host memory, as two halves.  One half is copied to
    the device while the other is read.
    Raises: OutOfMemory, and the errors of the reads; the memory is then freed.
    """
    slots = ops.empty((layers, num_experts, layout.nbytes), np.uint8)
    flat = slots.reshape(layers * num_experts, layout.nbytes)
    half = -(-num_experts // 2)
    staging = ops.empty_mapped((2, half, layout.nbytes), np.uint8)
    waits: Waits = []
    with _released_on_error(ops, staging), waited_for(waits):
        halves = np.asarray(ops.host_view(staging), np.uint8)
        parts = [(layer, first) for layer in range(layers) for first in range(0, num_experts, half)]
        for number in range(len(parts) + 1):
            if number < len(parts):
                layer, first = parts[number]
                waits.append(start_read(layer, first, halves[number % 2][: num_experts - first]))
            if number:
                layer, first = parts[number - 1]
                half_read = halves[(number - 1) % 2][: num_experts - first]
                waits[0]()
                waits.pop(0)
                start = layer * num_experts + first
                ops.copy_h2d(flat[start : start + len(half_read)], half_read)
                ops.synchronize()  # the read after the next one reuses this half
                if progress and first + half >= num_experts:
                    progress("experts", layer + 1, layers)
    ops.release(staging)
    return slots


@contextlib.contextmanager
def _released_on_error(ops: Ops, memory: Array) -> Iterator[None]:
    """Release mapped `memory` if the body raises."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(DeviceError):
            ops.synchronize()
        ops.release(memory)
        raise


def wrap_host_experts(layout: ExpertLayout, packed: npt.NDArray[Any]) -> HostExperts:
    """Host experts over `packed`, already in memory or mapped from a file; copies nothing.

    Raises: CheckpointError where `packed` is not u8 [L, E, layout.nbytes].
    """
    if packed.dtype != np.uint8 or packed.ndim != 3 or packed.shape[2] != layout.nbytes:
        raise CheckpointError(
            f"The packed experts are {packed.dtype} {list(packed.shape)}; they must be uint8 "
            f"[layers, experts, {layout.nbytes}]."
        )
    return HostExperts(layout, packed)
