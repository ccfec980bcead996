"""Ids to text as they stream: at once, in linear time, for every kind of decoder."""

import time

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from osmium.text.tokenizer import Tokenizer
from tests.text.byte_level import SPECIALS, byte_level

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_fallback() -> Tokenizer:
    """Words with a leading space, and a token for each byte, as of Llama."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁end", "s", "é"]
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True,
                   unk_token="<unk>", fuse_unk=True)
    )  # fmt: skip
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    inner.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return Tokenizer(inner.to_str().encode())


def byte_ids(tokenizer: Tokenizer, raw: bytes) -> list[int]:
    """The ids of single bytes."""
    letters = {bytes([byte]): f"<0x{byte:02X}>" for byte in range(256)}
    found = [tokenizer.id_of(letters[bytes([byte])]) for byte in raw]
    if found and found[0] is None:
        names = {tokenizer.token_bytes(i): i for i in range(256)}
        return [names[bytes([byte])] for byte in raw]
    return [one for one in found if one is not None]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("byte", [0x80, 0xC0, 0xFF])
def test_bytes_that_never_become_a_character_are_returned_at_once(make: object, byte: int) -> None:
    tokenizer: Tokenizer = make()  # type: ignore[operator]
    decoder = tokenizer.decoder()
    ids = byte_ids(tokenizer, bytes([byte]) * 20_000)
    start = time.perf_counter()
    pieces = [decoder.push(one) for one in ids]
    seconds = time.perf_counter() - start
    text = "".join(pieces)
    assert set(text) == {"\ufffd"}
    assert len(text + decoder.flush()) == 20_000
    waits = [len(text) for text in "".join("x" if piece else " " for piece in pieces).split("x")]
    assert max(waits) < 4, "text is held back for at most three tokens"
    assert seconds < 5, "20,000 tokens took minutes when each decoded all others"


@pytest.mark.parametrize("begin", [b"\xe2", b"\xe2\x82", b"\xf0\x9f\x98", b"\xed\xa0", b"\xf4\x90"])
def test_a_character_that_is_cut_becomes_u_fffd_with_the_next_byte(begin: bytes) -> None:
    tokenizer = byte_level()
    decoder = tokenizer.decoder()
    pieces = [decoder.push(one) for one in byte_ids(tokenizer, begin + b"ab")]
    assert pieces[-2].endswith("a") and pieces[-1] == "b"
    assert "".join(pieces) == (begin + b"ab").decode(errors="replace")


def test_a_replacement_character_of_the_model_is_not_held_back() -> None:
    tokenizer = byte_level()
    decoder = tokenizer.decoder()
    pieces = [decoder.push(one) for one in tokenizer.encode("a\ufffdb")]
    assert pieces == ["a", "", "", "\ufffd", "b"]


def test_a_special_token_without_text_does_not_cut_a_character() -> None:
    tokenizer = byte_level()
    special = tokenizer.id_of(SPECIALS[0])
    assert special is not None
    first, second = tokenizer.encode("é")
    for specials, wanted in ((False, "é"), (True, f"\ufffd{SPECIALS[0]}\ufffd")):
        decoder = tokenizer.decoder(specials)
        text = "".join(decoder.push(one) for one in (first, special, second)) + decoder.flush()
        assert text == wanted == tokenizer.decode([first, special, second], specials)


def test_random_bytes_join_to_the_decoding_of_the_whole(rng: np.random.Generator) -> None:
    tokenizer = byte_level()
    for _ in range(500):
        ids = rng.integers(0, tokenizer.vocab_size, int(rng.integers(1, 60))).tolist()
        for specials in (False, True):
            decoder = tokenizer.decoder(specials)
            text = "".join(decoder.push(one) for one in ids) + decoder.flush()
            assert text == tokenizer.decode(ids, specials), ids


@pytest.mark.parametrize("text", ["the end", "the ends", "é the é", "🙂 the 🙂🙂", "€€ s"])
def test_words_with_a_leading_space_join_to_the_text(text: str) -> None:
    tokenizer = byte_fallback()
    ids = tokenizer.encode(text)
    decoder = tokenizer.decoder()
    pieces = [decoder.push(one) for one in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + decoder.flush() == text
    assert decoder.flush() == "", "a second flush returns nothing"


def test_an_incomplete_character_of_byte_tokens_is_returned_by_flush() -> None:
    tokenizer = byte_fallback()
    decoder = tokenizer.decoder()
    pushed = [decoder.push(one) for one in byte_ids(tokenizer, "🙂".encode()[:3])]
    assert pushed == ["", "", ""]
    assert decoder.flush() == "\ufffd" * 3
    assert [decoder.push(one) for one in byte_ids(tokenizer, "é".encode())] == ["", "é"]
