"""Safetensors files: the tensors of a checkpoint folder, and their bytes as mapped arrays.

The safetensors package validates each file.  Its NumPy API has no BF16, so this module maps the
bytes by the offsets of the validated header.  It handles names, shapes and bytes, not models.
Format: github.com/huggingface/safetensors.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from osmium.errors import CheckpointError

__all__ = [
    "INDEX", "MAX_HEADER", "Shards", "Tensor", "listed_shards", "open_shards", "parse_header",
    "read_json", "shards_of",
]  # fmt: skip

_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(np.uint16), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
}  # fmt: skip
"""Supported dtypes; bf16 is read as u16."""

INDEX = "model.safetensors.index.json"

MAX_JSON = 16_000_000
MAX_INDEX = 64_000_000
"""Largest JSON files, bytes.  An index of 190,000 tensors has 20 MB."""

MAX_HEADER = 100_000_000
"""Largest header, bytes: the limit of the safetensors package."""


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

    def __init__(self, folder: Path, files: list[Path], tensors: dict[str, Tensor]) -> None:
        self.folder, self.files, self.tensors = folder, files, tensors
        self._maps: dict[Path, npt.NDArray[np.uint8]] = {}

    def read(self, name: str) -> npt.NDArray[Any]:
        """A tensor as a view of the mapped file; bf16 as u16.  Raises: CheckpointError."""
        tensor = self.tensors[name]
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{name} is {tensor.dtype} in {tensor.file.name}; BF16, F32 and F16 are supported."
            )
        if tensor.file not in self._maps:
            self._maps[tensor.file] = np.memmap(tensor.file, np.uint8, mode="r")
        raw = self._maps[tensor.file][tensor.offset : tensor.offset + tensor.nbytes]
        return raw.view(dtype).reshape(tensor.shape)

    def read_into(self, name: str, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Read a tensor from its byte `start` on into u8 [n], without the mapping; thread-safe.

        Raises: CheckpointError if the file is too short.
        """
        tensor, done = self.tensors[name], 0
        assert start + out.nbytes <= tensor.nbytes, f"{name} has {tensor.nbytes} bytes"
        with open(tensor.file, "rb", buffering=0) as file:
            while done < out.nbytes:
                at = tensor.offset + start + done
                try:
                    count = os.preadv(file.fileno(), [out[done:].data], at)
                except OSError as error:
                    raise CheckpointError(f"{tensor.file} cannot be read: {error}") from None
                if not count:
                    raise CheckpointError(f"{tensor.file} ends inside {name}.")
                done += count


def open_shards(folder: Path) -> Shards:
    """Read the headers of a checkpoint's files.  Raises: CheckpointError."""
    index = folder / INDEX
    listed: Mapping[str, Any] = {}
    if index.is_file():
        listed = listed_shards(read_json(index), str(folder))
        files = [folder / name for name in sorted(set(listed.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder} has neither {INDEX} nor a .safetensors file.")
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{INDEX} lists {file.name}, which is not in {folder}.")
    return shards_of(folder, {file: _header(file) for file in files}, listed)


def shards_of(
    folder: Path, headers: Mapping[Path, Mapping[str, Tensor]], listed: Mapping[str, str]
) -> Shards:
    """A checkpoint from the headers of its files, checked against its index if it has one.

    Raises: CheckpointError.
    """
    tensors: dict[str, Tensor] = {}
    for file, header in headers.items():
        for name, tensor in header.items():
            if name in tensors:
                raise CheckpointError(f"{name} is in {tensors[name].file.name} and {file.name}.")
            tensors[name] = tensor
    for name, file_name in listed.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise CheckpointError(f"{INDEX} lists {name} in {file_name}; it is not in that file.")
    return Shards(folder, list(headers), tensors)


def listed_shards(index: Mapping[str, Any], where: str) -> dict[str, str]:
    """The file name of each tensor, from an index.  Raises: CheckpointError.

    A name with a path is an error: an index must not point outside its folder.
    """
    listed = index.get("weight_map", {})
    if not isinstance(listed, Mapping) or not listed:
        raise CheckpointError(f"{INDEX} in {where} has no weight_map.")
    for name in listed.values():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise CheckpointError(f"{INDEX} in {where} lists {name!r}, which is no file name.")
    return dict(listed)


def _header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, after the safetensors package has accepted it."""
    try:
        with safe_open(str(file), framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file.name} is no complete safetensors file: {error}") from None
    with open(file, "rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
        return parse_header(raw.read(size), file, file.stat().st_size)


def parse_header(text: bytes, file: Path, nbytes: int) -> dict[str, Tensor]:
    """The tensors of a file of `nbytes` bytes whose header is `text`.

    Raises: CheckpointError if the header does not describe such a file.
    """
    tensors: dict[str, Tensor] = {}
    try:
        for name, entry in json.loads(text).items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            shape, at = tuple(int(n) for n in entry["shape"]), 8 + len(text)
            tensors[name] = Tensor(name, str(entry["dtype"]), shape, file, at + start, end - start)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file.name} has no safetensors header: {error!r}") from None
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
