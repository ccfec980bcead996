"""Rows of decode steps that have ended, and those of captured graphs, change no recurrent state."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.engine.decode_session import MAX_STEPS_IN_FLIGHT
from osmium.engine.request import Request, SamplingParams
from osmium.engine.runner import ModelRunner
from osmium.engine.scheduler import Batch
from osmium.models.state import DeltaState
from osmium.ops import Ops
from osmium.ops.reference import ReferenceOps
from tests.engine.fakes import GREEDY, EngineHarness, Gate
from tests.models.build import CASES
from tests.models.run import make_driver

SEQUENCES = 3


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def ops(request: pytest.FixtureRequest) -> Ops:
    made: Ops = ReferenceOps() if request.param == "cpu" else request.getfixturevalue("gpu")
    return made


@pytest.fixture
def runner(ops: Ops) -> ModelRunner:
    """A runner of a seeded model.  All bytes of its state are NaN, and it has no slot to spare."""
    kv_dtype = "f32" if isinstance(ops, ReferenceOps) else "bf16"
    driver = make_driver(CASES[0], ops=ops, kv_dtype=kv_dtype, sequences=SEQUENCES)
    pages = driver.tables.shape[1]
    return ModelRunner(ops, driver.model, driver.expert_runner, driver.state, SEQUENCES, pages, 1)


def slots(runner: ModelRunner) -> list[bytes]:
    """The bytes of each state slot, of all layers."""
    layers = [layer for layer in runner.state.layers if isinstance(layer, DeltaState)]
    arrays: list[npt.NDArray[Any]] = [
        runner.ops.copy_d2h(array) for layer in layers for array in (layer.conv, layer.delta)
    ]
    assert all(len(array) == SEQUENCES for array in arrays)
    return [b"".join(array[slot].tobytes() for array in arrays) for slot in range(SEQUENCES)]


def one_token(slot: int, count: int, **params: Any) -> Request:
    """A request with a prompt of one token and a response of `count`, in a page of its own."""
    settings = SamplingParams(temperature=0, ignore_eos=True, max_tokens=count, **params)
    request = Request([7 + slot], settings, lambda event: None, None, 0)
    request.state_slot, request.pages = slot, [slot]
    return request


def test_capturing_graphs_changes_no_state(runner: ModelRunner) -> None:
    before = slots(runner)
    runner.capture_graphs()
    assert slots(runner) == before


@pytest.mark.parametrize("params", [{}, {"presence_penalty": 0.5, "logprobs": 2}])
def test_a_row_that_has_ended_changes_no_state_in_later_steps(
    runner: ModelRunner, params: dict[str, Any]
) -> None:
    """The first row ends after two tokens, while steps of the other are in flight."""
    lengths = {0: 2, 2: 5}  # by slot
    session = runner.start_decode(
        Batch([(one_token(slot, count, **params), 1) for slot, count in lengths.items()])
    )
    after = [slots(runner)]
    steps = MAX_STEPS_IN_FLIGHT - 1
    for _ in range(steps):
        session.launch()
        after.append(slots(runner))
    tokens = np.array([session.wait_tokens() for _ in range(steps)])
    for slot in range(SEQUENCES):
        changes = [a[slot] != b[slot] for a, b in itertools.pairwise(after)]
        own = lengths.get(slot, 0)
        assert changes == [True] * own + [False] * (steps - own), f"slot {slot}"
    for row, count in enumerate(lengths.values()):
        assert (tokens[:count, row] >= 0).all() and (tokens[count:, row] == -2).all()


def test_the_slot_of_a_finished_request_keeps_the_state_of_its_last_token(
    harness_of: Callable[..., EngineHarness],
) -> None:
    gate = Gate()  # both requests are there before the first ends
    harness = harness_of(sequences=2, gate=gate)
    responses = [harness.submit([1, 2, 3], replace(GREEDY, max_tokens=count)) for count in (4, 9)]
    gate.open()
    assert [response.wait().completion_tokens for response in responses] == [4, 9]
    harness.engine.close()
    # the last token is sampled, and not computed
    assert sorted(tokens for tokens, _ in harness.model.slots) == [3 + 4 - 1, 3 + 9 - 1]
