"""A kernel's contract: parsing, refusals, and packing of launch arguments."""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from osmium.errors import KernelError
from osmium.kernels.expression import Expression
from osmium.kernels.ptx import Kernel, check, kernel, parse
from tests.ptx.interpreter import InterpretedRuntime
from tests.ptx.kernels import NAMES

HEADER = """// out = x * scale, for the tests.
//: entry   scale
//: grid    ceil(n / 64), rows
//: block   64
//: dynamic n * 4
//: regs    16                        and words for people
//: target  sm_80 sm_90
//: param   out    u64  out f32[rows, n]    align 16
//: param   flag   u32  anything
//: param   x      u64  in  f32[rows, n]    align 8
//: param   scale  f32
//: param   n      u32  values a row        n % 4 == 0
//: traffic rows * n * 8                    in and out
//: determinism fixed
"""

BODY = """.version 7.8
.target sm_80
.address_size 64
.visible .entry scale(
    .param .u64 out, .param .u32 flag, .param .u64 x, .param .f32 scale, .param .u32 n)
.maxntid 64
{
    ret;
}
"""


@dataclass
class Array:
    """The attributes that a launch reads."""

    ptr: int
    shape: tuple[int, ...]
    dtype: Any
    nbytes: int


class Stream:
    """Records launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []

    def launch(self, kernel: Kernel, grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        self.launches.append((grid, values))


def floats(ptr: int, *shape: int) -> Array:
    return Array(ptr, shape, np.float32, 4 * int(np.prod(shape)))


def make_kernel(header: str = HEADER, body: str = BODY) -> Kernel:
    contract = parse(header + body, "scale.ptx")
    return Kernel(contract.entry, lambda: contract)


def test_every_key_of_a_contract_is_read() -> None:
    c = make_kernel().contract
    assert (c.entry, c.block, c.regs, c.determinism) == ("scale", 64, 16, "fixed")
    assert c.targets == ("sm_80", "sm_90") and c.sizes == ("rows",)
    assert [p.name for p in c.params] == ["out", "flag", "x", "scale", "n"]
    assert (c.params[0].direction, c.params[0].dtype, c.params[0].align) == ("out", "f32", 16)
    assert c.params[0].shape == ("rows", "n")
    assert c.dynamic is not None and c.dynamic({"n": 12}) == 48


def test_the_grid_comes_first_from_sizes_then_from_parameters() -> None:
    stream = Stream()
    out, x = floats(64, 3, 100), floats(512, 3, 100)
    make_kernel()(stream, 3, out, 0, x, 2.0, 100)
    assert stream.launches == [((2, 3), (out, 0, x, 2.0, 100))]


def test_parameters_are_packed_as_the_abi_lays_them_out() -> None:
    one = make_kernel()
    values = (floats(0x1122334455667788, 1, 4), 7, floats(0x99, 1, 4), 2.5, 4)
    raw = bytes(one.pack(values))
    assert one.contract.offsets == (0, 8, 16, 24, 28)
    assert raw == struct.pack("<QIxxxxQfI", 0x1122334455667788, 7, 0x99, 2.5, 4)
    assert one.pack(values) is one.pack(values), "one buffer, reused"


def test_traffic_is_the_contracts_formula() -> None:
    assert make_kernel().bytes_moved((3, None, 0, None, 1.0, 100)) == 3 * 100 * 8


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("//: block   64", "//: block   32", "maxntid"),
        ("//: entry   scale", "//: entry   other", "other"),
        ("//: param   flag   u32  anything\n", "", "flag"),
        ("//: param   scale  f32", "//: param   scale  u32", "scale"),
        ("//: param   scale  f32", "//: param   scale  f16", "f16"),
        ("//: param   x      u64  in  f32[", "//: param   x      u64  in  f99[", "f99"),
        ("//: grid    ceil(n / 64), rows", "//: grid    open('x')", "open"),
        ("//: grid    ceil(n / 64), rows", "//: grid    n.real", "n.real"),
        ("//: grid    ceil(n / 64), rows", "//: grid    n +", "n +"),
        ("//: block   64", "//: block   many", "many"),
        ("//: determinism fixed", "//: wishes  none", "wishes"),
        ("//: block   64\n", "", "block"),
        (
            "//: determinism fixed\n",
            "//: determinism fixed\n//: determinism atomic\n",
            "determinism",
        ),
        ("//: dynamic n * 4", "//:dynamic n * 4", "//:dynamic n * 4"),
        ("//: determinism fixed", "//: determinism", "//: determinism"),
        ("//: dynamic n * 4", "//: dynamic rows * 4", "rows"),
        ("//: traffic rows * n * 8", "//: traffic rows * m * 8", "m is no"),
        ("//: grid    ceil(n / 64), rows", "//: grid    ceil(scale / 64), rows", "scale"),
        ("n % 4 == 0", "n % width == 0", "width"),
    ],
)
def test_a_broken_contract_is_refused_by_name(old: str, new: str, named: str) -> None:
    assert old in HEADER
    with pytest.raises(KernelError, match=r"scale\.ptx") as refused:
        make_kernel(HEADER.replace(old, new))
    assert named in str(refused.value)


def test_an_error_names_its_line() -> None:
    at = HEADER.splitlines().index("//: block   64") + 1
    with pytest.raises(KernelError, match=rf"scale\.ptx:{at}\b"):
        make_kernel(HEADER.replace("//: block   64", "//: block   many"))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ((3, floats(0, 3, 4), 0, floats(0, 3, 4), 1.0), "5"),
        ((0, floats(0, 3, 4), 0, floats(0, 3, 4), 1.0, 4), "grid"),
    ],
)
def test_a_wrong_count_or_an_empty_grid_is_refused(values: tuple[Any, ...], named: str) -> None:
    with pytest.raises(KernelError, match=named):
        make_kernel()(Stream(), *values)


@pytest.mark.parametrize(
    ("at", "value", "named"),
    [(1, 1 << 32, "flag"), (1, -1, "flag"), (1, 1.5, "flag"), (3, "x", "scale"), (0, None, "out")],
)
def test_a_value_of_the_wrong_kind_names_its_parameter(at: int, value: object, named: str) -> None:
    values: list[Any] = [floats(0, 1, 4), 0, floats(0, 1, 4), 1.0, 4]
    values[at] = value
    with pytest.raises(KernelError, match=named):
        make_kernel().pack(tuple(values))


@pytest.mark.parametrize(
    ("at", "value", "named"),
    [(0, 2.5, "rows is 2.5"), (0, None, "rows is None"), (5, 64.0, "n is 64.0"), (5, "x", "n is")],
)
def test_a_grid_of_a_non_integer_size_names_the_size(at: int, value: object, named: str) -> None:
    values: list[Any] = [3, floats(0, 3, 64), 0, floats(0, 3, 64), 1.0, 64]
    stream = Stream()
    make_kernel()(stream, *values)
    values[at] = value
    with pytest.raises(KernelError, match=named):
        make_kernel()(stream, *values)
    assert len(stream.launches) == 1, "a refused launch does not run"


@pytest.mark.parametrize(
    ("at", "value", "named"),
    [
        (1, floats(8, 3, 8), "align"),
        (3, 1 << 40, "x is"),
        (1, floats(16, 3, 7), "out"),
        (3, Array(16, (3, 8), np.uint16, 96), "uint16"),
        (5, 6, "n % 4"),
    ],
)
def test_a_checked_launch_refuses_arrays_that_break_the_contract(
    at: int, value: Any, named: str
) -> None:
    values: list[Any] = [3, floats(16, 3, 8), 0, floats(16, 3, 8), 1.0, 8]
    check(make_kernel().contract, tuple(values))
    values[at] = value
    with pytest.raises(KernelError, match=named):
        check(make_kernel().contract, tuple(values))


def test_only_integer_arithmetic_is_accepted_in_expressions() -> None:
    assert Expression("ceil(a / 8) + min(a, 3) * max(b, 2) % 4 // 2", "x")({"a": 17, "b": 1}) == 4
    assert Expression("a / 4", "x")({"a": 7}) == 1
    assert Expression("1 <= a <= b", "x")({"a": 3, "b": 2}) == 0
    for bad in ("__import__('os')", "[1][0]", "a if b else c", "lambda: 1", "a ** 2", "ceil(a)",
                "ceil(a + 8)", "1.5", "a + 'x'", "True"):  # fmt: skip
        with pytest.raises(KernelError):
            Expression(bad, "x")


def test_a_missing_kernel_names_the_searched_folders() -> None:
    with pytest.raises(KernelError, match=r"nothing\.ptx"):
        kernel("nothing").contract  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_has_a_contract_that_can_be_packed(name: str) -> None:
    contract = kernel(name).contract
    assert contract.layout.size <= 4096, "the limit of a launch's parameters"
    assert contract.offsets[-1] < contract.layout.size
    assert contract.traffic_bytes is not None


def test_the_interpreter_and_the_gpu_launch_by_the_same_call(rng: np.random.Generator) -> None:
    machine = InterpretedRuntime()
    a, b = (rng.standard_normal(1028).astype(np.float32) for _ in range(2))
    out, x = machine.empty((1028,), np.float32), machine.empty((1028,), np.float32)
    machine.copy_h2d(out, a)
    machine.copy_h2d(x, b)
    kernel("add_f32")(machine.stream, out, x, 1028)
    assert np.array_equal(machine.copy_d2h(out), a + b)
