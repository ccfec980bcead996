"""The lab model against its model card: ids, logits, greedy text, perplexity."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tokenizers

from osmium.ops import Array
from osmium.ops.reference import ReferenceOps
from tests.models.lab import LAB, lab_model
from tests.models.run import Logits, SequenceDriver
from tests.tolerance import close, distance

pytestmark = pytest.mark.skipif(
    not (LAB / "config.json").exists(), reason="no lab model at ../shared/lab-model"
)

FLIPS = 2e-4
"""Nats per token by which near-ties of the router may change a mean. One token in 512 has such a
near-tie, and another expert changes its logits by 0.1. Everything else agrees to more digits."""

CASES = ["plain", "chat_no_think", "chat_think", "chat_tools"]


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((LAB / "oracle.json").read_text())
    assert [case["name"] for case in found["cases"]] == CASES
    return found


@pytest.fixture(scope="module")
def model() -> SequenceDriver:
    return lab_model(rows=512, context=512)


@pytest.mark.parametrize("case", range(len(CASES)), ids=CASES)
def test_the_oracles_logits_and_greedy_ids_are_reproduced(
    case: int, oracle: dict[str, Any], model: SequenceDriver
) -> None:
    want = oracle["cases"][case]
    last = model.logits(want["ids"], chunk=512)[-1]
    top = want["top20"]
    assert np.argsort(-last)[:20].tolist() == top["ids"]
    errors = distance(last[top["ids"]], np.array(top["logits"]))
    assert close(last[top["ids"]], np.array(top["logits"]), "logits"), errors
    greedy = []
    for _ in want["greedy"]:  # no margin among these is below 0.03
        greedy.append(int(last.argmax()))
        last = model.step({0: greedy[-1:]})[0][-1]
    assert greedy == want["greedy"]


class RecordingOps(ReferenceOps):
    """Records the last row's output of each topk_softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.last: list[tuple[list[int], list[float]]] = []

    def topk_softmax(
        self, ids: Array, weights: Array, logits: Array, experts: int, counters: Array
    ) -> None:
        super().topk_softmax(ids, weights, logits, experts, counters)
        self.last.append((ids[-1].tolist(), weights[-1].tolist()))


def test_the_oracles_router_choices_are_reproduced(oracle: dict[str, Any]) -> None:
    ops = RecordingOps()
    model = lab_model(rows=512, context=512, ops=ops)
    for want in oracle["cases"]:
        ops.last.clear()
        model.logits(want["ids"], chunk=512)
        for (ids, weights), decoded in zip(ops.last, want["router"], strict=True):
            assert ids == decoded["experts"]
            assert np.allclose(weights, decoded["weights"], atol=1e-5)


def nll(logits: Logits, targets: npt.NDArray[np.int32]) -> float:
    """The sum of -log p(target) over rows, in float64."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    picked = wide[np.arange(len(targets)), targets]
    return float((top + np.log(np.exp(wide - top[:, None]).sum(axis=1)) - picked).sum())


def windows(file: str, ids_in_all: int) -> npt.NDArray[np.int32]:
    """A text in the card's protocol: full windows of 512 ids, the rest dropped. i32 [W, 512]"""
    text = (LAB / file).read_text(encoding="utf-8")
    tokenizer = tokenizers.Tokenizer.from_file(str(LAB / "tokenizer.json"))
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    assert len(ids) == ids_in_all
    return ids[: len(ids) // 512 * 512].reshape(-1, 512)


def prefill_nll(model: SequenceDriver, rows: npt.NDArray[np.int32]) -> float:
    """Mean over the scored tokens, each window from an empty state."""
    return sum(nll(model.logits(w, chunk=512)[:-1], w[1:]) for w in rows) / rows[:, 1:].size


def test_prefill_reaches_the_cards_perplexity(
    oracle: dict[str, Any], model: SequenceDriver
) -> None:
    mean = prefill_nll(model, windows("heldout_small.txt", 9018))
    assert abs(np.exp(mean) / 16.7784 - 1) < 5e-3
    assert abs(mean - oracle["heldout_small"]["nll"]) < FLIPS


@pytest.mark.parametrize("kind", ["bf16", "fp8_e4m3"])
def test_narrow_kv_changes_perplexity_by_less_than_half_a_percent(
    kind: str, oracle: dict[str, Any]
) -> None:
    model = lab_model(rows=512, context=512, kv_dtype=kind)
    mean = prefill_nll(model, windows("heldout_small.txt", 9018))
    assert abs(np.exp(mean - oracle["heldout_small"]["nll"]) - 1) < 5e-3


def test_int4_experts_raise_perplexity_by_less_than_two_percent() -> None:
    mean = prefill_nll(lab_model(4, rows=512, context=512), windows("heldout_small.txt", 9018))
    assert 1 < np.exp(mean) / 16.7784 < 1.02
