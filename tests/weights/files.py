"""Checkpoint folders for tests: complete, sharded, per expert, or broken.

Bytes are laid out here without the code under test.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from osmium.quant.floats import f32_from_bf16
from tests.models.build import Case, Tensor, hf_config, hf_tensors

CASE = Case("small", 7, 64, "da", (2, 1, 32), 0.5, (1, 2, 32, 32), (4, 2, 32), 32, False, 20,
            vocab=64)  # fmt: skip
"""One layer of each kind, about 150 kB."""

TIED = Case("tied", 8, 64, "a", (2, 1, 32), 0.5, (1, 1, 32, 32), (3, 2, 32), 32, True, 20, vocab=64)

ROOT = "model.language_model."

KINDS = {np.dtype(np.uint16): "BF16", np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}


def shard(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file; u16 arrays become BF16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": KINDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    return raw_shard(header, b"".join(tensor.tobytes() for tensor in tensors.values()))


def raw_shard(header: Mapping[str, Any] | bytes, data: bytes, length: int | None = None) -> bytes:
    """A file with any header and any stated header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stated_length = len(text) if length is None else length
    return stated_length.to_bytes(8, "little") + text + data


def write(
    folder: Path,
    tensors: Mapping[str, Tensor] | None = None,
    case: Case = CASE,
    shards: int = 1,
) -> Path:
    """Write a checkpoint folder; with several shards, tensors alternate and an index is written."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = hf_tensors(case) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(hf_config(case)))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 0]}))
    if shards == 1:
        (folder / "model.safetensors").write_bytes(shard(tensors))
        return folder
    weight_map = {}
    for i in range(shards):
        name = f"part{i}.safetensors"
        mine = dict(list(tensors.items())[i::shards])
        (folder / name).write_bytes(shard(mine))
        weight_map.update(dict.fromkeys(mine, name))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def per_expert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same model with one tensor per expert, like save_pretrained writes."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            at, inner = name.removesuffix("gate_up_proj"), tensor.shape[1] // 2
            for e, both in enumerate(tensor):
                found[f"{at}{e}.gate_proj.weight"] = both[:inner]
                found[f"{at}{e}.up_proj.weight"] = both[inner:]
        elif name.endswith("experts.down_proj"):
            at = name.removesuffix("down_proj")
            for e, down in enumerate(tensor):
                found[f"{at}{e}.down_proj.weight"] = down
        else:
            found[name] = tensor
    return found


def wide(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values as F32."""
    return {n: f32_from_bf16(t) if t.dtype == np.uint16 else t for n, t in tensors.items()}
