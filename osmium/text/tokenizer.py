"""Text to ids and back: tokenizer.json, through the tokenizers package."""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers.decoders import DecodeStream

from osmium.errors import CheckpointError, RequestError
from osmium.text.control_tokens import ControlTokens
from osmium.text.marked import MarkedText

__all__ = ["IncrementalDetokenizer", "Tokenizer"]


class Tokenizer:
    """A model's tokenizer.json."""

    def __init__(
        self, source: bytes | str | os.PathLike[str], unknown_ids_as_text: bool = False
    ) -> None:
        """`source` is the file's contents, or its path.

        Ids that the tokenizer lacks have no text, like the padding rows of a real model's head.
        With `unknown_ids_as_text` they become "⟨12345⟩".  Raises: CheckpointError.
        """
        try:
            raw = source if isinstance(source, bytes) else Path(source).read_bytes()
            self._inner = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as error:  # the package raises plain Exception, and OSError for the path
            raise CheckpointError(f"tokenizer.json cannot be used: {error}") from None
        self._inner.no_padding()
        self._inner.no_truncation()
        self._added = frozenset(self._inner.get_added_tokens_decoder())
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

    def id_of(self, token: str) -> int | None:
        """The id of a token, spelled as in the vocabulary; None if there is none."""
        token_id = self._inner.token_to_id(token)
        return None if token_id is None else int(token_id)

    def special_id(self, text: str) -> int | None:
        """The id of the special token with this text, which decoding omits; None if there is
        none."""
        token = self.control_tokens.id_of(text)
        return token if token is not None and token in self.control_tokens.special_ids else None

    def encode(self, text: str, specials: bool = True) -> list[int]:
        """Token ids of a text.

        With `specials`, names of added tokens in it become those tokens; in a rendered chat
        template only those of its markup do.  Without, names of special tokens stay text, as in a
        plain text to be scored.
        Raises: RequestError for half a surrogate pair, which is not Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"The text has {text[error.start]!r} at {error.start}, half of a surrogate pair; "
                "send whole characters.",
                code="invalid_text",
            ) from None
        if specials and isinstance(text, MarkedText) and not self.control_tokens.all_markup(text):
            return self.control_tokens.encode(text)
        inner = self._inner if specials else self._without_specials
        return list(inner.encode(text, add_special_tokens=False).ids)

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
            return _id_text(token).encode() if self._unknown_ids_as_text else b""
        if token in self._added:
            return str(name).encode()
        if all(letter in _BYTES for letter in name):
            return bytes(_BYTES[letter] for letter in name)
        return self.decode([token], specials=True).encode()

    def decoder(self, specials: bool = False) -> "IncrementalDetokenizer":
        """A detokenizer for one response."""
        return IncrementalDetokenizer(self._inner, specials, self._unknown_ids_as_text)


def _id_text(token: int) -> str:
    """The text of an id that the tokenizer lacks, without Markdown's or a terminal's characters."""
    return f"⟨{token}⟩"


class IncrementalDetokenizer:
    """Converts one response's ids to text as they stream; it returns complete characters."""

    def __init__(
        self, inner: tokenizers.Tokenizer, specials: bool, unknown_ids_as_text: bool = False
    ) -> None:
        self._inner, self._specials = inner, specials
        self._unknown_ids_as_text = unknown_ids_as_text
        self._reset()

    def _reset(self) -> None:
        self._stream = DecodeStream(skip_special_tokens=not self._specials)
        self._ids: list[int] = []
        self._num_returned = 0
        """Characters of `_ids` that push and flush have returned."""

    def push(self, token: int) -> str:
        """Add a token; returns the text that no later token can change."""
        if self._unknown_ids_as_text and self._inner.id_to_token(token) is None:
            before = self.flush()  # no later token completes a character across this one
            self._reset()
            return before + _id_text(token)
        self._ids.append(token)
        text = str(self._stream.step(self._inner, token) or "")
        self._num_returned += len(text)
        return text

    def flush(self) -> str:
        """The rest of the text; bytes of an incomplete character become U+FFFD."""
        text = str(self._inner.decode(self._ids, skip_special_tokens=not self._specials))
        rest = text[self._num_returned :]
        self._num_returned = len(text)
        return rest


def _byte_letters() -> dict[str, int]:
    """The byte of each letter of byte-level BPE.  Radford et al. 2019 (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return letters


_BYTES = _byte_letters()
