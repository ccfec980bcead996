"""The grammar compiler of an engine is made once, in the background."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest

from osmium.engine.engine import Engine
from osmium.errors import RequestError
from osmium.server import compilers
from osmium.server.compilers import grammar_compiler, warm_up
from osmium.server.loading import BackgroundLoader
from tests.server.scripted import PATIENCE_S, TOKENIZER


class Double:
    """What the module reads of an engine."""

    def __init__(self, eos: tuple[int, ...] = (1,), tokenizer: Any = TOKENIZER) -> None:
        self.name, self.tokenizer, self.stopped = "double", tokenizer, None
        self.config = SimpleNamespace(vocab_size=TOKENIZER.vocab_size, eos_token_ids=eos)


def double(**fields: Any) -> Engine:
    return cast(Engine, Double(**fields))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The compilers that are made, which takes a while."""
    found: list[object] = []

    class Slow:
        def __init__(self, *args: Any) -> None:
            time.sleep(0.2)
            found.append(self)

    monkeypatch.setattr(compilers, "GrammarCompiler", Slow)
    return found


def test_requests_at_once_share_one_compiler(made: list[object]) -> None:
    engine = double()
    with ThreadPoolExecutor(4) as pool:
        got = set(pool.map(lambda _: grammar_compiler(engine, "x"), range(4)))
    assert len(made) == 1 and got == set(made)


def test_a_loaded_model_is_ready_before_its_compiler_and_requests_wait_for_that_one(
    made: list[object],
) -> None:
    engine, done = double(), threading.Event()
    loader = BackgroundLoader(lambda progress: engine)
    loader.on_done = done.set
    loader.start()
    assert done.wait(PATIENCE_S) and loader.ready() is engine and not made
    time.sleep(0.05)
    assert grammar_compiler(engine, "x") is made[0] and len(made) == 1


@pytest.mark.parametrize("fields", [{"eos": ()}, {"tokenizer": None}])
def test_a_model_without_a_tokenizer_or_an_end_has_none(
    made: list[object], fields: dict[str, Any]
) -> None:
    engine = double(**fields)
    warm_up(engine)
    assert not made
    with pytest.raises(RequestError) as raised:
        grammar_compiler(engine, "guided_regex")
    assert raised.value.param == "guided_regex"


def test_a_failed_warm_up_is_logged_and_loading_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise ValueError("no such vocabulary")

    monkeypatch.setattr(compilers, "GrammarCompiler", fail)
    warm_up(double())
    assert "no such vocabulary" in caplog.text
