"""The recorded routing of a running model against its routers."""

from typing import Any

import numpy as np
import pytest

import osmium
from osmium.ops.formulas import matrix
from osmium.ops.reference import ReferenceOps


def test_recorded_predictions_are_the_next_router_on_this_layers_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In prefill steps of several rows, and in decode steps of one."""
    layers: list[tuple[Any, list[Any]]] = [(None, []) for _ in range(4)]
    router = ReferenceOps.router

    def recording_router(self: ReferenceOps, *args: Any, **more: Any) -> None:
        h, w, layer = args[3], args[4], args[9]
        layers[layer] = w, [*layers[layer][1], h.f32.copy()]
        router(self, *args, **more)

    engine = osmium.load("synthetic:tiny", "cpu", context=128, prefill_chunk=8, expert_slots=4)
    monkeypatch.setattr(ReferenceOps, "router", recording_router)
    recorder = engine.record_routing()
    greedy = osmium.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    list(engine.generate(list(range(1, 20)), greedy))
    engine.close()
    ids, predicted, weights = recorder.ids(), recorder.predicted(), recorder.predicted_weights()
    assert predicted is not None and predicted.shape == ids.shape and len(ids) > 19
    assert {len(rows) for rows in layers[0][1]} >= {1, 8}
    assert np.array_equal(predicted[:, 0], ids[:, 0])
    assert weights is not None and weights.shape == ids.shape
    assert (weights[:, 0] == np.float32(1 / engine.config.top_k)).all()
    for layer in range(3):
        rows, w = np.concatenate(layers[layer][1]), layers[layer + 1][0]
        scores = rows @ matrix(w.format, w.data, w.scale)[: engine.config.num_experts].T
        wanted = np.argsort(-scores, axis=1)[:, : engine.config.top_k]
        assert np.array_equal(predicted[:, layer + 1], wanted)
        exps = np.exp(np.take_along_axis(scores, wanted, axis=1))
        probabilities = exps / exps.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(weights[:, layer + 1], probabilities, rtol=1e-4)
    assert not np.array_equal(predicted, ids)
