"""Logits of seeded models of every shape against transformers, in float32 on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.models.build import CASES, Case, fingerprint, hf_tensors, prompt
from tests.models.run import Logits, make_driver
from tests.tolerance import close, distance

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def golden(case: Case) -> dict[str, npt.NDArray[Any]]:
    with np.load(GOLDEN / f"logits_{case.name}.npz") as file:
        found = dict(file)
    made_of = str(found["weights"])
    assert made_of == fingerprint(hf_tensors(case)), "other weights: run tools/make_golden.py"
    assert np.array_equal(found["ids"], prompt(case)), "another prompt: run tools/make_golden.py"
    return found


def check(case: Case, logits: Logits) -> None:
    want = golden(case)
    got = logits[want["positions"]]
    off = distance(got, want["logits"])
    assert close(got, want["logits"], "logits"), f"{case.name}: {off:.2e}"


@each_case
def test_prefill_at_once_gives_the_logits_of_transformers(case: Case) -> None:
    check(case, make_driver(case).logits(prompt(case), chunk=case.prompt))


@each_case
@pytest.mark.parametrize("chunk", [7, 32, 64])
def test_prefill_in_chunks_gives_the_logits_of_transformers(case: Case, chunk: int) -> None:
    check(case, make_driver(case, rows=chunk).logits(prompt(case), chunk))


@each_case
def test_teacher_forced_decode_gives_the_logits_of_transformers(case: Case) -> None:
    check(case, make_driver(case, rows=1).logits(prompt(case), chunk=1))


@each_case
def test_a_cache_of_top_k_slots_gives_the_logits_of_transformers(case: Case) -> None:
    small = make_driver(case, capacity=case.experts[1])
    check(case, small.logits(prompt(case), chunk=64))
    counted = small.expert_runner.counters()
    assert counted.routed == case.prompt * case.experts[1] * len(case.kinds)
