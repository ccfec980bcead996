"""min_tokens as a token mask: no token ends the response before."""

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from osmium.engine.request import TokenMask

__all__ = ["MinTokensMask", "with_min_tokens"]


class MinTokensMask:
    """Forbids the tokens that end a response until `min_tokens` are generated.

    Another mask may restrict it further; what that mask allows last is never taken away.
    """

    def __init__(
        self, min_tokens: int, end_ids: Collection[int], inner: TokenMask | None = None
    ) -> None:
        self._left, self._inner = min_tokens, inner
        ids = np.array(sorted(end_ids), np.int64)
        self._words = ids // 32
        self._bits = (np.uint32(1) << (ids % 32).astype(np.uint32)).view(np.int32)

    def fill(self, words: npt.NDArray[np.int32]) -> None:
        """See TokenMask."""
        if self._inner is None:
            words[:] = -1
        else:
            self._inner.fill(words)
        if self._left > 0:
            without_ends = words.copy()
            np.bitwise_and.at(without_ends, self._words, ~self._bits)
            if self._inner is None or without_ends.any():
                words[:] = without_ends

    def push(self, token: int) -> None:
        """See TokenMask."""
        self._left -= 1
        if self._inner is not None:
            self._inner.push(token)


def with_min_tokens(
    mask: TokenMask | None, min_tokens: int, end_ids: Collection[int]
) -> TokenMask | None:
    """`mask` that also keeps `end_ids` from the first `min_tokens` tokens."""
    return MinTokensMask(min_tokens, end_ids, mask) if min_tokens else mask
