"""Values of a JSON object from a file that may hold anything: type, limits, default.

A config.json can come from anywhere, so each value is checked before it is used: a wrong type, a
number that is not finite or a size beyond any model is an error that names key, value and rule.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from osmium.errors import CheckpointError, shown

__all__ = ["MAX_POSITIONS", "MAX_SIZE", "REQUIRED", "Section"]

MAX_SIZE = 1 << 17
"""Largest size of an axis, but for the vocabulary."""

MAX_POSITIONS = 1 << 24
"""Most positions and most token ids: f32 has every integer up to here."""

REQUIRED: Any = object()
"""As a default: the key must be there."""


class Section:
    """An object of a config.json; errors name it, the key and the value."""

    def __init__(self, values: Mapping[str, Any], name: str = "config.json") -> None:
        self.values, self.name = values, name

    @classmethod
    def of(cls, values: Any, name: str) -> "Section":
        """A section of `values`, which is empty for None.  Raises: CheckpointError."""
        if not isinstance(values, Mapping | None):
            raise CheckpointError(
                f"{name} is {shown(values)} in config.json; it must be an object."
            )
        return cls(values or {}, name)

    def integer(self, key: str, default: int, *, least: int = 1, most: int = MAX_SIZE) -> int:
        """An integer from `least` to `most`.  Raises: CheckpointError."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self.refuse(key, f"an integer from {least} to {most}")
        return value

    def number(
        self, key: str, default: float = REQUIRED, *, least: float = 0.0, most: float
    ) -> float:
        """A finite number from `least` to `most`; a `least` of 0 is excluded.

        Raises: CheckpointError.
        """
        value = self._value(key, default)
        fits = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and (least <= value <= most)  # false for NaN; an integer is compared exactly
            and value > 0
        )
        if not fits:
            above = f"from {least:g}" if least else "above 0"
            self.refuse(key, f"a number {above} {'to' if least else 'and up to'} {most:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """true or false; null is the default.  Raises: CheckpointError."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def refuse(self, key: str, rule: str) -> NoReturn:
        """Raises: CheckpointError."""
        raise CheckpointError(
            f"{key} is {shown(self.values.get(key))} in {self.name}; it must be {rule}."
        )

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is REQUIRED:
            raise CheckpointError(f"{self.name} has no {key}; it must be given.")
        return value
