"""Prefill passes of the engine: their inputs on the device, and how a prompt is cut into passes.

A pass computes up to `ModelRunner.max_pass_tokens` tokens of requests.  A short one may run while a
long one waits between two of its layers; each has inputs and rows of its own (a lane).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from osmium.engine.scheduler import CUT_TOKENS, Batch
from osmium.ops import Ops, StepInputs

__all__ = ["PrefillInputs", "PrefillPass", "piece_ends", "prefill_input_words"]


def piece_ends(computed: int, count: int, most: int) -> list[int]:
    """Ends of a pass's pieces of at most `most` tokens, counted from its first token.

    Pieces are about equal, and end at multiples of CUT_TOKENS of the prompt where `most` allows it.
    """
    pieces = -(-count // most)
    while pieces > 1:
        ends = [
            (computed + count * number // pieces) // CUT_TOKENS * CUT_TOKENS - computed
            for number in range(1, pieces)
        ] + [count]
        lengths = np.diff([0, *ends])
        if 0 < lengths.min() and lengths.max() <= most:
            return ends
        if pieces > 2 * (-(-count // most)) + 2:  # `most` is too small for these multiples
            return [*range(most, count, most), count]
        pieces += 1
    return [count]


def _max_pieces(tokens: int, rows: int, sequences: int) -> int:
    return 2 * -(-tokens // rows) + 3 + 2 * sequences


def prefill_input_words(tokens: int, rows: int, sequences: int, max_pages: int) -> int:
    """32-bit words of a PrefillInputs, on the device and in mapped host memory each."""
    pieces = _max_pieces(tokens, rows, sequences)
    return 3 * tokens + 3 * pieces + sequences * (1 + max_pages)


class PrefillInputs:
    """The inputs of the pieces of one pass, on the device."""

    def __init__(
        self, ops: Ops, first_row: int, tokens: int, rows: int, sequences: int, max_pages: int
    ) -> None:
        """For passes of up to `tokens` tokens of `sequences` sequences, in pieces of `rows`.

        first_row: of the model's rows for prefill passes    Raises: OutOfMemory
        """
        self.ops, self.first_row, self.tokens = ops, first_row, tokens
        self.rows, self.sequences, self.max_pages = rows, sequences, max_pages
        words = prefill_input_words(tokens, rows, sequences, max_pages)
        self._mapped = ops.zeros_mapped((2, words), np.int32)
        """Two, used in turns: one may still be copied."""
        self._turn = 0
        self._device = ops.empty((words,), np.int32)
        self._pieces = _max_pieces(tokens, rows, sequences)

    def fill(self, batch: Batch, page_size: int) -> list[StepInputs]:
        """Copy the inputs of a batch to the device; returns the steps of its pieces."""
        self._turn = 1 - self._turn
        host = self.ops.host_view(self._mapped)[self._turn]
        tokens, pieces = self.tokens, self._pieces
        at = np.cumsum([0, tokens, tokens, tokens, 2 * pieces, pieces, self.sequences])
        ids, positions, starts, past, slots = (int(at[i]) for i in (0, 1, 3, 4, 5))
        pages = int(at[6])
        host[int(at[2]) : int(at[3])] = 0  # sequence ids: each piece has one sequence
        steps: list[StepInputs] = []
        row = piece = 0
        device = self._device
        for sequence, (request, count) in enumerate(batch.scheduled):
            computed = request.num_computed_tokens
            table = pages + sequence * self.max_pages
            host[slots + sequence] = request.state_slot
            host[table : table + len(request.pages)] = request.pages
            start = 0
            for end in piece_ends(computed, count, self.rows):
                part, length = slice(row, row + end - start), end - start
                first = computed + start
                host[ids + part.start : ids + part.stop] = request.tokens[first : first + length]
                host[positions + part.start : positions + part.stop] = np.arange(
                    first, first + length
                )
                host[starts + 2 * piece : starts + 2 * piece + 2] = 0, length
                host[past + piece] = first
                zeros = int(at[2])
                steps.append(
                    StepInputs(
                        tokens=length,
                        sequences=1,
                        page_size=page_size,
                        ids=device[ids + part.start : ids + part.stop],
                        positions=device[positions + part.start : positions + part.stop],
                        sequence_ids=device[zeros : zeros + length],
                        query_start_loc=device[starts + 2 * piece : starts + 2 * piece + 2],
                        context_lens=device[past + piece : past + piece + 1],
                        state_slots=device[slots + sequence : slots + sequence + 1],
                        page_table=device[table : table + self.max_pages].reshape(
                            1, self.max_pages
                        ),
                        max_context=first + length,
                    )
                )
                row, start, piece = part.stop, end, piece + 1
        self.ops.copy(self._device, self._mapped[self._turn])
        return steps


@dataclass
class PrefillPass:
    """A pass that has begun."""

    batch: Batch
    inputs: PrefillInputs
    layers_done: Iterator[int]
    """Runs the next part of the pass; the number of layers that are done."""
    num_layers: int
    is_between_layers: bool = True
    """Whether another pass may run now."""
    scoring: Iterator[int] | None = None
    """Scores prompts once all layers are done, as score_prompts does; None before."""
    _done: int = 0

    def advance(self) -> bool:
        """Run the next part; False where all are done."""
        done = next(self.layers_done, None)
        if done is None:
            return False
        self.is_between_layers = done > self._done
        self._done = done
        for request, count in self.batch.scheduled:
            request.tokens_read = request.num_computed_tokens + count * done // self.num_layers
        return True

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.batch.scheduled)

    @property
    def size(self) -> tuple[int, int]:
        """Passes of the same size have parts of about the same time: logarithms of tokens, of the
        pass and with those before it."""
        context = max(
            request.num_computed_tokens + count for request, count in self.batch.scheduled
        )
        return self.tokens.bit_length(), context.bit_length()

    def close(self) -> None:
        """End the pass early; its requests compute these tokens again."""
        close = getattr(self.layers_done, "close", None)
        if close is not None:
            close()
        for request, _ in self.batch.scheduled:
            request.tokens_read = request.num_computed_tokens
