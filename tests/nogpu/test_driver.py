"""The driver layer without a GPU, and its handling of result codes."""

import ctypes
import functools
import re
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from osmium.cuda import driver
from osmium.cuda.driver import Device, Driver, load_driver
from osmium.cuda.memory import DeviceArray
from osmium.distribution import how_to_install
from osmium.errors import DeviceError, NoDevice


class Result:
    """A CUresult."""

    def __init__(self, value: int, name: str) -> None:
        self.value, self.name = value, name

    def __int__(self) -> int:
        return self.value


def test_a_machine_without_a_gpu_gives_one_clear_error() -> None:
    try:
        device = Device()
    except NoDevice as error:
        assert str(error)
    else:
        device.close()
        pytest.skip("there is a GPU here")


@pytest.mark.parametrize("shared_per_sm", [233472, 102400], ids=["H100", "RTX"])
@pytest.mark.parametrize(("max_blocks", "rows"), [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_dynamic_shared_memory_limits_blocks_per_sm(
    shared_per_sm: int, max_blocks: int, rows: int
) -> None:
    device, reserved, static = Device.__new__(Device), 1024, 2048
    device._shared_per_sm, device._shared_reserved, device.max_shared_per_block = (
        shared_per_sm,
        reserved,
        shared_per_sm - reserved,
    )
    contract = SimpleNamespace(max_blocks_per_sm=max_blocks, shared=static)
    dynamic_bytes = device.dynamic_shared_bytes(contract, 4096, rows)
    block = dynamic_bytes + static + reserved
    assert dynamic_bytes % 128 == 0 and dynamic_bytes <= device.max_shared_per_block - static
    assert shared_per_sm // block == max_blocks * rows, "exactly as many blocks per SM as the limit"
    assert device.dynamic_shared_bytes(contract, dynamic_bytes + 64, rows) == dynamic_bytes + 64, (
        "a larger request is unchanged"
    )
    assert (
        device.dynamic_shared_bytes(SimpleNamespace(max_blocks_per_sm=0, shared=static), 4096, rows)
        == 4096
    )


def hide(monkeypatch: pytest.MonkeyPatch, binding: object) -> None:
    """Make `binding` the importable driver binding; None means that it is not installed."""
    package = ModuleType("cuda.bindings")
    if binding is not None:
        package.driver = binding  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.delitem(sys.modules, "cuda.bindings.driver", raising=False)
    monkeypatch.setattr(driver, "load_driver", functools.cache(load_driver.__wrapped__))


def test_without_gpu_and_binding_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, None)
    monkeypatch.setattr(driver, "cuda_version", lambda: None)
    with pytest.raises(NoDevice, match=re.escape(how_to_install("cu13"))):
        Device()


@pytest.mark.parametrize(
    ("version", "named"),
    [
        (12080, re.escape(how_to_install("cu12"))),
        (13000, re.escape(how_to_install("cu13"))),
        (12040, r"12\.4.*12\.8"),
    ],
)
def test_a_gpu_without_the_binding_is_an_error_with_the_command(
    monkeypatch: pytest.MonkeyPatch, version: int, named: str
) -> None:
    hide(monkeypatch, None)
    monkeypatch.setattr(driver, "cuda_version", lambda: version)
    with pytest.raises(DeviceError, match=rf"{named}.*--device cpu") as caught:
        Device()
    assert not isinstance(caught.value, NoDevice), (
        "a GPU exists, so this must not count as NoDevice"
    )


def test_a_binding_that_fails_to_import_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="some symbol"):
        driver._explain_missing_binding(ImportError("some symbol"), 13000)


class Libcuda:
    """libcuda as ctypes sees it."""

    def __init__(self, init: int, count: int, version: int) -> None:
        self.init, self.count, self.version = init, count, version

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = self.count
        return 0

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = self.version
        return 0


@pytest.mark.parametrize(
    ("library", "found"),
    [
        (lambda: Libcuda(0, 1, 12080), 12080),
        (lambda: Libcuda(0, 0, 12080), None),
        (lambda: Libcuda(100, 1, 12080), None),
        (object, None),
    ],
    ids=["a GPU", "none visible", "no device", "another library"],
)
def test_the_driver_version_is_read_without_the_binding(
    monkeypatch: pytest.MonkeyPatch, library: Callable[[], Any], found: int | None
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library())
    assert driver.cuda_version() == found

    def none(name: str) -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", none)
    assert driver.cuda_version() is None


class Binding:
    """The two calls that decide whether a driver is usable."""

    def __init__(self, init: int, version: int) -> None:
        self.init, self.version = init, version

    def cuInit(self, flags: int) -> tuple[Result]:
        if self.init < 0:
            raise RuntimeError("Failed to dlopen libcuda.so.1")
        return (Result(self.init, "CUDA_ERROR_NO_DEVICE"),)

    def cuDriverGetVersion(self) -> tuple[Result, int]:
        return Result(0, "CUDA_SUCCESS"), self.version


@pytest.mark.parametrize(
    ("init", "version", "kind", "named"),
    [
        (-1, 0, NoDevice, "libcuda"),
        (100, 0, NoDevice, "CUDA_ERROR_NO_DEVICE"),
        (0, 12040, DeviceError, r"12\.4"),
    ],
)
def test_no_driver_no_gpu_and_an_old_driver_are_distinct_errors(
    monkeypatch: pytest.MonkeyPatch, init: int, version: int, kind: type[DeviceError], named: str
) -> None:
    hide(monkeypatch, Binding(init, version))
    with pytest.raises(kind, match=named) as caught:
        Device()
    assert type(caught.value) is kind


def test_a_missing_driver_is_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    binding = Binding(100, 12080)
    hide(monkeypatch, binding)
    with pytest.raises(NoDevice):
        driver.load_driver()
    binding.init = 0
    assert driver.load_driver()("cuDriverGetVersion") == 12080
    assert driver.load_driver() is driver.load_driver()


@pytest.mark.parametrize(
    ("code", "name", "lost", "says"),
    [
        (2, "CUDA_ERROR_OUT_OF_MEMORY", False, "--vram"),
        (700, "CUDA_ERROR_ILLEGAL_ADDRESS", True, "OSMIUM_LAUNCH_BLOCKING"),
        (719, "CUDA_ERROR_LAUNCH_FAILED", True, "restart"),
        (222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", False, "driver"),
        (1, "CUDA_ERROR_INVALID_VALUE", False, "cuSomething"),
    ],
)
def test_an_error_names_its_call_and_gives_advice(
    code: int, name: str, lost: bool, says: str
) -> None:
    error = Driver(None).error("cuSomething", Result(code, name))
    assert (error.call, error.name, error.code, error.context_lost) == (
        "cuSomething",
        name,
        code,
        lost,
    )
    assert "cuSomething" in str(error) and name in str(error) and says in str(error)


def test_arrays_slice_and_reshape_over_the_same_bytes() -> None:
    owner = object()
    a = DeviceArray(1000, (4, 3, 2), "float32", owner)
    assert a.nbytes == 96 and len(a) == 4
    assert (a[1].ptr, a[1].shape) == (1000 + 24, (3, 2))
    assert (a[-1].ptr, a[1:3].ptr, a[1:3].shape) == (1000 + 72, 1024, (2, 3, 2))
    assert a[2:99].shape == (2, 3, 2) and a[3:1].shape == (0, 3, 2)
    assert a.reshape(12, 2)[5].ptr == 1000 + 40
    assert a[1][2].owner is owner
    with pytest.raises(IndexError, match="4"):
        a[4]
    with pytest.raises(IndexError, match="2"):
        a[::2]
    with pytest.raises(ValueError, match="5"):
        a.reshape(5, 5)
