"""Separation of reasoning and answer, at any split of the text."""

import time

import numpy as np
import pytest

from osmium.text.reasoning import DisplayedResponse, ReasoningParser, starts_in_reasoning


def split(pieces: list[str], thinking: bool) -> tuple[str, str]:
    reasoning = ReasoningParser(thinking)
    parts = [reasoning.push(piece) for piece in pieces]
    parts.append(reasoning.flush())
    return "".join(a for a, _ in parts), "".join(b for _, b in parts)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("so it is\n</think>\n\nParis.", ("so it is", "Paris.")),
        ("</think>Paris.", ("", "Paris.")),
        ("\nline\n\nline\n</think>\n\nA\n\nB\n", ("line\n\nline", "A\n\nB\n")),
        ("a < b </thin </think>x", ("a < b </thin ", "x")),
        ("never ends", ("never ends", "")),
        ("ends in </thi", ("ends in </thi", "")),
        ("a</think>b</think>c", ("a", "b</think>c")),
    ],
)
def test_text_that_starts_in_reasoning_is_parsed_the_same_at_any_split(
    text: str, wanted: tuple[str, str], rng: np.random.Generator
) -> None:
    assert split([text], True) == wanted
    assert split(list(text), True) == wanted
    for _ in range(50):
        cuts = sorted(rng.integers(0, len(text) + 1, 4).tolist())
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert split(pieces, True) == wanted


@pytest.mark.parametrize("text", ["\n    return x", "\n\n", "plain", "</think>", ""])
def test_text_that_does_not_start_in_reasoning_is_all_answer(text: str) -> None:
    assert split(list(text), False) == ("", text)


def test_reasoning_is_returned_as_it_arrives() -> None:
    parser = ReasoningParser(True)
    assert parser.push("one two") == ("one two", "")


def test_a_prompt_with_an_open_think_tag_starts_in_reasoning() -> None:
    assert starts_in_reasoning("<|im_start|>assistant\n<think>\n")
    assert not starts_in_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not starts_in_reasoning("<|im_start|>assistant\n")


def shown(pieces: list[str], thinking: bool) -> tuple[str, str]:
    reply = DisplayedResponse(thinking)
    parts = [reply.push(piece) for piece in pieces]
    parts.append(reply.flush())
    return "".join(a for a, _ in parts), "".join(b for _, b in parts)


@pytest.mark.parametrize(
    ("text", "thinking", "wanted"),
    [
        ("so it is\n</think>\n\nParis.", True, ("so it is", "Paris.")),
        ("<think>\nhm\n</think>\n\nParis.", False, ("hm", "Paris.")),
        ("\n<think>hm</think>Paris.", False, ("hm", "Paris.")),
        ("a</think>b</think>c", True, ("a", "bc")),
        ("Paris.</think>", False, ("", "Paris.")),
        ("write <think>x</think> so", False, ("", "write <think>x</think> so")),
        ("write <think>x</think></think> so", False, ("", "write <think>x</think> so")),
        ("  a < b <th", False, ("", "  a < b <th")),
        ("<thi", False, ("", "<thi")),
        ("", False, ("", "")),
        ("never ends", True, ("never ends", "")),
    ],
)
def test_no_unpaired_tag_is_shown_at_any_split(
    text: str, thinking: bool, wanted: tuple[str, str], rng: np.random.Generator
) -> None:
    assert shown([text], thinking) == wanted
    assert shown(list(text), thinking) == wanted
    for _ in range(30):
        cuts = sorted(rng.integers(0, len(text) + 1, 4).tolist())
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert shown(pieces, thinking) == wanted


def test_many_newlines_of_reasoning_take_little_time() -> None:
    parser = ReasoningParser(True)
    start = time.perf_counter()
    for _ in range(20_000):
        assert parser.push("\n") == ("", "")
    assert time.perf_counter() - start < 5, "each push looked at each newline, in Python"
    assert parser.push("a") == ("a", "")
