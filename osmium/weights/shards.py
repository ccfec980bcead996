"""Safetensors files: which tensors a checkpoint folder has, and their bytes as mapped arrays.

Each file is validated by the safetensors package.  Its NumPy side has no BF16, so bytes are then
mapped by the offsets of the header that it has accepted.  Knows names, shapes and bytes; knows
nothing of models.  Format: github.com/huggingface/safetensors.
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
"""What can be read; bf16 is kept as u16."""

INDEX = "model.safetensors.index.json"

MAX_HEADER = 100_000_000
"""Bytes of a header at most, by the safetensors package."""


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies."""

    name: str
    dtype: str
    """As in the file: BF16, F32, F16, I32, F8_E4M3 ..."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Bytes from the start of the file."""
    nbytes: int


class Shards:
    """The tensors of a checkpoint, over all of its files."""

    def __init__(self, folder: Path, files: list[Path], tensors: dict[str, Tensor]) -> None:
        self.folder, self.files, self.tensors = folder, files, tensors
        self._maps: dict[Path, npt.NDArray[np.uint8]] = {}

    def read(self, name: str) -> npt.NDArray[Any]:
        """A tensor as a view of the mapped file; bf16 as u16.  Raises: CheckpointError."""
        tensor = self.tensors[name]
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{name} is {tensor.dtype} in {tensor.file.name}; BF16, F32 and F16 can be read."
            )
        if tensor.file not in self._maps:
            self._maps[tensor.file] = np.memmap(tensor.file, np.uint8, mode="r")
        raw = self._maps[tensor.file][tensor.offset : tensor.offset + tensor.nbytes]
        return raw.view(dtype).reshape(tensor.shape)

    def read_into(self, name: str, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Bytes of a tensor from `start` on into u8 [n], past the map; any thread may call this.

        Raises: CheckpointError where the file ends before.
        """
        tensor, done = self.tensors[name], 0
        assert start + out.nbytes <= tensor.nbytes, f"{name} has {tensor.nbytes} bytes"
        with open(tensor.file, "rb", buffering=0) as file:
            while done < out.nbytes:
                at = tensor.offset + start + done
                try:
                    got = os.preadv(file.fileno(), [out[done:].data], at)
                except OSError as error:
                    raise CheckpointError(f"{tensor.file} cannot be read: {error}") from None
                if not got:
                    raise CheckpointError(f"{tensor.file} ends inside {name}.")
                done += got


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
            raise CheckpointError(f"{INDEX} names {file.name}, which is not in {folder}.")
    return shards_of(folder, {file: _header(file) for file in files}, listed)


def shards_of(
    folder: Path, headers: Mapping[Path, Mapping[str, Tensor]], listed: Mapping[str, str]
) -> Shards:
    """A checkpoint of files whose headers have been read, held to its index if it has one.

    Raises: CheckpointError.
    """
    tensors: dict[str, Tensor] = {}
    for file, header in headers.items():
        for name, tensor in header.items():
            if name in tensors:
                raise CheckpointError(f"{name} is in {tensors[name].file.name} and {file.name}.")
            tensors[name] = tensor
    for name, where in listed.items():
        if name not in tensors or tensors[name].file.name != where:
            raise CheckpointError(f"{INDEX} says that {name} is in {where}; it is not there.")
    return Shards(folder, list(headers), tensors)


def listed_shards(index: Mapping[str, Any], where: str) -> dict[str, str]:
    """The file of each tensor, by an index.  Raises: CheckpointError.

    A file is a name without a path in it: an index must not lead out of its folder.
    """
    listed = index.get("weight_map", {})
    if not isinstance(listed, Mapping) or not listed:
        raise CheckpointError(f"{INDEX} in {where} has no weight_map.")
    for name in listed.values():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise CheckpointError(f"{INDEX} in {where} names the file {name!r}.")
    return dict(listed)


def _header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, after the safetensors package has accepted it."""
    try:
        with safe_open(str(file), framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file.name} is not a whole safetensors file: {error}") from None
    with open(file, "rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
        return parse_header(raw.read(size), file, file.stat().st_size)


def parse_header(text: bytes, file: Path, nbytes: int) -> dict[str, Tensor]:
    """The tensors of a file of `nbytes` bytes whose header is `text`.

    Raises: CheckpointError where the header does not describe such a file.
    """
    found: dict[str, Tensor] = {}
    try:
        for name, entry in json.loads(text).items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            shape, at = tuple(int(n) for n in entry["shape"]), 8 + len(text)
            found[name] = Tensor(name, str(entry["dtype"]), shape, file, at + start, end - start)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file.name} has no header of safetensors: {error!r}") from None
    for tensor in found.values():
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is not None and math.prod(tensor.shape) * dtype.itemsize != tensor.nbytes:
            raise CheckpointError(
                f"{file.name} is not a whole safetensors file: {tensor.name} is {tensor.dtype} "
                f"{list(tensor.shape)} in {tensor.nbytes} bytes."
            )
    end = 8 + len(text)
    for tensor in sorted(found.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end or tensor.nbytes < 0:
            raise CheckpointError(
                f"{file.name} is not a whole safetensors file: {tensor.name} begins at byte "
                f"{tensor.offset}, the tensor before it ends at byte {end}."
            )
        end += tensor.nbytes
    if end != nbytes:
        raise CheckpointError(
            f"{file.name} is not a whole safetensors file: it has {nbytes} bytes, its header "
            f"describes {end}."
        )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a file.  Raises: CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}; it must be an object.")
    return value
