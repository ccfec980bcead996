"""The engine on a GPU: captured steps, batches, traffic to the host, memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import osmium
from osmium.cuda.stream import CudaRuntime
from osmium.engine.engine import Engine
from osmium.engine.request import SamplingParams
from osmium.errors import NoDevice
from osmium.experts.cache import resident, verify
from osmium.experts.usage import snapshot_usage
from osmium.ops.gpu import GpuOps
from osmium.weights import DEMO, open_packed

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def demo(path: Path = DEMO, **options: Any) -> Engine:
    try:
        return osmium.load(path, device="gpu", **options)
    except NoDevice as error:
        pytest.skip(str(error))


def _slots(slots: int | None) -> dict[str, Any]:
    return {} if slots is None else {"expert_slots": slots}


def prompts(engine: Engine, rng: np.random.Generator, count: int) -> list[list[int]]:
    return [
        [int(one) for one in rng.integers(0, engine.config.vocab_size, int(rng.integers(2, 90)))]
        for _ in range(count)
    ]


def responses(engine: Engine, all_prompts: list[list[int]]) -> list[list[int]]:
    """The responses to all prompts, submitted together."""
    streams = [engine.generate(ids, GREEDY) for ids in all_prompts]
    return [[token.id for token in one] for one in streams]


def test_sampling_on_the_device_equals_sampling_on_the_host(rng: np.random.Generator) -> None:
    """With log-probabilities requested, the host reads every row of logits and samples."""
    engine = demo()
    try:
        assert engine._runner._graphs, "decode graphs are captured before serving"
        for settings in ({}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 5}):
            params = replace(GREEDY, **settings)  # type: ignore[arg-type]
            for ids in prompts(engine, rng, 3):
                device = [token.id for token in engine.generate(ids, params)]
                host = [token.id for token in engine.generate(ids, replace(params, logprobs=0))]
                assert device == host
    finally:
        engine.close()


def test_a_response_ends_at_an_end_token(rng: np.random.Generator) -> None:
    engine = demo(max_num_seqs=3)
    try:
        params = SamplingParams(temperature=1, max_tokens=200, seed=1)
        all_prompts = prompts(engine, rng, 6)
        streams = [engine.generate(ids, params) for ids in all_prompts]
        batched = [[token.id for token in one] for one in streams]
        host = replace(params, logprobs=0)
        alone = [[token.id for token in engine.generate(ids, host)] for ids in all_prompts]
        equal = sum(a == b for a, b in zip(alone, batched, strict=True))
        assert equal >= 4, f"{equal} of 6"  # another summation order may change a sampled token
    finally:
        engine.close()


@pytest.mark.parametrize("slots", [None, 16, 4])
def test_batched_requests_give_the_same_responses_as_alone(
    rng: np.random.Generator, slots: int | None
) -> None:
    engine = demo(max_num_seqs=4, **_slots(slots))
    try:
        all_prompts = prompts(engine, rng, 10)
        alone = [[token.id for token in engine.generate(ids, GREEDY)] for ids in all_prompts]
        batched = responses(engine, all_prompts)
        # Another summation order may change a near-tie, so almost all must be equal.
        equal = sum(a == b for a, b in zip(alone, batched, strict=True))
        assert equal >= 9, f"{equal} of 10"
        experts = engine.status()["experts"]
        assert experts["routed"] == experts["hit"] + experts["missed"]
    finally:
        engine.close()


def test_only_logits_are_copied_to_the_host(rng: np.random.Generator) -> None:
    engine = demo(expert_slots=8)
    try:
        (ids,) = prompts(engine, rng, 1)
        ops = engine._runner.ops
        list(engine.generate(ids, GREEDY))
        engine.status()  # waits for reads that the response left pending
        before = ops.d2h_bytes
        count = len(list(engine.generate(ids, GREEDY)))
        assert count == GREEDY.max_tokens
        engine.status()
        counters = 3 * engine._runner.expert_runner.cache.counters.nbytes  # two polls and a status
        logit_bytes = ops.d2h_bytes - before - counters
        assert logit_bytes == engine.config.vocab_size * 4, "the first token's logits"
    finally:
        engine.close()


def test_nothing_is_allocated_while_serving(rng: np.random.Generator) -> None:
    engine = demo(expert_slots=8)
    try:
        ops = engine._runner.ops
        assert isinstance(ops, GpuOps) and isinstance(ops.runtime, CudaRuntime)
        pool = ops.runtime.pool
        assert pool.frozen
        used = pool.used
        responses(engine, prompts(engine, rng, 3))
        assert pool.used == used
    finally:
        engine.close()


@pytest.mark.parametrize("slots", [None, 8])
@pytest.mark.parametrize("wc_alloc", [True, False])
def test_every_kind_of_host_memory_holds_the_files_experts(
    slots: int | None, wc_alloc: bool
) -> None:
    engine = demo(write_combined=wc_alloc, **_slots(slots))
    try:
        experts = open_packed(DEMO).all_packed_experts()
        runner = engine.runner
        if slots is None:
            assert (
                verify(runner.ops, runner.expert_runner.cache, experts, 10**6, 0)
                == experts[..., 0].size
            )
        else:
            assert runner.expert_runner.host_experts is not None
            assert np.array_equal(
                runner.ops.host_view(runner.expert_runner.host_experts.packed), experts
            )
    finally:
        engine.close()


def test_a_second_start_hits_more_with_saved_usage(tmp_path: Path) -> None:
    model = tmp_path / "model.osmium"  # the bundled file's own usage is not saved
    model.write_bytes(DEMO.read_bytes())
    experts = open_packed(model).all_packed_experts()

    def count() -> dict[str, int]:
        """Hits of twenty prompt tokens and their response; checks the slots at the start."""
        engine = demo(model, expert_slots=12, cache_dir=str(tmp_path))
        try:
            ops, store = engine.runner.ops, engine.runner.expert_runner
            num_resident = engine.run_on_engine_thread(
                lambda: int(resident(ops, store.cache).sum())
            )
            assert (
                engine.run_on_engine_thread(lambda: verify(ops, store.cache, experts, 10**6, 0))
                == num_resident
            )
            assert not any(engine.status()["experts"].values())
            list(engine.generate(list(range(5, 25)), GREEDY))
            return dict(engine.status()["experts"])
        finally:
            engine.close()

    cold, warm = count(), count()
    for counts in (cold, warm):
        assert counts["routed"] == counts["hit"] + counts["missed"]
    assert cold["routed"] == warm["routed"]
    assert warm["hit"] > cold["hit"]


def test_rebalancing_slots_between_responses_changes_none(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    model = tmp_path / "model.osmium"
    model.write_bytes(DEMO.read_bytes())
    experts = open_packed(model).all_packed_experts()
    engine = demo(model, expert_slots=12, cache_dir=str(tmp_path))
    try:
        runner = engine.runner
        ops, store = runner.ops, runner.expert_runner
        assert isinstance(ops, GpuOps) and isinstance(ops.runtime, CudaRuntime)
        all_prompts, used = prompts(engine, rng, 10), ops.runtime.pool.used
        before = [responses(engine, [ids]) for ids in all_prompts]
        counters_before, captured = engine.status()["experts"], dict(runner._graphs)
        usage = engine.run_on_engine_thread(lambda: snapshot_usage(ops, store.cache))

        count = engine.run_on_engine_thread(runner.rebalance_slots)
        slots_per_layer = [layer.shape[0] for layer in store.cache.slots]
        assert (
            count == sum(slots_per_layer) == 12 * len(slots_per_layer)
            and len({*slots_per_layer}) > 1
        )
        is_resident = engine.run_on_engine_thread(lambda: resident(ops, store.cache))
        assert is_resident.sum(axis=1).tolist() == slots_per_layer
        assert (
            engine.run_on_engine_thread(lambda: verify(ops, store.cache, experts, 10**6, 0))
            == count
        )
        for layer, num_slots in enumerate(slots_per_layer):
            assert set(np.flatnonzero(is_resident[layer])) == set(
                usage.top_experts(layer, num_slots).tolist()
            )
        usage_after = engine.run_on_engine_thread(lambda: snapshot_usage(ops, store.cache))
        assert np.allclose(usage_after.short_count, usage.short_count, rtol=1e-5)
        assert np.allclose(usage_after.long_count, usage.long_count, rtol=1e-5)
        assert engine.status()["experts"] == counters_before and ops.runtime.pool.used == used
        assert runner._graphs, "captured again"
        assert all(run is not captured.get(key) for key, run in runner._graphs.items())

        after = [responses(engine, [ids]) for ids in all_prompts]
        # The sum runs over hits before misses, and that may change a near-tie.
        equal = sum(a == b for a, b in zip(before, after, strict=True))
        assert equal >= 9, f"{equal} of 10"
        counters = engine.status()["experts"]
        routed = counters["hit"] + counters["missed"]
        assert counters["routed"] == routed == 2 * counters_before["routed"]
        is_resident = engine.run_on_engine_thread(lambda: resident(ops, store.cache))
        assert (
            engine.run_on_engine_thread(lambda: verify(ops, store.cache, experts, 10**6, 0))
            == is_resident.sum()
        )
        assert engine.run_on_engine_thread(runner.rebalance_slots) >= 0, "and again"
    finally:
        engine.close()
