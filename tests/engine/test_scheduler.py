"""Seats and turns, without a model: who owns what, who is next, and that nobody is lost."""

import numpy as np
import pytest

from osmium.engine.kv_cache_manager import KVCacheManager
from osmium.engine.request import Request, SamplingParams
from osmium.engine.scheduler import Batch, Scheduler


def request(tokens: int) -> Request:
    return Request([1] * tokens, SamplingParams(), lambda event: None, None, 0)


def compute(batch: Batch) -> list[Request]:
    """Do what the engine does with a step; those who now have a new token."""
    spoke = []
    for one, count in batch.scheduled:
        one.num_computed_tokens += count
        if one.num_pending_tokens == 0:
            one.tokens.append(2)
            spoke.append(one)
    return spoke


# -- KV cache manager ----------------------------------------------------------------------------


def test_a_request_has_as_many_pages_as_its_tokens_need() -> None:
    kv_cache, one = KVCacheManager(num_pages=10, page_size=4, num_slots=2), request(9)
    assert kv_cache.allocate_slot(one)
    for tokens, pages in ((1, 1), (4, 1), (5, 2), (9, 3), (3, 3), (40, 10)):
        assert kv_cache.allocate_pages(one, tokens)
        assert len(one.pages) == pages
        assert kv_cache.free_pages == 10 - pages
    kv_cache.free(one)
    assert (kv_cache.free_pages, kv_cache.free_slots, one.pages, one.state_slot) == (10, 2, [], -1)


def test_growing_past_what_is_free_says_so_and_takes_nothing() -> None:
    kv_cache, one, two = (
        KVCacheManager(num_pages=5, page_size=2, num_slots=2),
        request(1),
        request(1),
    )
    assert kv_cache.allocate_slot(one) and kv_cache.allocate_pages(one, 6)
    assert kv_cache.allocate_slot(two) and not kv_cache.allocate_pages(two, 5)
    assert (two.pages, kv_cache.free_pages) == ([], 2)
    assert kv_cache.allocate_pages(two, 4)


def test_there_is_no_seat_without_a_slot() -> None:
    kv_cache = KVCacheManager(num_pages=5, page_size=2, num_slots=1)
    one, two = request(1), request(1)
    assert kv_cache.allocate_slot(one)
    assert not kv_cache.allocate_slot(two)
    assert two.state_slot == -1
    kv_cache.free(one)
    assert kv_cache.allocate_slot(two)


def test_leaving_twice_gives_nothing_twice() -> None:
    kv_cache, one = KVCacheManager(num_pages=5, page_size=2, num_slots=2), request(1)
    assert kv_cache.allocate_slot(one) and kv_cache.allocate_pages(one, 5)
    kv_cache.free(one)
    kv_cache.free(one)
    assert (kv_cache.free_pages, kv_cache.free_slots) == (5, 2)


def test_no_page_and_no_slot_ever_has_two_owners(rng: np.random.Generator) -> None:
    kv_cache, sitting = KVCacheManager(num_pages=20, page_size=3, num_slots=5), list[Request]()
    for _ in range(2000):
        what = rng.integers(0, 4)
        if what == 0:
            one = request(1)
            assert kv_cache.allocate_slot(one) == (len(sitting) < 5)
            if one.state_slot >= 0:
                sitting.append(one)
        elif what == 1 and sitting:
            kv_cache.free(sitting.pop(int(rng.integers(0, len(sitting)))))
        elif sitting:
            kv_cache.allocate_pages(
                sitting[int(rng.integers(0, len(sitting)))], int(rng.integers(1, 30))
            )
        pages = [page for one in sitting for page in one.pages]
        slots = [one.state_slot for one in sitting]
        assert len(set(pages)) == len(pages) == 20 - kv_cache.free_pages
        assert len(set(slots)) == len(slots) == 5 - kv_cache.free_slots
        assert set(pages) <= set(range(20)) and set(slots) <= set(range(5))


# -- turns -----------------------------------------------------------------------------------------


def scheduler(pages: int = 30, page: int = 4, slots: int = 3, chunk: int = 8) -> Scheduler:
    return Scheduler(KVCacheManager(pages, page, slots), chunk)


def counts(batch: Batch | None) -> list[int]:
    assert batch is not None
    return [count for _, count in batch.scheduled]


def test_nothing_to_do_is_no_step() -> None:
    assert scheduler().schedule() is None


def test_a_prompt_is_read_in_chunks_and_its_last_chunk_gives_a_token() -> None:
    turns, one = scheduler(), request(19)
    turns.add(one)
    seen = []
    for _ in range(5):
        batch = turns.schedule()
        seen.append((counts(batch), bool(compute(batch)) if batch else None))
    assert seen == [([8], False), ([8], False), ([3], True), ([1], True), ([1], True)]


def test_between_two_chunks_everyone_who_decodes_gets_a_token() -> None:
    turns = scheduler()
    talkers = [request(1), request(1)]
    for one in talkers:
        turns.add(one)
    batch = turns.schedule()
    assert batch is not None
    compute(batch)
    turns.add(request(30))
    for wanted in ([8], [1, 1], [8], [1, 1], [8], [1, 1], [6], [1, 1, 1], [1, 1, 1]):
        batch = turns.schedule()
        assert counts(batch) == wanted
        assert batch is not None
        compute(batch)


def test_requests_wait_in_order_of_arrival() -> None:
    turns = scheduler(slots=2)
    four = [request(2) for _ in range(4)]
    for one in four:
        turns.add(one)
    turns.schedule()
    assert turns.running == four[:2]
    assert list(turns.waiting) == four[2:]
    turns.remove(four[1])
    turns.schedule()
    assert turns.running == [four[0], four[2]]
    assert list(turns.waiting) == four[3:]


def test_who_would_only_be_sent_away_again_waits() -> None:
    """Pages promised to others are as good as taken: no prompt is read only to be forgotten."""
    turns = scheduler(pages=6, page=4)
    first, second, third = request(11), request(12), request(3)
    for one in (first, second, third):
        turns.add(one)

    while len(first.tokens) < 16:
        batch = turns.schedule()
        assert batch is not None
        assert [one for one, _ in batch.scheduled] == [first]
        compute(batch)

    assert list(turns.waiting) == [second, third]
    turns.remove(first)
    batch = turns.schedule()
    assert turns.running == [second, third]  # four pages and one, of six


def test_a_waiting_request_that_is_removed_does_not_run() -> None:
    turns = scheduler(slots=1)
    three = [request(2) for _ in range(3)]
    for one in three:
        turns.add(one)
    turns.schedule()
    turns.remove(three[1])
    turns.remove(three[0])
    turns.schedule()
    assert turns.running == [three[2]]


def test_where_pages_run_out_the_last_to_come_makes_room_and_is_next_in_line() -> None:
    turns = scheduler(pages=4, page=4)
    first, second, third = request(7), request(7), request(1)
    turns.add(first)
    turns.add(second)
    for wanted in ([7], [1], [7]):
        batch = turns.schedule()
        assert counts(batch) == wanted
        assert batch is not None
        compute(batch)
    turns.add(third)
    assert (len(first.pages), len(second.pages)) == (2, 2)
    batch = turns.schedule()  # both want to go on, and the ninth token of the first needs a page
    assert batch is not None
    assert batch.scheduled == [(first, 1)]
    assert turns.running == [first]
    assert list(turns.waiting) == [second, third]
    assert (second.num_computed_tokens, second.pages, second.state_slot) == (0, [], -1)
    assert len(second.tokens) == 8  # what it said is not forgotten


@pytest.mark.parametrize("pages", [12, 15, 40])
def test_whatever_comes_everyone_ends_in_a_bounded_number_of_steps(
    rng: np.random.Generator, pages: int
) -> None:
    """A context is 12 pages of 4: the tightest memory that a plan allows, and roomier ones."""
    for _ in range(25):
        turns = scheduler(pages=pages, page=4, slots=3, chunk=int(rng.choice([3, 8, 64])))
        lengths = {}
        for _ in range(8):
            one = request(int(rng.integers(1, 40)))
            lengths[one] = min(48, len(one.tokens) + int(rng.integers(1, 30)))
        arriving = list(lengths)
        for _ in range(5000):
            if arriving and rng.integers(0, 3) == 0:
                turns.add(arriving.pop(0))
            batch = turns.schedule()
            if batch is None:
                if not arriving and not turns.waiting and not turns.running:
                    break
                continue
            owners = [one for one, _ in batch.scheduled]
            assert len(set(owners)) == len(owners) <= 3
            assert sum(counts(batch)) <= turns.max_step_tokens
            for one, count in batch.scheduled:
                assert one.state_slot >= 0
                assert 1 <= count <= one.num_pending_tokens
                assert len(one.pages) * 4 >= one.num_computed_tokens + count
            for one in compute(batch):
                if len(one.tokens) >= lengths[one]:
                    turns.remove(one)
                    del lengths[one]
        assert not lengths
        assert (turns.kv_cache.free_pages, turns.kv_cache.free_slots) == (pages, 3)
