"""What a model is and what the user asked for: two frozen records, resolved once.

`ModelConfig.from_hf` is the only place above weights/ where Hugging Face's names are read.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from osmium.errors import CheckpointError, ConfigError

__all__ = [
    "EngineConfig", "ModelConfig", "Progress", "parse_count", "parse_size", "user_cache",
]  # fmt: skip

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total) while something long runs; stage is a short word for people."""

Mixer = Literal["attention", "delta_net"]


@dataclass(frozen=True)
class ModelConfig:
    """The shapes and constants of one model, from its config.json and generation_config.json."""

    model_type: str
    """HF's model_type, which is also the name of the file in models/."""
    vocab_size: int
    hidden_size: int
    """D."""
    layer_types: tuple[Mixer, ...]
    """One a layer."""
    num_heads: int
    """Query heads H of an attention layer."""
    num_kv_heads: int
    """Key and value heads G."""
    head_dim: int
    rotary_dim: int
    """How many of a head's values are rotated."""
    rope_theta: float
    key_heads: int
    """Key heads U of a delta-net layer."""
    value_heads: int
    """Value heads V of a delta-net layer."""
    key_dim: int
    """dk, values of a key head."""
    value_dim: int
    """dv, values of a value head."""
    num_experts: int
    """E, routed experts a layer."""
    top_k: int
    """A, experts a token activates."""
    moe_intermediate_size: int
    """I, inner size of a routed expert."""
    shared_intermediate_size: int
    """Inner size of the shared expert."""
    eps: float
    max_context: int
    """Tokens the model was made for."""
    tie_word_embeddings: bool
    """The head is the embedding."""
    eos_token_ids: tuple[int, ...]
    """Ids that end a reply: config.json's and generation_config.json's together, ascending."""

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

        Raises: CheckpointError naming the key that is missing or has a value we cannot compute.
        """
        model_type = str(config.get("model_type", "")).removesuffix("_text")
        if model_type != "qwen3_5_moe":
            raise CheckpointError(
                f"model_type is {config.get('model_type')!r}; this version runs qwen3_5_moe."
            )
        text = config.get("text_config", config)
        if not isinstance(text, Mapping):
            raise CheckpointError("text_config in config.json is not an object.")
        read = _Reader(text)
        layers = read.positive("num_hidden_layers")
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        if rope.get("rope_type", "default") != "default":
            raise CheckpointError(
                f"rope_type is {rope['rope_type']!r}; only 'default' is computed."
            )
        head_dim = read.positive("head_dim")
        partial = rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 1.0))
        made = cls(
            model_type=model_type,
            vocab_size=read.positive("vocab_size"),
            hidden_size=read.positive("hidden_size"),
            layer_types=_mixers(text, layers),
            num_heads=read.positive("num_attention_heads"),
            num_kv_heads=read.positive("num_key_value_heads"),
            head_dim=head_dim,
            rotary_dim=int(head_dim * _number("partial_rotary_factor", partial)),
            rope_theta=_number("rope_theta", rope.get("rope_theta", text.get("rope_theta"))),
            key_heads=read.positive("linear_num_key_heads"),
            value_heads=read.positive("linear_num_value_heads"),
            key_dim=read.positive("linear_key_head_dim"),
            value_dim=read.positive("linear_value_head_dim"),
            num_experts=read.positive("num_experts"),
            top_k=read.positive("num_experts_per_tok"),
            moe_intermediate_size=read.positive("moe_intermediate_size"),
            shared_intermediate_size=read.positive("shared_expert_intermediate_size"),
            eps=_number("rms_norm_eps", text.get("rms_norm_eps")),
            max_context=read.positive("max_position_embeddings"),
            tie_word_embeddings=bool(
                config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
            ),
            eos_token_ids=_eos(text, config, generation or {}),
        )
        made._check(text)
        return made

    def _check(self, text: Mapping[str, Any]) -> None:
        """Raises CheckpointError for what this engine does not compute."""
        rules = [
            (text.get("hidden_act", "silu") == "silu", "hidden_act", "'silu'"),
            (text.get("linear_conv_kernel_dim", 4) == 4, "linear_conv_kernel_dim", "4"),
            (text.get("attn_output_gate", True) is True, "attn_output_gate", "true"),
            (not text.get("attention_bias"), "attention_bias", "false"),
            (text.get("norm_topk_prob", True) is True, "norm_topk_prob", "true"),
            (not text.get("mlp_only_layers"), "mlp_only_layers", "empty"),
            (self.top_k <= self.num_experts, "num_experts_per_tok", "at most num_experts"),
            (self.num_experts <= 1024, "num_experts", "at most 1024"),
            (self.top_k <= 32, "num_experts_per_tok", "at most 32"),
            (self.num_heads % self.num_kv_heads == 0,
             "num_attention_heads", "a multiple of the KV heads"),
            (self.value_heads % self.key_heads == 0,
             "linear_num_value_heads", "a multiple of the key heads"),
            (self.head_dim % 32 == 0 and self.head_dim <= 256, "head_dim", "32, 64 ... 256"),
            (0 < self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0,
             "partial_rotary_factor", "such that an even part of a head turns"),
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
                raise CheckpointError(
                    f"{key} is {text.get(key)!r} in config.json; it must be {rule}."
                )


class _Reader:
    """Integers out of a config.json, with the key in every complaint."""

    def __init__(self, text: Mapping[str, Any]) -> None:
        self.text = text

    def positive(self, key: str) -> int:
        value = self.text.get(key)
        if value is None:
            raise CheckpointError(
                f"config.json has no {key}; the model cannot be built without it."
            )
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{key} is {value!r} in config.json; it must be a positive integer."
            )
        return value


def _number(key: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise CheckpointError(f"{key} is {value!r} in config.json; it must be a number.")
    return float(value)


def _mixers(text: Mapping[str, Any], layers: int) -> tuple[Mixer, ...]:
    kinds = text.get("layer_types")
    if kinds is None:
        every = text.get("full_attention_interval", 4)
        if not isinstance(every, int) or every < 1:
            raise CheckpointError(f"full_attention_interval is {every!r}; it must be 1 or more.")
        kinds = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    if not isinstance(kinds, list | tuple) or len(kinds) != layers:
        raise CheckpointError(f"layer_types must name num_hidden_layers = {layers} layers.")
    names: dict[str, Mixer] = {"linear_attention": "delta_net", "full_attention": "attention"}
    for kind in kinds:
        if kind not in names:
            raise CheckpointError(f"layer_types has {kind!r}; known are {', '.join(names)}.")
    return tuple(names[kind] for kind in kinds)


def _eos(*sources: Mapping[str, Any]) -> tuple[int, ...]:
    found: set[int] = set()
    for source in sources:
        value = source.get("eos_token_id")
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int):
                found.add(one)
            elif one is not None:
                raise CheckpointError(f"eos_token_id has {one!r}; ids are integers.")
    return tuple(sorted(found))


Device = Literal["auto", "cpu", "gpu"]


@dataclass(frozen=True)
class EngineConfig:
    """The user's choices: every flag, with underscores."""

    device: Device = "auto"
    """auto takes the GPU where there is one."""
    gpu_expert_bits: int = 4
    """Bits of a routed expert's weights: 16, 8 or 4."""
    attention_quant: Literal["bf16", "int8", "int4"] = "bf16"
    """Format of the attention and delta-net projections."""
    shared_expert_quant: Literal["auto", "bf16", "int8", "int4"] = "auto"
    """Format of the shared expert; auto is bf16 beside 16-bit experts, else int8."""
    lm_head_quant: Literal["auto", "bf16", "int8", "int4"] = "auto"
    """Format of the head; auto is bf16 beside 16-bit experts, else int8."""
    kv_dtype: Literal["auto", "fp8_e4m3", "bf16", "f32"] = "auto"
    """Format of the KV pages; auto is fp8_e4m3 on the GPU and f32 on the CPU.  fp8_e4m3 has an f16
    scale a token and head; f32 is for the CPU alone."""
    kv_cache_mb: int | None = None
    """MiB of VRAM for KV pages; None follows `context`."""
    context: int | None = None
    """Most tokens of a sequence, prompt and reply; None takes the model's, up to 32768 and to what
    `kv_cache_mb` holds."""
    vram: int | None = None
    """Bytes of VRAM to plan for, the CUDA context included; None takes what is free."""
    ram: int | None = None
    """Bytes of host memory to plan for; None takes what the system reports."""
    min_free_ram: int | None = None
    """Bytes of host memory below which the engine stops; None is 0.5 % of it, at least 512 MiB."""
    expert_slots: int | None = None
    """At most this many expert slots a layer."""
    enable_expert_cache: bool = True
    """Keep hot experts in VRAM; without it a layer has no more slots than a token needs."""
    prefetch: bool = True
    """Fetch an expert that the next layer may ask for while the link has nothing else to do; from
    compute capability 9.0 on."""
    write_combined: bool | None = None
    """Write-combined host memory for experts that stay there: False forbids, None and True take
    it.  tools/dma_bandwidth.py says which suits this machine."""
    prefill_chunk: int = 512
    """Most tokens of a prefill step."""
    page_size: int = 64
    """Tokens a page of KV."""
    max_num_seqs: int | None = None
    """Most requests whose state is held at once, others wait; None is 4, or as many as a step has
    rows."""
    replay_routing: str | None = None
    """A trace that is replayed instead of the router's choice, for benchmarks on random weights."""
    cache_dir: str | None = None
    """Where packed files go; None is $XDG_CACHE_HOME/osmium."""

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
                names = ", ".join(str(one) for one in known)
                raise ConfigError(f"{_flag(name)} is {value!r}; it must be one of {names}.")
        for name in ("vram", "ram", "min_free_ram"):
            size = getattr(self, name)
            if isinstance(size, int) and 0 < size < MIN_BYTES:
                hint = f" For {size} GiB say {_flag(name)} {size}G, in Python {size} << 30."
                raise ConfigError(
                    f"{_flag(name)} is {size} bytes; it must be at least 1 MiB."
                    + hint * (size <= 4096)
                )
        least = {"prefill_chunk": 1, "page_size": 1}
        optional = {
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
    """Where what can be made again is kept: osmium in $XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "osmium"


_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

MIN_BYTES = 1 << 20
"""The least that a size in bytes may be: 32 in place of 32 GiB is a mistake, not a budget."""


def parse_size(text: str) -> int:
    """Bytes of "18G", "512M", "1.5T" or "4096B": units are binary, and one has to be given.

    Raises: ConfigError.
    """
    number = _number_of(text.strip().lower())
    if number is not None:
        hint = f"say {number:g}G" if number <= 4096 else "write one, as in 32G or 512M"
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
    """A positive number that is all of the word; None for anything else."""
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
