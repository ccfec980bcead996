"""Which experts were asked for: recorded from a running model, or read from a trace.

A trace is an .npz with ids [T, L, A], the experts that each token activated in each layer, in order
of time, and prompt_starts [P], where the traffic of another prompt begins.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.errors import ConfigError

__all__ = ["Recorder", "Trace", "read_trace"]

Ids = npt.NDArray[np.uint16]


class Recorder:
    """Collects routing as a model runs: for looking, since every layer's ids come to the host."""

    def __init__(self, layers: int) -> None:
        self._layers: list[list[Ids]] = [[] for _ in range(layers)]
        self._starts: list[int] = [0]
        self._tokens = 0

    def add(self, layer: int, ids: Ids) -> None:
        """ids u16 [T, A] of one step's layer; layers come in order."""
        self._layers[layer].append(np.array(ids, np.uint16))
        if layer == 0:
            self._tokens += len(ids)

    def prompt(self) -> None:
        """What follows belongs to another prompt."""
        if self._tokens > self._starts[-1]:
            self._starts.append(self._tokens)

    def ids(self) -> Ids:
        """u16 [T, L, A]."""
        return np.stack([np.concatenate(layer) for layer in self._layers], axis=1)

    def save(self, path: str | Path) -> None:
        """Raises: ConfigError where the file cannot be written."""
        try:
            with open(path, "wb") as file:
                starts = np.array(self._starts, np.int64)
                np.savez_compressed(file, ids=self.ids(), prompt_starts=starts)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error}") from None


class Trace:
    """Routing to replay or to simulate with."""

    def __init__(
        self,
        ids: Ids,
        starts: npt.NDArray[np.int64],
        experts: int,
        predicted: Ids | None = None,
    ) -> None:
        self.ids, self.starts, self.experts, self.predicted = ids, starts, experts, predicted


def read_trace(path: str | Path, experts: int | None = None) -> Trace:
    """A trace from its file; `experts` a layer, or one more than the largest id.

    Raises: ConfigError where the file is no trace, or of another model.
    """
    try:
        with np.load(path) as file:
            data: dict[str, Any] = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise ConfigError(f"{path} cannot be read as a trace: {error}") from None
    ids = data.get("ids")
    if ids is None or ids.ndim != 3 or ids.dtype.kind != "u" or not ids.size:
        raise ConfigError(f"{path} holds no ids [tokens, layers, experts a token], unsigned.")
    most = int(ids.max()) + 1
    if experts is not None and most > experts:
        raise ConfigError(f"{path} names expert {most - 1}; the model has {experts} a layer.")
    starts = np.asarray(data.get("prompt_starts", [0]), np.int64)
    predicted = data.get("predicted")
    likely = None if predicted is None else predicted.astype(np.uint16)
    return Trace(ids.astype(np.uint16), starts, experts or most, likely)
