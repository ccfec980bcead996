"""Text to token ids and back, whole and incrementally."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from osmium.errors import CheckpointError, RequestError
from osmium.text import tokenizer as text_tokenizer
from osmium.text.tokenizer import Tokenizer
from tests.text.byte_level import SPECIALS, byte_level, byte_level_json

LAB = Path(__file__).resolve().parents[3] / "shared" / "lab-model" / "tokenizer.json"

ALPHABETS = (
    (0x20, 0x7F), (0xA0, 0x250), (0x370, 0x400), (0x590, 0x600), (0x4E00, 0x5000),
    (0x1F300, 0x1F650), (0x200B, 0x2030), (0x300, 0x370),
)  # fmt: skip


@pytest.fixture(params=["byte_level", "lab"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "byte_level":
        return byte_level()
    if not LAB.is_file():
        pytest.skip("the lab model is not beside this checkout")
    return Tokenizer(LAB)


def some_text(rng: np.random.Generator) -> str:
    letters = []
    for _ in range(int(rng.integers(1, 60))):
        low, high = ALPHABETS[rng.integers(len(ALPHABETS))]
        letters.append(chr(int(rng.integers(low, high))))
    return "".join(letters)


def test_encoding_and_decoding_returns_the_same_text(rng: np.random.Generator) -> None:
    tokenizer = byte_level()
    for _ in range(200):
        text = some_text(rng)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_incremental_pieces_join_to_the_text(
    tokenizer: Tokenizer, rng: np.random.Generator
) -> None:
    for _ in range(200):
        ids = tokenizer.encode(some_text(rng))
        decoder = tokenizer.decoder()
        pieces = [decoder.push(one) for one in ids]
        assert not any("\ufffd" in piece for piece in pieces), "a character was split"
        assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("specials", [False, True])
def test_incremental_pieces_of_random_ids_join_to_their_decoding(
    tokenizer: Tokenizer, rng: np.random.Generator, specials: bool
) -> None:
    for _ in range(300):
        high = tokenizer.vocab_size if rng.random() < 0.5 else 256
        ids = rng.integers(0, high, int(rng.integers(1, 30))).tolist()
        decoder = tokenizer.decoder(specials)
        pieces = [decoder.push(one) for one in ids]
        assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids, specials), ids


def test_a_character_is_returned_once_it_is_complete() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("a🙂b")
    decoder = tokenizer.decoder()
    assert [decoder.push(one) for one in ids] == ["a", "", "", "", "🙂", "b"]
    assert decoder.flush() == ""


def test_an_incomplete_character_at_the_end_becomes_a_replacement() -> None:
    tokenizer = byte_level()
    decoder = tokenizer.decoder()
    pushed = [decoder.push(one) for one in tokenizer.encode("x🙂")[:-1]]
    assert pushed == ["x", "", "", ""]
    assert set(decoder.flush()) == {"\ufffd"}
    assert decoder.flush() == "", "a second flush returns nothing"


def test_special_tokens_are_omitted_unless_requested() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(f"{SPECIALS[0]}hi{SPECIALS[1]}")
    assert len(ids) == 4
    for specials, wanted in ((False, "hi"), (True, f"{SPECIALS[0]}hi{SPECIALS[1]}")):
        decoder = tokenizer.decoder(specials)
        assert "".join(decoder.push(one) for one in ids) + decoder.flush() == wanted
        assert tokenizer.decode(ids, specials) == wanted


def test_names_of_special_tokens_in_plain_text_stay_text() -> None:
    tokenizer = byte_level()
    text = f"say {SPECIALS[1]}"
    assert tokenizer.id_of(SPECIALS[1]) in tokenizer.encode(text)
    plain = tokenizer.encode(text, specials=False)
    assert tokenizer.id_of(SPECIALS[1]) not in plain
    assert tokenizer.decode(plain) == text


def test_threads_with_and_without_special_tokens_are_independent() -> None:
    tokenizer = byte_level()
    text = f"{SPECIALS[0]} the end " * 50
    wanted = {flag: tokenizer.encode(text, flag) for flag in (True, False)}
    wrong: list[object] = []

    def work(flag: bool) -> None:
        try:
            for _ in range(100):
                if tokenizer.encode(text, flag) != wanted[flag]:
                    wrong.append(flag)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_id_beyond_the_vocabulary_has_no_text() -> None:
    """Embeddings are padded: a model may generate ids that the tokenizer lacks."""
    tokenizer = byte_level()
    decoder = tokenizer.decoder()
    ids = tokenizer.encode("ab")
    said = [decoder.push(one) for one in (*ids, tokenizer.vocab_size + 7, *ids)]
    assert "".join(said) + decoder.flush() == "abab"
    assert tokenizer.token_bytes(tokenizer.vocab_size + 7) == b""


def test_ids_beyond_the_vocabulary_can_be_shown_as_ids(rng: np.random.Generator) -> None:
    tokenizer = byte_level(unknown_ids_as_text=True)
    (a,) = tokenizer.encode("a")
    beyond = tokenizer.vocab_size + 7
    decoder = tokenizer.decoder()
    assert [decoder.push(one) for one in (a, beyond, beyond, a)] == [
        "a", f"⟨{beyond}⟩", f"⟨{beyond}⟩", "a",
    ]  # fmt: skip
    assert tokenizer.token_bytes(beyond) == f"⟨{beyond}⟩".encode()
    for _ in range(100):
        ids = rng.integers(0, 2 * tokenizer.vocab_size, int(rng.integers(1, 30))).tolist()
        decoder = tokenizer.decoder()
        text = "".join(decoder.push(one) for one in ids) + decoder.flush()
        assert text == tokenizer.decode(ids)
        text.encode("utf-8")
        assert text.count("⟨") == sum(one >= tokenizer.vocab_size for one in ids)


def test_a_character_interrupted_by_an_unknown_id_is_replaced() -> None:
    tokenizer = byte_level(unknown_ids_as_text=True)
    smile, beyond = tokenizer.encode("🙂"), tokenizer.vocab_size
    decoder = tokenizer.decoder()
    pushed = [decoder.push(one) for one in (*smile[:2], beyond, *smile)]
    assert pushed[:2] == ["", ""] and set(pushed[2].removesuffix(f"⟨{beyond}⟩")) == {"\ufffd"}
    assert "".join(pushed[3:]) + decoder.flush() == "🙂"


def test_token_bytes_join_to_the_bytes_of_the_text(
    tokenizer: Tokenizer, rng: np.random.Generator
) -> None:
    for _ in range(50):
        ids = tokenizer.encode(some_text(rng))
        whole = tokenizer.decode(ids, specials=True)
        assert b"".join(tokenizer.token_bytes(one) for one in ids) == whole.encode()


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(RequestError, match="ud800"):
        byte_level().encode("a\ud800b")


@pytest.mark.parametrize("source", [b"", b"{}", b"\xff\xfe", Path("/nowhere/tokenizer.json")])
def test_an_invalid_tokenizer_file_is_refused(source: bytes | Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(source)


def test_other_threads_run_while_a_text_is_encoded() -> None:
    tokenizer = byte_level()
    text = "the end " * 100_000
    turns, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            turns[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        before = turns[0]
        tokenizer.encode(text)
        assert turns[0] - before > 10_000, "encoding holds the global lock"
    finally:
        stop.set()
        thread.join()


def test_the_least_tokens_of_a_text_are_never_too_many(
    tokenizer: Tokenizer, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osmium.text.tokenizer.PIECE_CHARS", 50)
    for _ in range(200):
        text = some_text(rng) * int(rng.integers(1, 20))
        count = len(tokenizer.encode(text))
        for enough in (1, count // 2, count, 2 * count):
            assert tokenizer.min_tokens(text, enough) <= count


def test_a_text_too_long_for_its_context_is_not_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    longest = len(SPECIALS[0])
    assert tokenizer.max_token_bytes == longest
    monkeypatch.setattr("osmium.text.tokenizer._encode", lambda *_: pytest.fail("it is tokenized"))
    assert tokenizer.min_tokens("ab" * 10_000, 1000) == -(-20_000 // longest)
    assert tokenizer.min_tokens("é" * 10_000, 1000) == -(-20_000 // longest)
    assert tokenizer.min_tokens("ab" * 10_000, 5000) == 0, "it may fit"


def test_a_long_text_is_counted_in_pieces_until_it_is_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer, sizes = byte_level(), []
    encode = text_tokenizer._encode

    def record(inner: object, text: str) -> object:
        sizes.append(len(text))
        return encode(inner, text)  # type: ignore[arg-type]

    monkeypatch.setattr(text_tokenizer, "PIECE_CHARS", 1000)
    monkeypatch.setattr(text_tokenizer, "_encode", record)
    found = tokenizer.min_tokens("xyz" * 5000, 2500)
    assert 2500 <= found <= 3000
    assert sizes == [1000, 1000, 1000], "no piece after the limit"


@pytest.mark.parametrize("change", ["strip", "normalizer", "byte", "unknown", "removed"])
def test_a_tokenizer_that_may_drop_text_has_no_longest_token(change: str) -> None:
    made = json.loads(byte_level_json())
    if change == "strip":
        made["added_tokens"][0]["rstrip"] = True
    elif change == "normalizer":
        made["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    elif change == "byte":
        del made["model"]["vocab"]["z"]
    elif change == "unknown":
        made["model"]["unk_token"] = "z"
    else:
        made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
            {"type": "WhitespaceSplit"}, made["pre_tokenizer"]]}  # fmt: skip
    tokenizer = Tokenizer(json.dumps(made).encode())
    assert tokenizer.max_token_bytes is None
    assert tokenizer.min_tokens(" " * 100_000, 1000) == 0


def test_a_normalizer_that_composes_characters_counts_as_shrinking() -> None:
    made = json.loads(byte_level_json())
    made["normalizer"] = {"type": "NFC"}
    tokenizer = Tokenizer(json.dumps(made).encode())
    text = "\u1112\u1161\u11ab" * 1000  # one syllable of three bytes, from nine
    longest = tokenizer.max_token_bytes
    assert longest is not None
    assert tokenizer.min_tokens(text, 10) == -(-3000 // longest)


def test_the_longest_token_is_found_beyond_a_gap_of_the_ids() -> None:
    made = json.loads(byte_level_json())
    made["model"]["vocab"]["x" * 40] = 100_000
    assert Tokenizer(json.dumps(made).encode()).max_token_bytes == 40
