"""The engine on a GPU: recorded steps, requests side by side, what comes back, what is held."""

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


def replies(engine: Engine, asked: list[list[int]]) -> list[list[int]]:
    """All of them at once."""
    going = [engine.generate(ids, GREEDY) for ids in asked]
    return [[token.id for token in one] for one in going]


def test_replies_of_the_device_are_those_of_the_host(rng: np.random.Generator) -> None:
    """Asked for log-probabilities, the host looks at every row of logits and draws itself."""
    engine = demo()
    try:
        assert engine._runner._graphs, "a token was recorded before anybody is served"
        for settings in ({}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 5}):
            params = replace(GREEDY, **settings)  # type: ignore[arg-type]
            for ids in prompts(engine, rng, 3):
                device = [token.id for token in engine.generate(ids, params)]
                host = [token.id for token in engine.generate(ids, replace(params, logprobs=0))]
                assert device == host
    finally:
        engine.close()


def test_a_reply_ends_at_an_end_token(rng: np.random.Generator) -> None:
    engine = demo(max_num_seqs=3)
    try:
        params = SamplingParams(temperature=1, max_tokens=200, seed=1)
        asked = prompts(engine, rng, 6)
        going = [engine.generate(ids, params) for ids in asked]
        together = [[token.id for token in one] for one in going]
        host = replace(params, logprobs=0)
        alone = [[token.id for token in engine.generate(ids, host)] for ids in asked]
        same = sum(a == b for a, b in zip(alone, together, strict=True))
        assert same >= 4, f"{same} of 6"  # a sum in another order may flip a draw
    finally:
        engine.close()


@pytest.mark.parametrize("slots", [None, 16, 4])
def test_requests_side_by_side_say_what_they_say_alone(
    rng: np.random.Generator, slots: int | None
) -> None:
    engine = demo(max_num_seqs=4, **_slots(slots))
    try:
        asked = prompts(engine, rng, 10)
        alone = [[token.id for token in engine.generate(ids, GREEDY)] for ids in asked]
        together = replies(engine, asked)
        # A sum in another order may flip a near-tie: almost all of them must be the same.
        same = sum(a == b for a, b in zip(alone, together, strict=True))
        assert same >= 9, f"{same} of 10"
        experts = engine.status()["experts"]
        assert experts["routed"] == experts["hit"] + experts["missed"]
    finally:
        engine.close()


def test_only_logits_come_back(rng: np.random.Generator) -> None:
    engine = demo(expert_slots=8)
    try:
        (ids,) = prompts(engine, rng, 1)
        ops = engine._runner.ops
        list(engine.generate(ids, GREEDY))
        engine.status()  # whatever that reply still reads has come by now
        before = ops.bytes_to_host
        count = len(list(engine.generate(ids, GREEDY)))
        assert count == GREEDY.max_tokens
        engine.status()
        counters = 3 * engine._runner.expert_runner.cache.counters.nbytes  # two looks and a status
        came = ops.bytes_to_host - before - counters
        assert came == engine.config.vocab_size * 4, "the first token's logits"
    finally:
        engine.close()


def test_nothing_is_allocated_while_serving(rng: np.random.Generator) -> None:
    engine = demo(expert_slots=8)
    try:
        ops = engine._runner.ops
        assert isinstance(ops, GpuOps) and isinstance(ops.machine, CudaRuntime)
        pool = ops.machine.pool
        assert pool.frozen
        used = pool.used
        replies(engine, prompts(engine, rng, 3))
        assert pool.used == used
    finally:
        engine.close()


@pytest.mark.parametrize("slots", [None, 8])
@pytest.mark.parametrize("wc_alloc", [True, False])
def test_every_kind_of_host_memory_is_filled_with_the_file(
    slots: int | None, wc_alloc: bool
) -> None:
    engine = demo(write_combined=wc_alloc, **_slots(slots))
    try:
        records = open_packed(DEMO).all_records()
        runner = engine.runner
        if slots is None:
            assert (
                verify(runner.ops, runner.expert_runner.cache, records, 10**6, 0)
                == records[..., 0].size
            )
        else:
            assert runner.expert_runner.host_experts is not None
            assert np.array_equal(
                runner.ops.host_view(runner.expert_runner.host_experts.records), records
            )
    finally:
        engine.close()


def test_a_second_start_hits_what_was_hot(tmp_path: Path) -> None:
    model = tmp_path / "model.osmium"  # the bundled file's own heat is not kept
    model.write_bytes(DEMO.read_bytes())
    records = open_packed(model).all_records()

    def count() -> dict[str, int]:
        """What twenty tokens and their reply hit; at the start slots hold what they should."""
        engine = demo(model, expert_slots=12, cache_dir=str(tmp_path))
        try:
            ops, store = engine.runner.ops, engine.runner.expert_runner
            there = engine.run_on_engine_thread(lambda: int(resident(ops, store.cache).sum()))
            assert (
                engine.run_on_engine_thread(lambda: verify(ops, store.cache, records, 10**6, 0))
                == there
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


def test_slots_shared_out_between_two_replies_change_neither(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    model = tmp_path / "model.osmium"
    model.write_bytes(DEMO.read_bytes())
    records = open_packed(model).all_records()
    engine = demo(model, expert_slots=12, cache_dir=str(tmp_path))
    try:
        runner = engine.runner
        ops, store = runner.ops, runner.expert_runner
        assert isinstance(ops, GpuOps) and isinstance(ops.machine, CudaRuntime)
        asked, used = prompts(engine, rng, 10), ops.machine.pool.used
        before = [replies(engine, [ids]) for ids in asked]
        counted, recorded = engine.status()["experts"], dict(runner._graphs)
        heat = engine.run_on_engine_thread(lambda: snapshot_usage(ops, store.cache))

        count = engine.run_on_engine_thread(runner.rebalance_slots)
        each = [layer.shape[0] for layer in store.cache.slots]
        assert count == sum(each) == 12 * len(each) and len({*each}) > 1
        there = engine.run_on_engine_thread(lambda: resident(ops, store.cache))
        assert there.sum(axis=1).tolist() == each
        assert (
            engine.run_on_engine_thread(lambda: verify(ops, store.cache, records, 10**6, 0))
            == count
        )
        for layer, own in enumerate(each):
            assert set(np.flatnonzero(there[layer])) == set(heat.top_experts(layer, own).tolist())
        again = engine.run_on_engine_thread(lambda: snapshot_usage(ops, store.cache))
        assert np.allclose(again.short_count, heat.short_count, rtol=1e-5)
        assert np.allclose(again.long_count, heat.long_count, rtol=1e-5)
        assert engine.status()["experts"] == counted and ops.machine.pool.used == used
        assert runner._graphs, "recorded again"
        assert all(run is not recorded.get(key) for key, run in runner._graphs.items())

        after = [replies(engine, [ids]) for ids in asked]
        # Who hits is summed before who misses, and that may turn a near-tie.
        same = sum(a == b for a, b in zip(before, after, strict=True))
        assert same >= 9, f"{same} of 10"
        experts = engine.status()["experts"]
        assert experts["routed"] == experts["hit"] + experts["missed"] == 2 * counted["routed"]
        there = engine.run_on_engine_thread(lambda: resident(ops, store.cache))
        assert (
            engine.run_on_engine_thread(lambda: verify(ops, store.cache, records, 10**6, 0))
            == there.sum()
        )
        assert engine.run_on_engine_thread(runner.rebalance_slots) >= 0, "and once more"
    finally:
        engine.close()
