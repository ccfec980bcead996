"""Models of published shapes with seeded random weights: to measure a machine before downloading.

`synthetic:NAME`, or `synthetic:NAME:LAYERS` for the first so many layers of it.  What a part holds
depends on its name alone, so that any part can be made again, and compared, at any time.  Random
routers pick uniformly: give a routing trace with it (--routing).

Shapes: the published configs of Qwen3.5-35B-A3B, -122B-A10B and -397B-A17B.
"""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.config import EngineConfig, ModelConfig
from osmium.errors import ConfigError
from osmium.ops import Linear
from osmium.quant.record import Record
from osmium.weights.checkpoint import Formats, Part, inventory

__all__ = ["PREFIX", "Synthetic", "open_synthetic"]

PREFIX = "synthetic:"

_SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden": 64, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "key_heads": 2,
        "value_heads": 4, "head_size": 32, "experts": 8, "top_k": 2, "inner": 32, "vocab": 256,
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


def _config(shape: dict[str, int], layers: int) -> ModelConfig:
    kinds = ["delta_net" if (i + 1) % 4 else "attention" for i in range(layers)]
    return ModelConfig(
        model_type="qwen3_5_moe",
        vocab=shape["vocab"],
        hidden=shape["hidden"],
        mixers=tuple(kinds),  # type: ignore[arg-type]
        heads=shape["heads"],
        kv_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        rotary_dim=shape["head_dim"] // 4,
        rope_theta=1e7,
        key_heads=shape["key_heads"],
        value_heads=shape["value_heads"],
        key_dim=shape["head_size"],
        value_dim=shape["head_size"],
        experts=shape["experts"],
        top_k=shape["top_k"],
        expert_size=shape["inner"],
        shared_size=shape["inner"],
        eps=1e-6,
        max_context=262144,
        tied_head=False,
        eos=(),
    )


class Synthetic:
    """What weights.Packed is, made up."""

    def __init__(self, name: str, config: ModelConfig, formats: Formats) -> None:
        self.path = Path(name)
        self.config, self.formats = config, formats
        self.record = Record(formats.expert_bits, config.hidden, config.expert_size)
        self.parts: dict[str, Part] = {p.name: p for p in inventory(config, formats)}

    def names(self) -> list[str]:
        """Everything but the routed experts."""
        return list(self.parts)

    def file(self, name: str) -> bytes | None:
        """There are no files: no tokenizer, no template."""
        return None

    def json(self, name: str) -> dict[str, Any] | None:
        return None

    def tensor(self, name: str) -> Linear | npt.NDArray[Any]:
        """A part; matrices keep the size of what they multiply."""
        part = self.parts[name]
        rng = _rng(name)
        if not part.matrix and part.format == "f32":
            return _vector(rng, name, part.shape)
        arrays = part.arrays
        shape, dtype = arrays["data"]
        gain = part.shape[-1] ** -0.5
        data = _values(rng, shape, dtype, 1.0 if name == "embed" else gain)
        if not part.matrix:
            return data
        scale = None
        if "scale" in arrays:
            size, kind = arrays["scale"]
            scale = _scales(rng, int(np.prod(size)), part.format, gain).astype(kind).reshape(size)
        group = part.shape[1] // scale.shape[1] if scale is not None and scale.ndim == 2 else 0
        assert part.format != "f32", "matrices are bf16, int8 or int4"
        rows, columns = part.shape
        return Linear(part.format, rows, columns, data, scale, group)

    def read_records(self, layer: int, out: npt.NDArray[np.uint8]) -> None:
        """A layer's experts into u8 [E, nbytes], on as many threads as there are cores."""

        def fill(expert: int) -> None:
            out[expert] = self.one_record(layer, expert)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(fill, range(self.config.experts)))

    def one_record(self, layer: int, expert: int) -> npt.NDArray[np.uint8]:
        """One expert, u8 [nbytes]."""
        record, rng = self.record, _rng(f"experts.{layer}.{expert}")
        raw = rng.integers(0, 1 << 64, record.nbytes // 8, np.uint64, endpoint=False).view(np.uint8)
        parts = (
            (0, record.up_scale, record.down, 2 * record.inner, record.hidden),
            (record.down, record.down_scale, record.nbytes, record.hidden, record.inner),
        )
        for start, scales, end, rows, columns in parts:
            if record.bits == 16:
                _as_bf16(raw[start:end].view(np.uint16), columns**-0.5)
                continue
            form = "int8" if record.bits == 8 else "int4"
            width = 4 if record.bits == 8 else 2
            group = record.up_group if start == 0 else record.down_group
            count = rows if record.bits == 8 else rows * (columns // group)
            scale = _scales(rng, count, form, columns**-0.5)
            raw[scales : scales + count * width] = scale.astype(
                np.float32 if record.bits == 8 else np.float16
            ).view(np.uint8)
        return raw

    def all_records(self) -> npt.NDArray[np.uint8]:
        """The experts of all layers, u8 [L, E, nbytes], in memory."""
        shape = (self.config.layers, self.config.experts, self.record.nbytes)
        out = np.empty(shape, np.uint8)
        for layer in range(self.config.layers):
            self.read_records(layer, out[layer])
        return out


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


def _values(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any], gain: float
) -> npt.NDArray[Any]:
    """Random bits of a stored matrix; bf16 of a size near `gain`."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = rng.integers(0, 1 << 64, -(-nbytes // 8), np.uint64).view(np.uint8)[:nbytes]
    values = raw.view(dtype).reshape(shape)
    if dtype == np.uint16:
        _as_bf16(values, gain)
    return values


def _as_bf16(bits: npt.NDArray[np.uint16], gain: float) -> None:
    """Random bits to bf16 numbers: sign and mantissa stay, the exponent is that of `gain`."""
    exponent = 127 + int(np.floor(np.log2(gain)))
    np.bitwise_and(bits, 0x807F, out=bits)
    np.bitwise_or(bits, exponent << 7, out=bits)


def _scales(
    rng: np.random.Generator, count: int, form: str, gain: float
) -> npt.NDArray[np.float64]:
    """Scales that make uniform nibbles or bytes numbers of a size near `gain`."""
    spread = 74.0 if form == "int8" else 4.6  # the standard deviation of -128 .. 127, of -8 .. 7
    return np.asarray((0.5 + rng.random(count)) * gain / spread)
