"""The CUDA driver: late import of the binding, checked results, the device and its primary context.

Importing this module imports no binding; a machine without a GPU never loads one.  Every driver
call goes through `Driver`, which raises CudaError for a failed one.
"""

import ctypes
import functools
import os
import threading
from typing import Any, NoReturn

from osmium.distribution import gpu_extra, how_to_install
from osmium.errors import CudaError, DeviceError, KernelError, NoDevice

__all__ = ["MIN_DRIVER_VERSION", "Device", "Driver", "cuda_version", "load_driver"]

MIN_DRIVER_VERSION = 12080
"""CUDA 12.8, as cuDriverGetVersion returns it."""

BINDING = "cuda-bindings"
"""The package through which Python calls the driver."""

_CONTEXT_LOST_CODES = {214, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999}
"""Results after which every call on the context fails: ECC, illegal address, timeout, ..."""

_HINTS = {
    2: "Lower --vram, --expert-slots, --context or --kv-cache-mb, or close what else uses the GPU.",
    100: "No GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES.",
    209: "The GPU is older than sm_80; Osmium needs the RTX 30 series or newer.",
    218: "The driver refused the PTX; the log has the line.",
    222: "The PTX is newer than the driver; update the driver.",
    701: "The launch needs more registers, threads or shared memory than the GPU has.",
}
"""The likely remedy, by CUresult."""


class Driver:
    """Calls into cuda.bindings.driver by name, checked: `driver("cuMemAlloc", n)`."""

    def __init__(self, binding: Any) -> None:
        self.binding = binding

    def __call__(self, call: str, *args: Any) -> Any:
        """The call's values: none, one, or a tuple.  Raises: CudaError."""
        result = getattr(self.binding, call)(*args)
        if result[0].value:
            raise self.error(call, result[0])
        return result[1] if len(result) == 2 else result[1:]

    def error(self, call: str, result: Any, more: str = "") -> CudaError:
        """The CudaError of a failed call; `more` replaces the hint of the code."""
        code = int(result)
        name = str(getattr(result, "name", result))
        lost = code in _CONTEXT_LOST_CODES
        hint = _HINTS.get(code, "")
        if lost:
            hint = "The context is lost; restart. OSMIUM_LAUNCH_BLOCKING=1 names the kernel."
        text = f"{call}: {name} ({code}). {more or hint}".rstrip()
        return CudaError(text, call=call, name=name, code=code, context_lost=lost)


@functools.cache
def load_driver() -> Driver:
    """Import the binding and initialise the driver, once.

    Raises: NoDevice without a driver or a GPU; DeviceError with a GPU, if the binding is missing or
    the driver is too old.
    """
    try:
        from cuda.bindings import driver as binding  # late: a laptop never loads it
    except ImportError as error:
        _explain_missing_binding(error, cuda_version())
    try:
        (result,) = binding.cuInit(0)
    except Exception as error:  # without libcuda the binding raises its own exception types
        raise NoDevice(f"There is no usable NVIDIA driver here ({error}).") from None
    driver = Driver(binding)
    if result.value:
        raise NoDevice(f"The NVIDIA driver finds no GPU: {driver.error('cuInit', result)}")
    _check_version(driver("cuDriverGetVersion"))
    return driver


def cuda_version() -> int | None:
    """The driver's CUDA version, as cuDriverGetVersion returns it; needs no binding.

    None without a driver or a visible GPU.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        version, count = ctypes.c_int(), ctypes.c_int()
        failed = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
        failed = failed or cuda.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed or not count.value else version.value


def _explain_missing_binding(error: ImportError, version: int | None) -> NoReturn:
    """Raises: NoDevice without a GPU, DeviceError with one."""
    if version is None:
        raise NoDevice(
            f"There is no NVIDIA driver here that sees a GPU, and {BINDING} is not installed. "
            f"With a GPU: {how_to_install('cu13')} (driver 580 or newer; cu12 for driver 570)."
        ) from None
    _check_version(version)
    if isinstance(error, ModuleNotFoundError):
        problem = f"{BINDING}, which Osmium needs to use it, is not installed"
    else:
        problem = f"{BINDING}, which Osmium needs to use it, cannot be imported ({error})"
    raise DeviceError(
        f"This machine has an NVIDIA GPU (driver for CUDA {_dotted(version)}), but {problem}. "
        f"Install it: {how_to_install(gpu_extra(version))}. Without the GPU: --device cpu."
    ) from None


def _check_version(version: int) -> None:
    if version < MIN_DRIVER_VERSION:
        raise DeviceError(
            f"The NVIDIA driver is for CUDA {_dotted(version)}; Osmium needs 12.8 (driver 570) "
            "or newer. Update the driver; without the GPU: --device cpu."
        )


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


class Device:
    """One GPU and its primary context, current on the thread that creates it."""

    def __init__(self, ordinal: int = 0) -> None:
        """Raises: NoDevice without such a GPU, DeviceError where it cannot be used as it is."""
        self.driver = load_driver()
        count = self.driver("cuDeviceGetCount")
        if ordinal >= count:
            raise NoDevice(f"GPU {ordinal} does not exist; the driver reports {count}.")
        self.handle = self.driver("cuDeviceGet", ordinal)
        self.driver_version = int(self.driver("cuDriverGetVersion"))
        self.name = self.driver("cuDeviceGetName", 96, self.handle).split(b"\0")[0].decode()
        self.capability = (self._attribute(75), self._attribute(76))
        if self.capability < (8, 0):
            raise NoDevice(
                f"{self.name} is sm_{self.capability[0]}{self.capability[1]}; Osmium needs sm_80 "
                "(RTX 30 series) or newer."
            )
        self.sm_count = self._attribute(16)
        self.l2 = self._attribute(38)
        self.max_shared_per_block = self._attribute(97)
        """Most bytes of shared memory per block."""
        self._shared_per_sm, self._shared_reserved = self._attribute(81), self._attribute(111)
        """Bytes of shared memory: per multiprocessor, and reserved by the driver per block."""
        self.context = self.driver("cuDevicePrimaryCtxRetain", self.handle)
        self.closed = False
        self._functions: dict[tuple[str, str], Any] = {}
        self._dynamic: dict[tuple[str, str], int] = {}
        self._modules: list[Any] = []
        self._lock = threading.Lock()
        self.pdl_enabled = self.capability >= (9, 0) and os.environ.get("OSMIUM_PDL") != "0"
        """Whether captured kernels use programmatic dependent launch (kernels.ptx.pdl_text)."""
        self.make_current()

    def _attribute(self, number: int) -> int:
        attribute = self.driver.binding.CUdevice_attribute(number)
        return int(self.driver("cuDeviceGetAttribute", attribute, self.handle))

    def make_current(self) -> None:
        """Make the context current on the calling thread; each thread that uses it must call it."""
        self.driver("cuCtxSetCurrent", self.context)

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of VRAM."""
        free, total = self.driver("cuMemGetInfo")
        return int(free), int(total)

    def synchronize(self) -> None:
        """Wait for all work of this context."""
        self.driver("cuCtxSynchronize")

    def dynamic_shared_bytes(self, contract: Any, nbytes: int, rows: int) -> int:
        """Bytes of dynamic shared memory for a launch of a kernel that uses `nbytes`.

        A contract's max_blocks_per_sm limits the blocks per multiprocessor, times `rows` of the
        grid, by a larger request.  With PDL a kernel starts before its predecessor ends.  Without
        the limit its blocks would crowd onto the multiprocessors that become free first.
        """
        if not contract.max_blocks_per_sm:
            return nbytes
        shared: int = contract.shared
        per_block = self._shared_per_sm // (contract.max_blocks_per_sm * rows + 1)
        least: int = per_block + 1 - self._shared_reserved - shared
        return max(nbytes, min(-(least // -128) * 128, self.max_shared_per_block - shared))

    def text(self, contract: Any) -> str:
        """The PTX of a kernel: with PDL instructions where this device uses them."""
        text: str = contract.pdl_text if self.pdl_enabled else contract.text
        return text

    def function(self, entry: str, text: str, dynamic: int = 0) -> Any:
        """The function `entry` of a PTX text; the driver compiles it at first use.

        `dynamic` is the dynamic shared memory of the launch, bytes.
        Raises: KernelError with the driver's log.
        """
        with self._lock:
            function = self._functions.get((entry, text))
            if function is None:
                module = self._module(entry, text)
                function = self.driver("cuModuleGetFunction", module, entry.encode())
                # Give every kernel the full shared-memory carveout.  Otherwise the driver picks it
                # per kernel, and a successor that needs more cannot start early with PDL.
                # Not measured.
                carveout = self.driver.binding.CUfunction_attribute(9)
                self.driver("cuFuncSetAttribute", function, carveout, 100)
                self._functions[entry, text] = function
            # More than 48 KiB of shared memory needs this attribute.  Only ever raise it: streams
            # share the function.
            if dynamic > self._dynamic.get((entry, text), 0):
                attribute = self.driver.binding.CUfunction_attribute(8)
                self.driver("cuFuncSetAttribute", function, attribute, dynamic)
                self._dynamic[entry, text] = dynamic
        return function

    def _module(self, entry: str, text: str) -> Any:
        options = self.driver.binding.CUjit_option
        log = bytearray(8192)  # the driver writes into it
        result, module = self.driver.binding.cuModuleLoadDataEx(
            text.encode() + b"\0",
            2,
            [options.CU_JIT_ERROR_LOG_BUFFER, options.CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES],
            [log, len(log)],
        )
        if result.value:
            message = log.split(b"\0")[0].decode(errors="replace").strip()
            error = self.driver.error("cuModuleLoadDataEx", result)
            raise KernelError(f"{entry}: {error}" + (f"\n{message}" if message else ""))
        self._modules.append(module)
        return module

    def close(self) -> None:
        """Unload the modules and release the primary context with all its allocations."""
        if self.closed:
            return
        self.closed = True
        self.make_current()
        for module in self._modules:
            self.driver("cuModuleUnload", module)
        self.driver("cuDevicePrimaryCtxRelease", self.handle)
