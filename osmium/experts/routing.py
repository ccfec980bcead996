"""Which experts were asked for: recorded from a running model, or read from a trace.

A trace is an .npz with ids [T, L, A], the experts that each token activated in each layer, in order
of time, and prompt_starts [P], where the traffic of another prompt begins.  It may have predicted
[T, L, A], whom each layer's router would have chosen for the rows that the layer before has seen;
the first layer has none before it, and there predicted is ids.  Beside predicted it may have
predicted_weights, float [T, L, A]: the softmax of that router over the A that it would have chosen;
in the first layer 1 / A each.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from osmium.errors import ConfigError
from osmium.ops import LinearWeight, MatmulInput, Ops

__all__ = ["RoutingRecorder", "RoutingTrace", "predict_experts", "read_trace"]

Ids = npt.NDArray[np.uint16]
F32 = npt.NDArray[np.float32]


class RoutingRecorder:
    """Collects routing as a model runs: for looking, since every layer's ids come to the host."""

    def __init__(self, layers: int) -> None:
        self._layers: list[list[Ids]] = [[] for _ in range(layers)]
        self._expected: list[list[Ids]] = [[] for _ in range(layers)]
        self._weights: list[list[F32]] = [[] for _ in range(layers)]
        self._starts: list[int] = [0]
        self._tokens = 0

    def add(self, layer: int, ids: Ids) -> None:
        """ids u16 [T, A] of one step's layer; layers come in order."""
        self._layers[layer].append(np.array(ids, np.uint16))
        if layer == 0:
            self._tokens += len(ids)

    def add_predicted(self, layer: int, predicted: Ids, weights: F32) -> None:
        """predicted u16, weights f32 [T, A] of a layer but the first, in every step or in none."""
        self._expected[layer].append(np.array(predicted, np.uint16))
        self._weights[layer].append(np.array(weights, np.float32))

    def prompt(self) -> None:
        """What follows belongs to another prompt."""
        if self._tokens > self._starts[-1]:
            self._starts.append(self._tokens)

    def ids(self) -> Ids:
        """u16 [T, L, A]."""
        return _stacked(self._layers)

    def predicted(self) -> Ids | None:
        """u16 [T, L, A], or None where nothing was expected."""
        if not any(self._expected):
            return None
        return _stacked([self._layers[0], *self._expected[1:]])

    def predicted_weights(self) -> F32 | None:
        """f32 [T, L, A], in the first layer 1 / A; None where nothing was expected."""
        if not any(self._expected):
            return None
        alike = [np.full(ids.shape, 1 / ids.shape[1], np.float32) for ids in self._layers[0]]
        return _stacked([alike, *self._weights[1:]])

    def save(self, path: str | Path) -> None:
        """Raises: ConfigError where the file cannot be written."""
        try:
            with open(path, "wb") as file:
                starts, more = np.array(self._starts, np.int64), dict[str, Any]()
                if (predicted := self.predicted()) is not None:
                    more = {"predicted": predicted, "predicted_weights": self.predicted_weights()}
                np.savez_compressed(file, ids=self.ids(), prompt_starts=starts, **more)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error}") from None


class RoutingTrace:
    """Routing to replay or to simulate with."""

    def __init__(
        self,
        ids: Ids,
        starts: npt.NDArray[np.int64],
        experts: int,
        predicted: Ids | None = None,
        predicted_weights: F32 | None = None,
    ) -> None:
        self.ids, self.starts, self.experts = ids, starts, experts
        self.predicted, self.predicted_weights = predicted, predicted_weights


def read_trace(path: str | Path, experts: int | None = None) -> RoutingTrace:
    """A trace from its file; `experts` a layer, or one more than the largest that it names.

    Raises: ConfigError where the file is no trace, or of another model.
    """
    try:
        with np.load(path) as file:
            data: dict[str, Any] = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, BadZipFile, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read as a trace: {error}") from None
    ids = data.get("ids")
    if ids is None or ids.ndim != 3 or ids.dtype.kind != "u" or not ids.size:
        raise ConfigError(f"{path} has no unsigned array ids [tokens, layers, experts per token].")
    predicted = data.get("predicted")
    if predicted is not None and (predicted.shape != ids.shape or predicted.dtype.kind != "u"):
        raise ConfigError(
            f"{path}: predicted is {predicted.dtype} {list(predicted.shape)}; it must be unsigned "
            f"and {list(ids.shape)}, as ids are."
        )
    weights = data.get("predicted_weights")
    if weights is not None:
        _check_weights(path, weights, predicted)
        weights = weights.astype(np.float32)
    most = int(ids.max() if predicted is None else max(ids.max(), predicted.max())) + 1
    if experts is not None and most > experts:
        raise ConfigError(
            f"{path} has expert id {most - 1}; the model has {experts} experts per layer."
        )
    starts = np.asarray(data.get("prompt_starts", [0]), np.int64)
    if predicted is not None:
        predicted = predicted.astype(np.uint16)
    return RoutingTrace(ids.astype(np.uint16), starts, experts or most, predicted, weights)


def _check_weights(path: str | Path, weights: npt.NDArray[Any], predicted: Ids | None) -> None:
    """Raises: ConfigError where these are no weights of the predicted."""
    if predicted is None:
        raise ConfigError(f"{path} has predicted_weights without predicted ids.")
    if weights.shape != predicted.shape or weights.dtype.kind != "f":
        raise ConfigError(
            f"{path}: predicted_weights is {weights.dtype} {list(weights.shape)}; it must be float "
            f"and {list(predicted.shape)}, as predicted is."
        )
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ConfigError(f"{path}: predicted_weights has values that are not finite or below 0.")


def predict_experts(
    ops: Ops, h: MatmulInput, router: LinearWeight, num_experts: int, top_k: int
) -> tuple[Ids, F32]:
    """Whom a router would choose for rows h [T, D], u16 [T, A], and their weights, f32 [T, A], on
    the host.  Allocates and waits, as recording does."""
    tokens = h.f32.shape[0]
    ids, weights = ops.empty((tokens, top_k), np.uint16), ops.empty((tokens, top_k), np.float32)
    router_logits, counters = (
        ops.empty((tokens, router.out_features), np.float32),
        ops.to_device(np.zeros(4, np.int64)),
    )
    ops.linear(router_logits, h, router)
    ops.topk_softmax(ids, weights, router_logits, num_experts, counters)
    chosen, by = ops.copy_d2h(ids), ops.copy_d2h(weights)
    return chosen.astype(np.uint16, copy=False), by.astype(np.float32, copy=False)


def _stacked(layers: Sequence[Sequence[npt.NDArray[Any]]]) -> npt.NDArray[Any]:
    return np.stack([np.concatenate(layer) for layer in layers], axis=1)
