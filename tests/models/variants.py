"""Checkpoints as they are on people's disks: seeded models whose config or tensors deviate.

Each variant has golden logits of transformers, which reads the same folder.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.models.build import Case, Tensor, fingerprint, hf_config, hf_tensors
from tests.weights.files import ROOT, shard

BASE = Case("base", 21, 64, "ada", (4, 2, 64), 0.25, (1, 2, 32, 32), (5, 2, 32), 32, False, 96)
TIED = Case("tied", 22, 64, "ad", (2, 1, 32), 0.5, (1, 1, 32, 32), (4, 2, 16), 16, True, 40)
QWEN3_6 = Case("qwen3_6", 23, 64, "ddda", (4, 2, 64), 0.25, (2, 4, 32, 32), (8, 2, 16), 16,
               False, 48, wide=False)  # fmt: skip

MROPE = {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


@dataclass(frozen=True)
class Variant:
    """A case with another config.json or other tensors."""

    name: str
    edit: Callable[[dict[str, Any], dict[str, Any]], None] = lambda config, text: None
    """Changes config.json; `text` is its text_config."""
    tensors: Callable[[dict[str, Tensor]], None] = lambda tensors: None
    """Changes the tensors."""
    case: Case = BASE

    def config(self) -> dict[str, Any]:
        config = hf_config(self.case)
        self.edit(config, config["text_config"])
        return config

    def hf_tensors(self) -> dict[str, Tensor]:
        found = hf_tensors(self.case)
        self.tensors(found)
        return found

    def fingerprint(self) -> str:
        """sha256 over config.json and tensors."""
        text = json.dumps(self.config(), sort_keys=True)
        return hashlib.sha256(f"{text}{fingerprint(self.hf_tensors())}".encode()).hexdigest()

    def write(self, folder: Path) -> Path:
        """Write config.json and one shard."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config()))
        (folder / "model.safetensors").write_bytes(shard(self.hf_tensors()))
        return folder


def variant_positions(variant: Variant) -> npt.NDArray[np.int32]:
    """The prompt's positions whose logits are golden: every eighth, and the last four."""
    p = np.arange(variant.case.prompt, dtype=np.int32)
    rows: npt.NDArray[np.int32] = p[(p % 8 == 7) | (p >= len(p) - 4)]
    return rows


def _rope(key: str, values: dict[str, Any], **beside: Any) -> Any:
    """Sets the RoPE parameters of text_config, under one key, and keys beside them."""

    def edit(config: dict[str, Any], text: dict[str, Any]) -> None:
        del text["rope_parameters"]
        text.update({key: values}, **beside)

    return edit


def _scaled(**values: Any) -> Any:
    """Adds values to rope_parameters, where published files have theta and the fraction."""

    def edit(config: dict[str, Any], text: dict[str, Any]) -> None:
        text["rope_parameters"].update(values)

    return edit


def _without(*keys: str) -> Any:
    def edit(config: dict[str, Any], text: dict[str, Any]) -> None:
        for key in keys:
            del text[key]

    return edit


def _tie(top: bool | None, text_value: bool | None) -> Any:
    def edit(config: dict[str, Any], text: dict[str, Any]) -> None:
        for section, value in ((config, top), (text, text_value)):
            del section["tie_word_embeddings"]
            if value is not None:
                section["tie_word_embeddings"] = value

    return edit


def _other_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors[f"{ROOT}embed_tokens.weight"][::-1].copy()


def _head_alone(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop(f"{ROOT}embed_tokens.weight")


def _qwen3_6(config: dict[str, Any], text: dict[str, Any]) -> None:
    """The keys of Qwen3.6-35B-A3B's config.json, in this size."""
    text.update({
        "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True,
        "bos_token_id": 0, "dtype": "bfloat16", "full_attention_interval": 4,
        "initializer_range": 0.02, "mamba_ssm_dtype": "float32", "mlp_only_layers": [],
        "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False,
        "output_router_logits": False, "pad_token_id": None, "partial_rotary_factor": 0.25,
        "router_aux_loss_coef": 0.001, "use_cache": True, "output_gate_type": "swish",
    })  # fmt: skip
    config.update({
        "image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92,
        "vision_end_token_id": 93, "transformers_version": "4.57.1",
    })  # fmt: skip
    config["vision_config"]["deepstack_visual_indexes"] = []


def _mtp_and_vision(tensors: dict[str, Tensor]) -> None:
    """A fused MTP layer, as in Qwen3.6, and a vision tower, of which there are two tensors."""
    layer = {n: t for n, t in tensors.items() if n.startswith(f"{ROOT}layers.0.")}
    tensors |= {n.replace(f"{ROOT}layers.0.", "mtp.layers.0."): t for n, t in layer.items()}
    norm = tensors[f"{ROOT}norm.weight"]
    for name in ("mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"):
        tensors[f"{name}.weight"] = norm
    tensors["mtp.fc.weight"] = np.concatenate([norm, norm])[None].repeat(len(norm), 0)
    tensors["model.visual.pos_embed.weight"] = norm[None]
    tensors["model.visual.merger.norm.weight"] = norm


def _text_only(config: dict[str, Any], text: dict[str, Any]) -> None:
    """A fine-tune of the text model alone: no text_config, as save_pretrained writes it."""
    config.clear()
    config.update(text, architectures=["Qwen3_5MoeForCausalLM"], torch_dtype="bfloat16")
    config.update(transformers_version="5.24.0", use_cache=False)


def _short_names(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith(ROOT)]:
        tensors[name.replace(ROOT, "model.")] = tensors.pop(name)


VARIANTS = [
    # -- RoPE scaling: where it stands, and its parameters
    Variant("yarn_in_rope_scaling", _rope("rope_scaling", {"type": "yarn", **YARN},
                                          rope_theta=1e7)),
    Variant("yarn_in_rope_parameters", _scaled(rope_type="yarn", **YARN)),
    Variant("yarn_of_two_types", _rope(
        "rope_scaling", {"rope_type": "yarn", "type": "yarn", "rope_theta": 1e6, "factor": 2,
                         "original_max_position_embeddings": 48, **MROPE},
        partial_rotary_factor=0.5)),
    Variant("yarn_with_an_attention_factor", _scaled(
        rope_type="yarn", **YARN, attention_factor=0.8, beta_fast=8, beta_slow=2)),
    Variant("yarn_with_mscale", _scaled(
        rope_type="yarn", **YARN, mscale=1.5, mscale_all_dim=0.7, truncate=False)),
    Variant("yarn_with_one_mscale", _scaled(rope_type="yarn", **YARN, mscale=1.5)),
    Variant("yarn_without_an_original_context", _scaled(
        rope_type="yarn", factor=8.0, rope_theta=1e4)),
    Variant("yarn_with_the_original_context_beside", _rope(
        "rope_scaling", {"type": "yarn", "factor": None, "original_max_position_embeddings": 512},
        rope_theta=1e5, original_max_position_embeddings=64)),
    Variant("yarn_with_falsy_betas", _scaled(
        rope_type="yarn", **YARN, beta_fast=0, beta_slow=None, attention_factor=None,
        truncate=None)),
    Variant("linear_scaling", _scaled(rope_type="linear", factor=3.0)),
    Variant("dynamic_scaling", _scaled(rope_type="dynamic", factor=2.7)),
    Variant("llama3_scaling", _scaled(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64, rope_theta=1e3)),
    # -- absent keys
    Variant("no_partial_rotary_factor", _rope("rope_parameters", {"rope_theta": 1e7})),
    Variant("no_rope_theta", _rope("rope_parameters", {"rope_type": "default", **MROPE})),
    Variant("no_rope_at_all", _without("rope_parameters")),
    Variant("rope_beside", _rope("rope_scaling", {}, rope_theta=1e3, partial_rotary_factor=0.5)),
    Variant("few_keys", _without(
        "rms_norm_eps", "hidden_act", "linear_conv_kernel_dim", "max_position_embeddings",
        "tie_word_embeddings", "rope_parameters", "eos_token_id")),
    # -- tied heads
    Variant("tied_with_another_head", _tie(True, True), _other_head, TIED),
    Variant("tied_at_the_top_with_another_head", _tie(True, None), _other_head, TIED),
    Variant("tied_without_a_head", _tie(None, True), case=TIED),
    Variant("tied_without_an_embedding", _tie(True, True), _head_alone, TIED),
    # -- siblings and fine-tunes
    Variant("qwen3_6", _qwen3_6, _mtp_and_vision, QWEN3_6),
    Variant("text_only", _text_only, _short_names),
]  # fmt: skip

ROPE = [
    # the family's long contexts, as its model cards state them
    {"rope_type": "yarn", "rope_theta": 1e7, "factor": 4.0,
     "original_max_position_embeddings": 262144},
    {"rope_type": "yarn", "rope_theta": 1e7, "factor": 2.0,
     "original_max_position_embeddings": 262144, "mscale": 0.5, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "rope_theta": 1e7, "factor": 1.0},
    {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "beta_fast": 1730,
     "original_max_position_embeddings": 20000},  # the ramp ends beyond the last pair
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
     "original_max_position_embeddings": 3},  # no pair rotates once
    {"rope_type": "yarn", "rope_theta": 1e5, "factor": 32.0, "beta_fast": 4, "beta_slow": 4,
     "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0},
    {"rope_type": "yarn", "rope_theta": 1e5, "factor": 32.0, "beta_fast": 2, "beta_slow": 9,
     "original_max_position_embeddings": 4096, "truncate": False},
    {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
     "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    {"rope_type": "linear", "rope_theta": 1e7, "factor": 8},
    {"rope_type": "dynamic", "rope_theta": 1e7, "factor": 3.3},
    {"rope_type": "default", "rope_theta": 1e7},
    {},
]  # fmt: skip
"""rope_parameters whose frequencies are golden: tests/golden/variants/rope.json."""


def rope_config(parameters: dict[str, Any]) -> dict[str, Any]:
    """A config.json of Qwen3.5's shapes, which are the family's defaults, with these parameters."""
    return {
        "model_type": "qwen3_5_moe_text",
        "max_position_embeddings": 262144,
        "rope_parameters": dict(parameters),
    }
