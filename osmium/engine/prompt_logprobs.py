"""Log-probabilities of a prompt's tokens, from the logits of its prefill."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from osmium.errors import OsmiumError

__all__ = ["PromptLogprobs"]

BLOCK = 256
"""Logits of which only the largest is looked at first, in the search for the likeliest tokens."""

Entry = tuple[int, float, int, tuple[tuple[int, float], ...]]
"""A token, its log-probability, its rank (1: the likeliest), and the likeliest with theirs."""


class PromptLogprobs:
    """The log-probability of each token of a prompt but the first, and the likeliest ones there.

    Complete with the first generated token.  The engine's thread writes, any thread may read.
    """

    def __init__(self, prompt: Sequence[int], count: int) -> None:
        """`count` likeliest tokens are kept at each position."""
        length = len(prompt)
        self.ids = np.array(prompt, np.int32)
        self._logprobs = np.zeros(length, np.float32)
        self._ranks = np.zeros(length, np.int32)
        self._top_ids = np.zeros((length, count), np.int32)
        self._top_logprobs = np.zeros((length, count), np.float32)
        self.num_scored = 1
        """Tokens that have their log-probability; the first one needs none."""

    def add(self, position: int, logits: npt.NDArray[np.float32]) -> None:
        """Score the tokens behind `position`, ..., whose logits are f32 [n, vocab].

        Tokens that are scored, and those behind the prompt, are left out.
        Raises: OsmiumError where the largest logit is not finite.
        """
        for at, row in enumerate(logits, position + 1):
            if at == self.num_scored < len(self.ids):
                self._score(at, row)
                self.num_scored += 1

    def _score(self, at: int, row: npt.NDArray[np.float32]) -> None:
        """The token at a position, by the logits of the position before."""
        token = int(self.ids[at])
        largest = row.max()
        if not np.isfinite(largest):
            raise OsmiumError(
                f"The largest logit before token {at} of the prompt is not finite: the weights are "
                "damaged, or a kernel computes wrong values."
            )
        total = np.exp(row - largest).sum(dtype=np.float64)
        shift = np.float64(largest) + np.log(total)
        top = _largest(row, self._top_ids.shape[1])
        self._logprobs[at] = row[token] - shift
        self._ranks[at] = np.count_nonzero(row > row[token]) + 1
        self._top_ids[at, : len(top)] = top
        self._top_logprobs[at, : len(top)] = row[top] - shift

    def entries(self) -> Iterator[Entry | None]:
        """One entry for each token; None for the first."""
        yield None
        for at in range(1, len(self.ids)):
            top = zip(self._top_ids[at].tolist(), self._top_logprobs[at].tolist(), strict=True)
            rank = int(self._ranks[at])
            yield int(self.ids[at]), float(self._logprobs[at]), rank, tuple(top)


def _largest(row: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
    """The ids of the `count` largest, largest first, ties to the lower id; at most all.

    At least `count` values reach the `count`-th largest maximum of a block, so few remain to sort.
    """
    if count == 0:
        return np.empty(0, np.intp)
    if count == 1:
        return np.array([row.argmax()])
    starts = np.arange(0, len(row), BLOCK)
    if len(starts) > count:
        maxima = np.maximum.reduceat(row, starts)
        threshold = np.partition(maxima, len(maxima) - count)[len(maxima) - count]
        candidates = np.flatnonzero(row >= threshold)
    else:
        candidates = np.arange(len(row))
    return candidates[np.lexsort((candidates, -row[candidates]))][:count]
