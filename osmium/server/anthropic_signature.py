"""The signature of a thinking block, which clients return unread.

Where a client asks for blocks without their text, the signature has it, so that the next request
still contains the model's reasoning.
"""

import base64
import binascii

__all__ = ["signature", "signed_thinking"]

_PREFIX = "osmium:"


def signature(thinking: str = "") -> str:
    """The signature of a block; it has `thinking`, the text that the block leaves out."""
    return _PREFIX + base64.b64encode(thinking.encode(errors="replace")).decode()


def signed_thinking(value: str | None) -> str:
    """The text that a signature has; empty without one, and for other servers' signatures."""
    if value is None or not value.startswith(_PREFIX):
        return ""
    try:
        return base64.b64decode(value.removeprefix(_PREFIX), validate=True).decode()
    except (binascii.Error, ValueError):
        return ""
