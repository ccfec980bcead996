"""One JSON value from a model's text, repaired and returned while it streams.

A model's JSON may be cut off, use Python's literals or have unescaped quotes.  What is returned
concatenates to valid JSON in every case, and to the same value for text that is valid.
"""

import json
import re

__all__ = ["JsonRepair", "is_number", "shortened_number"]

MAX_DEPTH = 100
"""Lists and objects inside each other; a deeper value becomes null."""

MAX_TOKEN = 300
"""Characters of a number or bare word.  Python reads no integer of more than 4,300 digits."""

MAX_SPACE = 64
"""White space after a quote within which the next character is looked for."""

_SPACE = " \t\r\n"
_NO_DIGIT = re.compile(r"[^0-9]")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_DECIMALS = re.compile(r"-?(?:0|[1-9][0-9]*)\.[0-9]+")
_WORDS = {
    "true": "true", "false": "false", "null": "null", "none": "null", "undefined": "null",
    "nan": "null", "infinity": "null", "-infinity": "null",
}  # fmt: skip
_WORD_END = re.compile(r"""[,:\[\]{}"'\s<]""")
_SPECIAL = {quote: re.compile(rf"[{quote}\\\x00-\x1f\"<]") for quote in "\"'"}
_NO_SPACE = re.compile(r"[^ \t\r\n]")
_HIGH = re.compile("[dD][89abAB][0-9a-fA-F]{2}")
_LOW_EXAMPLE = r"\udc00"
_LOW = re.compile(r"\\u[dD][c-fC-F][0-9a-fA-F]{2}")
"""The halves of a surrogate pair, as JSON escapes them."""


def is_number(text: str) -> bool:
    """Whether `text` is a number as JSON writes it."""
    return len(text) <= MAX_TOKEN and _NUMBER.fullmatch(text) is not None


def shortened_number(text: str) -> str:
    """`text`; of a number with more than MAX_TOKEN characters, without its last decimals."""
    start = text[:MAX_TOKEN]
    is_long = len(text) > MAX_TOKEN and _DECIMALS.fullmatch(start) and _NUMBER.fullmatch(text)
    return start if is_long and "e" not in text.lower() else text


class JsonRepair:
    """Reads one value.

    `parse` consumes the text of a buffer as far as it is certain; `close` completes a value whose
    end is missing.
    """

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        """`stops` are tags that end the value where no string is open, as "</tool_call>"."""
        self.done = False
        self._stops = stops
        self._state = "value"  # value, key, colon, next, string
        self._open: list[str] = []
        """Closing brackets of the open lists and objects."""
        self._lead = ""
        """Comma and key, returned with the value that follows them."""
        self._key: list[str] | None = None
        """Pieces of the key that is being read."""
        self._quote = ""
        self._muted: int | None = None
        """Depth of the list or object that is too deep, and is left out."""
        self._skips_decimals = False
        """Whether more decimals of a number follow than a number has."""
        self._out: list[str] = []

    def parse(self, text: str, at: int, final: bool) -> tuple[str, int]:
        """Read `text` from `at`; returns the valid JSON of it, and where the uncertain rest starts.

        `final` says that no text follows.  After the value, `done` is set.
        """
        while not self.done:
            step = self._string if self._state == "string" else self._outside
            after = step(text, at, final)
            if after is None:
                break
            at = after
        return self._taken(), at

    def close(self) -> str:
        """The rest of the value, if its text has ended."""
        if not self.done:
            if self._state == "string":
                self._end_string()
            elif self._state == "value" and self._lead.endswith(": "):
                self._lead = ""  # a key without its value
            while self._open:
                self._pop()
            self.done = True
        return self._taken()

    @property
    def in_string(self) -> bool:
        """Whether a string is open."""
        return self._state == "string"

    def _taken(self) -> str:
        out, self._out = "".join(self._out), []
        return out

    def _emit(self, text: str) -> None:
        if self._key is not None:
            self._key.append(text)
        elif self._muted is None:
            self._out.append(text)

    # -- outside of strings ------------------------------------------------------------------------

    def _outside(self, text: str, at: int, final: bool) -> int | None:
        """One step; the new position, or None if more text is needed."""
        if self._skips_decimals:
            found = _NO_DIGIT.search(text, at)
            if found is None:
                return len(text) if at < len(text) else None
            self._skips_decimals, at = False, found.start()
        found = _NO_SPACE.search(text, at)
        if found is None:
            return None
        at = found.start()
        char = text[at]
        if char == "<" and self._stops:
            stop = _stop_at(text, at, self._stops, final)
            if stop is None:
                return None
            if stop:
                self._out = [self.close()]
                return at
            return at + 1
        if char in "\"'":
            return self._open_string(char, at)
        if char in "]}":
            return self._close_bracket(char, at)
        if char in "[{" and self._state != "colon":
            self._separate()
            if self._state == "key":
                return at + 1  # a doubled bracket
            return self._open_bracket(char, at)
        if char in ",:=" or (self._state == "colon" and char in "[{"):
            return self._separator(char, at)
        return self._word(text, at, final)

    def _open_bracket(self, char: str, at: int) -> int:
        if self._muted is None and len(self._open) >= MAX_DEPTH:
            self._value("null")
            self._muted = len(self._open)
        elif self._muted is None:
            self._value(char)
        self._open.append("}" if char == "{" else "]")
        self._state, self._lead = ("key" if char == "{" else "value"), ""
        return at + 1

    def _close_bracket(self, char: str, at: int) -> int:
        if char not in self._open:
            return at + 1
        if self._state == "colon" or (self._state == "value" and self._lead.endswith(": ")):
            self._value("null")
        while self._pop() != char:
            pass
        return at + 1

    def _pop(self) -> str:
        """Close the innermost list or object."""
        bracket = self._open.pop()
        if self._muted == len(self._open):
            self._muted = None
        elif self._muted is None:
            self._out.append(bracket)
        self._after_value()
        return bracket

    def _separator(self, char: str, at: int) -> int:
        if self._state == "colon":
            if char == ",":
                self._value("null")
                self._after_value()
                self._begin_item()
            else:
                self._state = "value"
            return at if char in "[{" else at + 1
        if char == "," and self._state == "value" and self._lead.endswith(": "):
            self._value("null")
            self._after_value()
        if char == "," and self._state == "next":
            self._begin_item()
        return at + 1

    def _word(self, text: str, at: int, final: bool) -> int | None:
        end = _WORD_END.search(text, at + 1, at + MAX_TOKEN)
        stop = end.start() if end else min(len(text), at + MAX_TOKEN)
        if end is None and stop == len(text) and stop - at < MAX_TOKEN and not final:
            return None
        self._separate()
        word = text[at:stop]
        if self._state == "colon":  # its colon is missing
            self._state = "value"
        if self._state == "key":
            self._end_key(word)
            return stop
        self._skips_decimals = (
            end is None and len(word) == MAX_TOKEN and bool(_DECIMALS.fullmatch(word))
        )
        known = _WORDS.get(word.lower())
        if known is None and is_number(word):
            known = word
        if end is None and final and known is None:
            return stop  # cut off: it may be the beginning of anything
        self._value(known or json.dumps(word, ensure_ascii=False))
        self._after_value()
        return stop

    def _separate(self) -> None:
        """Go on after a missing comma."""
        if self._state == "next":
            self._begin_item()

    def _begin_item(self) -> None:
        self._lead = ", "
        self._state = "key" if self._open[-1] == "}" else "value"

    def _value(self, text: str) -> None:
        if self._muted is None:
            self._out.append(self._lead + text)
        self._lead = ""

    def _after_value(self) -> None:
        self._lead = ""
        if self._open:
            self._state = "next"
        else:
            self.done = True

    # -- strings -----------------------------------------------------------------------------------

    def _open_string(self, quote: str, at: int) -> int:
        self._separate()
        if self._state == "colon":
            self._state = "value"
        self._quote = quote
        if self._state == "key":
            self._key = []
        else:
            self._value('"')
        self._state = "string"
        return at + 1

    def _string(self, text: str, at: int, final: bool) -> int | None:
        """One step inside a string; the new position, or None if more text is needed."""
        found = _SPECIAL[self._quote].search(text, at)
        if found is None:
            self._emit(text[at:])
            return len(text) if at < len(text) else None
        if found.start() > at:
            self._emit(text[at : found.start()])
            return found.start()  # so that a step emits once
        char = text[at]
        if char == "\\":
            return self._escape(text, at, final)
        if char == self._quote:
            return self._end_quote(text, at, final)
        if char == '"':
            self._emit('\\"')
        elif char == "<":
            stop = self._stop_in_string(text, at, final) if self._stops else False
            if stop is None:
                return None
            if stop:
                self._end_string()
                return at
            self._emit(char)
        else:
            self._emit(json.dumps(char)[1:-1])
        return at + 1

    def _escape(self, text: str, at: int, final: bool) -> int | None:
        if at + 1 == len(text):
            return at + 1 if final else None
        char = text[at + 1]
        if char == "u":
            digits = text[at + 2 : at + 6]
            if all(c in "0123456789abcdefABCDEF" for c in digits):
                return self._code(text, at, digits, final)
        elif char in '"\\/bfnrt':
            self._emit(text[at : at + 2])
            return at + 2
        elif char == "'":
            self._emit("'")
            return at + 2
        self._emit("\\\\")
        return at + 1

    def _code(self, text: str, at: int, digits: str, final: bool) -> int | None:
        """At \\uXXXX; half a surrogate pair, which is not Unicode, becomes U+FFFD."""
        if len(digits) < 4:
            return len(text) if final else None
        after = at + 6
        if _HIGH.fullmatch(digits):
            rest = text[after : after + 6]
            if _LOW.fullmatch(rest):
                after += 6
            elif not final and _LOW.fullmatch(rest + _LOW_EXAMPLE[len(rest) :]):
                return None
        whole = after > at + 6 or digits[0] not in "dD" or digits[1] in "01234567"
        self._emit(text[at:after] if whole else r"\ufffd")
        return after

    def _end_quote(self, text: str, at: int, final: bool) -> int | None:
        """Whether a quote ends the string: a comma, colon or bracket follows."""
        found = _NO_SPACE.search(text, at + 1, at + 1 + MAX_SPACE)
        if found is None and len(text) <= at + MAX_SPACE and not final:
            return None
        ends = found is None or text[found.start()] in ",:}]"
        if not ends and found is not None:
            char, line_ends = text[found.start()], "\n" in text[at : found.start()]
            ends = line_ends and char in "\"'"  # a missing comma
            if char == "<" and self._stops:
                stop = _stop_at(text, found.start(), self._stops, final)
                if stop is None:
                    return None
                ends = stop
        if ends:
            self._end_string()
        else:
            self._emit('\\"' if self._quote == '"' else "'")
        return at + 1

    def _end_string(self) -> None:
        if self._key is not None:
            key, self._key = "".join(self._key), None
            self._lead += f'"{key}": '
            self._state = "colon"
            return
        self._emit('"')
        self._after_value()

    def _end_key(self, word: str) -> None:
        self._lead += json.dumps(word, ensure_ascii=False) + ": "
        self._state = "colon"

    def _stop_in_string(self, text: str, at: int, final: bool) -> bool | None:
        """Whether a string that has no end stops at a tag: the text ends, or another call follows.

        None if that is not certain yet.
        """
        if not _stop_at(text, at, self._stops, final):
            return _stop_at(text, at, self._stops, final)
        after = next(at + len(stop) for stop in self._stops if text.startswith(stop, at))
        found = _NO_SPACE.search(text, after, after + MAX_SPACE)
        if found is None:
            if len(text) >= after + MAX_SPACE:
                return False
            return True if final else None
        if "\n" not in text[after : found.start()]:
            return False  # a string has no line ends, so it mentions both tags
        return _stop_at(text, found.start(), ("<tool_call>",), final)


def _stop_at(text: str, at: int, stops: tuple[str, ...], final: bool) -> bool | None:
    """Whether one of `stops` is at `at`; None if a longer text decides."""
    if any(text.startswith(stop, at) for stop in stops):
        return True
    rest = text[at : at + max(map(len, stops))]
    if not final and any(stop.startswith(rest) for stop in stops):
        return None
    return False
