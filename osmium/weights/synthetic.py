"""Models of published shapes with seeded random weights: to measure a machine before downloading.

`synthetic:NAME`, or `synthetic:NAME:LAYERS` for its first LAYERS layers.  The contents of a part
depend only on its name, so that any part can be generated again and compared.  Kernels generate
matrices in VRAM or host memory from a counter (quant/random_fill.py), the same on every backend.

Random routers pick uniformly: use a routing trace (--replay-routing).  A synthetic model has no
end-of-sequence token.  Its tokenizer is the bundled model's; ids beyond it are shown as numbers.

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

_VERSION = 2
"""Version of the generator, part of the fingerprint: packed files of others are written again."""

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
    """`synthetic:NAME[:LAYERS]` in lower case; None for other models."""
    if not isinstance(model, str) or not model.lower().startswith(PREFIX):
        return None
    return model.lower()


def open_synthetic(name: str, options: EngineConfig) -> "Synthetic":
    """The model `synthetic:NAME[:LAYERS]`.  Raises: ConfigError for an unknown name."""
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
    """The shape as a config.json."""
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
    """A model with generated weights, with the methods of weights.PackedModel."""

    def __init__(self, name: str, config: dict[str, Any], formats: Formats) -> None:
        self.path = Path(name)
        self.config, self.formats = ModelConfig.from_hf(config), formats
        self.layout = ExpertLayout(
            formats.expert_bits, self.config.hidden_size, self.config.moe_intermediate_size
        )
        self.parts: dict[str, TensorSpec] = {p.name: p for p in tensor_specs(self.config, formats)}
        self.files = {"config.json": json.dumps(config, indent=1).encode()}
        self.fingerprint = f"{name} {_VERSION}"
        self._ops = ReferenceOps()

    def names(self) -> list[str]:
        """Names of all tensors but the routed experts'."""
        return list(self.parts)

    def file(self, name: str) -> bytes | None:
        """A small file: config.json, or one that open_weights copies from the bundled model."""
        return self.files.get(name)

    def json(self, name: str) -> dict[str, Any] | None:
        raw = self.file(name)
        return None if raw is None else dict(json.loads(raw))

    # -- parts -------------------------------------------------------------------------------------

    def tensor(self, name: str) -> LinearWeight | npt.NDArray[Any]:
        """A part, generated by NumPy.  Matrices have a gain of about 1."""
        tensor: LinearWeight | npt.NDArray[Any] = self.make(self._ops, name)
        return tensor

    def arrays(self, part: TensorSpec) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a part: data, and a matrix's scale."""
        tensor = self.tensor(part.name)
        if not isinstance(tensor, LinearWeight):
            return {"data": tensor}
        return {"data": tensor.data, **({} if tensor.scale is None else {"scale": tensor.scale})}

    def make(self, ops: Ops, name: str, *, on_host: bool = False) -> Any:
        """A part, generated by `ops` in VRAM, or with `on_host` in mapped host memory."""
        part = self.parts[name]
        if not part.matrix and part.format == "f32":
            return ops.to_device(_vector(_rng(name), name, part.shape))
        gain = 1.0 if name == "embed" else part.shape[-1] ** -0.5
        arrays = {}
        for kind, (shape, dtype) in part.arrays.items():
            nbytes = math.prod(shape) * dtype.itemsize
            padded = -(-nbytes // 16) * 16
            out = (ops.empty_mapped if on_host else ops.empty)((1, padded), np.uint8)
            pattern = _pattern(part.format, gain, kind == "scale")
            ops.random_fill(out, 0, padded, random_fill.seed_from_name(f"{name}.{kind}"), pattern)
            arrays[kind] = out.reshape(padded)[:nbytes].view(dtype).reshape(*shape)
        if not part.matrix:
            return arrays["data"]
        assert part.format != "f32", "matrices are bf16, int8 or int4"
        rows, columns = part.shape
        group = columns // arrays["scale"].shape[1] if part.format == "int4" else 0
        return LinearWeight(part.format, rows, columns, arrays["data"], arrays.get("scale"), group)

    def upload(self, ops: Ops) -> dict[str, Any]:
        """All parts, generated by `ops` in the memory where models/weights.upload places them."""
        return {name: self.make(ops, name, on_host=name == "embed") for name in self.parts}

    # -- experts -----------------------------------------------------------------------------------

    def generate_experts(self, ops: Ops, layer: int, out: Array, first: int = 0) -> None:
        """Generate a layer's packed experts from number `first` on, by `ops`.

        out u8 [<= E, nbytes], in VRAM or mapped host memory
        """
        layout, form = self.layout, {16: "bf16", 8: "int8", 4: "int4"}[self.layout.bits]
        seed = random_fill.skip_seed(
            random_fill.seed_from_name(f"experts.{layer}"), first * layout.nbytes // 8
        )
        up, down = layout.hidden**-0.5, layout.inner**-0.5
        for start, end, gain, scales in (
            (0, layout.up_scale, up, False),
            (layout.up_scale, layout.down, up, True),
            (layout.down, layout.down_scale, down, False),
            (layout.down_scale, layout.nbytes, down, True),
        ):
            # bf16 has no scales: nothing or padding follows its matrices
            if end > start:
                pattern = _pattern(form, gain, scales and form != "bf16")
                ops.random_fill(out, start, end - start, seed, pattern)

    def read_packed_experts(self, layer: int, out: npt.NDArray[np.uint8]) -> None:
        """Generate a layer's packed experts, u8 [E, nbytes], with one thread per core."""
        threads = os.cpu_count() or 1
        chunk = -(-len(out) // (4 * threads))

        def fill(first: int) -> None:
            self.generate_experts(self._ops, layer, out[first : first + chunk], first)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(0, len(out), chunk)))

    def layers(self, wanted: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
        """The packed experts of the layers `wanted`, u8 [E, nbytes] each.

        Two buffers alternate: an array is overwritten two layers later.
        """
        shape = (2, self.config.num_experts, self.layout.nbytes)
        out = np.empty(shape, np.uint8)
        for i, layer in enumerate(wanted):
            self.read_packed_experts(layer, out[i % 2])
            yield out[i % 2]

    def packed_expert(self, layer: int, expert: int) -> npt.NDArray[np.uint8]:
        """One packed expert, u8 [nbytes]."""
        out = np.empty(self.layout.nbytes, np.uint8)
        self.generate_experts(self._ops, layer, out[None], expert)
        return out

    def all_packed_experts(self, progress: Progress | None = None) -> npt.NDArray[np.uint8]:
        """The packed experts of all layers, u8 [L, E, nbytes], in memory."""
        shape = (self.config.num_layers, self.config.num_experts, self.layout.nbytes)
        out = np.empty(shape, np.uint8)
        for layer in range(self.config.num_layers):
            if progress:
                progress("experts", layer, self.config.num_layers)
            self.read_packed_experts(layer, out[layer])
        return out


def _pattern(form: str, gain: float, scale: bool) -> BitPattern:
    """The bit pattern whose numbers have a standard deviation near `gain`.

    Uniform nibbles have a standard deviation of 4.6, uniform bytes of 74.
    """
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
    """f32 vectors: norms near 0 (kernels add 1), decays as in trained models."""
    x = rng.standard_normal(shape, np.float32)
    last = name.rpartition(".")[2]
    if last == "gated_norm":
        return np.asarray(1 + 0.1 * x, np.float32)
    if last in ("a_log", "dt_bias"):
        return np.asarray(x - 1, np.float32)
    return np.asarray((0.5 if last == "conv" else 0.1) * x, np.float32)
