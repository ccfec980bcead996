"""Seeded models of every shape: a config, the checkpoint's tensors, and the loaded weights.

Golden files hold only logits, so the weights must never change. They come from PCG64's raw words, a
stream that NumPy keeps stable, by exact arithmetic.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.config import ModelConfig
from osmium.ops import LinearWeight
from osmium.quant import int4, int8
from osmium.quant.expert_layout import ExpertLayout
from osmium.quant.floats import bf16_from_f32, f32_from_bf16

Tensor = npt.NDArray[Any]
"""f32, or bf16 as u16."""


@dataclass(frozen=True)
class Case:
    """One seeded model and its prompt."""

    name: str
    seed: int
    hidden: int
    kinds: str
    """One letter per layer: d for delta net, a for attention."""
    heads: tuple[int, int, int]
    """Query heads, key/value heads, head size."""
    rotary: float
    """Fraction of a head that RoPE rotates."""
    delta: tuple[int, int, int, int]
    """Key heads, value heads, key size, value size."""
    experts: tuple[int, int, int]
    """Number of experts, experts per token, intermediate size."""
    shared: int
    tied: bool
    prompt: int
    """Prompt tokens."""
    theta: float = 1e7
    vocab: int = 96
    wide: bool = True
    """Whether A_log and the gated norm are F32, like in Qwen3.5, else BF16, like in Qwen3.6."""


CASES = [
    Case("three_to_one", 1, 128, "ddda", (4, 2, 64), 0.25, (2, 4, 32, 32), (8, 2, 64), 64,
         False, 150),
    Case("seven_experts", 2, 96, "ada", (3, 1, 32), 0.5, (1, 3, 32, 64), (7, 3, 48), 32,
         True, 37),
    Case("top_one_of_five", 3, 64, "dadad", (6, 3, 64), 1.0, (2, 2, 64, 32), (5, 1, 32), 48,
         False, 61, theta=1e4),
    Case("as_many_kv_heads", 4, 64, "dddadd", (4, 4, 32), 0.75, (2, 8, 32, 32), (16, 4, 16), 16,
         True, 129, wide=False),
    Case("all_of_four", 5, 160, "da", (8, 1, 256), 0.25, (1, 4, 128, 128), (4, 4, 32), 80,
         False, 100, vocab=101),
    Case("attention_alone", 6, 64, "aa", (4, 2, 32), 0.25, (1, 1, 32, 32), (9, 2, 32), 16,
         False, 53),
]  # fmt: skip


def hf_config(case: Case) -> dict[str, Any]:
    """config.json with the published nesting."""
    types = {"d": "linear_attention", "a": "full_attention"}
    rope = {
        "rope_type": "default",
        "rope_theta": case.theta,
        "partial_rotary_factor": case.rotary,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    }
    text = {
        "model_type": "qwen3_5_moe_text",
        "vocab_size": case.vocab,
        "hidden_size": case.hidden,
        "num_hidden_layers": len(case.kinds),
        "layer_types": [types[kind] for kind in case.kinds],
        "num_attention_heads": case.heads[0],
        "num_key_value_heads": case.heads[1],
        "head_dim": case.heads[2],
        "rope_parameters": rope,
        "linear_num_key_heads": case.delta[0],
        "linear_num_value_heads": case.delta[1],
        "linear_key_head_dim": case.delta[2],
        "linear_value_head_dim": case.delta[3],
        "linear_conv_kernel_dim": 4,
        "num_experts": case.experts[0],
        "num_experts_per_tok": case.experts[1],
        "moe_intermediate_size": case.experts[2],
        "shared_expert_intermediate_size": case.shared,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "eos_token_id": 0,
        "tie_word_embeddings": case.tied,
    }
    vision = {
        "model_type": "qwen3_5_moe_vision",
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": case.hidden,
    }
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": case.tied,
    }


class _RawWords:
    """Uniform numbers from PCG64's raw words."""

    def __init__(self, seed: int) -> None:
        self.bits = np.random.PCG64(seed)

    def uniform(self, low: float, high: float, *shape: int) -> npt.NDArray[np.float32]:
        words = self.bits.random_raw(int(np.prod(shape)))
        unit = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return (low + (high - low) * unit).astype(np.float32).reshape(shape)

    def matrix(self, *shape: int, gain: float = 1.0) -> Tensor:
        """A bf16 matrix whose gain keeps the scale of activations."""
        bound = gain * float(np.sqrt(3 / shape[-1]))
        return bf16_from_f32(self.uniform(-bound, bound, *shape))


def hf_tensors(case: Case) -> dict[str, Tensor]:
    """The checkpoint's text tensors in the published layout, BF16 or F32."""
    words, hidden = _RawWords(case.seed), case.hidden
    heads, groups, size = case.heads
    key_heads, value_heads, key_size, value_size = case.delta
    experts, _, inner = case.experts
    keys, values = key_heads * key_size, value_heads * value_size

    def norm(width: int) -> Tensor:
        return bf16_from_f32(words.uniform(-0.4, 0.4, width))

    def precise(x: npt.NDArray[np.float32]) -> Tensor:
        return x if case.wide else bf16_from_f32(x)

    root = "model.language_model."
    found = {f"{root}embed_tokens.weight": bf16_from_f32(words.uniform(-1, 1, case.vocab, hidden))}
    for i, kind in enumerate(case.kinds):
        at = f"{root}layers.{i}."
        found[f"{at}input_layernorm.weight"] = norm(hidden)
        found[f"{at}post_attention_layernorm.weight"] = norm(hidden)
        if kind == "a":
            module = f"{at}self_attn."
            found[f"{module}q_proj.weight"] = words.matrix(2 * heads * size, hidden)
            found[f"{module}k_proj.weight"] = words.matrix(groups * size, hidden)
            found[f"{module}v_proj.weight"] = words.matrix(groups * size, hidden)
            found[f"{module}o_proj.weight"] = words.matrix(hidden, heads * size)
            found[f"{module}q_norm.weight"] = norm(size)
            found[f"{module}k_norm.weight"] = norm(size)
        else:
            module = f"{at}linear_attn."
            found[f"{module}in_proj_qkv.weight"] = words.matrix(2 * keys + values, hidden)
            found[f"{module}in_proj_z.weight"] = words.matrix(values, hidden)
            found[f"{module}in_proj_a.weight"] = words.matrix(value_heads, hidden)
            found[f"{module}in_proj_b.weight"] = words.matrix(value_heads, hidden)
            found[f"{module}conv1d.weight"] = words.matrix(2 * keys + values, 1, 4)
            found[f"{module}A_log"] = precise(words.uniform(-3, 1, value_heads))
            found[f"{module}dt_bias"] = bf16_from_f32(words.uniform(-2, 1, value_heads))
            found[f"{module}norm.weight"] = precise(words.uniform(0.5, 1.5, value_size))
            found[f"{module}out_proj.weight"] = words.matrix(hidden, values)
        module = f"{at}mlp."
        # A steep router has fewer near-ties, which another summation order may change.
        found[f"{module}gate.weight"] = words.matrix(experts, hidden, gain=4)
        found[f"{module}experts.gate_up_proj"] = words.matrix(experts, 2 * inner, hidden)
        found[f"{module}experts.down_proj"] = words.matrix(experts, hidden, inner)
        found[f"{module}shared_expert.gate_proj.weight"] = words.matrix(case.shared, hidden)
        found[f"{module}shared_expert.up_proj.weight"] = words.matrix(case.shared, hidden)
        found[f"{module}shared_expert.down_proj.weight"] = words.matrix(hidden, case.shared)
        found[f"{module}shared_expert_gate.weight"] = words.matrix(1, hidden)
    found[f"{root}norm.weight"] = norm(hidden)
    if not case.tied:
        found["lm_head.weight"] = words.matrix(case.vocab, hidden)
    return found


def prompt(case: Case) -> npt.NDArray[np.int32]:
    """The ids of the golden logits, i32 [prompt]."""
    words = np.random.PCG64(case.seed + 1000).random_raw(case.prompt)
    return (words % np.uint64(case.vocab)).astype(np.int32)


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """sha256 over names and bytes, which ties golden logits to these weights."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode() + tensor.tobytes())
    return total.hexdigest()


def write_checkpoint(case: Case, folder: Path) -> None:
    """Write config.json and one shard in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(case)))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, tensors = 0, hf_tensors(case)
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        kind = "BF16" if tensor.dtype == np.uint16 else "F32"
        header[name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.tobytes())


# -- the same weights by Osmium's names ------------------------------------------------------------


def weights_of(
    config: ModelConfig, tensors: dict[str, Tensor]
) -> dict[str, LinearWeight | npt.NDArray[Any]]:
    """The weights that models/weights.py reads, every matrix in bf16."""
    root = "model.language_model."
    weights: dict[str, LinearWeight | npt.NDArray[Any]] = {
        "embed": tensors[f"{root}embed_tokens.weight"],
        "norm": _wide(tensors[f"{root}norm.weight"]),
    }
    if not config.tie_word_embeddings:
        weights["head"] = _linear(tensors["lm_head.weight"])
    for i, mixer in enumerate(config.layer_types):
        at, to = f"{root}layers.{i}.", f"layers.{i}."

        def concatenated(*names: str, at: str = at) -> Tensor:
            return np.concatenate([tensors[at + name] for name in names])

        weights[f"{to}mixer_norm"] = _wide(concatenated("input_layernorm.weight"))
        weights[f"{to}moe_norm"] = _wide(concatenated("post_attention_layernorm.weight"))
        weights[f"{to}router"] = _linear(
            concatenated("mlp.gate.weight", "mlp.shared_expert_gate.weight")
        )
        module = "mlp.shared_expert."
        weights[f"{to}shared_up"] = _linear(
            concatenated(f"{module}gate_proj.weight", f"{module}up_proj.weight")
        )
        weights[f"{to}shared_down"] = _linear(concatenated(f"{module}down_proj.weight"))
        if mixer == "attention":
            module = "self_attn."
            weights[f"{to}qgkv"] = _linear(
                concatenated(
                    f"{module}q_proj.weight", f"{module}k_proj.weight", f"{module}v_proj.weight"
                )
            )
            norms = concatenated(f"{module}q_norm.weight", f"{module}k_norm.weight")
            weights[f"{to}attention_norms"] = _wide(norms).reshape(2, config.head_dim)
            weights[f"{to}attention_out"] = _linear(concatenated(f"{module}o_proj.weight"))
        else:
            module = "linear_attn."
            weights[f"{to}qkvz"] = _linear(
                concatenated(f"{module}in_proj_qkv.weight", f"{module}in_proj_z.weight")
            )
            weights[f"{to}ab"] = _linear(
                concatenated(f"{module}in_proj_a.weight", f"{module}in_proj_b.weight")
            )
            weights[f"{to}conv"] = _wide(concatenated(f"{module}conv1d.weight")).reshape(-1, 4)
            weights[f"{to}a_log"] = _wide(concatenated(f"{module}A_log"))
            weights[f"{to}dt_bias"] = _wide(concatenated(f"{module}dt_bias"))
            weights[f"{to}gated_norm"] = _wide(concatenated(f"{module}norm.weight"))
            weights[f"{to}delta_out"] = _linear(concatenated(f"{module}out_proj.weight"))
    return weights


def packed_experts_of(
    config: ModelConfig, tensors: dict[str, Tensor], bits: int
) -> tuple[ExpertLayout, npt.NDArray[np.uint8]]:
    """Every routed expert, packed: u8 [L, E, layout.nbytes]."""
    layout = ExpertLayout(bits, config.hidden_size, config.moe_intermediate_size)
    experts = np.zeros((config.num_layers, config.num_experts, layout.nbytes), np.uint8)
    for i in range(config.num_layers):
        at = f"model.language_model.layers.{i}.mlp.experts."
        for e in range(config.num_experts):
            up, down = tensors[f"{at}gate_up_proj"][e], tensors[f"{at}down_proj"][e]
            _put(experts[i, e], up, 0, layout.up_scale, bits, layout.up_group)
            _put(experts[i, e], down, layout.down, layout.down_scale, bits, layout.down_group)
    return layout, experts


def _put(
    out: npt.NDArray[np.uint8], w: Tensor, start: int, scales: int, bits: int, group: int
) -> None:
    parts: list[tuple[int, Tensor]] = [(start, w)]
    if bits == 8:
        parts = list(zip((start, scales), int8.quantize(f32_from_bf16(w)), strict=True))
    elif bits == 4:
        parts = list(zip((start, scales), int4.quantize(f32_from_bf16(w), group), strict=True))
    for at, part in parts:
        raw = np.frombuffer(part.tobytes(), np.uint8)
        out[at : at + len(raw)] = raw


def _linear(w: Tensor) -> LinearWeight:
    return LinearWeight("bf16", w.shape[0], w.shape[1], w)


def _wide(x: Tensor) -> npt.NDArray[np.float32]:
    return x if x.dtype == np.float32 else f32_from_bf16(x)
