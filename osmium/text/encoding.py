"""Texts to ids by the tokenizers package, with its faults as errors."""

from collections.abc import Sequence

import tokenizers

from osmium.errors import RequestError, is_panic

__all__ = ["encode_texts"]


def encode_texts(inner: tokenizers.Tokenizer, texts: Sequence[str]) -> list[tokenizers.Encoding]:
    """The encodings of texts.  `encode` would hold Python's global lock, encode_batch releases it.

    Raises: RequestError where the package fails or panics.
    """
    try:
        return list(inner.encode_batch_fast(list(texts), add_special_tokens=False))
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise RequestError(
            f"The model's tokenizer fails on this text: {str(error)[:200]}.",
            code="tokenizer_failed",
        ) from None
