"""A checkpoint's tensors, by Osmium's names and in its formats.

The only module with Hugging Face's tensor names.  `tensor_specs` lists the parts of a model;
a `Checkpoint` converts the shards to each part.  models/weights.py describes the parts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, cast

import numpy as np
import numpy.typing as npt

from osmium.config import EngineConfig, ModelConfig
from osmium.errors import CheckpointError
from osmium.quant import int4, int8
from osmium.quant.expert import pack_expert
from osmium.quant.expert_layout import ExpertLayout, group_of
from osmium.quant.finite import first_not_finite, is_finite, packed_is_finite
from osmium.quant.floats import bf16_from_f32, f32_from_bf16
from osmium.weights.choosing import summary
from osmium.weights.shards import Shards

__all__ = ["UNUSED", "Checkpoint", "Formats", "TensorSpec", "tensor_specs"]

Format = Literal["f32", "bf16", "int8", "int4"]


@dataclass(frozen=True)
class Formats:
    """Storage formats of the parts of a model."""

    expert_bits: int
    attention: Format
    shared: Format
    head: Format

    @classmethod
    def of(cls, config: EngineConfig) -> "Formats":
        """The formats of an engine's settings, with auto resolved."""
        auto: Format = "bf16" if config.gpu_expert_bits == 16 else "int8"
        shared, head = (
            auto if choice == "auto" else cast(Format, choice)
            for choice in (config.shared_expert_quant, config.lm_head_quant)
        )
        return cls(config.gpu_expert_bits, config.attention_quant, shared, head)

    def __str__(self) -> str:
        return f"experts{self.expert_bits}-{self.attention}-{self.shared}-{self.head}"


@dataclass(frozen=True)
class TensorSpec:
    """One named array or matrix of a model."""

    name: str
    shape: tuple[int, ...]
    format: Format
    matrix: bool
    """A LinearWeight; else a plain array in f32, or bf16 for the embedding."""
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    """Tensors to concatenate along the first axis: name without root, and shape."""
    root: bool = True
    """Whether the tensors' names start with the text model's root."""

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and dtype of its arrays: data, and a matrix's scale."""
        if self.format in ("f32", "bf16"):
            dtype = np.dtype(np.float32 if self.format == "f32" else np.uint16)
            return {"data": (self.shape, dtype)}
        rows, columns = self.shape
        if self.format == "int8":
            return {
                "data": ((rows, columns), np.dtype(np.int8)),
                "scale": ((rows,), np.dtype(np.float32)),
            }
        return {
            "data": ((rows, columns // 2), np.dtype(np.uint8)),
            "scale": ((rows, columns // group_of(columns)), np.dtype(np.float16)),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(math.prod(s) * dtype.itemsize for s, dtype in self.arrays.values())


def tensor_specs(config: ModelConfig, formats: Formats) -> list[TensorSpec]:
    """All parts but the routed experts.

    Raises: CheckpointError for a shape that does not fit its format.
    """
    parts = [
        _array(
            "embed",
            (("embed_tokens.weight", (config.vocab_size, config.hidden_size)),),
            form="bf16",
        ),
        _array("norm", (("norm.weight", (config.hidden_size,)),)),
    ]
    if not config.tie_word_embeddings:
        shape = (config.vocab_size, config.hidden_size)
        parts.append(
            TensorSpec("head", shape, formats.head, True, (("lm_head.weight", shape),), False)
        )
    for i in range(config.num_layers):
        parts += _layer(config, formats, i)
    for part in parts:
        step = {"bf16": 8, "int8": 16, "int4": 32}.get(part.format, 1)
        if part.matrix and part.shape[1] % step:
            raise CheckpointError(
                f"{part.name} is {list(part.shape)}; {part.format} needs its last axis to be a "
                f"multiple of {step}. Choose another format for it."
            )
    return parts


def _layer(config: ModelConfig, formats: Formats, i: int) -> Iterator[TensorSpec]:
    """The parts of one layer."""
    hidden, prefix = config.hidden_size, f"layers.{i}."  # of Osmium's names and of the sources

    def array(name: str, *sources: tuple[str, tuple[int, ...]]) -> TensorSpec:
        return _array(prefix + name, tuple((prefix + source, shape) for source, shape in sources))

    def matrix(name: str, form: Format, columns: int, *sources: tuple[str, int]) -> TensorSpec:
        shape = (sum(rows for _, rows in sources), columns)
        shapes = tuple((prefix + source, (rows, columns)) for source, rows in sources)
        return TensorSpec(prefix + name, shape, form, True, shapes)

    yield array("mixer_norm", ("input_layernorm.weight", (hidden,)))
    yield array("moe_norm", ("post_attention_layernorm.weight", (hidden,)))
    gates = (("mlp.gate.weight", config.num_experts), ("mlp.shared_expert_gate.weight", 1))
    yield matrix("router", "bf16", hidden, *gates)
    block, size = "mlp.shared_expert.", config.shared_intermediate_size
    gate_up = ((f"{block}gate_proj.weight", size), (f"{block}up_proj.weight", size))
    yield matrix("shared_up", formats.shared, hidden, *gate_up)
    yield matrix("shared_down", formats.shared, size, (f"{block}down_proj.weight", hidden))
    if config.layer_types[i] == "attention":
        block, d = "self_attn.", config.head_dim
        q, kv = 2 * config.num_heads * d, config.num_kv_heads * d
        qgkv = (
            (f"{block}q_proj.weight", q),
            (f"{block}k_proj.weight", kv),
            (f"{block}v_proj.weight", kv),
        )
        yield matrix("qgkv", formats.attention, hidden, *qgkv)
        yield array(
            "attention_norms", (f"{block}q_norm.weight", (d,)), (f"{block}k_norm.weight", (d,))
        )
        yield matrix(
            "attention_out",
            formats.attention,
            config.num_heads * d,
            (f"{block}o_proj.weight", hidden),
        )
    else:
        block, heads = "linear_attn.", config.value_heads
        values = heads * config.value_dim
        qkvz = (
            (f"{block}in_proj_qkv.weight", config.channels),
            (f"{block}in_proj_z.weight", values),
        )
        yield matrix("qkvz", formats.attention, hidden, *qkvz)
        ab = ((f"{block}in_proj_a.weight", heads), (f"{block}in_proj_b.weight", heads))
        yield matrix("ab", "bf16", hidden, *ab)
        yield array("conv", (f"{block}conv1d.weight", (config.channels, 1, 4)))
        yield array("a_log", (f"{block}A_log", (heads,)))
        yield array("dt_bias", (f"{block}dt_bias", (heads,)))
        yield array("gated_norm", (f"{block}norm.weight", (config.value_dim,)))
        yield matrix("delta_out", formats.attention, values, (f"{block}out_proj.weight", hidden))


def _array(
    name: str, sources: tuple[tuple[str, tuple[int, ...]], ...], form: Format = "f32"
) -> TensorSpec:
    shape = sources[0][1]
    if len(sources) > 1:
        shape = (len(sources), *shape)
    elif shape[1:2] == (1,):
        shape = (shape[0], *shape[2:])  # the convolution's middle axis
    return TensorSpec(name, shape, form, False, sources)


_EMBED, _HEAD = "embed_tokens.weight", "lm_head.weight"

_COMPARE_BYTES = 1 << 24
"""Bytes that are compared at once."""

_ROOTS = ("model.language_model.", "language_model.model.", "model.")
"""Where the text model's names start: published, MLX's, and the text class's own."""

UNUSED = (
    "model.visual.",
    "visual.",
    "vision_tower.",
    "mtp.",
    "model.mtp.",
    "language_model.mtp.",
)
"""Vision and multi-token prediction, which Osmium does not use."""


class Checkpoint:
    """The parts of one model, converted from its shards."""

    def __init__(self, shards: Shards, config: ModelConfig, formats: Formats) -> None:
        """Raises: CheckpointError for a tensor that is missing, extra or of the wrong shape.

        `config` is as config.json has it; self.config as the tensors are.
        """
        self.shards, self.formats = shards, formats
        self.layout = ExpertLayout(
            formats.expert_bits, config.hidden_size, config.moe_intermediate_size
        )
        names = shards.tensors
        marks = (_EMBED, "norm.weight")  # an embedding may be absent: _has_own_head
        roots = [root for mark in marks for root in _ROOTS if root + mark in names]
        if not roots:
            raise CheckpointError(
                f"{shards.folder} has no embed_tokens.weight under any of {', '.join(_ROOTS)}."
            )
        self.root = roots[0]
        if config.tie_word_embeddings and self._has_own_head():
            config = replace(config, tie_word_embeddings=False)
        self.config, self.parts = config, tensor_specs(config, formats)
        self.fused = f"{self.root}layers.0.mlp.experts.gate_up_proj" in names
        self._check()

    def _name(self, part: TensorSpec, source: str) -> str:
        if not part.root:
            return self._head_name()
        name = self.root + source
        if part.name == "embed" and self.config.tie_word_embeddings:
            return name if name in self.shards.tensors else self._head_name()
        return name

    def _head_name(self) -> str:
        nested = f"language_model.{_HEAD}"
        return nested if nested in self.shards.tensors else _HEAD

    def _has_own_head(self) -> bool:
        """Whether a head that config.json ties is in the files with other values.

        As in transformers: such a head is used; without an embedding, the head is the embedding.
        """
        tensors = self.shards.tensors
        embed, head = (tensors.get(name) for name in (f"{self.root}{_EMBED}", self._head_name()))
        if embed is None or head is None:
            return False
        if (embed.dtype, embed.shape) != (head.dtype, head.shape) or not head.file.is_file():
            return True
        size = min(head.nbytes, _COMPARE_BYTES)
        buffers = np.empty((2, size), np.uint8)
        for start in range(0, head.nbytes, size or 1):
            parts = buffers[:, : min(size, head.nbytes - start)]
            for tensor, out in zip((embed, head), parts, strict=True):
                self.shards.read_into(tensor.name, start, out)
            if not np.array_equal(*parts):
                return True
        return False

    def _unread(self) -> str:
        """For an error about a missing tensor: the files that were read and left out."""
        left_out = self.shards.left_out
        if not left_out:
            return ""
        files = summary([file.name for file in self.shards.files])
        return f" Of its files {files} was read, and left out: {summary(left_out)}."

    def _check(self) -> None:
        config = self.config
        expected: set[str] = set()
        for part in self.parts:
            expected |= self._check_tensors(
                {self._name(part, source): shape for source, shape in part.sources}
            )
        for i in range(config.num_layers):
            expected |= self._check_tensors(self._expert_shapes(i))
        tied = {_HEAD, f"language_model.{_HEAD}"} if config.tie_word_embeddings else set()
        for name in self.shards.tensors:
            if name not in expected and name not in tied and not name.startswith(UNUSED):
                raise CheckpointError(
                    f"{name} in {self.shards.tensors[name].file.name} is no tensor of "
                    f"{config.model_type} with this config.json."
                )

    def _check_tensors(self, expected: dict[str, tuple[int, ...]]) -> set[str]:
        """The names of `expected`.  Raises: CheckpointError."""
        for name, shape in expected.items():
            tensor = self.shards.tensors.get(name)
            if tensor is None:
                raise CheckpointError(
                    f"{self.shards.folder} lacks the tensor {name} {list(shape)}.{self._unread()}"
                )
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{name} is {list(tensor.shape)} in {tensor.file.name}; config.json requires "
                    f"{list(shape)}."
                )
            if tensor.dtype not in ("BF16", "F32", "F16"):
                raise CheckpointError(
                    f"{name} is {tensor.dtype} in {tensor.file.name}; this version reads BF16, F32 "
                    "and F16 checkpoints."
                )
        return set(expected)

    def _expert_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        config, prefix = self.config, f"{self.root}layers.{layer}.mlp.experts."
        experts, inner, hidden = (
            config.num_experts,
            config.moe_intermediate_size,
            config.hidden_size,
        )
        if self.fused:
            return {
                f"{prefix}gate_up_proj": (experts, 2 * inner, hidden),
                f"{prefix}down_proj": (experts, hidden, inner),
            }
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        return {
            f"{prefix}{e}.{kind}_proj.weight": shape
            for e in range(experts)
            for kind, shape in shapes.items()
        }

    @property
    def experts_are_bf16(self) -> bool:
        """Whether every routed expert is in bf16."""
        names = (name for i in range(self.config.num_layers) for name in self._expert_shapes(i))
        return all(self.shards.tensors[name].dtype == "BF16" for name in names)

    def expert_names(self, layer: int) -> list[list[str]]:
        """The tensor names of a layer's experts.

        Fused: one list, [gate_up, down] of all experts.  Else [gate, up, down] of each expert.
        """
        names = list(self._expert_shapes(layer))
        step = 2 if self.fused else 3
        return [names[i : i + step] for i in range(0, len(names), step)]

    def concatenated(self, part: TensorSpec, check: bool = False) -> npt.NDArray[Any]:
        """A part in the checkpoint's dtype: bf16, f16, or f32 if its sources' dtypes differ.

        Raises: CheckpointError, with `check` also for a value that is not finite.
        """
        sources = [self.shards.read(self._name(part, source)) for source, _ in part.sources]
        if check:
            for source, (name, _) in zip(sources, part.sources, strict=True):
                _refuse_not_finite(self._name(part, name), source)
        array = sources[0] if len(sources) == 1 else np.concatenate(_one_dtype(sources))
        return array.reshape(part.shape)

    def arrays(self, part: TensorSpec) -> dict[str, npt.NDArray[Any]]:
        """A part in its format: data, and a matrix's scale.

        Raises: CheckpointError for a value that is not finite.
        """
        quantised = part.format in ("int8", "int4")
        array = self.concatenated(part, check=not quantised)
        if part.format == "f32":
            return {"data": _f32(array)}
        if part.format == "bf16":
            data = array if array.dtype == np.uint16 else bf16_from_f32(_f32(array))
            if data is not array and not is_finite(data):
                self.refuse_part(part)
            return {"data": data}
        if part.format == "int8":
            data8, scale8 = int8.quantize(_f32(array))
            arrays: dict[str, npt.NDArray[Any]] = {"data": data8, "scale": scale8}
        else:
            data4, scale4 = int4.quantize(_f32(array), group_of(part.shape[1]))
            arrays = {"data": data4, "scale": scale4}
        if not is_finite(arrays["scale"]):
            self.refuse_part(part)
        return arrays

    def pack_expert(self, out: npt.NDArray[np.uint8], layer: int, expert: int) -> None:
        """Quantise and pack one routed expert into u8 [layout.nbytes].

        Raises: CheckpointError for a value that is not finite.
        """
        *ups, down = (tensor for _, tensor in self._expert(layer, expert))
        up = ups[0] if len(ups) == 1 else np.concatenate(_one_dtype(ups))
        up, down = _bf16_or_f32(up), _bf16_or_f32(down)
        pack_expert(out, self.layout, up, down)
        self.check_packed_expert(out, layer, expert)

    def check_packed_expert(self, packed: npt.NDArray[np.uint8], layer: int, expert: int) -> None:
        """Check the scales of a packed expert, or its values in 16 bits.

        Raises: CheckpointError that names a tensor which is not finite or too large.
        """
        if not packed_is_finite(packed, self.layout):
            tensors = self._expert(layer, expert)
            _refuse(tensors, f"{self.layout.bits}-bit experts", expert if self.fused else None)

    def _expert(self, layer: int, expert: int) -> list[tuple[str, npt.NDArray[Any]]]:
        """Names and values of an expert's tensors: gate and up, which may be one, and down."""
        prefix, at = f"{self.root}layers.{layer}.mlp.experts.", None
        if self.fused:
            names, at = [f"{prefix}gate_up_proj", f"{prefix}down_proj"], expert
        else:
            names = [f"{prefix}{expert}.{kind}_proj.weight" for kind in ("gate", "up", "down")]
        return [(name, self.shards.read(name, at)) for name in names]

    def refuse_part(self, part: TensorSpec) -> NoReturn:
        """Raises: CheckpointError that names the tensor which is not finite or too large."""
        names = [self._name(part, source) for source, _ in part.sources]
        _refuse([(name, self.shards.read(name)) for name in names], part.format)


def _refuse(
    tensors: list[tuple[str, npt.NDArray[Any]]], form: str, expert: int | None = None
) -> NoReturn:
    """Raises: CheckpointError that names the tensor which is not finite, or is too large."""
    for name, tensor in tensors:
        _refuse_not_finite(name, tensor, expert)
    largest, name = max((float(np.abs(_f32(tensor)).max()), name) for name, tensor in tensors)
    raise CheckpointError(
        f"{name} has a value of magnitude {largest:g}, which is too large for {form}; the file is "
        "damaged, or choose another format."
    )


def _refuse_not_finite(name: str, tensor: npt.NDArray[Any], expert: int | None = None) -> None:
    """Raises: CheckpointError for a value that is not finite; `expert` is its first index."""
    found = first_not_finite(tensor)
    if found is None:
        return
    index, kind, count = found
    at = list(index if expert is None else (expert, *index))
    raise CheckpointError(
        f"{name} has {kind} at {at}, {count} of its {tensor.size} values"
        f"{'' if expert is None else f' of expert {expert}'} are not finite; weights must be "
        "finite. The file is damaged or its training diverged: download it again, or use another."
    )


def _f32(x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return f32_from_bf16(x) if x.dtype == np.uint16 else x.astype(np.float32, copy=False)


def _bf16_or_f32(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """bf16 unchanged, other dtypes as f32."""
    return x if x.dtype == np.uint16 else _f32(x)


def _one_dtype(arrays: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Arrays of one dtype, f32 if theirs differ: NumPy would convert bf16 as integers."""
    return arrays if len({x.dtype for x in arrays}) == 1 else [_f32(x) for x in arrays]
