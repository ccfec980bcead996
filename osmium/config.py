"""The configuration of a model and of the engine: two frozen dataclasses, resolved once.

Above weights/, only `ModelConfig.from_hf` reads Hugging Face's key names.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from osmium.errors import CheckpointError, ConfigError, shown
from osmium.hf import MAX_POSITIONS, Section, read_rope

__all__ = [
    "EngineConfig", "ModelConfig", "Progress", "parse_count", "parse_size", "user_cache",
]  # fmt: skip

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total) during long work; stage is a short word for display."""

LayerType = Literal["attention", "delta_net"]


@dataclass(frozen=True)
class ModelConfig:
    """The shapes and constants of one model, from its config.json and generation_config.json."""

    model_type: str
    """HF's model_type, and the name of the file in models/."""
    vocab_size: int
    hidden_size: int
    """D."""
    layer_types: tuple[LayerType, ...]
    """The mixer of each layer."""
    num_heads: int
    """Query heads H of an attention layer."""
    num_kv_heads: int
    """Key and value heads G."""
    head_dim: int
    rotary_dim: int
    """R, values of a head that RoPE rotates."""
    rope_frequencies: tuple[float, ...]
    """Radians per position of each of the R / 2 pairs."""
    rope_factor: float
    """Factor of the rotated values of queries and keys; 1 without YaRN."""
    key_heads: int
    """Key heads U of a delta-net layer."""
    value_heads: int
    """Value heads V of a delta-net layer."""
    key_dim: int
    """dk, values of a key head."""
    value_dim: int
    """dv, values of a value head."""
    num_experts: int
    """E, routed experts per layer."""
    top_k: int
    """A, routed experts per token."""
    moe_intermediate_size: int
    """I, inner size of a routed expert."""
    shared_intermediate_size: int
    """Is, inner size of the shared expert."""
    eps: float
    max_context: int
    """Maximum tokens of context of the model."""
    tie_word_embeddings: bool
    """Whether the head's weight is the embedding's."""
    eos_token_ids: tuple[int, ...]
    """Ids that end a response, of config.json and generation_config.json together, ascending."""

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layer_types)

    @property
    def channels(self) -> int:
        """C, channels of a delta-net layer's convolution: queries, keys, values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """Read a config.json, nested (text_config) or flat, and a generation_config.json.

        Absent keys have the family's defaults, as in transformers.
        Raises: CheckpointError, with the key that has an unsupported value.
        """
        model_type = str(config.get("model_type", "")).removesuffix("_text")
        if model_type != "qwen3_5_moe":
            raise CheckpointError(
                f"model_type is {shown(config.get('model_type'))}; this version runs qwen3_5_moe."
            )
        text = config.get("text_config", config)
        if not isinstance(text, Mapping):
            raise CheckpointError(
                f"text_config is {shown(text)} in config.json; it must be an object."
            )
        read = Section(text)
        layers = read.integer("num_hidden_layers", 40, most=1024)
        head_dim = read.integer("head_dim", 256)
        max_positions = read.integer("max_position_embeddings", 32768, least=2, most=MAX_POSITIONS)
        rope = read_rope(config, text, head_dim, max_positions)
        tied = [Section(part).boolean("tie_word_embeddings", False) for part in (config, text)]
        result = cls(
            model_type=model_type,
            vocab_size=read.integer("vocab_size", 248320, most=MAX_POSITIONS),
            hidden_size=read.integer("hidden_size", 2048),
            layer_types=_layer_types(read, layers),
            num_heads=read.integer("num_attention_heads", 16),
            num_kv_heads=read.integer("num_key_value_heads", 2),
            head_dim=head_dim,
            rotary_dim=rope.rotary_dim,
            rope_frequencies=rope.frequencies,
            rope_factor=rope.factor,
            key_heads=read.integer("linear_num_key_heads", 16),
            value_heads=read.integer("linear_num_value_heads", 32),
            key_dim=read.integer("linear_key_head_dim", 128),
            value_dim=read.integer("linear_value_head_dim", 128),
            num_experts=read.integer("num_experts", 256),
            top_k=read.integer("num_experts_per_tok", 8),
            moe_intermediate_size=read.integer("moe_intermediate_size", 512),
            shared_intermediate_size=read.integer("shared_expert_intermediate_size", 512),
            eps=read.number("rms_norm_eps", 1e-6, most=1.0),
            max_context=rope.max_positions,
            tie_word_embeddings=any(tied),
            eos_token_ids=_eos_token_ids(text, config, generation or {}),
        )
        result._check(read)
        return result

    def _check(self, read: Section) -> None:
        """Raises: CheckpointError for a value that this engine does not support."""
        text = read.values
        rules = [
            (text.get("hidden_act") in (None, "silu", "swish"), "hidden_act", "'silu'"),
            (text.get("output_gate_type") in (None, "silu", "swish"),
             "output_gate_type", "'silu' or 'swish'"),
            (read.integer("linear_conv_kernel_dim", 4) == 4, "linear_conv_kernel_dim", "4"),
            (read.boolean("attn_output_gate", True), "attn_output_gate", "true"),
            (not read.boolean("attention_bias", False), "attention_bias", "false"),
            (read.boolean("norm_topk_prob", True), "norm_topk_prob", "true"),
            (not text.get("mlp_only_layers"), "mlp_only_layers", "empty"),
            (not text.get("per_layer_config"), "per_layer_config", "absent"),
            (self.top_k <= self.num_experts, "num_experts_per_tok", "at most num_experts"),
            (self.num_experts <= 1024, "num_experts", "at most 1024"),
            (self.top_k <= 32, "num_experts_per_tok", "at most 32"),
            (self.num_heads % self.num_kv_heads == 0,
             "num_attention_heads", "a multiple of the KV heads"),
            (self.value_heads % self.key_heads == 0,
             "linear_num_value_heads", "a multiple of the key heads"),
            (self.head_dim % 32 == 0 and self.head_dim <= 256, "head_dim", "32, 64 ... 256"),
            (self.key_dim % 32 == 0 and self.key_dim <= 128,
             "linear_key_head_dim", "32, 64, 96 or 128"),
            (self.value_dim % 32 == 0 and self.value_dim <= 128, "linear_value_head_dim",
             "32, 64, 96 or 128"),
            (self.hidden_size % 32 == 0, "hidden_size", "a multiple of 32"),
            (self.moe_intermediate_size % 16 == 0, "moe_intermediate_size", "a multiple of 16"),
            (self.shared_intermediate_size % 16 == 0,
             "shared_expert_intermediate_size", "a multiple of 16"),
        ]  # fmt: skip
        for holds, key, rule in rules:
            if not holds:
                read.refuse(key, rule)


def _layer_types(read: Section, layers: int) -> tuple[LayerType, ...]:
    names: dict[str, LayerType] = {
        "linear_attention": "delta_net",
        "full_attention": "attention",
    }
    kinds = read.values.get("layer_types")
    if kinds is None:
        interval = read.integer("full_attention_interval", 4)
        kinds = [
            "linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)
        ]
    if not isinstance(kinds, list) or len(kinds) != layers:
        read.refuse("layer_types", f"a list of num_hidden_layers = {layers} names")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in names:
            raise CheckpointError(
                f"layer_types has {shown(kind)} in config.json; known are {', '.join(names)}."
            )
    return tuple(names[kind] for kind in kinds)


MAX_EOS = 256
"""Most end tokens of a model: each generated token is compared with all of them."""


def _eos_token_ids(*sources: Mapping[str, Any]) -> tuple[int, ...]:
    ids: set[int] = set()
    for source in sources:
        value = source.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if (
                isinstance(token, int)
                and not isinstance(token, bool)
                and 0 <= token < MAX_POSITIONS
            ):
                ids.add(token)
            elif token is not None:
                raise CheckpointError(
                    f"eos_token_id has {shown(token)}; ids are integers from 0 to {MAX_POSITIONS}."
                )
    if len(ids) > MAX_EOS:
        raise CheckpointError(f"eos_token_id lists {len(ids)} ids; it may list {MAX_EOS}.")
    return tuple(sorted(ids))


Device = Literal["auto", "cpu", "gpu"]


@dataclass(frozen=True)
class EngineConfig:
    """The user's options: every flag, with underscores."""

    device: Device = "auto"
    """auto uses the GPU where there is one."""
    gpu_expert_bits: int = 4
    """Bits per weight of a routed expert: 16, 8 or 4."""
    attention_quant: Literal["bf16", "int8", "int4"] = "bf16"
    """Format of the attention and delta-net projections."""
    shared_expert_quant: Literal["auto", "bf16", "int8", "int4"] = "auto"
    """Format of the shared expert; auto is bf16 with 16-bit experts, else int8."""
    lm_head_quant: Literal["auto", "bf16", "int8", "int4"] = "auto"
    """Format of the head; auto is bf16 with 16-bit experts, else int8."""
    kv_dtype: Literal["auto", "fp8_e4m3", "bf16", "f32"] = "auto"
    """Format of the KV pages; auto is fp8_e4m3 on the GPU and f32 on the CPU.  fp8_e4m3 has one f16
    scale per token and head; f32 is for the CPU only."""
    kv_cache_mb: int | None = None
    """MiB of VRAM for KV pages; None follows `context`."""
    context: int | None = None
    """Most tokens of a sequence, prompt and response.  None is the model's maximum, limited to
    32768 and to the capacity of `kv_cache_mb`."""
    vram: int | None = None
    """Bytes of VRAM to plan for, the CUDA context included; None is all free VRAM."""
    ram: int | None = None
    """Bytes of host memory to plan for; None is the system's value."""
    min_free_ram: int | None = None
    """The engine stops below this many bytes of available host memory.  None is 0.5 % of all, at
    least 512 MiB."""
    expert_slots: int | None = None
    """Most expert slots per layer; None is as many as VRAM holds."""
    enable_expert_cache: bool = True
    """Cache experts in VRAM; without it a layer has only the slots that one token needs."""
    prefetch: bool = True
    """Prefetch an expert of the next layer while the link is idle; needs compute capability 9.0."""
    write_combined: bool | None = None
    """Write-combined memory for host experts: True uses it, False forbids it, None chooses by
    measured copy rates.  tools/dma_bandwidth.py measures all kinds."""
    prefill_chunk: int | None = None
    """Most tokens of a prompt per pass over the layers; each missing expert crosses the link once
    per pass.  None is 10240, or 8192 where VRAM holds every expert, less on small GPUs."""
    decode_gap_ms: int = 100
    """Longest time between two tokens of a running response while prompts are read,
    milliseconds."""
    page_size: int = 64
    """Tokens per KV page."""
    max_num_seqs: int | None = None
    """Most requests with state at once; others wait.  None is 4, or the rows of a step if fewer."""
    replay_routing: str | None = None
    """A trace to replay instead of the router's choice, for benchmarks on random weights."""
    cache_dir: str | None = None
    """Folder of packed files; None is $XDG_CACHE_HOME/osmium."""

    def __post_init__(self) -> None:
        choices = [
            ("device", self.device, ("auto", "cpu", "gpu")),
            ("gpu_expert_bits", self.gpu_expert_bits, (16, 8, 4)),
            ("attention_quant", self.attention_quant, ("bf16", "int8", "int4")),
            ("shared_expert_quant", self.shared_expert_quant, ("auto", "bf16", "int8", "int4")),
            ("lm_head_quant", self.lm_head_quant, ("auto", "bf16", "int8", "int4")),
            ("kv_dtype", self.kv_dtype, ("auto", "fp8_e4m3", "bf16", "f32")),
        ]
        for name, value, known in choices:
            if value not in known:
                names = ", ".join(map(str, known))
                raise ConfigError(f"{_flag(name)} is {value!r}; it must be one of {names}.")
        for name in ("vram", "ram", "min_free_ram"):
            size = getattr(self, name)
            if isinstance(size, int) and 0 < size < MIN_BYTES:
                hint = f" For {size} GiB use {_flag(name)} {size}G, in Python {size} << 30."
                raise ConfigError(
                    f"{_flag(name)} is {size} bytes; it must be at least 1 MiB."
                    + hint * (size <= 4096)
                )
        least = {"page_size": 1, "decode_gap_ms": 1}
        optional = {
            "prefill_chunk": 1,
            "kv_cache_mb": 1,
            "context": 2,
            "vram": 1,
            "ram": 1,
            "min_free_ram": 1,
            "expert_slots": 1,
            "max_num_seqs": 1,
        }
        for name, low in {**least, **optional}.items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(
                    f"{_flag(name)} is {value!r}; it must be an integer of at least {low}."
                )


def _flag(name: str) -> str:
    """The flag that sets an EngineConfig field."""
    name = {"enable_expert_cache": "hcs", "write_combined": "wc-alloc"}.get(name, name)
    return "--" + name.replace("_", "-")


def user_cache() -> Path:
    """The folder of files that can be made again: osmium in $XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "osmium"


_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

MIN_BYTES = 1 << 20
"""Smallest size of memory, bytes: a smaller one is a missing unit, as in 32 for 32G."""


def parse_size(text: str) -> int:
    """Bytes of "18G", "512M", "1.5T" or "4096B"; units are binary and required.

    Raises: ConfigError.
    """
    number = _number_of(text.strip().lower())
    if number is not None:
        hint = f"write {number:g}G" if number <= 4096 else "write one, as in 32G or 512M"
        raise ConfigError(f"{text!r} has no unit: {hint} ({text.strip()}B would be bytes).")
    word = text.strip().lower().removesuffix("b").removesuffix("i")
    value = _number_of(word)
    if value is None and word[-1:] in _UNITS:
        value = _number_of(word[:-1])
        value = None if value is None else value * _UNITS[word[-1]]
    if value is None:
        raise ConfigError(f"{text!r} is not a size; write a number and K, M, G or T, as in 18G.")
    return int(value)


def parse_count(text: str) -> int:
    """Tokens of "32k" (32 * 1024) or "32768".  Raises: ConfigError."""
    word = text.strip().lower()
    value = _number_of(word)
    if value is None and word[-1:] in _UNITS:
        value = _number_of(word[:-1])
        value = None if value is None else value * _UNITS[word[-1]]
    if value is None:
        raise ConfigError(f"{text!r} is not a number of tokens; write 32768 or 32k.")
    return int(value)


def _number_of(word: str) -> float | None:
    """The positive, finite number that `word` is; None for anything else."""
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
