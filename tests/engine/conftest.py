"""Engines that are closed at the end of a test, and must then hold nothing."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.engine.fakes import Bench


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    """Makes a Bench of the given options."""
    made: list[Bench] = []

    def make(*args: Any, **options: Any) -> Bench:
        made.append(Bench(*args, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
