"""Flag values: text to a value, or a one-line error with the value and the rule.

Each function returns a parser for argparse's `type`.  A parser raises ArgumentTypeError with the
rest of a sentence that begins with the flag: "is 'x'; it must be ...".
"""

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any

from osmium.config import parse_count
from osmium.errors import ConfigError

__all__ = [
    "choice", "depths", "integer", "integers", "number", "parsed", "token_counts", "turns",
]  # fmt: skip


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """An integer from `low` to `high`, both included."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise _wrong(text, "an integer " + _span(low, high))
        return value

    return convert


def number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """A number from `low` to `high`; with `above`, without `low` itself."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):
            rule = f"above {low:g} and at most {high:g}" if above else _span(low, high)
            raise _wrong(text, "a number " + rule)
        return value

    return convert


def integers(low: int) -> Callable[[str], tuple[int, ...]]:
    """ "1,4" as (1, 4)."""

    def convert(text: str) -> tuple[int, ...]:
        try:
            values = tuple(int(part) for part in text.split(","))
        except ValueError:
            values = (low - 1,)
        if min(values) < low:
            raise _wrong(text, f"integers of at least {low}, as in {low} or 512,4096")
        return values

    return convert


def choice(*known: str, otherwise: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """One of `known` words.  `otherwise` has the advice for values that are not supported."""

    def convert(text: str) -> str:
        if text in known:
            return text
        advice = (otherwise or {}).get(text.lower())
        if advice is not None:
            raise argparse.ArgumentTypeError(f"{text} {advice}")
        raise _wrong(text, f"one of {', '.join(known)}")

    return convert


def depths(text: str) -> str:
    """Context lengths of a benchmark: "1k,16k", "4096" or "90%"; returned as written."""
    for depth in text.lower().split(","):
        digits = depth[:-1] if depth.endswith(("k", "%")) else depth
        try:
            value = float(digits)
        except ValueError:
            value = -1.0
        if not math.isfinite(value) or value <= 0 or (depth.endswith("%") and value > 100):
            raise _wrong(text, "one or more lengths such as 1k, 4096 or 90%, separated by commas")
    return text


def token_counts(text: str) -> tuple[int, ...]:
    """ "1k,4096" as (1024, 4096); "0" as ()."""
    if text.strip() == "0":
        return ()
    try:
        return tuple(_token_count(part) for part in text.split(","))
    except ConfigError:
        raise _wrong(text, "numbers of tokens, as in 1k or 512,4k; 0 for none") from None


def turns(text: str) -> tuple[tuple[int, int], ...]:
    """ "32k+16,1k+256" as ((32768, 16), (1024, 256)); "0" as ()."""
    if text.strip() == "0":
        return ()
    pairs = [part.split("+") for part in text.split(",")]
    try:
        return tuple((_token_count(cached), _token_count(new)) for cached, new in pairs)
    except (ConfigError, ValueError):
        rule = "tokens in the state + new tokens, as in 32k+256 or 8k+64,32k+2k; 0 for none"
        raise _wrong(text, rule) from None


def _token_count(text: str) -> int:
    """ "1k" as 1024.  Raises: ConfigError for anything that is less than a token."""
    count = parse_count(text)
    if count < 1:
        raise ConfigError(f"{text} is less than a token.")
    return count


def parsed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser of osmium/config.py whose ConfigError becomes argparse's error."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(f"cannot be read: {error}") from None

    return convert


def _span(low: float, high: float | None) -> str:
    return f"of at least {low:g}" if high is None else f"from {low:g} to {high:g}"


def _wrong(text: str, rule: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"is {text!r}; it must be {rule}.")
