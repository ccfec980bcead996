"""A tokenizer.json that takes unbounded time or memory is refused; ordinary ones are not."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from osmium.errors import CheckpointError, RequestError
from osmium.text import regexes
from osmium.text.tokenizer import Tokenizer
from tests.text.byte_level import byte_level_json

O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ORDINARY = [
    *sorted(regexes._KNOWN), O200K, r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
    r"\d{1,3}(?=(\d{3})+\b)", r"(?:\r\n|\n)+", r" ?[^(\s|[.,!?…。，、।۔،])]+", "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    "", "a", r"(?<word>\w+)\s", r"\(+", "[(+]+", r"(ab)+", r"(?:ab|cd)*", r"x{2,3}y{2}",
]  # fmt: skip
EXPLODING = [
    "(a+)+$", "(a|a)*b", "(?=(a+)+b)", "(a|a){21}b", "(?:a|a|a){12}b|.", "((a{1,3})b?)+c",
    r"(?:\s|\S)*x", "(?<x>a+)+b", "([a-z]+)*1", "(a?){30}a{30}", "(?i:(x+x+)+y)",
    "(((a{5,9}|b){5,9}|c){5,9}|d)", "(.*)(.*)(.*)(.*)(.*)x", r"\p{L}*\p{L}*\p{L}*1",
    "a?" * 40 + "a" * 40, r"(a*)\1*\1*b", "((a)*)*b", "(?:(?:a{3})*)+b", "([ab]|a)+c",
    r"(\p{L}|\w)+1", "(a+?)+?b",
]  # fmt: skip


def with_step(step: dict[str, Any], place: str = "pre_tokenizer") -> bytes:
    """A tokenizer with another pre-tokenizer or normalizer."""
    source = json.loads(byte_level_json())
    before = source[place]
    source[place] = step
    if before is not None:
        key = "pretokenizers" if place == "pre_tokenizer" else "normalizers"
        source[place] = {"type": "Sequence", key: [step, before]}
    return json.dumps(source).encode()


def split(pattern: str) -> bytes:
    return with_step({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                      "invert": False})  # fmt: skip


def replace(pattern: str, content: str) -> bytes:
    step = {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
    return with_step(step, "normalizer")


@pytest.mark.parametrize("pattern", ORDINARY)
def test_an_ordinary_pattern_is_accepted(pattern: str) -> None:
    assert Tokenizer(split(pattern)).encode("ab 12")


@pytest.mark.parametrize("make", [split, lambda pattern: replace(pattern, "x")])
@pytest.mark.parametrize("pattern", EXPLODING)
@pytest.mark.timeout(20)
def test_a_pattern_that_explodes_is_refused_within_seconds(
    pattern: str, make: Callable[[str], bytes]
) -> None:
    start = time.process_time()
    with pytest.raises(CheckpointError, match="regular expression"):
        Tokenizer(make(pattern))
    assert time.process_time() - start < 10


def test_a_known_pattern_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regexes, "_trials", lambda *_: pytest.fail("tried"))
    for pattern in regexes._KNOWN:
        Tokenizer(split(pattern))


def test_a_pattern_of_absurd_length_is_refused() -> None:
    with pytest.raises(CheckpointError, match="characters"):
        Tokenizer(split("a" * (regexes.MAX_PATTERN + 1)))


@pytest.mark.parametrize(
    "pattern", ["(", "a)", "[", "(?", "(?<x", "\\", "a{2,1}b(", "(?<x>\\g<x>)"]
)
def test_a_pattern_that_is_none_is_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(split(pattern))


def test_replacements_that_multiply_a_text_are_refused() -> None:
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    source = json.loads(byte_level_json())
    for count, fits in ((10, True), (40, False)):
        source["normalizer"] = {"type": "Sequence", "normalizers": [double] * count}
        raw = json.dumps(source).encode()
        if fits:
            assert len(Tokenizer(raw).encode("a")) == 1 << count
        else:
            with pytest.raises(CheckpointError, match="times longer"):
                Tokenizer(raw)


def test_thousands_of_normalizers_are_refused() -> None:
    source = json.loads(byte_level_json())
    source["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 300}
    with pytest.raises(CheckpointError, match="normalizers"):
        Tokenizer(json.dumps(source).encode())


def test_a_panic_of_the_package_at_encoding_is_a_request_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(regexes, "_check", lambda pattern: None)
    tokenizer = Tokenizer(split("(?=(a+)+b)"))
    assert tokenizer.encode("hello")
    with pytest.raises(RequestError, match="retry-limit") as found:
        tokenizer.encode("a" * 40 + "cb")
    assert found.value.code == "tokenizer_failed"


@pytest.mark.parametrize(
    "edit",
    [
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
        {"model": {"type": "Unigram", "vocab": [], "unk_id": 7}},
        {"model": {"type": "WordPiece", "vocab": {}, "unk_token": "x"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////////"}},
        {"added_tokens": [{"id": -1, "content": "x"}]},
        {"added_tokens": 7},
        {"pre_tokenizer": {"type": "None"}},
        {"decoder": []},
    ],
)
def test_a_tokenizer_that_the_package_cannot_build_is_refused(edit: dict[str, Any]) -> None:
    source = json.loads(byte_level_json())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(json.dumps({**source, **edit}).encode())


@pytest.mark.parametrize("raw", [b"", b"[]", b"[" * 100_000, b'{"a": ' * 100_000, b"\xff", b"null"])
def test_a_file_that_is_no_tokenizer_is_refused(raw: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(raw, config={"added_tokens_decoder": {"1": {"content": "x"}}})
