"""Half surrogate pairs in a JSON body, which is what remains of a character that was cut in two."""

import re

__all__ = ["replace_surrogates"]

_ESCAPES = re.compile(
    rb"(?<!\\)(?:\\\\)*+"  # an even number of backslashes is text
    rb"(?:\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a pair
    rb"|(\\u[dD][89a-fA-F][0-9a-fA-F]{2}))"  # a half
)

_ENCODED = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
"""A half as three bytes, which is not UTF-8."""


def replace_surrogates(body: bytes | bytearray) -> bytes | bytearray:
    """The body with U+FFFD for each half of a surrogate pair; all other bytes stay."""
    if b"\xed" in body:
        body = _ENCODED.sub("\ufffd".encode(), body)
    if rb"\ud" in body or rb"\uD" in body:
        body = _ESCAPES.sub(_replacement, body)
    return body


def _replacement(match: re.Match[bytes]) -> bytes:
    return match[0][: len(match[0]) - len(match[1])] + rb"\ufffd" if match[1] else match[0]
