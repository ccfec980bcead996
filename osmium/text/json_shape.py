"""The size of JSON before it is decoded: the number of its values and their depth.

A decoder holds Python's global lock until it ends, and an empty list of three bytes takes 72 bytes
of memory.  So JSON from a client is measured first, in time linear in its bytes.
"""

from itertools import accumulate

from osmium.errors import RequestError

__all__ = ["MAX_DEPTH", "MAX_VALUES", "check_json_shape"]

MAX_VALUES = 1 << 17
"""Most values of a request's JSON: texts, numbers, lists, objects."""

MAX_DEPTH = 100
"""Most lists and objects inside each other."""

_OTHER = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def check_json_shape(
    text: bytes | bytearray,
    max_values: int = MAX_VALUES,
    max_depth: int = MAX_DEPTH,
    name: str = "The body",
    hint: str = "",
) -> int:
    """Check the shape of `text`, UTF-8, which need not be valid JSON; returns its values, at most.

    Raises: RequestError for more values, with `hint`, or a greater depth.
    """
    most = text.count(b",") + _openings(text) + 1
    if most <= min(max_values, max_depth):
        return most
    # An escaped quote does not end a text.
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    least = plain.count(b'"') // 4  # a value is at most one text, and has at most one key
    if least > max_values:
        raise _too_many(name, least, max_values, hint)
    outside = b"".join(plain.split(b'"')[::2])
    count = outside.count(b",") + _openings(outside) + 1
    if count > max_values:
        raise _too_many(name, count, max_values, hint)
    brackets = outside.translate(None, _OTHER)
    depth = max(accumulate(map(_STEP.__getitem__, brackets)), default=0)
    if depth > max_depth:
        raise RequestError(
            f"{name} has {depth} lists and objects inside each other; at most {max_depth} are "
            "read. Send flatter JSON.",
            code="json_too_deep",
        )
    return count


def _openings(text: bytes | bytearray) -> int:
    return text.count(b"[") + text.count(b"{")


def _too_many(name: str, count: int, limit: int, hint: str) -> RequestError:
    return RequestError(
        f"{name} has {count} or more JSON values; at most {limit} are read. Send fewer.{hint}",
        code="too_many_values",
    )
