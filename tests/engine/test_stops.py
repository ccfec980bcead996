"""Stop texts, wherever the borders of tokens fall."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from osmium.engine.stops import StopMatcher
from tests.engine.fakes import ByteDecoder


class Pieces:
    """Token i is the i-th of some pieces of text."""

    def __init__(self, pieces: Sequence[str], rest: str = "") -> None:
        self.pieces, self.rest = pieces, rest

    def push(self, token: int) -> str:
        return self.pieces[token]

    def flush(self) -> str:
        return self.rest


def told(stops: StopMatcher, count: int) -> list[str]:
    """What comes out, piece by piece, until a stop text has come or the tokens are at an end."""
    out = []
    for token in range(count):
        out.append(stops.push(token))
        if stops.matched:
            break
    out.append(stops.flush())
    return out


def cut(text: str, borders: Sequence[int]) -> list[str]:
    return [text[a:b] for a, b in pairwise([0, *borders, len(text)])]


TEXT = "one two STOP three"


@pytest.mark.parametrize("stop", ["STOP", "S", "two S", "o STOP thre", "P", " ", TEXT, "e"])
def test_a_stop_text_is_found_at_every_split_and_never_given_out(stop: str) -> None:
    wanted = TEXT[: TEXT.index(stop)]
    for first in range(len(TEXT) + 1):
        for second in range(first, len(TEXT) + 1):
            stops = StopMatcher(Pieces(cut(TEXT, [first, second])), (stop,))
            assert "".join(told(stops, 3)) == wanted
            assert stops.matched


def test_without_a_stop_text_everything_comes_out_at_once() -> None:
    stops = StopMatcher(Pieces(["a", "", "bc", "d"]), ())
    assert told(stops, 4) == ["a", "", "bc", "d", ""]
    assert not stops.matched


def test_what_only_began_like_a_stop_text_comes_out_when_that_is_certain() -> None:
    stops = StopMatcher(Pieces(["a<", "|e", "n", "d.", "<|en"]), ("<|end|>",))
    assert told(stops, 5) == ["a", "", "", "<|end.", "", "<|en"]
    assert not stops.matched


def test_a_beginning_inside_a_beginning_is_kept() -> None:
    stops = StopMatcher(Pieces(list("aabaabaaab")), ("aabaaa",))
    assert "".join(told(stops, 10)) == "aab"
    assert stops.matched


def test_what_the_decoder_still_held_may_complete_a_stop_text() -> None:
    stops = StopMatcher(Pieces(["ab", "c"], rest="d"), ("cd",))
    assert told(stops, 2) == ["ab", "", ""]
    assert stops.matched


def test_any_text_any_stops_any_split_equal_the_restatement(rng: np.random.Generator) -> None:
    """At every token: nothing once a stop text is in the text so far, and what came before the
    first of them; else all but the longest end that could still become one."""
    for _ in range(600):
        text = "".join(rng.choice(list("abc"), int(rng.integers(1, 25))))
        made = ["".join(rng.choice(list("abc"), int(rng.integers(1, 7)))) for _ in range(3)]
        stop = tuple(made[: int(rng.integers(0, 4))])
        borders = sorted(rng.integers(0, len(text) + 1, int(rng.integers(0, 12))).tolist())
        pieces = cut(text, borders)
        stops, given, so_far = StopMatcher(Pieces(pieces), stop), "", ""
        for token, piece in enumerate(pieces):
            given += stops.push(token)
            so_far += piece
            found = [so_far.index(one) for one in stop if one in so_far]
            assert stops.matched == bool(found)
            if found:
                assert given == so_far[: min(found)]
                break
            held = max(
                n
                for n in range(len(so_far) + 1)
                if n == 0 or any(one.startswith(so_far[len(so_far) - n :]) for one in stop)
            )
            assert given == so_far[: len(so_far) - held], (text, stop, borders)
        else:
            given += stops.flush()
            assert given == text


def test_a_character_of_several_bytes_is_never_split() -> None:
    text = "naïve → 😀 fin"
    stops, out = StopMatcher(ByteDecoder(), ("😀 fi",)), []
    for byte in text.encode():
        out.append(stops.push(byte))
        if stops.matched:
            break
    assert "".join(out) == "naïve → "
    assert all("\ufffd" not in piece for piece in out)


def test_bytes_that_never_became_a_character_come_at_the_end() -> None:
    stops = StopMatcher(ByteDecoder(), ("zz",))
    out = [stops.push(byte) for byte in "ab→".encode()[:-1]]
    assert out == ["a", "b", "", ""]
    assert stops.flush() == "\ufffd"


def test_without_a_decoder_there_is_no_text() -> None:
    stops = StopMatcher(None, ("a",))
    assert stops.push(97) == ""
    assert stops.flush() == ""
