"""Refuses a tokenizer.json that takes exponential time or memory for some text.

A regular expression that backtracks is the case: of a text of 40 characters, `(a+)+b` tries 2^40
partitions.  Patterns of published tokenizers are known; others are checked by their structure, and
tried on short texts whose length doubles.
"""

import time
from collections.abc import Iterator
from typing import Any

import msgspec
import tokenizers
from tokenizers.pre_tokenizers import Split

from osmium.errors import CheckpointError, is_panic

__all__ = ["check_tokenizer_json"]

MAX_PATTERN = 1 << 16
"""Longest pattern, characters."""

MAX_GROWTH = 1 << 12
"""Most characters that all replacements together may make of one."""

MAX_STEPS = 256
"""Most parts of a tokenizer: normalizers, pre-tokenizers and others, nested ones included."""

TRIAL_LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
TRIAL_S = 0.05
"""Longest time of a trial, the best of three.  Patterns of published tokenizers take less than 2 ms
for 1024 characters."""


class _Steps(msgspec.Struct):
    """The parts of tokenizer.json that work on text."""

    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    decoder: Any = None


def check_tokenizer_json(raw: bytes) -> None:
    """Raises: CheckpointError for a tokenizer whose time or memory can grow without bound."""
    try:
        steps = msgspec.json.decode(raw, type=_Steps)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return  # the tokenizers package says what is wrong with the file
    parts = [
        part
        for root in (steps.normalizer, steps.pre_tokenizer, steps.post_processor, steps.decoder)
        for part in _objects(root)
    ]
    if sum("type" in part for part in parts) > MAX_STEPS:
        raise CheckpointError(f"tokenizer.json has more than {MAX_STEPS} normalizers and others.")
    growth = 1
    for part in parts:
        for key in ("content", "prepend", "replacement"):
            if isinstance(part.get(key), str):
                growth *= max(1, len(part[key]))
    if growth > MAX_GROWTH:
        raise CheckpointError(
            f"The replacements of tokenizer.json can make a text {growth} times longer; "
            f"{MAX_GROWTH} times is the limit."
        )
    for pattern in {part["Regex"] for part in parts if isinstance(part.get("Regex"), str)}:
        if pattern not in _KNOWN:
            _check(pattern)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield value
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _check(pattern: str) -> None:
    """Raises: CheckpointError."""
    if len(pattern) > MAX_PATTERN:
        raise _refused(pattern, f"it has {len(pattern)} characters, {MAX_PATTERN} are the limit")
    if _repeats_a_repetition(pattern):
        raise _refused(
            pattern,
            "it repeats a group whose content can repeat or has alternatives, which can take "
            "exponential time",
        )
    try:
        split = Split(tokenizers.Regex(pattern), "isolated")
        for length in TRIAL_LENGTHS:
            for text in _trials(pattern, length):
                if all(_seconds(split, text) > TRIAL_S for _ in range(3)):
                    raise _refused(
                        pattern, f"it takes more than {TRIAL_S} s for {length} characters"
                    )
    except CheckpointError:
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise _refused(pattern, str(error)) from None


def _seconds(split: Split, text: str) -> float:
    start = time.perf_counter()
    split.pre_tokenize_str(text)
    return time.perf_counter() - start


def _trials(pattern: str, length: int) -> Iterator[str]:
    """Texts of about `length` characters that make a pattern backtrack: runs, and a last other."""
    letters = dict.fromkeys(c for c in pattern if c.isalnum())
    runs = dict.fromkeys([*"aA1 \n.é中'", *list(letters)[:8]])
    required = "".join(letters)[:64]  # a search that needs a letter ends early where it is missing
    for run in runs:
        for last in ("", "a", "0", " ", "\n", "!", "\n" + required, " " + required):
            yield run * length + last
    yield "a1 " * (length // 3) + "!"
    yield "aA" * (length // 2) + "!"


def _refused(pattern: str, why: str) -> CheckpointError:
    shown = pattern if len(pattern) <= 80 else f"{pattern[:80]}..."
    return CheckpointError(
        f"tokenizer.json has the regular expression {shown!r}: {why}. Use the tokenizer.json of "
        "the model that this one was made from."
    )


def _repeats_a_repetition(pattern: str) -> bool:
    """Whether a group that is repeated contains a repetition or alternatives.

    Repetition of a fixed number is no matter: its match has one length.  Alternatives that begin
    with different letters are none either.
    """
    stack: list[list[Any]] = [[False, [""]]]  # of each open group: risky, its alternatives
    closed: list[Any] | None = None  # the group that has just ended
    i = 0
    while i < len(pattern):
        letter, atom = pattern[i], pattern[i]
        group, closed_before, closed = stack[-1], closed, None
        if letter == "\\":
            atom, i = pattern[i : i + 2], i + 2
            if atom in (r"\p", r"\P", r"\x", r"\k", r"\g") and pattern[i : i + 1] in "{<":
                ends = [at for at in (pattern.find("}", i), pattern.find(">", i)) if at >= 0]
                end = min(ends, default=len(pattern))
                atom, i = atom + pattern[i : end + 1], end + 1
        elif letter == "[":
            i = _class_end(pattern, i)
            atom = "["
        elif letter == "(":
            i += 1
            if pattern.startswith("?", i):
                i = _group_start(pattern, i)
            stack.append([False, [""]])
            continue
        elif letter == ")":
            i += 1
            if len(stack) == 1:
                return False  # not balanced: the package refuses it
            closed = stack.pop()
            stack[-1][0] |= closed[0]
            stack[-1][1][-1] += "("
            continue
        elif letter == "|":
            group[1].append("")
            i += 1
            continue
        elif (repeat := _quantifier(pattern, i)) is not None:
            i, least, most = repeat
            if closed_before is not None and most > 1 and _is_risky(closed_before):
                return True
            if most != least:
                group[0] = True
            closed = closed_before
            if closed is not None and most != least:
                closed[0] = True
            continue
        else:
            i += 1
        group[1][-1] += atom
    return False


def _is_risky(group: list[Any]) -> bool:
    """Whether a group's match can end at several places."""
    risky, alternatives = group
    firsts = [text[: 2 if text.startswith("\\") else 1] for text in alternatives]
    plain = all(c.isalnum() or c in (r"\r", r"\n", r"\t") for c in firsts)
    distinct = plain and len(set(firsts)) == len(firsts)
    return bool(risky) or (len(alternatives) > 1 and not distinct)


def _class_end(pattern: str, i: int) -> int:
    """The index after a character class that begins at `i`; classes nest."""
    depth = 0
    first = i
    while i < len(pattern):
        if pattern[i] == "\\":
            i += 1
        elif pattern[i] == "[":
            depth, first = depth + 1, i + 1
            if pattern.startswith("^", first):
                i, first = i + 1, first + 1
        elif pattern[i] == "]" and i != first:
            depth -= 1
            if not depth:
                return i + 1
        i += 1
    return i


def _group_start(pattern: str, i: int) -> int:
    """The index after `?:`, `?i:`, `?=`, `?<name>` and the like."""
    while i < len(pattern) and pattern[i] not in ":=!>)":
        i += 1
    return i if pattern.startswith(")", i) else i + 1


def _quantifier(pattern: str, i: int) -> tuple[int, int, int] | None:
    """(index after it, least, most) of a quantifier at `i`; None if there is none."""
    many = 1 << 30
    simple = {"*": (0, many), "+": (1, many), "?": (0, 1)}.get(pattern[i])
    if simple is not None:
        end, (least, most) = i + 1, simple
    elif pattern[i] == "{":
        end = pattern.find("}", i) + 1
        low, comma, high = pattern[i + 1 : end - 1].partition(",")
        if not end or not (low + high).isdecimal() or len(low + high) > 12:
            return None
        least = int(low or 0)
        most = (int(high) if high else many) if comma else least
    else:
        return None
    if pattern[end : end + 1] in ("?", "+") and pattern[end : end + 1]:
        end += 1  # lazy or possessive
    return end, least, most


_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_KNOWN = {
    # GPT-2
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Qwen2 to Qwen3
    _CASES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen3.5
    _CASES + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""Patterns that need no trial."""
