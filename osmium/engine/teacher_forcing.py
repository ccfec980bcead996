"""Teacher forcing: the logits of sequences that are told, not chosen."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from osmium.engine.request import Event, Request, SamplingParams
from osmium.engine.runner import ModelRunner
from osmium.engine.scheduler import Batch, Scheduler

__all__ = ["teacher_forced_logits"]

LogitChunks = Iterator[tuple[tuple[int, int], npt.NDArray[np.float32]]]
"""((position, sequence), f32 [n, vocab]): rows of a sequence from a position on."""


def teacher_forced_logits(
    runner: ModelRunner, scheduler: Scheduler, sequences: list[list[int]], chunk: int
) -> LogitChunks:
    """Logits of whole sequences, `chunk` tokens at a time, several sequences in one step.

    On slots and pages of its own; whoever is running is read again later.
    """
    seats = scheduler.seats
    for request in list(reversed(scheduler.running)):
        scheduler.preempt(request)
    every = list(enumerate(sequences))
    while every:
        group: list[tuple[int, Request]] = []
        while every and len(group) < min(runner.sequences, max(1, runner.rows // chunk)):
            index, ids = every[0]
            request = Request(ids, SamplingParams(), _ignore, None, 0)
            if not seats.allocate_slot(request):
                break
            if not seats.allocate_pages(request, len(ids)):
                seats.free(request)
                break
            group.append((index, request))
            every.pop(0)
        assert group, "a sequence of at most the context always fits alone"
        try:
            while live := [(i, r) for i, r in group if r.num_pending_tokens]:
                parts = [(r, min(r.num_pending_tokens, chunk)) for _, r in live]
                runner.forward(Batch(parts))
                yield from _rows(runner, live, parts)
        finally:
            for _, request in group:
                seats.free(request)


def _rows(
    runner: ModelRunner, live: list[tuple[int, Request]], parts: list[tuple[Request, int]]
) -> LogitChunks:
    row = 0
    for (index, request), (_, count) in zip(live, parts, strict=True):
        at = request.num_computed_tokens
        for piece in runner.logits(np.arange(row, row + count, dtype=np.int32)):
            yield (at, index), piece
            at += len(piece)
        request.num_computed_tokens += count
        row += count


def _ignore(event: Event) -> None:
    """Nothing is emitted."""
