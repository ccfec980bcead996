"""Engines that are closed at the end of a test, and must then hold nothing; a packed model."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from osmium.config import EngineConfig
from osmium.weights import PackedModel, open_model
from tests.engine.fakes import Bench
from tests.models.build import CASES, write_checkpoint

CASE = CASES[3]
"""Six layers of sixteen experts."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """A packed file of CASE."""
    folder = tmp_path_factory.mktemp("packed")
    write_checkpoint(CASE, folder / "model")
    return open_model(folder / "model", EngineConfig(cache_dir=str(folder), gpu_expert_bits=16))


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
