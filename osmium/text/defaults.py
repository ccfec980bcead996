"""A model's recommended sampling parameters, from generation_config.json."""

import math
from collections.abc import Mapping
from typing import Any

from osmium.errors import shown

__all__ = ["sampling_defaults"]

_RANGES = {
    "temperature": (0.0, 100.0), "top_p": (0.0, 1.0), "top_k": (-1, 1 << 31), "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}  # fmt: skip
"""The values that a request may have, both ends included; of top_p without 0."""


def sampling_defaults(generation: Mapping[str, Any] | None) -> tuple[dict[str, Any], list[str]]:
    """Sampling parameters by name; do_sample false is temperature 0.  Empty without the file.

    Also returns a note for each value that is repaired or ignored.  A request gets none of them, so
    that a file's mistake is not reported as the request's.
    """
    generation = generation or {}
    defaults: dict[str, Any] = {}
    notes: list[str] = []
    do_sample = generation.get("do_sample")
    if do_sample is False:
        return {"temperature": 0.0}, []
    if do_sample is not None and do_sample is not True:
        notes.append(f"do_sample {shown(do_sample)} is ignored (it must be true or false)")
    for name, (low, high) in _RANGES.items():
        given = generation.get(name)
        if given is None:
            continue
        value = _number(given)
        if value is not None and isinstance(low, int):
            value = int(value) if value == int(value) else None
        if value is None or not low <= value <= high or (name == "top_p" and value == 0):
            rule = (
                f"an integer of at least {low}" if isinstance(low, int) else f"{low:g} to {high:g}"
            )
            rule = "above 0, at most 1" if name == "top_p" else rule
            notes.append(f"{name} {shown(given)} is ignored (it must be {rule})")
            continue
        if isinstance(given, str) or type(given) is not type(value):
            notes.append(f"{name} {shown(given)} is read as {value}")
        defaults[name] = value
    return defaults, notes


def _number(given: Any) -> int | float | None:
    """A finite number, also from a text; None for anything else."""
    if isinstance(given, str):
        try:
            given = float(given) if len(given) <= 40 else None
        except ValueError:
            return None
    if not isinstance(given, int | float) or isinstance(given, bool):
        return None
    if isinstance(given, int):
        return given if given.bit_length() <= 64 else None
    return given if math.isfinite(given) else None
