"""Values in messages: shortened, whatever they are."""

from typing import Any

import pytest

from osmium.errors import SHOWN_CHARS, shown


def test_a_value_in_a_message_is_short() -> None:
    values: list[Any] = [
        "x" * 10**6, [["x" * 99] * 99] * 99, {i: {i: [i] * 50} for i in range(50)}, 10**5000,
        -(10**400), b"\0" * 10**5, [10**5000], {10**5000: 1}, object(),
    ]  # fmt: skip
    for value in values:
        assert 0 < len(shown(value)) <= SHOWN_CHARS


@pytest.mark.parametrize("value", ["text", 5, -1.5, None, True, [1, "a"], {"a": [1]}, 2**100])
def test_a_short_value_is_shown_as_it_is(value: Any) -> None:
    assert shown(value) == repr(value)
