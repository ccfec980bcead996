"""Safetensors files: the tensors of a checkpoint folder, and their bytes.

The safetensors package validates each file.  Its NumPy API has no BF16, so this module reads the
bytes by the offsets of the validated header.  It handles names, shapes and bytes, not models.
It reads and never maps: a mapped file that is cut meanwhile ends the process by SIGBUS.
Format: github.com/huggingface/safetensors.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from osmium.errors import CheckpointError, is_panic
from osmium.weights.choosing import INDEX, ShardChoice, choose_shards, summary

__all__ = [
    "MAX_HEADER", "Shards", "Tensor", "choose_files", "open_shards", "parse_header", "read_json",
    "shards_of",
]  # fmt: skip

_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(np.uint16), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
}  # fmt: skip
"""Supported dtypes; bf16 is read as u16."""

MAX_JSON = 16_000_000
MAX_INDEX = 64_000_000
"""Largest JSON files, bytes.  An index of 190,000 tensors has 20 MB."""

MAX_HEADER = 50_000_000
"""Largest header, bytes; one of 190,000 tensors in one file has 25 MB."""


_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class _Entry(msgspec.Struct, frozen=True):
    """A tensor's entry in the header's JSON."""

    dtype: str
    shape: Annotated[list[_Count], msgspec.Meta(max_length=16)]
    data_offsets: tuple[_Count, _Count]


@dataclass(frozen=True)
class Tensor:
    """Location, dtype and shape of one tensor."""

    name: str
    dtype: str
    """The file's name of the dtype: BF16, F32, F16, I32, F8_E4M3 ..."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Bytes from the start of the file."""
    nbytes: int


class Shards:
    """The tensors of all files of a checkpoint."""

    def __init__(
        self,
        folder: Path,
        files: list[Path],
        tensors: dict[str, Tensor],
        left_out: tuple[str, ...] = (),
    ) -> None:
        self.folder, self.files, self.tensors = folder, files, tensors
        self.left_out = left_out
        """What of the folder's weights is not used, in words."""

    def read(self, name: str, at: int | None = None) -> npt.NDArray[Any]:
        """A tensor, or its entry `at` along the first axis; bf16 as u16.  Thread-safe.

        Raises: CheckpointError.
        """
        tensor = self.tensors[name]
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{name} is {tensor.dtype} in {tensor.file.name}; BF16, F32 and F16 are supported."
            )
        shape = tensor.shape if at is None else tensor.shape[1:]
        out = np.empty(shape, dtype)
        start = 0 if at is None else at * out.nbytes
        self.read_into(name, start, out.reshape(-1).view(np.uint8))
        return out

    def read_into(self, name: str, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Read a tensor from its byte `start` on into u8 [n]; thread-safe.

        Raises: CheckpointError if the file is too short.
        """
        tensor, done = self.tensors[name], 0
        assert start + out.nbytes <= tensor.nbytes, f"{name} has {tensor.nbytes} bytes"
        try:
            with open(tensor.file, "rb", buffering=0) as file:
                while done < out.nbytes:
                    at = tensor.offset + start + done
                    count = os.preadv(file.fileno(), [out[done:].data], at)
                    if not count:
                        raise CheckpointError(
                            f"{tensor.file} ends inside {name}; it was cut after it was opened."
                        )
                    done += count
        except OSError as error:
            raise CheckpointError(f"{tensor.file} cannot be read: {error}") from None


def open_shards(folder: Path, unused: tuple[str, ...] = ()) -> Shards:
    """Read the headers of a checkpoint's files.

    `unused` are beginnings of the names of tensors that Osmium does not use.
    Raises: CheckpointError.
    """
    choice = choose_files(folder, unused)
    return shards_of(
        folder, {folder / name: _header(folder / name) for name in choice.names}, choice
    )


def choose_files(folder: Path, unused: tuple[str, ...] = ()) -> ShardChoice:
    """The files of a checkpoint folder that hold its weights.  Raises: CheckpointError."""
    try:
        names = {entry.name for entry in os.scandir(folder) if entry.is_file()}
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}.") from None
    return choose_shards(names, lambda: read_json(folder / INDEX), str(folder), unused)


def shards_of(
    folder: Path, headers: Mapping[Path, Mapping[str, Tensor]], choice: ShardChoice
) -> Shards:
    """A checkpoint from the headers of its files, in the order of reading.

    Of two tensors of one name the last one counts where an index lists the files.
    Raises: CheckpointError for two tensors of one name in files without an index.
    """
    tensors: dict[str, Tensor] = {}
    twice: list[str] = []
    for file, header in headers.items():
        for name, tensor in header.items():
            if name in tensors:
                before = tensors[name].file.name
                if not choice.listed:
                    raise CheckpointError(
                        f"{name} is in {before} and {file.name}, and no {INDEX} says which of them "
                        "belong together; remove one of the files."
                    )
                twice.append(f"{name} of {before} (that of {file.name} is used)")
            tensors[name] = tensor
    absent = [name for name in choice.listed if name not in tensors]
    left_out = [*choice.left_out, *twice]
    if absent:
        where = f" ({summary(choice.missing)} does not exist)" if choice.missing else ""
        left_out.append(f"{summary(absent)}, which {INDEX} lists and no file has{where}")
    return Shards(folder, list(headers), tensors, tuple(left_out))


def _header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, after the safetensors package has accepted it."""
    try:
        with open(file, "rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            if size > MAX_HEADER:
                raise CheckpointError(
                    f"{file.name} is no complete safetensors file: its header has {size} bytes, "
                    f"{MAX_HEADER} are the limit."
                )
            with safe_open(str(file), framework="numpy"):
                pass
            return parse_header(raw.read(size), file, file.stat().st_size)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file.name} is no complete safetensors file: {error}") from None
    except BaseException as error:
        if not is_panic(error):
            raise
        raise CheckpointError(f"{file.name} is no complete safetensors file: {error}") from None


def parse_header(text: bytes, file: Path, nbytes: int) -> dict[str, Tensor]:
    """The tensors of a file of `nbytes` bytes whose header is `text`.

    Raises: CheckpointError if the header does not describe such a file.
    """
    tensors: dict[str, Tensor] = {}
    at = 8 + len(text)
    try:
        for name, raw in msgspec.json.decode(text, type=dict[str, msgspec.Raw]).items():
            if name == "__metadata__":
                continue
            entry = msgspec.json.decode(raw, type=_Entry)
            start, end = entry.data_offsets
            shape = tuple(entry.shape)
            tensors[name] = Tensor(name, entry.dtype, shape, file, at + start, end - start)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file.name} has no safetensors header: {error}") from None
    for tensor in tensors.values():
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is not None and math.prod(tensor.shape) * dtype.itemsize != tensor.nbytes:
            raise CheckpointError(
                f"{file.name} is no complete safetensors file: {tensor.name} is {tensor.dtype} "
                f"{list(tensor.shape)} in {tensor.nbytes} bytes."
            )
    end = 8 + len(text)
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end or tensor.nbytes < 0:
            raise CheckpointError(
                f"{file.name} is no complete safetensors file: {tensor.name} begins at byte "
                f"{tensor.offset}, the previous tensor ends at byte {end}."
            )
        end += tensor.nbytes
    if end != nbytes:
        raise CheckpointError(
            f"{file.name} is no complete safetensors file: it has {nbytes} bytes, its header "
            f"describes {end}."
        )
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file, with or without a byte order mark.

    Raises: CheckpointError, also for a file of more than MAX_JSON bytes, an index's MAX_INDEX.
    """
    most = MAX_INDEX if path.name.endswith(".index.json") else MAX_JSON
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
            raise CheckpointError(f"{path} is no regular file; replace it by one.")
        with open(path, "rb") as file:
            raw = file.read(most + 1)
        if len(raw) > most:
            raise CheckpointError(
                f"{path} has more than {most} bytes, the limit for such a file; replace it by the "
                "original."
            )
        value = json.loads(raw.decode("utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}; it must be an object.")
    return value
