"""Text to ids and back: tokenizer.json, through the tokenizers package."""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers.decoders import DecodeStream

from osmium.errors import CheckpointError, RequestError

__all__ = ["IncrementalDetokenizer", "Tokenizer"]


class Tokenizer:
    """One tokenizer.json."""

    def __init__(
        self, source: bytes | str | os.PathLike[str], unknown_ids_as_text: bool = False
    ) -> None:
        """`source` is the file's contents, or its path.

        Ids that the tokenizer lacks have no text, as the padding of a real model's head; with
        `unknown_ids_as_text` they become "⟨12345⟩".  Raises: CheckpointError.
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
    def _plain(self) -> tokenizers.Tokenizer:
        """A second one for plain texts: the switch is the tokenizer's, which threads share."""
        other = tokenizers.Tokenizer.from_str(self._inner.to_str())
        other.encode_special_tokens = True
        return other

    @property
    def vocab(self) -> int:
        """Ids, added tokens included."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    def id_of(self, token: str) -> int | None:
        """The id of a token as it stands in the vocabulary."""
        found = self._inner.token_to_id(token)
        return None if found is None else int(found)

    def encode(self, text: str, specials: bool = True) -> list[int]:
        """Ids of a text.  With `specials`, names of special tokens in it become those tokens, as a
        rendered chat template wants; without, they stay text, as in a plain text to be scored.

        Raises: RequestError for a text that is not Unicode, as half a surrogate pair is not.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"The text has {text[error.start]!r} at {error.start}, half of a surrogate pair; "
                "send whole characters.",
                code="invalid_text",
            ) from None
        inner = self._inner if specials else self._plain
        return list(inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        """The text of ids; special tokens are left out unless asked for."""
        if not self._unknown_ids_as_text:
            return str(self._inner.decode(list(ids), skip_special_tokens=not specials))
        decoder = self.decoder(specials)
        return "".join(decoder.push(one) for one in ids) + decoder.flush()

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token: part of a character, perhaps."""
        name = self._inner.id_to_token(token)
        if name is None:
            return _id_text(token).encode() if self._unknown_ids_as_text else b""
        if token in self._added:
            return str(name).encode()
        if all(letter in _BYTES for letter in name):
            return bytes(_BYTES[letter] for letter in name)
        return self.decode([token], specials=True).encode()

    def decoder(self, specials: bool = False) -> "IncrementalDetokenizer":
        """Ids back to text as they come."""
        return IncrementalDetokenizer(self._inner, specials, self._unknown_ids_as_text)


def _id_text(token: int) -> str:
    """What stands for an id that has no text; Markdown and terminals show it as it is."""
    return f"⟨{token}⟩"


class IncrementalDetokenizer:
    """One reply's ids, back to text piece by piece; a character is given out once it is whole."""

    def __init__(
        self, inner: tokenizers.Tokenizer, specials: bool, unknown_ids_as_text: bool = False
    ) -> None:
        self._inner, self._specials = inner, specials
        self._unknown_ids_as_text = unknown_ids_as_text
        self._restart()

    def _restart(self) -> None:
        self._stream = DecodeStream(skip_special_tokens=not self._specials)
        self._ids: list[int] = []
        self._given = 0
        """Characters given out."""

    def push(self, token: int) -> str:
        """The text that is certain once `token` is there."""
        if self._unknown_ids_as_text and self._inner.id_to_token(token) is None:
            before = self.flush()  # no later token completes a character across this one
            self._restart()
            return before + _id_text(token)
        self._ids.append(token)
        text = str(self._stream.step(self._inner, token) or "")
        self._given += len(text)
        return text

    def flush(self) -> str:
        """What is left at the end; bytes that never became a character come as U+FFFD."""
        whole = str(self._inner.decode(self._ids, skip_special_tokens=not self._specials))
        rest = whole[self._given :]
        self._given = len(whole)
        return rest


def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level BPE writes bytes.  Radford et al. 2019 (GPT-2)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in set(plain)]
    letters.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return letters


_BYTES = _byte_letters()
