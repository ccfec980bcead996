"""Sequences without a state slot: no state changes, and other sequences keep their bits."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.kernels.ptx import kernel
from osmium.ops import Ops
from osmium.ops.gpu import GpuOps
from osmium.ops.reference import ReferenceOps
from tests.ops.cases import CASES, TINY, Arrays, Case, run
from tests.ptx.interpreter import InterpretedRuntime, PtxFault, parse_program

LENGTHS, PAST = (2, 18, 1), (5, 6, 60)
"""Rows and context of the sequences of a step with several rows per sequence."""

ENDED = 1
"""The sequence that has no state slot."""

STEPS: dict[str, tuple[str, tuple[int, int], tuple[int, ...]]] = {
    "convolution": ("causal_conv1d", (32, 32), LENGTHS),
    "token by token": ("delta_rule_recurrent", (32, 64), LENGTHS),
    "chunks of 16": ("delta_rule_chunk", (64, 32), LENGTHS),
    "chunks of 64": ("delta_rule_chunk", (128, 128), LENGTHS),
    "one kernel": ("delta_net", (64, 96), (1, 1, 1)),
    "one kernel, digits": ("delta_net", (128, 128), (1, 1, 1)),
    "a step of several kernels": ("delta_net", (32, 32), LENGTHS),
}
"""Operation, head sizes and rows of each sequence."""


def made(name: str, seed: int, ended: tuple[int, ...]) -> Case:
    """A case in which the sequences `ended` have no slot."""
    operation, (key_dim, value_dim), lengths = STEPS[name]
    size = replace(
        TINY, key_heads=1, value_heads=1, key_dim=key_dim, value_dim=value_dim, lengths=lengths,
        past=PAST,
    )  # fmt: skip
    case = CASES[operation](np.random.default_rng(seed), size)
    case.arrays["slots"][list(ended)] = -1
    return case


def rows_of(arrays: Arrays, sequence: int) -> slice:
    return slice(*arrays["starts"][sequence : sequence + 2])


@pytest.fixture(params=["reference", "kernels"])
def ops_of(request: pytest.FixtureRequest) -> Callable[[int], Ops]:
    """Make the operations, by seed."""
    if request.param == "reference":
        return lambda seed: ReferenceOps(cache_bytes=0)
    return lambda seed: GpuOps(InterpretedRuntime(seed))


@pytest.mark.parametrize("name", STEPS)
def test_a_sequence_without_a_slot_leaves_states_and_other_sequences_as_they_are(
    ops_of: Callable[[int], Ops], rng: np.random.Generator, name: str
) -> None:
    seed = int(rng.integers(1 << 32))
    before, wanted = made(name, seed, ()).arrays, run(made(name, seed, ()), ops_of(seed))
    found = run(made(name, seed, (ENDED,)), ops_of(seed))
    slots = before["slots"]
    for state in {"state", "inputs"} & wanted.keys():
        assert found[state][slots[ENDED]].tobytes() == before[state][slots[ENDED]].tobytes()
        for other in {0, 1, 2} - {ENDED}:
            assert found[state][slots[other]].tobytes() == wanted[state][slots[other]].tobytes()
            assert found[state][slots[other]].tobytes() != before[state][slots[other]].tobytes()
    for output in {"out", "x"} & wanted.keys():
        for other in {0, 1, 2} - {ENDED}:
            rows = rows_of(before, other)
            assert found[output][rows].tobytes() == wanted[output][rows].tobytes()
        rows = rows_of(before, ENDED)
        np.testing.assert_array_equal(found[output][rows], ended_rows(name, seed, ops_of(seed)))


def ended_rows(name: str, seed: int, ops: Ops) -> npt.NDArray[Any]:
    """What the rows of the sequence without a slot become."""
    case = made(name, seed, ())
    rows = rows_of(case.arrays, ENDED)
    if "x" in case.arrays:
        return case.arrays["x"][rows]  # nothing is added
    if name != "convolution":
        return np.zeros_like(case.arrays["out"][rows])
    case.arrays["past"][ENDED] = 0  # a new sequence starts from zeros
    return run(case, ops)["out"][rows]


class Spaced(GpuOps):
    """Launches a kernel before each delta net, as its input is two launches old in a model."""

    def delta_net(self, x: Any, *arguments: Any) -> None:
        between = self.to_device(np.zeros((1, 8), np.float32))
        self.add(between, between)
        super().delta_net(x, *arguments)


@pytest.mark.parametrize("ended", [(0, 1, 2), (1,)])
def test_blocks_without_a_state_wait_for_the_previous_kernel(
    rng: np.random.Generator, ended: tuple[int, ...]
) -> None:
    """Otherwise the next kernel might run before the one before theirs has ended."""
    name, seed = "delta_net_decode_f32", int(rng.integers(1 << 32))
    waits, text = "griddepcontrol.wait;", kernel(name).contract.pdl_text
    run(made("one kernel", seed, ended), Spaced(InterpretedRuntime(seed, pdl=True)))
    assert len(re.findall(waits, text)) == 2
    first = text.index(waits) + len(waits)
    machine = InterpretedRuntime(seed, pdl=True)
    machine.stream.programs[name] = parse_program(text[:first] + text[first:].replace(waits, ""))
    with pytest.raises(PtxFault, match="waited"):
        run(made("one kernel", seed, ended), Spaced(machine))
