"""A model's tensors by name, each generated or mapped when it is read."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from osmium.config import Progress

__all__ = ["LazyTensors"]


class _Model(Protocol):
    """A packed file or a synthetic model."""

    parts: Any

    def names(self) -> list[str]: ...
    def tensor(self, name: str) -> Any: ...


class LazyTensors(Mapping[str, Any]):
    """All tensors but the routed experts'; each read is reported as progress."""

    def __init__(self, model: _Model, progress: Progress | None) -> None:
        self._model, self._progress = model, progress
        self._read = 0

    def __getitem__(self, name: str) -> Any:
        if name not in self._model.parts:
            raise KeyError(name)
        if self._progress:
            self._progress("weights", self._read, len(self))
        self._read += 1
        return self._model.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._model.names())

    def __len__(self) -> int:
        return len(self._model.names())

    def __contains__(self, name: object) -> bool:
        return name in self._model.parts  # Mapping's own method would read the tensor
