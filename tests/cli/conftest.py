"""Fixtures for the command line tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import osmium
from osmium.engine.engine import Engine
from osmium.weights import DEMO


@pytest.fixture(scope="module")
def demo() -> Iterator[Engine]:
    """The bundled model on the CPU."""
    if not DEMO.is_file():
        pytest.skip("the demo model is not here")
    engine = osmium.load("demo", device="cpu", context=256, prefill_chunk=32)
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tests away from the user's own cache and history."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
