"""A model's recommended sampling parameters, from generation_config.json."""

from collections.abc import Mapping
from typing import Any

__all__ = ["sampling_defaults"]

_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(generation: Mapping[str, Any] | None) -> dict[str, Any]:
    """Sampling parameters by name; do_sample false is temperature 0.  Empty without the file."""
    generation = generation or {}
    if generation.get("do_sample") is False:
        return {"temperature": 0.0}
    return {
        name: generation[name]
        for name in _FIELDS
        if isinstance(generation.get(name), int | float)
        and not isinstance(generation.get(name), bool)
    }
