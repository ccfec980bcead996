"""min_tokens as a token mask: tokens that end a response are not sampled before it."""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from osmium.engine.request import Request, SamplingParams, TokenMask
from osmium.errors import RequestError

__all__ = ["EndMask", "drop_spent_mask", "end_mask", "has_spent_mask"]


class EndMask:
    """A TokenMask that forbids `end_ids` for the first `min_tokens` tokens, over another mask.

    Where nothing else is allowed, as at the end of a grammar, it forbids nothing.
    """

    def __init__(
        self, end_ids: Collection[int], min_tokens: int, inner: TokenMask | None = None
    ) -> None:
        ids = np.array(sorted(end_ids), np.int64)
        self._words, self._bits = ids // 32, np.left_shift(1, ids % 32).astype(np.uint32)
        self._left = min_tokens
        self.inner = inner

    @property
    def spent(self) -> bool:
        """Whether it forbids nothing any more."""
        return self._left <= 0

    def fill(self, words: npt.NDArray[np.int32]) -> None:
        """Write the mask of the next token, as TokenMask.fill."""
        if self.inner is None:
            words[:] = -1
        else:
            self.inner.fill(words)
        if self.spent:
            return
        allowed = words.copy()
        np.bitwise_and.at(allowed.view(np.uint32), self._words, ~self._bits)
        if allowed.any():
            words[:] = allowed

    def push(self, token: int) -> None:
        """Advance by a sampled token."""
        self._left -= 1
        if self.inner is not None:
            self.inner.push(token)

    def completion(self) -> Sequence[int]:
        """Tokens that complete the text, as TokenMask.completion."""
        return () if self.inner is None else self.inner.completion()


def end_mask(
    params: SamplingParams,
    inner: TokenMask | None,
    eos: Collection[int],
    stop_ids: Collection[int],
    vocab: int,
) -> TokenMask | None:
    """The mask of a request: `inner`, and with min_tokens an EndMask over it.

    `stop_ids` are special tokens of stop texts.  Raises: RequestError if all tokens are ends.
    """
    if not params.min_tokens:
        return inner
    ids = {*params.stop_token_ids, *stop_ids, *(() if params.ignore_eos else eos)}
    if len(ids) >= vocab:
        raise RequestError(
            f"min_tokens is {params.min_tokens}, but each of the {vocab} tokens ends the response. "
            "Send fewer stop_token_ids.",
            param="min_tokens",
            code="invalid_value",
        )
    return EndMask(ids, params.min_tokens, inner) if ids else inner


def has_spent_mask(request: Request) -> bool:
    """Whether the request has a mask that it no longer needs; a session with masks is slower."""
    return _is_spent(request.token_mask)


def drop_spent_mask(request: Request) -> None:
    """Remove masks that are spent; no step that reads them may be in flight."""
    while _is_spent(request.token_mask):
        request.token_mask = getattr(request.token_mask, "inner")  # noqa: B009


def _is_spent(mask: TokenMask | None) -> bool:
    """Whether a mask over another one, its `inner`, forbids nothing any more."""
    return getattr(mask, "spent", False) is True
