"""The lab model: a small trained checkpoint in ../shared/lab-model, if present.

Reads tensors without osmium/weights, so that its tests do not depend on that code.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from osmium.config import ModelConfig
from tests.models.build import Tensor, packed_experts_of, weights_of
from tests.models.run import SequenceDriver

LAB = Path(__file__).resolve().parents[2].parent / "shared" / "lab-model"

_DTYPES = {"BF16": np.uint16, "F32": np.float32}


def tensors() -> dict[str, Tensor]:
    """The text model's tensors from all shards."""
    found: dict[str, Tensor] = {}
    for shard in sorted(LAB.glob("*.safetensors")):
        raw = shard.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header: dict[str, Any] = json.loads(raw[8 : 8 + size])
        for name, entry in header.items():
            if name.startswith(("model.language_model.", "lm_head.")):
                start, end = entry["data_offsets"]
                data = np.frombuffer(
                    raw[8 + size + start : 8 + size + end], _DTYPES[entry["dtype"]]
                )
                found[name] = data.reshape(entry["shape"])
    return found


def lab_model(bits: int = 16, **options: Any) -> SequenceDriver:
    """The lab model on the CPU, with experts of `bits` bits."""
    config = ModelConfig.from_hf(
        json.loads((LAB / "config.json").read_text()),
        json.loads((LAB / "generation_config.json").read_text()),
    )
    read = tensors()
    layout, experts = packed_experts_of(config, read, bits)
    return SequenceDriver(config, weights_of(config, read), layout, experts, **options)
