"""The published checkpoints as a hub serves them, without weights.

Names, shapes and dtypes of the text model follow the configs. Vision and multi-token prediction,
which are not read, are one tensor each of the missing size.
"""

import json
import math
from typing import Any

from osmium.config import EngineConfig
from osmium.weights.checkpoint import Formats, tensor_specs
from osmium.weights.choosing import INDEX
from osmium.weights.synthetic import open_synthetic
from tests.weights.stand_in_hub import HubFile

__all__ = ["PUBLISHED", "published"]

PUBLISHED = {
    "Qwen/Qwen3.5-35B-A3B": ("qwen3.5-35b-a3b", 14, 71_903_655_008),
    "Qwen/Qwen3.5-122B-A10B": ("qwen3.5-122b-a10b", 39, 250_173_007_840),
}
"""Per hub id: shapes, shards, and bytes of all tensors."""

ROOT = "model.language_model."

TOKENIZER_BYTES = 12_807_982


def published(name: str) -> dict[str, HubFile]:
    """The files of a published model; shards and tokenizer are virtual."""
    shapes, count, nbytes = PUBLISHED[name]
    synthetic = open_synthetic(f"synthetic:{shapes}", EngineConfig())
    tensors = _tensors(synthetic.config)
    held = sum(2 * math.prod(shape) for shape in tensors.values())
    tensors["model.visual.all"] = ((nbytes - held) // 4,)
    tensors["mtp.all"] = ((nbytes - held) // 2 - (nbytes - held) // 4,)
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(count)]
    done = 0
    for tensor, shape in tensors.items():
        shards[done * count // nbytes][tensor] = shape
        done += 2 * math.prod(shape)
    named = {
        f"model.safetensors-{i + 1:05}-of-{count:05}.safetensors": shard
        for i, shard in enumerate(shards)
    }
    index = {
        "metadata": {"total_size": nbytes},
        "weight_map": {tensor: file for file, shard in named.items() for tensor in shard},
    }
    small = {
        "config.json": synthetic.files["config.json"],
        "generation_config.json": b'{"eos_token_id": [248046, 248044]}',
        INDEX: json.dumps(index).encode(),
    }
    return {
        **{file: HubFile.whole(content) for file, content in small.items()},
        "tokenizer.json": HubFile(b"", TOKENIZER_BYTES),
        **{file: _shard(shard) for file, shard in named.items()},
    }


def _tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the text model in Hugging Face's scheme."""
    found = {}
    for part in tensor_specs(config, Formats.of(EngineConfig(gpu_expert_bits=16))):
        for source, shape in part.sources:
            found[(ROOT if part.root else "") + source] = shape
    experts, inner, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
    for i in range(config.num_layers):
        at = f"{ROOT}layers.{i}.mlp.experts."
        found[f"{at}gate_up_proj"] = (experts, 2 * inner, hidden)
        found[f"{at}down_proj"] = (experts, hidden, inner)
    return found


def _shard(tensors: dict[str, tuple[int, ...]]) -> HubFile:
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return HubFile(len(text).to_bytes(8, "little") + text, 8 + len(text) + end)
