"""Every error that Osmium raises on purpose.

OsmiumError
├─ ConfigError          the user's flag or file             CLI: one line, exit 2
├─ CheckpointError      missing, truncated, wrong shape     CLI: one line, exit 2
├─ DeviceError
│  ├─ NoDevice          no driver, or no GPU                the only error a test may skip on
│  ├─ OutOfMemory       requested and free bytes, and what uses the rest
│  ├─ KernelError       contract broken, at load or at launch
│  └─ CudaError         .call .name .code; .context_lost
├─ RequestError         the client's fault                  HTTP 4xx with param and code
│  └─ ContextError      a prompt that does not fit          .tokens .context
└─ EngineStopped        the engine cannot serve any more    HTTP 503

A message is one or two sentences: the thing, the value found, the rule, the remedy.
"""

import reprlib

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ContextError",
    "CudaError",
    "DeviceError",
    "EngineStopped",
    "KernelError",
    "NoDevice",
    "OsmiumError",
    "OutOfMemory",
    "RequestError",
    "is_panic",
    "shown",
]


SHOWN_CHARS = 200
"""Characters of a value in an error."""


class _Repr(reprlib.Repr):
    """repr() whose length is limited; Python refuses to write integers of many digits."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"an integer of {x.bit_length()} bits"


_SHORT = _Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


class OsmiumError(Exception):
    """The base class of every error that Osmium raises on purpose."""


class ConfigError(OsmiumError):
    """A flag, an option or a configuration file that cannot be used as it stands."""


class CheckpointError(OsmiumError):
    """A checkpoint or a packed file that is missing, cut short, edited or of the wrong shape."""


class DeviceError(OsmiumError):
    """An error of the GPU, its driver or its memory."""


class NoDevice(DeviceError):
    """There is no CUDA driver here, or it sees no GPU."""


class OutOfMemory(DeviceError):
    """VRAM or host memory does not suffice; the message has the requested and the free bytes."""


class KernelError(DeviceError):
    """A kernel's contract is broken: its text, its module, or the arguments of a launch."""


class CudaError(DeviceError):
    """A driver call failed.

    `call` is the driver function, `name` and `code` its CUresult.  With `context_lost` every later
    call fails, and the process has to restart.
    """

    def __init__(
        self, message: str, *, call: str, name: str, code: int, context_lost: bool
    ) -> None:
        super().__init__(message)
        self.call, self.name, self.code, self.context_lost = call, name, code, context_lost


class RequestError(OsmiumError):
    """A request that the engine rejects: the client's fault.

    `param` names the field, `code` is the machine-readable reason, `status` the HTTP status.
    """

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class ContextError(RequestError):
    """A prompt of `tokens` tokens or more, which does not fit `context` tokens."""

    def __init__(self, message: str, *, tokens: int, context: int) -> None:
        super().__init__(message, param="messages", code="context_length_exceeded")
        self.tokens, self.context = tokens, context


class EngineStopped(OsmiumError):
    """The engine is closed or has failed, and takes no more requests."""


def is_panic(error: BaseException) -> bool:
    """Whether a package in Rust panicked; PyO3 raises that as a BaseException, without a class."""
    return type(error).__name__ == "PanicException"


def shown(value: object) -> str:
    """A value for a message, shortened: it may come from any file or client."""
    text = _SHORT.repr(value)
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."
