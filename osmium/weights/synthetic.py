"""Models of published shapes with seeded random weights: to measure a machine before downloading.

`synthetic:NAME`, or `synthetic:NAME:LAYERS` for the first so many layers of it.  What a part holds
depends on its name alone, so that any part can be made again, and compared, at any time: matrices
are words of a counter (quant/random_fill.py), the same on every backend, generated in place.
Random routers pick uniformly: give a routing trace with it (--replay-routing).  It has no token
that ends a reply, and its text is the bundled model's tokens: ids beyond those are shown as ids.

Shapes: the published configs of Qwen3.5-35B-A3B, -122B-A10B and -397B-A17B.
"""

import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.config import EngineConfig, ModelConfig, Progress
from osmium.errors import ConfigError
from osmium.ops import Array, LinearWeight, Ops
from osmium.ops.reference import ReferenceOps
from osmium.quant import random_fill
from osmium.quant.expert_layout import ExpertLayout
from osmium.quant.random_fill import BitPattern
from osmium.weights.checkpoint import Formats, TensorSpec, tensor_specs

__all__ = ["PREFIX", "Synthetic", "open_synthetic", "synthetic_name"]

PREFIX = "synthetic:"

_MADE = 2
"""Counts the ways in which parts were made: a packed file of another way is made again."""

_SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden": 64, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "key_heads": 2,
        "value_heads": 4, "head_size": 32, "experts": 8, "top_k": 2, "inner": 32, "vocab": 8192,
    },
    "qwen3.5-35b-a3b": {
        "hidden": 2048, "layers": 40, "heads": 16, "kv_heads": 2, "head_dim": 256, "key_heads": 16,
        "value_heads": 32, "head_size": 128, "experts": 256, "top_k": 8, "inner": 512,
        "vocab": 248320,
    },
    "qwen3.5-122b-a10b": {
        "hidden": 3072, "layers": 48, "heads": 32, "kv_heads": 2, "head_dim": 256, "key_heads": 16,
        "value_heads": 64, "head_size": 128, "experts": 256, "top_k": 8, "inner": 1024,
        "vocab": 248320,
    },
    "qwen3.5-397b-a17b": {
        "hidden": 4096, "layers": 60, "heads": 32, "kv_heads": 2, "head_dim": 256, "key_heads": 16,
        "value_heads": 64, "head_size": 128, "experts": 512, "top_k": 10, "inner": 1024,
        "vocab": 248320,
    },
}  # fmt: skip


def synthetic_name(model: str | os.PathLike[str] | None) -> str | None:
    """`synthetic:NAME[:LAYERS]` in small letters, however it is written; None for other models."""
    if not isinstance(model, str) or not model.lower().startswith(PREFIX):
        return None
    return model.lower()


def open_synthetic(name: str, options: EngineConfig) -> "Synthetic":
    """`synthetic:NAME[:LAYERS]`.  Raises: ConfigError naming what is known."""
    model, _, layers = name.removeprefix(PREFIX).partition(":")
    if model not in _SHAPES:
        raise ConfigError(f"There is no {PREFIX}{model}; known are {', '.join(_SHAPES)}.")
    shape = _SHAPES[model]
    if layers and not (layers.isdigit() and 1 <= int(layers) <= shape["layers"]):
        raise ConfigError(
            f"{name}: {layers!r} is no number of layers; {model} has {shape['layers']}."
        )
    return Synthetic(name, _config(shape, int(layers or shape["layers"])), Formats.of(options))


def _config(shape: dict[str, int], layers: int) -> dict[str, Any]:
    """As a config.json."""
    return {
        "model_type": "qwen3_5_moe",
        "vocab_size": shape["vocab"],
        "hidden_size": shape["hidden"],
        "num_hidden_layers": layers,
        "full_attention_interval": 4,
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25},
        "linear_num_key_heads": shape["key_heads"],
        "linear_num_value_heads": shape["value_heads"],
        "linear_key_head_dim": shape["head_size"],
        "linear_value_head_dim": shape["head_size"],
        "num_experts": shape["experts"],
        "num_experts_per_tok": shape["top_k"],
        "moe_intermediate_size": shape["inner"],
        "shared_expert_intermediate_size": shape["inner"],
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
    }


class Synthetic:
    """What weights.Packed is, made up."""

    def __init__(self, name: str, config: dict[str, Any], formats: Formats) -> None:
        self.path = Path(name)
        self.config, self.formats = ModelConfig.from_hf(config), formats
        self.record = ExpertLayout(
            formats.expert_bits, self.config.hidden_size, self.config.moe_intermediate_size
        )
        self.parts: dict[str, TensorSpec] = {p.name: p for p in tensor_specs(self.config, formats)}
        self.files = {"config.json": json.dumps(config, indent=1).encode()}
        self.fingerprint = f"{name} {_MADE}"
        self._ops = ReferenceOps()

    def names(self) -> list[str]:
        """Everything but the routed experts."""
        return list(self.parts)

    def file(self, name: str) -> bytes | None:
        """A small file: config.json, and what weights.open_weights takes from the bundled model."""
        return self.files.get(name)

    def json(self, name: str) -> dict[str, Any] | None:
        raw = self.file(name)
        return None if raw is None else dict(json.loads(raw))

    # -- parts -------------------------------------------------------------------------------------

    def tensor(self, name: str) -> LinearWeight | npt.NDArray[Any]:
        """A part; matrices keep the size of what they multiply."""
        made: LinearWeight | npt.NDArray[Any] = self.make(self._ops, name)
        return made

    def arrays(self, part: TensorSpec) -> dict[str, npt.NDArray[Any]]:
        """What a part is stored as: data, and a matrix's scale."""
        made = self.tensor(part.name)
        if not isinstance(made, LinearWeight):
            return {"data": made}
        return {"data": made.data, **({} if made.scale is None else {"scale": made.scale})}

    def make(self, ops: Ops, name: str, *, on_host: bool = False) -> Any:
        """A part, made by `ops` where its kernels reach it fast, or in host memory."""
        part = self.parts[name]
        if not part.matrix and part.format == "f32":
            return ops.to_device(_vector(_rng(name), name, part.shape))
        gain = 1.0 if name == "embed" else part.shape[-1] ** -0.5
        arrays = {}
        for kind, (shape, dtype) in part.arrays.items():
            nbytes = math.prod(shape) * dtype.itemsize
            room = (1, -(-nbytes // 16) * 16)
            out = (ops.empty_mapped if on_host else ops.empty)(room, np.uint8)
            which = _pattern(part.format, gain, kind == "scale")
            ops.random_fill(out, 0, room[1], random_fill.seed_from_name(f"{name}.{kind}"), which)
            arrays[kind] = out.reshape(room[1])[:nbytes].view(dtype).reshape(*shape)
        if not part.matrix:
            return arrays["data"]
        assert part.format != "f32", "matrices are bf16, int8 or int4"
        rows, columns = part.shape
        group = columns // arrays["scale"].shape[1] if part.format == "int4" else 0
        return LinearWeight(part.format, rows, columns, arrays["data"], arrays.get("scale"), group)

    def upload(self, ops: Ops) -> dict[str, Any]:
        """Every part, made by `ops` where models/weights.upload would put it."""
        return {name: self.make(ops, name, on_host=name == "embed") for name in self.parts}

    # -- experts -----------------------------------------------------------------------------------

    def generate_experts(self, ops: Ops, layer: int, out: Array, first: int = 0) -> None:
        """A layer's experts from `first` on into `out`, by `ops`: in VRAM, or in host memory that
        its kernels reach.

        out u8 [<= E, nbytes]
        """
        record, form = self.record, {16: "bf16", 8: "int8", 4: "int4"}[self.record.bits]
        seed = random_fill.skip_seed(
            random_fill.seed_from_name(f"experts.{layer}"), first * record.nbytes // 8
        )
        up, down = record.hidden**-0.5, record.inner**-0.5
        for start, end, gain, scales in (
            (0, record.up_scale, up, False),
            (record.up_scale, record.down, up, True),
            (record.down, record.down_scale, down, False),
            (record.down_scale, record.nbytes, down, True),
        ):
            # bf16 has no scales: what follows its matrices is none or padding
            if end > start:
                which = _pattern(form, gain, scales and form != "bf16")
                ops.random_fill(out, start, end - start, seed, which)

    def read_records(self, layer: int, out: npt.NDArray[np.uint8]) -> None:
        """A layer's experts into u8 [E, nbytes], on as many threads as there are cores."""
        threads = os.cpu_count() or 1
        some = -(-len(out) // (4 * threads))

        def fill(first: int) -> None:
            self.generate_experts(self._ops, layer, out[first : first + some], first)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(0, len(out), some)))

    def layers(self, wanted: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
        """The experts of some layers, u8 [E, nbytes] each; good until the next but one."""
        shape = (2, self.config.num_experts, self.record.nbytes)
        out = np.empty(shape, np.uint8)
        for i, layer in enumerate(wanted):
            self.read_records(layer, out[i % 2])
            yield out[i % 2]

    def one_record(self, layer: int, expert: int) -> npt.NDArray[np.uint8]:
        """One expert, u8 [nbytes]."""
        out = np.empty(self.record.nbytes, np.uint8)
        self.generate_experts(self._ops, layer, out[None], expert)
        return out

    def all_records(self, progress: Progress | None = None) -> npt.NDArray[np.uint8]:
        """The experts of all layers, u8 [L, E, nbytes], in memory."""
        shape = (self.config.num_layers, self.config.num_experts, self.record.nbytes)
        out = np.empty(shape, np.uint8)
        for layer in range(self.config.num_layers):
            if progress:
                progress("experts", layer, self.config.num_layers)
            self.read_records(layer, out[layer])
        return out


def _pattern(form: str, gain: float, scale: bool) -> BitPattern:
    """What stored words are made of, for numbers of a size near `gain`: uniform nibbles have a
    standard deviation of 4.6, uniform bytes of 74."""
    if form == "bf16":
        return random_fill.bf16(gain)
    if not scale:
        return random_fill.ALL_BITS
    return (
        random_fill.f16_scales(gain / 4.6) if form == "int4" else random_fill.f32_scales(gain / 74)
    )


def _rng(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))


def _vector(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Norms near nothing (their weights are one more), decays as trained models have them."""
    x = rng.standard_normal(shape, np.float32)
    last = name.rpartition(".")[2]
    if last == "gated_norm":
        return np.asarray(1 + 0.1 * x, np.float32)
    if last in ("a_log", "dt_bias"):
        return np.asarray(x - 1, np.float32)
    return np.asarray((0.5 if last == "conv" else 0.1) * x, np.float32)
