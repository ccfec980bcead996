"""Text to ids and back: tokenizer.json, through the tokenizers package."""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from osmium.errors import CheckpointError, RequestError, is_panic
from osmium.text.added_tokens import add_tokens, merged
from osmium.text.control_tokens import ControlTokens
from osmium.text.detokenizer import (
    BYTES,
    ByteDetokenizer,
    IncrementalDetokenizer,
    WindowDetokenizer,
    id_text,
)
from osmium.text.encoding import encode_texts
from osmium.text.marked import MarkedText
from osmium.text.regexes import check_tokenizer_json

__all__ = ["Tokenizer"]

PIECE_CHARS = 1 << 20
"""Characters that one call tokenizes while tokens are counted; it takes about 100 bytes each."""

_REMOVING = (
    "Removed", "Whitespace", "Bert", "CharDelimiter", "Punctuation", "Metaspace",
)  # fmt: skip
"""Words in the description of pre-tokenizers that may remove characters of a text."""


class Tokenizer:
    """A model's tokenizer.json."""

    def __init__(
        self,
        source: bytes | str | os.PathLike[str],
        unknown_ids_as_text: bool = False,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """`source` is the file's contents, or its path; `config` is tokenizer_config.json.

        Ids that the tokenizer lacks have no text, like the padding rows of a real model's head.
        With `unknown_ids_as_text` they become "⟨12345⟩".  Raises: CheckpointError.
        """
        config = config or {}
        moved: dict[str, tuple[int, int]] = {}
        try:
            raw = source if isinstance(source, bytes) else Path(source).read_bytes()
            check_tokenizer_json(raw)
            self._inner = tokenizers.Tokenizer.from_buffer(merged(raw, config))
            self._inner.no_padding()
            self._inner.no_truncation()
            moved = add_tokens(self._inner, config)
            self._inner.encode("a", add_special_tokens=False)
        except CheckpointError:
            raise
        except BaseException as error:  # the package raises plain Exception, and panics
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            raise CheckpointError(f"tokenizer.json cannot be used: {str(error)[:500]}") from None
        self.notes: list[str] = []
        """What the two files say differently."""
        if moved:
            content, (listed, actual) = next(iter(moved.items()))
            others = f"; so do {len(moved) - 1} other tokens" if len(moved) > 1 else ""
            self.notes.append(
                f"tokenizer_config.json lists {content!r} as id {listed}; it gets id {actual}, the "
                f"next one of tokenizer.json, as in transformers{others}."
            )
        added = self._inner.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._is_byte_level = isinstance(self._inner.decoder, decoders.ByteLevel)
        self._unknown_ids_as_text = unknown_ids_as_text

    @cached_property
    def _without_specials(self) -> tokenizers.Tokenizer:
        """A copy that encodes names of special tokens as text.

        The option belongs to the tokenizer, and threads share a tokenizer.
        """
        copy = tokenizers.Tokenizer.from_str(self._inner.to_str())
        copy.encode_special_tokens = True
        return copy

    @cached_property
    def control_tokens(self) -> ControlTokens:
        """The tokens that a chat template's markup stands for."""
        return ControlTokens(self._inner)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    @property
    def added_ids(self) -> frozenset[int]:
        """The ids of added tokens, special or not."""
        return self._added

    def has_id(self, token: int) -> bool:
        """Whether the tokenizer has a token with this id."""
        return self._inner.id_to_token(token) is not None

    def id_of(self, token: str) -> int | None:
        """The id of a token, spelled as in the vocabulary; None if there is none."""
        token_id = self._inner.token_to_id(token)
        return None if token_id is None else int(token_id)

    def special_id(self, text: str) -> int | None:
        """The id of the special token with this text, which decoding omits; None if there is
        none."""
        token = self.control_tokens.id_of(text)
        return token if token is not None and token in self._special_ids else None

    def encode(self, text: str, specials: bool = True) -> list[int]:
        """Token ids of a text.  Other Python threads run meanwhile.

        With `specials`, names of added tokens in it become those tokens; in a rendered chat
        template only those of its markup do.  Without, names of special tokens stay text, as in a
        plain text to be scored.
        Raises: RequestError for half a surrogate pair, which is not Unicode.
        """
        _check_unicode(text)
        if specials and isinstance(text, MarkedText) and not self.control_tokens.all_markup(text):
            return self.control_tokens.encode(text)
        inner = self._inner if specials else self._without_specials
        return list(_encode(inner, text).ids)

    def min_tokens(self, text: str, enough: int) -> int:
        """A lower bound of the tokens of `text`, as far as it matters: counting ends at `enough`.

        First by the text's length, without tokenizing it.  A long text is then tokenized in pieces,
        so that a text that is too long takes neither much memory nor much time.
        Raises: RequestError for half a surrogate pair.
        """
        if len(text) < enough // 4:
            return 0  # at most four bytes per character, and a byte per token
        _check_unicode(text)
        longest = self.max_token_bytes
        if longest is not None:
            num_bytes = len(text) if text.isascii() else len(text.encode()) // self._shrink
            least = -(-num_bytes // longest)
            if least >= enough:
                return least
        if len(text) <= PIECE_CHARS:
            return 0
        count = 0
        for start in range(0, len(text), PIECE_CHARS):
            # A cut splits tokens; the allowance for it is a whole token's bytes.
            count += len(_encode(self._inner, text[start : start + PIECE_CHARS])) - (longest or 256)
            if count >= enough:
                return count
        return max(count, 0)

    @cached_property
    def max_token_bytes(self) -> int | None:
        """Bytes of the longest token; None where a token may stand for text of any length."""
        model, normalizer = self._inner.model, self._inner.normalizer
        added = self._inner.get_added_tokens_decoder()
        removing = str(self._inner.pre_tokenizer)
        if (
            not self._is_byte_level
            or not isinstance(model, models.BPE)
            or model.unk_token is not None
            or any(self._inner.token_to_id(letter) is None for letter in BYTES)
            or not (normalizer is None or isinstance(normalizer, normalizers.NFC))
            or any(token.lstrip or token.rstrip for token in added.values())
            or any(word in removing for word in _REMOVING)
        ):
            return None
        longest = max(map(len, self._inner.get_vocab(with_added_tokens=False)))  # a letter per byte
        return max([longest, *(len(token.content.encode()) for token in added.values())])

    @property
    def _shrink(self) -> int:
        """Most bytes of a text that the normalizer may turn into one byte."""
        return 1 if self._inner.normalizer is None else 3  # NFC of nine bytes of Hangul letters

    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        """The text of token ids, without special tokens unless `specials`."""
        if not self._unknown_ids_as_text:
            return str(self._inner.decode(list(ids), skip_special_tokens=not specials))
        decoder = self.decoder(specials)
        return "".join(decoder.push(token) for token in ids) + decoder.flush()

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which may be part of a character."""
        name = self._inner.id_to_token(token)
        if name is None:
            return id_text(token).encode() if self._unknown_ids_as_text else b""
        if token in self._added:
            return str(name).encode()
        if all(letter in BYTES for letter in name):
            return bytes(BYTES[letter] for letter in name)
        return self.decode([token], specials=True).encode()

    def decoder(self, specials: bool = False) -> IncrementalDetokenizer:
        """A detokenizer for one response."""
        kind = ByteDetokenizer if self._is_byte_level else WindowDetokenizer
        hidden = frozenset() if specials else self._special_ids
        return kind(self._inner, hidden, self._unknown_ids_as_text)


def _encode(inner: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    (encoding,) = encode_texts(inner, [text])
    return encoding


def _check_unicode(text: str) -> None:
    """Raises: RequestError for half a surrogate pair, which is not Unicode."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The text has {text[error.start]!r} at {error.start}, half of a surrogate pair; "
            "send whole characters.",
            code="invalid_text",
        ) from None
