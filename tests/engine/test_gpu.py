"""The engine on a GPU: captured steps, batches, traffic to the host, memory."""

import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import osmium
from osmium.cuda.stream import CudaRuntime
from osmium.engine.engine import Engine
from osmium.engine.request import Finish, SamplingParams, Token
from osmium.engine.runner import ModelRunner
from osmium.engine.sampler import log_softmax
from osmium.errors import NoDevice
from osmium.experts.cache import resident, verify
from osmium.experts.usage import snapshot_usage
from osmium.ops.gpu import GpuOps
from osmium.weights import DEMO, open_packed

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def demo(path: Path | str = DEMO, **options: Any) -> Engine:
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


class AllowedTokens:
    """A mask that allows a random third of the tokens, another after each token."""

    def __init__(self, vocab: int, seed: int) -> None:
        self.vocab, self.seed, self.count = vocab, seed, 0

    def fill(self, words: Any) -> None:
        rng = np.random.default_rng((self.seed, self.count))
        bits = np.zeros(32 * len(words), np.uint8)
        bits[: self.vocab] = rng.random(self.vocab) < 1 / 3
        words[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def push(self, token: int) -> None:
        self.count += 1

    def completion(self) -> tuple[int, ...]:
        return ()


SAMPLED = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 5}
PENALTIES = {"repetition_penalty": 1.2, "presence_penalty": 0.6, "frequency_penalty": 0.4}
CONTROLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": SAMPLED,
    "penalties": PENALTIES,
    "bias": {"logit_bias": dict.fromkeys(range(0, 900, 3), 3.0)},
    "log-probabilities": {"logprobs": 20},
    "all": {**SAMPLED, **PENALTIES, "logit_bias": {5: 4.0, 6: -100}, "logprobs": 5},
}


def generated(
    engine: Engine, ids: list[int], params: SamplingParams, seed: int | None = None
) -> list[Token]:
    """The tokens of a response; with a seed it has a mask."""
    events: queue.SimpleQueue[Token | Finish] = queue.SimpleQueue()
    mask = None if seed is None else AllowedTokens(engine.config.vocab_size, seed)
    engine.submit(ids, params, events.put, token_mask=mask)
    tokens: list[Token] = []
    while isinstance(event := events.get(timeout=60), Token):
        tokens.append(event)
    assert event.error is None
    return tokens


def compare_log_probabilities(found: list[Token], wanted: list[Token]) -> None:
    """Logits of two steps differ by rounding; so near-ties may change places."""
    for one, other in zip(found, wanted, strict=True):
        assert (one.logprob is None) == (other.logprob is None)
        if one.logprob is not None and other.logprob is not None:
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
            values, others = (np.array([p for _, p in token.top]) for token in (one, other))
            assert np.allclose(values, others, atol=1e-3)
            assert (np.diff(values) <= 0).all()


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", CONTROLS)
def test_sampling_on_the_device_equals_sampling_on_the_host(
    rng: np.random.Generator, name: str, mask: bool
) -> None:
    """Without rows for decode sessions, the host reads every row of logits and samples."""
    engine = demo()
    try:
        runner = engine.runner
        assert {("decode", 1), ("controlled", 1)} <= set(runner._graphs), "captured before serving"
        params = replace(GREEDY, **CONTROLS[name])
        rows, seed = runner.max_decode_rows, 3 if mask else None
        for ids in prompts(engine, rng, 3):
            device = generated(engine, ids, params, seed)
            engine.run_on_engine_thread(lambda: setattr(runner, "max_decode_rows", 0))
            host = generated(engine, ids, params, seed)
            engine.run_on_engine_thread(lambda: setattr(runner, "max_decode_rows", rows))
            assert [token.id for token in device] == [token.id for token in host]
            compare_log_probabilities(device, host)
    finally:
        engine.close()


def test_prompts_are_scored_beside_other_requests_as_teacher_forcing_scores_them(
    rng: np.random.Generator,
) -> None:
    engine = demo(max_num_seqs=4, prefill_chunk=32)
    try:
        scored = prompts(engine, rng, 6)
        beside = [engine.generate(ids, GREEDY) for ids in prompts(engine, rng, 3)]
        done: queue.SimpleQueue[Token | Finish] = queue.SimpleQueue()
        params = SamplingParams(max_tokens=0, prompt_logprobs=2)
        requests = [engine.submit(ids, params, done.put) for ids in scored]
        for _ in requests:
            event = done.get(timeout=60)
            assert isinstance(event, Finish) and event.error is None
        assert all(len([*tokens]) == 24 for tokens in beside)
        for ids, request in zip(scored, requests, strict=True):
            wanted = log_softmax(engine.logits(ids))
            assert request.prompt_logprobs is not None
            entries = list(request.prompt_logprobs.entries())[1:]
            for row, token, entry in zip(wanted, ids[1:], entries, strict=False):
                assert entry is not None
                assert entry[1] == pytest.approx(row[token], abs=1e-3)
                assert entry[3][0][1] == pytest.approx(row.max(), abs=1e-3)
    finally:
        engine.close()


def test_controlled_requests_in_a_batch_give_the_same_responses_as_alone(
    rng: np.random.Generator,
) -> None:
    """Rows come and go, with and without masks, with 0 to 4 steps in flight."""
    engine = demo(max_num_seqs=4)
    try:
        jobs = []
        for i, ids in enumerate(prompts(engine, rng, 24)):
            params = replace(GREEDY, **list(CONTROLS.values())[i % 6], max_tokens=6 + 3 * (i % 9))
            jobs.append((ids, params, i if i % 5 == 0 else None))
        alone = [generated(engine, *job) for job in jobs]
        with ThreadPoolExecutor(len(jobs)) as pool:
            batched = list(pool.map(lambda job: generated(engine, *job), jobs))
        equal = [
            [token.id for token in a] == [token.id for token in b]
            for a, b in zip(alone, batched, strict=True)
        ]
        assert sum(equal) >= 20, f"{sum(equal)} of 24"  # another summation order may change one
        for one, other, same in zip(batched, alone, equal, strict=True):
            if same:
                compare_log_probabilities(one, other)
    finally:
        engine.close()


def test_a_response_ends_at_an_end_token(rng: np.random.Generator) -> None:
    engine = demo(max_num_seqs=3)
    try:
        params = SamplingParams(temperature=1, max_tokens=200, seed=1)
        all_prompts = prompts(engine, rng, 6)
        streams = [engine.generate(ids, params) for ids in all_prompts]
        batched = [[token.id for token in one] for one in streams]
        engine.run_on_engine_thread(lambda: setattr(engine.runner, "max_decode_rows", 0))
        alone = [[token.id for token in engine.generate(ids, params)] for ids in all_prompts]
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


@pytest.mark.parametrize("name", CONTROLS)
def test_only_logits_are_copied_to_the_host(rng: np.random.Generator, name: str) -> None:
    engine, params = demo(expert_slots=8), replace(GREEDY, **CONTROLS[name])
    try:
        (ids,) = prompts(engine, rng, 1)
        ops = engine._runner.ops
        list(engine.generate(ids, params))
        engine.status()  # waits for reads that the response left pending
        before = ops.d2h_bytes
        count = len(list(engine.generate(ids, params)))
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
        for i, options in enumerate(CONTROLS.values()):
            generated(engine, [3, 4], replace(GREEDY, **options), i)
        assert pool.used == used
    finally:
        engine.close()


def test_a_streamed_prompt_has_the_logits_of_resident_experts(rng: np.random.Generator) -> None:
    """Prompts of several streamed steps; decode graphs captured before are as good afterwards."""
    name = "synthetic:qwen3.5-35b-a3b:4"

    def measure(**more: Any) -> tuple[list[Any], list[list[int]]]:
        engine = demo(name, context=2048, prefill_chunk=512, **more)
        try:
            runner = engine.runner
            ops, store, graphs = runner.ops, runner.expert_runner, dict(runner._graphs)
            assert isinstance(ops, GpuOps) and isinstance(ops.runtime, CudaRuntime)
            used = ops.runtime.pool.used
            logits: list[Any] = []
            replies: list[list[int]] = []
            for ids in ids_of_prompts:
                engine.stream_prompt_logits(
                    [ids], 512, lambda position, _, chunk: logits.append(chunk[:, :4096].copy())
                )
                replies += responses(engine, [ids])
            assert runner._graphs == graphs and ops.runtime.pool.used == used
            counts = engine.status()["experts"]
            assert counts["routed"] == counts["hit"] + counts["missed"]
            experts = store.host_experts
            if experts is not None:
                packed = np.asarray(ops.host_view(experts.packed))
                checked = engine.run_on_engine_thread(
                    lambda: verify(ops, store.cache, packed, 100, 0)
                )
                assert checked == 100 and counts["experts_copied"] > 0
            return logits, replies
        finally:
            engine.close()

    # no step has fewer than 97 tokens
    ids_of_prompts = [rng.integers(0, 200_000, n).tolist() for n in (97, 512, 1124)]
    resident_logits, wanted = measure()
    logits, found = measure(expert_slots=40)
    np.testing.assert_array_equal(np.concatenate(logits), np.concatenate(resident_logits))
    assert len(np.concatenate(logits)) == 97 + 512 + 1124
    pairs = list(zip(found, wanted, strict=True))
    assert all(got[0] == want[0] for got, want in pairs), "a prompt's logits give the first token"
    # Decode adds hits and misses apart, which may change a near-tie.
    equal = sum(a == b for got, want in pairs for a, b in zip(got, want, strict=True))
    assert equal > 36, f"{equal} of 72 tokens"


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


@pytest.mark.parametrize("model", [DEMO, "synthetic:qwen3.5-122b-a10b:4"])
def test_a_response_has_the_same_bits_for_any_slots_and_neighbours(
    rng: np.random.Generator, model: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities of graphs, and teacher-forced logits, of 1, 2, 4 and 8 rows.

    Then with few slots, with and without prefetch, and with launches instead of graphs.
    """
    params = replace(GREEDY, max_tokens=16, logprobs=20)
    # pages for all: a preempted request reads its response as a prompt, with other kernels
    options: dict[str, Any] = {"context": 1024, "max_num_seqs": 8, "kv_cache_mb": 128}
    lengths = [3, 700, 65, 64, 9, 130, 31, 200]

    def measure(*counts: int, **more: Any) -> dict[str, Any]:
        engine = demo(model, **options, **more)
        found: dict[str, Any] = {}
        try:
            for count in counts:
                streams = []
                for first in range(0, len(all_ids), count):
                    group = [engine.generate(ids, params) for ids in all_ids[first : first + count]]
                    streams += [[(t.id, t.logprob, t.top) for t in stream] for stream in group]
                found[f"{count} responses at once"] = streams
                forced = []
                for first in range(0, len(short_ids), count):
                    group_ids = short_ids[first : first + count]
                    logits = dict(engine.prompt_logits(group_ids, 1))
                    forced += [
                        [logits[position, sequence].tobytes() for position in range(20)]
                        for sequence in range(len(group_ids))
                    ]
                found[f"{count} forced rows"] = forced
            return found
        finally:
            engine.close()

    engine = demo(model, **options)
    vocab = engine.config.vocab_size
    engine.close()
    all_ids = [[int(one) for one in rng.integers(0, vocab, n)] for n in lengths]
    short_ids = [[int(one) for one in rng.integers(0, vocab, 20)] for _ in lengths]
    resident = measure(1, 2, 4, 8)
    for name, found in resident.items():
        assert found == resident["1 " + name[2:]], name
    for slots in (8, 16):
        for prefetch in (True, False):
            few = measure(1, 8, expert_slots=slots, prefetch=prefetch)
            for name, found in few.items():
                assert found == resident[name], f"{name}, {slots} slots, prefetch {prefetch}"
    monkeypatch.setattr(ModelRunner, "_captured", lambda self, key, run: run)
    for name, found in measure(1, 8, expert_slots=16).items():
        assert found == resident[name], f"{name}, no graphs"
