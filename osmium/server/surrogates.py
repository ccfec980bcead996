"""Half surrogate pairs in a JSON body, which is what remains of a character that was cut in two."""

import re

__all__ = ["replace_surrogates"]

_ESCAPES = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a pair
    rb"|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})"  # a half
    rb"|\\.",  # any other escape: \\ud800 is a backslash and a word
    re.DOTALL,
)

_ENCODED = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
"""A half as three bytes, which is not UTF-8."""


def replace_surrogates(body: bytes) -> bytes:
    """The body with U+FFFD for each half of a surrogate pair; all other bytes stay."""
    body = _ENCODED.sub("\ufffd".encode(), body)
    return _ESCAPES.sub(lambda match: rb"\ufffd" if match[1] else match[0], body)
