"""KV cache manager and scheduler without a model: ownership of pages and slots, order, progress."""

import itertools

import numpy as np
import pytest

from osmium.engine.kv_cache_manager import KVCacheManager
from osmium.engine.request import Request, SamplingParams
from osmium.engine.scheduler import CUT_TOKENS, Batch, Scheduler, pass_tokens


def request(tokens: int) -> Request:
    return Request([1] * tokens, SamplingParams(), lambda event: None, None, 0)


def compute(batch: Batch) -> list[Request]:
    """Advance the batch like the engine does; returns the requests with a new token."""
    with_new_token = []
    for one, count in batch.scheduled:
        one.num_computed_tokens += count
        if one.num_pending_tokens == 0:
            one.tokens.append(2)
            with_new_token.append(one)
    return with_new_token


# -- KV cache manager ------------------------------------------------------------------------------


def test_a_request_has_as_many_pages_as_its_tokens_need() -> None:
    manager, one = KVCacheManager(num_pages=10, page_size=4, num_slots=2), request(9)
    assert manager.allocate_slot(one)
    for tokens, pages in ((1, 1), (4, 1), (5, 2), (9, 3), (3, 3), (40, 10)):
        assert manager.allocate_pages(one, tokens)
        assert len(one.pages) == pages
        assert manager.free_pages == 10 - pages
    manager.free(one)
    assert (manager.free_pages, manager.free_slots, one.pages, one.state_slot) == (10, 2, [], -1)


def test_allocating_more_than_free_pages_fails_and_takes_none() -> None:
    manager, one, two = (
        KVCacheManager(num_pages=5, page_size=2, num_slots=2),
        request(1),
        request(1),
    )
    assert manager.allocate_slot(one) and manager.allocate_pages(one, 6)
    assert manager.allocate_slot(two) and not manager.allocate_pages(two, 5)
    assert (two.pages, manager.free_pages) == ([], 2)
    assert manager.allocate_pages(two, 4)


def test_a_request_without_a_free_slot_is_not_admitted() -> None:
    manager = KVCacheManager(num_pages=5, page_size=2, num_slots=1)
    one, two = request(1), request(1)
    assert manager.allocate_slot(one)
    assert not manager.allocate_slot(two)
    assert two.state_slot == -1
    manager.free(one)
    assert manager.allocate_slot(two)


def test_freeing_twice_frees_once() -> None:
    manager, one = KVCacheManager(num_pages=5, page_size=2, num_slots=2), request(1)
    assert manager.allocate_slot(one) and manager.allocate_pages(one, 5)
    manager.free(one)
    manager.free(one)
    assert (manager.free_pages, manager.free_slots) == (5, 2)


def test_no_page_and_no_slot_ever_has_two_owners(rng: np.random.Generator) -> None:
    manager, admitted = KVCacheManager(num_pages=20, page_size=3, num_slots=5), list[Request]()
    for _ in range(2000):
        action = rng.integers(0, 4)
        if action == 0:
            one = request(1)
            assert manager.allocate_slot(one) == (len(admitted) < 5)
            if one.state_slot >= 0:
                admitted.append(one)
        elif action == 1 and admitted:
            manager.free(admitted.pop(int(rng.integers(0, len(admitted)))))
        elif admitted:
            manager.allocate_pages(
                admitted[int(rng.integers(0, len(admitted)))], int(rng.integers(1, 30))
            )
        pages = [page for one in admitted for page in one.pages]
        slots = [one.state_slot for one in admitted]
        assert len(set(pages)) == len(pages) == 20 - manager.free_pages
        assert len(set(slots)) == len(slots) == 5 - manager.free_slots
        assert set(pages) <= set(range(20)) and set(slots) <= set(range(5))


# -- scheduler -------------------------------------------------------------------------------------


def scheduler(pages: int = 30, page: int = 4, slots: int = 3, chunk: int = 8) -> Scheduler:
    return Scheduler(KVCacheManager(pages, page, slots), chunk, chunk)


def wanted(batch: Batch | None, tokens: list[int] | None) -> Batch:
    """The batch, which has these numbers of tokens."""
    assert batch is not None
    assert tokens is None or counts(batch) == tokens
    return batch


def counts(batch: Batch | None) -> list[int]:
    assert batch is not None
    return [count for _, count in batch.scheduled]


def test_without_requests_there_is_no_step() -> None:
    assert scheduler().schedule() is None


def test_the_first_tokens_of_a_prompt_may_count_as_computed() -> None:
    manager = KVCacheManager(num_pages=4, page_size=4, num_slots=1)
    scheduler = Scheduler(manager, 4, 4)
    one = Request([1] * 13, SamplingParams(), lambda event: None, None, 0, computed_tokens=7)
    scheduler.add(one)
    counts = []
    while len(one.tokens) < 15:
        batch = scheduler.schedule()
        assert batch is not None
        ((_, count),) = batch.scheduled
        counts.append(count)
        compute(batch)
    assert counts == [4, 2, 1], "6 tokens of the prompt, then one generated token"
    scheduler.preempt(one)
    assert one.num_computed_tokens == 0
    batch = scheduler.schedule()
    assert batch is not None and one.num_computed_tokens == 7
    with pytest.raises(AssertionError, match="13 computed of 13"):
        Request([1] * 13, SamplingParams(), lambda event: None, None, 0, computed_tokens=13)


def test_a_prompt_is_computed_in_chunks_and_its_last_chunk_gives_a_token() -> None:
    sched, one = scheduler(), request(19)
    sched.add(one)
    steps = []
    for _ in range(5):
        batch = sched.schedule()
        steps.append((counts(batch), bool(compute(batch)) if batch else None))
    assert steps == [([8], False), ([8], False), ([3], True), ([1], True), ([1], True)]


def test_decode_steps_and_passes_can_be_scheduled_apart() -> None:
    sched = scheduler()
    assert sched.schedule_decode() is None
    for _ in range(2):
        sched.add(request(1))
        compute(wanted(sched.schedule(), [1]))
    sched.add(request(30))
    for _ in range(3):
        compute(wanted(sched.schedule(), [8]))
        compute(wanted(sched.schedule_decode(), [1, 1]))
    compute(wanted(sched.schedule(), [6]))
    compute(wanted(sched.schedule(), [1, 1, 1]))


def test_the_shortest_prompt_is_first_and_the_oldest_is_not_overtaken_without_end() -> None:
    sched = scheduler(pages=100, slots=9)
    long = request(30)
    sched.add(long)
    passes = []
    for _ in range(12):
        short = request(5)
        sched.add(short)
        batch = wanted(sched.schedule(), None)
        passes.append(batch.scheduled[0][0] is long)
        compute(batch)
        for one in [r for r in sched.running if r is not long and r.num_pending_tokens == 1]:
            sched.remove(one)
    assert passes[:5] == [False] * 4 + [True] and passes.count(True) == 2


def test_a_short_pass_takes_no_pages_of_others() -> None:
    sched = scheduler(pages=10, page=4, slots=3)
    long, short, medium = request(20), request(3), request(9)
    sched.add(long)
    compute(wanted(sched.schedule(), [8]))
    assert sched.schedule_short(8, [long]) is None
    sched.add(short)
    sched.add(medium)
    assert wanted(sched.schedule_short(8, [long]), [3]).scheduled == [(short, 3)]
    assert sched.schedule_short(8, [long, short]) is None, "nine tokens are too many"
    assert wanted(sched.schedule_short(9, [long, short]), [9]).scheduled == [(medium, 9)]
    assert long in sched.running and len(long.pages) == 2


def test_passes_are_about_equal_and_end_at_multiples_of_64() -> None:
    for computed, pending, most in itertools.product(
        (0, 64, 1000), (1, 100, 5000, 20480), (64, 512, 10240)
    ):
        ends, left = [], pending
        while left:
            count = pass_tokens(computed + pending - left, left, most)
            assert 0 < count <= most
            left -= count
            ends.append(computed + pending - left)
        assert all(end % CUT_TOKENS == 0 for end in ends[:-1])
        assert len(ends) <= -(-pending // most) + (
            2 if most > 64 and computed % 64 == 0 else pending
        )
    assert pass_tokens(0, 20480, 10240) == 10240 and pass_tokens(0, 10300, 10240) == 5184
    assert [pass_tokens(0, 9, 8), pass_tokens(3, 70, 64)] == [8, 61]


def test_requests_wait_in_order_of_arrival() -> None:
    sched = scheduler(slots=2)
    requests = [request(2) for _ in range(4)]
    for one in requests:
        sched.add(one)
    sched.schedule()
    assert sched.running == requests[:2]
    assert list(sched.waiting) == requests[2:]
    sched.remove(requests[1])
    sched.schedule()
    assert sched.running == [requests[0], requests[2]]
    assert list(sched.waiting) == requests[3:]


def test_a_request_that_would_be_preempted_at_once_waits() -> None:
    """Pages reserved for running requests count as taken, so no prompt is computed only to be
    preempted."""
    sched = scheduler(pages=6, page=4)
    first, second, third = request(11), request(12), request(3)
    for one in (first, second, third):
        sched.add(one)

    while len(first.tokens) < 16:
        batch = sched.schedule()
        assert batch is not None
        assert [one for one, _ in batch.scheduled] == [first]
        compute(batch)

    assert list(sched.waiting) == [second, third]
    sched.remove(first)
    batch = sched.schedule()
    assert sched.running == [second, third]  # four pages and one, of six


def test_a_removed_waiting_request_does_not_run() -> None:
    sched = scheduler(slots=1)
    requests = [request(2) for _ in range(3)]
    for one in requests:
        sched.add(one)
    sched.schedule()
    sched.remove(requests[1])
    sched.remove(requests[0])
    sched.schedule()
    assert sched.running == [requests[2]]


def test_without_free_pages_the_latest_request_is_preempted_and_queued_first() -> None:
    sched = scheduler(pages=4, page=4)
    first, second, third = request(7), request(7), request(1)
    sched.add(first)
    sched.add(second)
    for tokens in ([7], [7]):
        compute(wanted(sched.schedule(), tokens))
    compute(wanted(sched.schedule(), [1, 1]))
    sched.add(third)
    assert (len(first.pages), len(second.pages)) == (2, 2)
    batch = sched.schedule_decode()  # both are ready, and the first's ninth token needs a page
    assert batch is not None
    assert batch.scheduled == [(first, 1)]
    assert sched.running == [first]
    assert list(sched.waiting) == [second, third]
    assert (second.num_computed_tokens, second.pages, second.state_slot) == (0, [], -1)
    assert len(second.tokens) == 9  # its generated token is kept


@pytest.mark.parametrize("pages", [12, 15, 40])
def test_every_request_finishes_in_a_bounded_number_of_steps(
    rng: np.random.Generator, pages: int
) -> None:
    """A context takes 12 pages of 4 tokens: the smallest valid plan, and larger ones."""
    for _ in range(25):
        sched = scheduler(pages=pages, page=4, slots=3, chunk=int(rng.choice([3, 8, 64])))
        lengths = {}
        for _ in range(8):
            one = request(int(rng.integers(1, 40)))
            lengths[one] = min(48, len(one.tokens) + int(rng.integers(1, 30)))
        arriving = list(lengths)
        for _ in range(5000):
            if arriving and rng.integers(0, 3) == 0:
                sched.add(arriving.pop(0))
            batch = sched.schedule()
            if batch is None:
                if not arriving and not sched.waiting and not sched.running:
                    break
                continue
            owners = [one for one, _ in batch.scheduled]
            assert len(set(owners)) == len(owners) <= 3
            assert sum(counts(batch)) <= sched.max_pass_tokens
            for one, count in batch.scheduled:
                assert one.state_slot >= 0
                assert 1 <= count <= one.num_pending_tokens
                assert len(one.pages) * 4 >= one.num_computed_tokens + count
            for one in compute(batch):
                if len(one.tokens) >= lengths[one]:
                    sched.remove(one)
                    del lengths[one]
        assert not lengths
        assert (sched.kv_cache.free_pages, sched.kv_cache.free_slots) == (pages, 3)
