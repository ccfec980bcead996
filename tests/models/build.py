"""Seeded models: a config and weights of every kind, as a checkpoint's tensors and as ours.

The golden files hold logits only, so the weights must come out the same for ever: they are made of
PCG64's raw words, whose stream NumPy keeps, by exact arithmetic.
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
    """A letter a layer: d for a delta net, a for attention."""
    heads: tuple[int, int, int]
    """Query heads, key and value heads, their size."""
    rotary: float
    """Part of a head that turns."""
    delta: tuple[int, int, int, int]
    """Key heads, value heads, key size, value size."""
    experts: tuple[int, int, int]
    """Experts, how many a token activates, their inner size."""
    shared: int
    tied: bool
    prompt: int
    """Tokens."""
    theta: float = 1e7
    vocab: int = 96
    wide: bool = True
    """A_log and the gated norm are F32, as in Qwen3.5, else BF16, as in Qwen3.6."""


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
    """config.json in the published nesting."""
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


class _Dice:
    """Uniform numbers from PCG64's raw words."""

    def __init__(self, seed: int) -> None:
        self.bits = np.random.PCG64(seed)

    def uniform(self, low: float, high: float, *shape: int) -> npt.NDArray[np.float32]:
        words = self.bits.random_raw(int(np.prod(shape)))
        unit = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return (low + (high - low) * unit).astype(np.float32).reshape(shape)

    def matrix(self, *shape: int, gain: float = 1.0) -> Tensor:
        """bf16, of a spread that keeps the size of what is multiplied."""
        bound = gain * float(np.sqrt(3 / shape[-1]))
        return bf16_from_f32(self.uniform(-bound, bound, *shape))


def hf_tensors(case: Case) -> dict[str, Tensor]:
    """The checkpoint's text tensors in the published layout: BF16, and F32 where it says so."""
    dice, hidden = _Dice(case.seed), case.hidden
    heads, groups, size = case.heads
    key_heads, value_heads, key_size, value_size = case.delta
    experts, _, inner = case.experts
    keys, values = key_heads * key_size, value_heads * value_size

    def norm(width: int) -> Tensor:
        return bf16_from_f32(dice.uniform(-0.4, 0.4, width))

    def precise(x: npt.NDArray[np.float32]) -> Tensor:
        return x if case.wide else bf16_from_f32(x)

    root = "model.language_model."
    found = {f"{root}embed_tokens.weight": bf16_from_f32(dice.uniform(-1, 1, case.vocab, hidden))}
    for i, kind in enumerate(case.kinds):
        at = f"{root}layers.{i}."
        found[f"{at}input_layernorm.weight"] = norm(hidden)
        found[f"{at}post_attention_layernorm.weight"] = norm(hidden)
        if kind == "a":
            own = f"{at}self_attn."
            found[f"{own}q_proj.weight"] = dice.matrix(2 * heads * size, hidden)
            found[f"{own}k_proj.weight"] = dice.matrix(groups * size, hidden)
            found[f"{own}v_proj.weight"] = dice.matrix(groups * size, hidden)
            found[f"{own}o_proj.weight"] = dice.matrix(hidden, heads * size)
            found[f"{own}q_norm.weight"] = norm(size)
            found[f"{own}k_norm.weight"] = norm(size)
        else:
            own = f"{at}linear_attn."
            found[f"{own}in_proj_qkv.weight"] = dice.matrix(2 * keys + values, hidden)
            found[f"{own}in_proj_z.weight"] = dice.matrix(values, hidden)
            found[f"{own}in_proj_a.weight"] = dice.matrix(value_heads, hidden)
            found[f"{own}in_proj_b.weight"] = dice.matrix(value_heads, hidden)
            found[f"{own}conv1d.weight"] = dice.matrix(2 * keys + values, 1, 4)
            found[f"{own}A_log"] = precise(dice.uniform(-3, 1, value_heads))
            found[f"{own}dt_bias"] = bf16_from_f32(dice.uniform(-2, 1, value_heads))
            found[f"{own}norm.weight"] = precise(dice.uniform(0.5, 1.5, value_size))
            found[f"{own}out_proj.weight"] = dice.matrix(hidden, values)
        own = f"{at}mlp."
        # A steep router: near-ties, which any arithmetic may flip, are rarer.
        found[f"{own}gate.weight"] = dice.matrix(experts, hidden, gain=4)
        found[f"{own}experts.gate_up_proj"] = dice.matrix(experts, 2 * inner, hidden)
        found[f"{own}experts.down_proj"] = dice.matrix(experts, hidden, inner)
        found[f"{own}shared_expert.gate_proj.weight"] = dice.matrix(case.shared, hidden)
        found[f"{own}shared_expert.up_proj.weight"] = dice.matrix(case.shared, hidden)
        found[f"{own}shared_expert.down_proj.weight"] = dice.matrix(hidden, case.shared)
        found[f"{own}shared_expert_gate.weight"] = dice.matrix(1, hidden)
    found[f"{root}norm.weight"] = norm(hidden)
    if not case.tied:
        found["lm_head.weight"] = dice.matrix(case.vocab, hidden)
    return found


def prompt(case: Case) -> npt.NDArray[np.int32]:
    """The ids that the golden logits are of, i32 [prompt]."""
    words = np.random.PCG64(case.seed + 1000).random_raw(case.prompt)
    return (words % np.uint64(case.vocab)).astype(np.int32)


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """sha256 over names and bytes: whether golden logits are of these weights."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode() + tensor.tobytes())
    return total.hexdigest()


def write_checkpoint(case: Case, folder: Path) -> None:
    """config.json and one shard, as published."""
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


# -- the same weights by our names -----------------------------------------------------------------


def our_weights(
    config: ModelConfig, tensors: dict[str, Tensor]
) -> dict[str, LinearWeight | npt.NDArray[Any]]:
    """What models/weights.py asks for, every matrix in bf16."""
    root = "model.language_model."
    ours: dict[str, LinearWeight | npt.NDArray[Any]] = {
        "embed": tensors[f"{root}embed_tokens.weight"],
        "norm": _wide(tensors[f"{root}norm.weight"]),
    }
    if not config.tie_word_embeddings:
        ours["head"] = _linear(tensors["lm_head.weight"])
    for i, mixer in enumerate(config.layer_types):
        at, to = f"{root}layers.{i}.", f"layers.{i}."

        def take(*names: str, at: str = at) -> Tensor:
            return np.concatenate([tensors[at + name] for name in names])

        ours[f"{to}mixer_norm"] = _wide(take("input_layernorm.weight"))
        ours[f"{to}moe_norm"] = _wide(take("post_attention_layernorm.weight"))
        ours[f"{to}router"] = _linear(take("mlp.gate.weight", "mlp.shared_expert_gate.weight"))
        own = "mlp.shared_expert."
        ours[f"{to}shared_up"] = _linear(take(f"{own}gate_proj.weight", f"{own}up_proj.weight"))
        ours[f"{to}shared_down"] = _linear(take(f"{own}down_proj.weight"))
        if mixer == "attention":
            own = "self_attn."
            ours[f"{to}qgkv"] = _linear(
                take(f"{own}q_proj.weight", f"{own}k_proj.weight", f"{own}v_proj.weight")
            )
            norms = take(f"{own}q_norm.weight", f"{own}k_norm.weight")
            ours[f"{to}attention_norms"] = _wide(norms).reshape(2, config.head_dim)
            ours[f"{to}attention_out"] = _linear(take(f"{own}o_proj.weight"))
        else:
            own = "linear_attn."
            ours[f"{to}qkvz"] = _linear(take(f"{own}in_proj_qkv.weight", f"{own}in_proj_z.weight"))
            ours[f"{to}ab"] = _linear(take(f"{own}in_proj_a.weight", f"{own}in_proj_b.weight"))
            ours[f"{to}conv"] = _wide(take(f"{own}conv1d.weight")).reshape(-1, 4)
            ours[f"{to}a_log"] = _wide(take(f"{own}A_log"))
            ours[f"{to}dt_bias"] = _wide(take(f"{own}dt_bias"))
            ours[f"{to}gated_norm"] = _wide(take(f"{own}norm.weight"))
            ours[f"{to}delta_out"] = _linear(take(f"{own}out_proj.weight"))
    return ours


def our_records(
    config: ModelConfig, tensors: dict[str, Tensor], bits: int
) -> tuple[ExpertLayout, npt.NDArray[np.uint8]]:
    """Every routed expert, packed: u8 [L, E, record.nbytes]."""
    record = ExpertLayout(bits, config.hidden_size, config.moe_intermediate_size)
    records = np.zeros((config.num_layers, config.num_experts, record.nbytes), np.uint8)
    for i in range(config.num_layers):
        at = f"model.language_model.layers.{i}.mlp.experts."
        for e in range(config.num_experts):
            up, down = tensors[f"{at}gate_up_proj"][e], tensors[f"{at}down_proj"][e]
            _put(records[i, e], up, 0, record.up_scale, bits, record.up_group)
            _put(records[i, e], down, record.down, record.down_scale, bits, record.down_group)
    return record, records


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
