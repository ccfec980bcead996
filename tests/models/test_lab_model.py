"""The lab model against what its card says: ids, logits, greedy text, perplexity."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tokenizers

from osmium.ops import Array
from osmium.ops.reference import ReferenceOps
from tests.models.lab import LAB, lab_model
from tests.models.run import Logits, Runner
from tests.tolerance import close, distance

pytestmark = pytest.mark.skipif(
    not (LAB / "config.json").exists(), reason="no lab model at ../shared/lab-model"
)

CASES = ["plain", "chat_no_think", "chat_think", "chat_tools"]


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((LAB / "oracle.json").read_text())
    assert [case["name"] for case in found["cases"]] == CASES
    return found


@pytest.fixture(scope="module")
def model() -> Runner:
    return lab_model(rows=512, context=512)


@pytest.mark.parametrize("case", range(len(CASES)), ids=CASES)
def test_the_oracles_logits_and_greedy_ids_are_reproduced(
    case: int, oracle: dict[str, Any], model: Runner
) -> None:
    want = oracle["cases"][case]
    last = model.logits(want["ids"], chunk=512)[-1]
    top = want["top20"]
    assert np.argsort(-last)[:20].tolist() == top["ids"]
    off = distance(last[top["ids"]], np.array(top["logits"]))
    assert close(last[top["ids"]], np.array(top["logits"]), "logits"), off
    greedy = []
    for _ in want["greedy"]:  # no margin among them is under 0.03
        greedy.append(int(last.argmax()))
        last = model.step({0: greedy[-1:]})[0][-1]
    assert greedy == want["greedy"]


class Routed(ReferenceOps):
    """Keeps what the last row of each `route` was given."""

    def __init__(self) -> None:
        super().__init__()
        self.last: list[tuple[list[int], list[float]]] = []

    def route(
        self, ids: Array, weights: Array, logits: Array, experts: int, counters: Array
    ) -> None:
        super().route(ids, weights, logits, experts, counters)
        self.last.append((ids[-1].tolist(), weights[-1].tolist()))


def test_the_oracles_router_choices_are_reproduced(oracle: dict[str, Any]) -> None:
    ops = Routed()
    model = lab_model(rows=512, context=512, ops=ops)
    for want in oracle["cases"]:
        ops.last.clear()
        model.logits(want["ids"], chunk=512)
        for (ids, weights), said in zip(ops.last, want["router"], strict=True):
            assert ids == said["experts"]
            assert np.allclose(weights, said["weights"], atol=1e-5)


def nll(logits: Logits, targets: npt.NDArray[np.int32]) -> float:
    """The sum of -log p(target) over rows, in float64."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    picked = wide[np.arange(len(targets)), targets]
    return float((top + np.log(np.exp(wide - top[:, None]).sum(axis=1)) - picked).sum())


def windows(oracle: dict[str, Any]) -> npt.NDArray[np.int32]:
    """heldout_small.txt by the card's protocol: whole windows of 512 ids.  i32 [17, 512]"""
    said = oracle["heldout_small"]
    text = (LAB / said["file"]).read_text(encoding="utf-8")
    tokenizer = tokenizers.Tokenizer.from_file(str(LAB / "tokenizer.json"))
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    assert len(ids) == said["ids"]
    return ids[: len(ids) // said["window"] * said["window"]].reshape(-1, said["window"])


def test_prefill_reaches_the_cards_perplexity(oracle: dict[str, Any], model: Runner) -> None:
    rows = windows(oracle)
    total = sum(nll(model.logits(w, chunk=512)[:-1], w[1:]) for w in rows)
    mean = total / oracle["heldout_small"]["scored"]
    assert abs(np.exp(mean) / oracle["heldout_small_perplexity_bf16_files_f32"] - 1) < 5e-3
    # A near-tie of the router may flip an expert; all else agrees to more digits than this.
    assert abs(mean - oracle["heldout_small"]["nll"]) < 2e-4


@pytest.mark.slow
def test_decode_reaches_the_cards_perplexity(oracle: dict[str, Any]) -> None:
    """All windows at once, a token each a step: decode, and in a batch."""
    rows = windows(oracle)
    model = lab_model(rows=len(rows), context=512, sequences=len(rows))
    total = 0.0
    for at in range(rows.shape[1] - 1):
        out = model.step({s: rows[s, at : at + 1] for s in range(len(rows))})
        total += nll(np.concatenate([out[s] for s in range(len(rows))]), rows[:, at + 1])
    mean = total / oracle["heldout_small"]["scored"]
    assert abs(np.exp(mean) / oracle["heldout_small_perplexity_bf16_files_f32"] - 1) < 5e-3
    assert abs(mean - oracle["heldout_small"]["nll"]) < 2e-4
