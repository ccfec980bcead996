"""The driver layer where there is no GPU, and what it says of results."""

import pytest

from osmium.cuda.driver import Device, Driver, load_driver
from osmium.cuda.memory import DeviceArray
from osmium.errors import NoDevice


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


def test_the_driver_is_asked_again_after_it_was_not_there() -> None:
    for _ in range(2):
        try:
            load_driver()
        except NoDevice:
            continue


@pytest.mark.parametrize(
    ("code", "name", "lost", "says"),
    [
        (2, "CUDA_ERROR_OUT_OF_MEMORY", False, "--vram"),
        (700, "CUDA_ERROR_ILLEGAL_ADDRESS", True, "OSMIUM_SYNC"),
        (719, "CUDA_ERROR_LAUNCH_FAILED", True, "restart"),
        (222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", False, "driver"),
        (1, "CUDA_ERROR_INVALID_VALUE", False, "cuSomething"),
    ],
)
def test_an_error_names_its_call_and_a_way_out(code: int, name: str, lost: bool, says: str) -> None:
    error = Driver(None).error("cuSomething", Result(code, name))
    assert (error.call, error.name, error.code, error.lost) == ("cuSomething", name, code, lost)
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
