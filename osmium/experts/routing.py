"""Routing traces: the experts chosen for each token, recorded from a running model or read back.

A trace is an .npz with these arrays:

ids                unsigned [T, L, A]  the top-k expert ids of each token and layer, in time order
prompt_starts      i64 [P]             indices of tokens at which a new prompt begins
predicted          unsigned [T, L, A]  optional; a layer's router on the previous layer's input
predicted_weights  float [T, L, A]     optional; the softmax of that router over its top k

The first layer has no previous layer: there predicted is ids, and each weight is 1 / A.
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

__all__ = ["RoutingRecorder", "RoutingTrace", "predict_experts", "read_model_trace", "read_trace"]

Ids = npt.NDArray[np.uint16]
F32 = npt.NDArray[np.float32]


class RoutingRecorder:
    """Collects routing while a model runs.  Slow: each layer's ids are copied to the host."""

    def __init__(self, layers: int) -> None:
        self._layers: list[list[Ids]] = [[] for _ in range(layers)]
        self._predicted: list[list[Ids]] = [[] for _ in range(layers)]
        self._weights: list[list[F32]] = [[] for _ in range(layers)]
        self._prompt_starts: list[int] = [0]
        self._num_tokens = 0

    def add(self, layer: int, ids: Ids) -> None:
        """Append ids u16 [T, A] of one layer and step; call it in layer order."""
        self._layers[layer].append(np.array(ids, np.uint16))
        if layer == 0:
            self._num_tokens += len(ids)

    def add_predicted(self, layer: int, predicted: Ids, weights: F32) -> None:
        """Append predicted u16 [T, A] and weights f32 [T, A] of a layer after the first.

        Call it in every step or in none.
        """
        self._predicted[layer].append(np.array(predicted, np.uint16))
        self._weights[layer].append(np.array(weights, np.float32))

    def prompt(self) -> None:
        """Begin a new prompt: later tokens belong to it."""
        if self._num_tokens > self._prompt_starts[-1]:
            self._prompt_starts.append(self._num_tokens)

    def ids(self) -> Ids:
        """u16 [T, L, A]."""
        return _stacked(self._layers)

    def predicted(self) -> Ids | None:
        """u16 [T, L, A], or None without recorded predictions."""
        if not any(self._predicted):
            return None
        return _stacked([self._layers[0], *self._predicted[1:]])

    def predicted_weights(self) -> F32 | None:
        """f32 [T, L, A], in the first layer 1 / A; None without recorded predictions."""
        if not any(self._predicted):
            return None
        equal = [np.full(ids.shape, 1 / ids.shape[1], np.float32) for ids in self._layers[0]]
        return _stacked([equal, *self._weights[1:]])

    def save(self, path: str | Path) -> None:
        """Write the trace.  Raises: ConfigError where the file cannot be written."""
        try:
            with open(path, "wb") as file:
                prompt_starts = np.array(self._prompt_starts, np.int64)
                optional = dict[str, Any]()
                if (predicted := self.predicted()) is not None:
                    optional["predicted"] = predicted
                    optional["predicted_weights"] = self.predicted_weights()
                np.savez_compressed(file, ids=self.ids(), prompt_starts=prompt_starts, **optional)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error}") from None


class RoutingTrace:
    """Routing to replay, or input of a cache simulation.

    ids u16 [T, L, A]; starts i64 [P]; experts: the number per layer; predicted u16 [T, L, A] and
    predicted_weights f32 [T, L, A] are None where the trace lacks them.
    """

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
    """Read a trace.  Without `experts`, their number per layer is the largest id plus one.

    Raises: ConfigError where the file is not a trace, or has an id of `experts` or more.
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
    max_id = int(ids.max() if predicted is None else max(ids.max(), predicted.max()))
    if experts is not None and max_id >= experts:
        raise ConfigError(f"{path} has expert id {max_id}; the model has {experts} per layer.")
    starts = np.asarray(data.get("prompt_starts", [0]), np.int64)
    if predicted is not None:
        predicted = predicted.astype(np.uint16)
    return RoutingTrace(ids.astype(np.uint16), starts, experts or max_id + 1, predicted, weights)


def read_model_trace(
    path: str | Path, layers: int, experts: int, top_k: int, may_have_more_layers: bool
) -> RoutingTrace:
    """The trace to replay for a model of `layers` layers.  Its predicted weights are not read.

    With `may_have_more_layers` the first `layers` ones of the trace count.
    Raises: ConfigError where the shape of the trace does not match.
    """
    trace = read_trace(path, experts)
    ids, predicted = trace.ids, trace.predicted
    if may_have_more_layers:
        ids = ids[:, :layers]
        predicted = None if predicted is None else predicted[:, :layers]
    if ids.shape[1:] != (layers, top_k):
        raise ConfigError(
            f"{path} has {ids.shape[1]} layers of {ids.shape[2]} experts per token; the model "
            f"has {layers} of {top_k}."
        )
    return RoutingTrace(ids, trace.starts, trace.experts, predicted)


def _check_weights(path: str | Path, weights: npt.NDArray[Any], predicted: Ids | None) -> None:
    """Raises: ConfigError where `weights` do not match `predicted`, are not finite or below 0."""
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
    """Top-k ids u16 [T, A] and weights f32 [T, A] of `router` on rows h [T, D], on the host.

    Allocates and synchronises, so it serves recording only.
    """
    tokens = h.f32.shape[0]
    ids, weights = ops.empty((tokens, top_k), np.uint16), ops.empty((tokens, top_k), np.float32)
    router_logits, counters = (
        ops.empty((tokens, router.out_features), np.float32),
        ops.to_device(np.zeros(4, np.int64)),
    )
    ops.linear(router_logits, h, router)
    ops.topk_softmax(ids, weights, router_logits, num_experts, counters)
    host_ids, host_weights = ops.copy_d2h(ids), ops.copy_d2h(weights)
    return host_ids.astype(np.uint16, copy=False), host_weights.astype(np.float32, copy=False)


def _stacked(layers: Sequence[Sequence[npt.NDArray[Any]]]) -> npt.NDArray[Any]:
    """[L][steps] arrays [t, A] -> [T, L, A]."""
    return np.stack([np.concatenate(layer) for layer in layers], axis=1)
