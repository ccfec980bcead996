"""Stop strings at any split of the text into tokens."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from osmium.engine.stops import StopMatcher
from tests.engine.fakes import ByteDecoder


class Pieces:
    """A detokenizer whose token i is the i-th piece of a text."""

    def __init__(self, pieces: Sequence[str], rest: str = "") -> None:
        self.pieces, self.rest = pieces, rest

    def push(self, token: int) -> str:
        return self.pieces[token]

    def flush(self) -> str:
        return self.rest


def matched_output(stops: StopMatcher, count: int) -> list[str]:
    """The output after each token, until a stop string matches or the tokens end; then the
    flush."""
    out = []
    for token in range(count):
        out.append(stops.push(token))
        if stops.matched:
            break
    out.append(stops.flush())
    return out


def split_at(text: str, borders: Sequence[int]) -> list[str]:
    return [text[a:b] for a, b in pairwise([0, *borders, len(text)])]


TEXT = "one two STOP three"


@pytest.mark.parametrize("stop", ["STOP", "S", "two S", "o STOP thre", "P", " ", TEXT, "e"])
def test_a_stop_string_is_found_at_every_split_and_never_returned(stop: str) -> None:
    wanted = TEXT[: TEXT.index(stop)]
    for first in range(len(TEXT) + 1):
        for second in range(first, len(TEXT) + 1):
            stops = StopMatcher(Pieces(split_at(TEXT, [first, second])), (stop,))
            assert "".join(matched_output(stops, 3)) == wanted
            assert stops.matched


def test_without_a_stop_string_text_is_returned_at_once() -> None:
    stops = StopMatcher(Pieces(["a", "", "bc", "d"]), ())
    assert matched_output(stops, 4) == ["a", "", "bc", "d", ""]
    assert not stops.matched


def test_a_broken_partial_match_is_returned() -> None:
    stops = StopMatcher(Pieces(["a<", "|e", "n", "d.", "<|en"]), ("<|end|>",))
    assert matched_output(stops, 5) == ["a", "", "", "<|end.", "", "<|en"]
    assert not stops.matched


def test_an_overlapping_partial_match_is_kept() -> None:
    stops = StopMatcher(Pieces(list("aabaabaaab")), ("aabaaa",))
    assert "".join(matched_output(stops, 10)) == "aab"
    assert stops.matched


def test_the_detokenizers_flush_may_complete_a_stop_string() -> None:
    stops = StopMatcher(Pieces(["ab", "c"], rest="d"), ("cd",))
    assert matched_output(stops, 2) == ["ab", "", ""]
    assert stops.matched


def test_random_texts_and_splits_equal_a_reimplementation(rng: np.random.Generator) -> None:
    """After each token the output ends before the first stop string in the text so far.

    Without one, it ends before the longest suffix that could begin a stop string.
    """
    for _ in range(600):
        text = "".join(rng.choice(list("abc"), int(rng.integers(1, 25))))
        candidates = ["".join(rng.choice(list("abc"), int(rng.integers(1, 7)))) for _ in range(3)]
        stop = tuple(candidates[: int(rng.integers(0, 4))])
        borders = sorted(rng.integers(0, len(text) + 1, int(rng.integers(0, 12))).tolist())
        pieces = split_at(text, borders)
        stops, returned, so_far = StopMatcher(Pieces(pieces), stop), "", ""
        for token, piece in enumerate(pieces):
            returned += stops.push(token)
            so_far += piece
            found = [so_far.index(one) for one in stop if one in so_far]
            assert stops.matched == bool(found)
            if found:
                assert returned == so_far[: min(found)]
                assert stops.found in stop and so_far[min(found) :].startswith(stops.found)
                break
            num_held = max(
                n
                for n in range(len(so_far) + 1)
                if n == 0 or any(one.startswith(so_far[len(so_far) - n :]) for one in stop)
            )
            assert returned == so_far[: len(so_far) - num_held], (text, stop, borders)
        else:
            returned += stops.flush()
            assert returned == text and stops.found is None


def test_a_character_of_several_bytes_is_never_split() -> None:
    text = "naïve → 😀 fin"
    stops, out = StopMatcher(ByteDecoder(), ("😀 fi",)), []
    for byte in text.encode():
        out.append(stops.push(byte))
        if stops.matched:
            break
    assert "".join(out) == "naïve → "
    assert all("\ufffd" not in piece for piece in out)


def test_incomplete_bytes_are_returned_at_the_end() -> None:
    stops = StopMatcher(ByteDecoder(), ("zz",))
    out = [stops.push(byte) for byte in "ab→".encode()[:-1]]
    assert out == ["a", "b", "", ""]
    assert stops.flush() == "\ufffd"


def test_without_a_detokenizer_there_is_no_text() -> None:
    stops = StopMatcher(None, ("a",))
    assert stops.push(97) == ""
    assert stops.flush() == ""


# -- after the reasoning ---------------------------------------------------------------------------

THOUGHT = "is it END?\nno</x>\n\nthe END."


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [
        ("END", "is it END?\nno</x>\n\nthe "),
        ("it", THOUGHT),
        ("\n", THOUGHT),
        ("\n\n", THOUGHT),
        ("x>\n", THOUGHT),
        ("</x>", "is it END?\nno</x>"),
        ("t", "is it END?\nno</x>\n\n"),
        (".", "is it END?\nno</x>\n\nthe END"),
    ],
)
def test_a_stop_string_counts_after_the_reasoning_and_its_newlines(stop: str, wanted: str) -> None:
    for first in range(len(THOUGHT) + 1):
        for second in range(first, len(THOUGHT) + 1):
            pieces = split_at(THOUGHT, [first, second])
            stops = StopMatcher(Pieces(pieces), (stop,), "</x>")
            assert "".join(matched_output(stops, 3)) == wanted, pieces
            assert stops.matched == (wanted != THOUGHT)


def test_reasoning_is_returned_at_once() -> None:
    stops = StopMatcher(Pieces(["EN", "a<", "/x", ">EN", "b"]), ("END", "<"), "</x>")
    assert matched_output(stops, 5) == ["EN", "a<", "/x", ">", "ENb", ""]


def test_a_stop_string_in_the_last_bytes_counts_only_after_the_reasoning() -> None:
    assert StopMatcher(Pieces([], rest="END"), ("END",), "</x>").flush() == "END"
    assert StopMatcher(Pieces([], rest="a</x>bEND"), ("END",), "</x>").flush() == "a</x>b"


def test_a_stop_token_counts_only_after_the_reasoning() -> None:
    stops = StopMatcher(Pieces(["a", "</x>", "b"]), ("<special>",), "</x>", {7: "<special>"})
    assert [stops.stops_at(7), stops.stops_at(8)] == [False, False]
    stops.push(0)
    assert not stops.stops_at(7)
    stops.push(1)
    assert [stops.stops_at(7), stops.stops_at(8)] == [True, False]
    assert stops.found == "<special>"
    assert StopMatcher(None, ("<special>",), "", {7: "<special>"}).stops_at(7)


def test_the_length_counts_text_before_a_stop_string_ends_it() -> None:
    stops, lengths = StopMatcher(Pieces(["ab", "", "cEN", "D"]), ("END",)), []
    for token in range(4):
        stops.push(token)
        lengths.append(stops.length)
    assert lengths == [2, 2, 5, 6]


@pytest.mark.parametrize("min_tokens", range(8))
def test_stop_texts_count_from_min_tokens_on(min_tokens: int) -> None:
    pieces = ["a", "b", "a", "b", "a", "b"]
    stops = StopMatcher(Pieces(pieces), ("b",), min_tokens=min_tokens)
    text = "".join(matched_output(stops, len(pieces)))
    ends = [count for count in (2, 4, 6) if count >= min_tokens]
    assert text == ("ababab"[: ends[0] - 1] if ends else "ababab")
    assert stops.matched is bool(ends)


def test_a_special_stop_token_counts_from_min_tokens_on() -> None:
    stops = StopMatcher(Pieces(["a", "b"]), ("<s>",), token_ids={7: "<s>"}, min_tokens=1)
    assert not stops.stops_at(7)
    stops.push(0)
    assert stops.stops_at(7)


def test_the_end_of_reasoning_as_a_stop_text_counts_from_min_tokens_on() -> None:
    for min_tokens, wanted, found in ((0, "a</t>", "</t>"), (5, "a</t>b", None)):
        stops = StopMatcher(Pieces(["a", "</t>", "b"]), ("</t>",), "</t>", min_tokens=min_tokens)
        assert "".join(matched_output(stops, 3)) == wanted
        assert stops.found == found
