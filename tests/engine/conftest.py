"""Fixtures: engine harnesses, closed and checked for leaks after a test, and a packed model."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from osmium.config import EngineConfig
from osmium.weights import PackedModel, open_model
from tests.engine.fakes import EngineHarness
from tests.models.build import CASES, write_checkpoint

CASE = CASES[3]
"""Six layers, sixteen experts."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """The packed file of CASE."""
    folder = tmp_path_factory.mktemp("packed")
    write_checkpoint(CASE, folder / "model")
    return open_model(folder / "model", EngineConfig(cache_dir=str(folder), gpu_expert_bits=16))


@pytest.fixture(params=[0, 1, 3], ids=lambda steps: f"lookahead {steps}")
def harness_of(request: pytest.FixtureRequest) -> Iterator[Callable[..., EngineHarness]]:
    """Make an EngineHarness whose runner launches 0, 1 or 3 steps ahead."""
    harnesses: list[EngineHarness] = []

    def make(*args: Any, **options: Any) -> EngineHarness:
        harnesses.append(EngineHarness(*args, **{"lookahead": request.param, **options}))
        return harnesses[-1]

    yield make
    for harness in harnesses:
        harness.close()
