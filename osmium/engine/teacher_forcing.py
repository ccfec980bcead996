"""Teacher forcing: the logits of given sequences, and the log-probabilities of prompts."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from osmium.engine.request import Event, Request, SamplingParams
from osmium.engine.runner import ModelRunner
from osmium.engine.scheduler import Batch, Scheduler

__all__ = ["score_prompts", "teacher_forced_logits"]

LogitChunks = Iterator[tuple[tuple[int, int], npt.NDArray[np.float32]]]
"""((position, sequence), f32 [n, vocab]): logits of n positions from `position` on."""


def teacher_forced_logits(
    runner: ModelRunner, scheduler: Scheduler, sequences: list[list[int]], chunk: int
) -> LogitChunks:
    """Logits of whole sequences, `chunk` tokens per step, several sequences per step.

    No request may run, so that all slots and pages are free.
    """
    kv_cache = scheduler.kv_cache
    remaining = list(enumerate(sequences))
    while remaining:
        group: list[tuple[int, Request]] = []
        while remaining and len(group) < min(
            runner.max_num_seqs, max(1, runner.max_pass_tokens // chunk)
        ):
            index, ids = remaining[0]
            request = Request(ids, SamplingParams(), _ignore, None, 0)
            if not kv_cache.allocate_slot(request):
                break
            if not kv_cache.allocate_pages(request, len(ids)):
                kv_cache.free(request)
                break
            group.append((index, request))
            remaining.pop(0)
        assert group, "a sequence of at most the context always fits alone"
        try:
            while unfinished := [(i, r) for i, r in group if r.num_pending_tokens]:
                scheduled = [(r, min(r.num_pending_tokens, chunk)) for _, r in unfinished]
                runner.forward(Batch(scheduled))
                yield from _step_logits(runner, unfinished, scheduled)
        finally:
            for _, request in group:
                kv_cache.free(request)


def score_prompts(runner: ModelRunner, batch: Batch) -> Iterator[int]:
    """Add the log-probabilities of the prompts' tokens that the last pass, `batch`, computed.

    Yields the number of tokens after each chunk of logits.  Other steps may run then; `runner`
    must have the logits of `batch` again before the next chunk.
    """
    row = 0
    for request, count in batch.scheduled:
        found, position = request.prompt_logprobs, request.num_computed_tokens
        if found is not None:
            skipped = max(0, found.num_scored - 1 - position)
            rows = min(count, request.prompt_tokens - 1 - position)
            for logits in runner.logits(np.arange(row + skipped, row + rows, dtype=np.int32)):
                found.add(position + skipped, logits)
                skipped += len(logits)
                yield len(logits)
        row += count


def _step_logits(
    runner: ModelRunner,
    unfinished: list[tuple[int, Request]],
    scheduled: list[tuple[Request, int]],
) -> LogitChunks:
    """The logits of all rows of the last step; counts its tokens as computed."""
    row = 0
    for (index, request), (_, count) in zip(unfinished, scheduled, strict=True):
        position = request.num_computed_tokens
        for chunk in runner.logits(np.arange(row, row + count, dtype=np.int32)):
            yield (position, index), chunk
            position += len(chunk)
        request.num_computed_tokens += count
        row += count


def _ignore(event: Event) -> None:
    """Teacher forcing emits no events."""
