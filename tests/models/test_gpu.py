"""Whole models on a GPU against the CPU, for tokens that route to the same experts."""

import numpy as np
import pytest

from osmium.experts.cache import resident, verify
from osmium.ops import Ops
from tests.models.build import CASES, Case, prompt
from tests.models.outliers import RecordingRunner, logits_and_experts
from tests.models.run import SequenceDriver, make_driver
from tests.tolerance import TOLERANCE

pytestmark = pytest.mark.gpu

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def check(
    case: Case, gpu: Ops, chunk: int, bits: int, capacity: int | None = None, kv: str = "bf16"
) -> SequenceDriver:
    """Assert that GPU and CPU logits agree for tokens that route to the same experts."""
    ids = prompt(case)
    cpu = make_driver(case, bits, kv_dtype=kv, store_type=RecordingRunner)
    want, want_experts = logits_and_experts(cpu, ids, chunk)
    model = make_driver(
        case, bits, ops=gpu, kv_dtype=kv, capacity=capacity, store_type=RecordingRunner
    )
    got, got_experts = logits_and_experts(model, ids, chunk)
    assert np.isfinite(got).all()
    agree = (got_experts == want_experts).all(axis=(1, 2))
    assert agree.mean() > 0.9, f"experts agree for {agree.mean():.0%} of the tokens"
    errors = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    assert np.median(errors[agree]) <= TOLERANCE["gpu_logits"], np.median(errors[agree])
    return model


@each_case
@pytest.mark.parametrize("chunk", [1, 33, 256])
def test_a_gpu_gives_the_cpus_logits(case: Case, chunk: int, gpu: Ops) -> None:
    check(case, gpu, chunk, bits=16)


@each_case
@pytest.mark.parametrize("chunk", [1, 33])
def test_kv_in_e4m3_gives_the_cpus_logits(case: Case, chunk: int, gpu: Ops) -> None:
    check(case, gpu, chunk, bits=16, kv="fp8_e4m3")


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_experts_give_the_cpus_logits(bits: int, gpu: Ops) -> None:
    check(CASES[0], gpu, 33, bits)


@each_case
def test_a_small_cache_gives_the_cpus_logits_and_its_slots_verify(case: Case, gpu: Ops) -> None:
    model = check(case, gpu, 33, bits=16, capacity=case.experts[1])
    counted = model.expert_runner.counters()
    assert counted.routed == case.prompt * case.experts[1] * len(case.kinds)
    held = int(resident(gpu, model.expert_runner.cache).sum())
    assert verify(gpu, model.expert_runner.cache, model.experts, samples=held, seed=0) == held > 0


def test_only_requested_logits_are_copied_to_the_host(gpu: Ops) -> None:
    model = make_driver(CASES[0], ops=gpu, kv_dtype="bf16")
    before = gpu.d2h_bytes
    got = model.logits(prompt(CASES[0]), 50)
    assert gpu.d2h_bytes - before == got.nbytes
