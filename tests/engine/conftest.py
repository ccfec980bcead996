"""Engines that are closed at the end of a test, and must then hold nothing."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.engine.fakes import Bench


@pytest.fixture(params=[0, 1, 3], ids=lambda ahead: f"{ahead} ahead")
def bench(request: pytest.FixtureRequest) -> Iterator[Callable[..., Bench]]:
    """Makes a Bench of the given options, whose runner launches 0, 1 or 3 steps ahead."""
    made: list[Bench] = []

    def make(*args: Any, **options: Any) -> Bench:
        made.append(Bench(*args, **{"ahead": request.param, **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()
