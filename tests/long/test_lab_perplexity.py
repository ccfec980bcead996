"""The lab model's perplexity on all of its text, and by decode."""

from typing import Any

import numpy as np
import pytest

from tests.models.lab import LAB, lab_model
from tests.models.run import SequenceDriver
from tests.models.test_lab_model import FLIPS, model, nll, oracle, prefill_nll, windows

__all__ = ["model", "oracle"]

pytestmark = pytest.mark.skipif(
    not (LAB / "config.json").exists(), reason="no lab model at ../shared/lab-model"
)


def test_prefill_reaches_the_cards_perplexity_on_all_of_the_text(model: SequenceDriver) -> None:
    mean = prefill_nll(model, windows("heldout.txt", 58_008))
    assert abs(np.exp(mean) / 19.5215 - 1) < 5e-3
    assert abs(mean - 2.971517) < FLIPS


def test_decode_reaches_the_cards_perplexity(oracle: dict[str, Any]) -> None:
    """All windows in one batch, one token each per step."""
    rows = windows("heldout_small.txt", 9018)
    model = lab_model(rows=len(rows), context=512, sequences=len(rows))
    total = 0.0
    for at in range(rows.shape[1] - 1):
        out = model.step({s: rows[s, at : at + 1] for s in range(len(rows))})
        total += nll(np.concatenate([out[s] for s in range(len(rows))]), rows[:, at + 1])
    mean = total / rows[:, 1:].size
    assert abs(np.exp(mean) / 16.7784 - 1) < 5e-3
    assert abs(mean - oracle["heldout_small"]["nll"]) < FLIPS
