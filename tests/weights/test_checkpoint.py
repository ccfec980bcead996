"""Tensor names, shapes and formats: what a checkpoint is packed to, and which ones are refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from osmium.config import EngineConfig
from osmium.errors import CheckpointError, ConfigError, OsmiumError
from osmium.ops import LinearWeight
from osmium.quant.floats import bf16_from_f32
from osmium.weights import PackedModel, open_model
from tests.models.build import (
    CASES,
    Case,
    Tensor,
    hf_config,
    hf_tensors,
    packed_experts_of,
    weights_of,
)
from tests.weights.files import CASE, ROOT, TIED, per_expert, wide, write

BF16 = {"gpu_expert_bits": 16}


def pack(folder: Path, **options: object) -> PackedModel:
    config = EngineConfig(cache_dir=str(folder.parent / "cache"), **options)  # type: ignore[arg-type]
    return open_model(folder, config)


def assert_equal(one: PackedModel, other: PackedModel) -> None:
    """Assert that every weight and every packed expert is equal, bit for bit."""
    assert one.names() == other.names()
    for name in one.names():
        a, b = one.tensor(name), other.tensor(name)
        if isinstance(a, LinearWeight):
            assert isinstance(b, LinearWeight) and np.array_equal(a.data, b.data), name
            if a.scale is not None:
                assert b.scale is not None and np.array_equal(a.scale, b.scale), name
        else:
            assert not isinstance(b, LinearWeight) and np.array_equal(a, b), name
    assert np.array_equal(one.all_packed_experts(), other.all_packed_experts())


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_weights_and_packed_experts_equal_the_seeded_model(
    case: Case, bits: int, tmp_path: Path
) -> None:
    tensors = hf_tensors(case)
    bf16 = {"shared_expert_quant": "bf16", "lm_head_quant": "bf16"}
    packed = pack(write(tmp_path / "m", tensors, case), gpu_expert_bits=bits, **bf16)
    wanted = weights_of(packed.config, tensors)
    assert set(packed.names()) == set(wanted)
    for name, right in wanted.items():
        found = packed.tensor(name)
        if isinstance(right, LinearWeight):
            assert isinstance(found, LinearWeight)
            assert (found.out_features, found.in_features, found.format) == (
                right.out_features,
                right.in_features,
                "bf16",
            )
            assert np.array_equal(found.data, right.data), name
        else:
            assert not isinstance(found, LinearWeight)
            assert found.dtype == right.dtype and np.array_equal(found, right), name
    layout, experts = packed_experts_of(packed.config, tensors, bits)
    assert packed.layout == layout
    assert np.array_equal(packed.all_packed_experts(), experts)


def test_a_tied_head_is_absent_and_its_copy_is_ignored(tmp_path: Path) -> None:
    tensors = hf_tensors(TIED)
    plain = pack(write(tmp_path / "a", tensors, TIED))
    assert "head" not in plain.names()
    copy = {**tensors, "lm_head.weight": tensors[f"{ROOT}embed_tokens.weight"]}
    assert_equal(plain, pack(write(tmp_path / "b", copy, TIED)))


@pytest.mark.parametrize("row", [0, 30, -1])
def test_a_tied_head_that_differs_in_one_row_is_a_part(
    row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osmium.weights.checkpoint._COMPARE_BYTES", 1000)
    tensors = hf_tensors(TIED)
    head = tensors[f"{ROOT}embed_tokens.weight"].copy()
    head[row, 3] ^= 1
    packed = pack(write(tmp_path / "m", {**tensors, "lm_head.weight": head}, TIED), **BF16)
    matrix = packed.tensor("head")
    assert isinstance(matrix, LinearWeight) and np.array_equal(matrix.data, head)
    assert not packed.config.tie_word_embeddings


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_experts_in_separate_tensors_equal_fused_experts(bits: int, tmp_path: Path) -> None:
    tensors = hf_tensors(CASE)
    fused = pack(write(tmp_path / "fused", tensors), gpu_expert_bits=bits)
    single = write(tmp_path / "single", per_expert(tensors), shards=3)
    assert_equal(fused, pack(single, gpu_expert_bits=bits))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_f32_tensors_of_the_same_values_give_the_same_bytes(bits: int, tmp_path: Path) -> None:
    tensors = hf_tensors(CASE)
    narrow = pack(write(tmp_path / "narrow", tensors), gpu_expert_bits=bits)
    assert_equal(narrow, pack(write(tmp_path / "wide", wide(tensors)), gpu_expert_bits=bits))


def test_f16_and_mixed_dtypes_keep_their_values(tmp_path: Path) -> None:
    tensors = wide(hf_tensors(CASE))
    # Values exact in f16, bf16 and f32.
    coarse = {n: np.round(t * 8).clip(-16, 16).astype(np.float32) / 8 for n, t in tensors.items()}
    conversions: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: t.astype(np.float16),
        bf16_from_f32,
    ]
    mixed: dict[str, Tensor] = {n: conversions[i % 3](t) for i, (n, t) in enumerate(coarse.items())}
    half: dict[str, Tensor] = {n: t.astype(np.float16) for n, t in coarse.items()}
    right = pack(write(tmp_path / "f32", coarse), **BF16)
    assert_equal(right, pack(write(tmp_path / "mixed", mixed), **BF16))
    assert_equal(right, pack(write(tmp_path / "f16", half), **BF16))


@pytest.mark.parametrize("root", ["model.", "language_model.model."])
def test_other_tensor_name_prefixes_are_accepted(root: str, tmp_path: Path) -> None:
    tensors = hf_tensors(CASE)
    nested = root.startswith("language_model")
    other = {
        n.replace(ROOT, root)
        if n.startswith(ROOT)
        else ("language_model." if nested else "") + n: t
        for n, t in tensors.items()
    }
    assert_equal(pack(write(tmp_path / "a", tensors)), pack(write(tmp_path / "b", other)))


def test_vision_and_mtp_tensors_are_ignored_in_any_dtype(tmp_path: Path) -> None:
    tensors = hf_tensors(CASE)
    more: dict[str, Tensor] = {
        "model.visual.patch_embed.proj.weight": np.zeros((2, 3), np.float16),
        "visual.blocks.0.norm1.weight": np.zeros(3, np.uint16),
        "mtp.layers.0.mlp.experts.0.gate_proj.weight": np.zeros((2, 3), np.uint16),
    }
    assert_equal(
        pack(write(tmp_path / "a", tensors)), pack(write(tmp_path / "b", {**tensors, **more}))
    )


# -- refusals --------------------------------------------------------------------------------------

NAMES = sorted(hf_tensors(CASE))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    tensors = hf_tensors(CASE)
    del tensors[name]
    # Without the first fused tensor the experts are taken for separate tensors.
    said = "experts.0.gate_proj" if name.endswith("0.mlp.experts.gate_up_proj") else name
    if name.endswith("embed_tokens.weight"):
        said = "embed_tokens.weight"
    with pytest.raises(CheckpointError) as raised:
        pack(write(tmp_path / "m", tensors))
    assert said in str(raised.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_shape_is_refused_with_found_and_expected_shape(name: str, tmp_path: Path) -> None:
    tensors = hf_tensors(CASE)
    right = tensors[name]
    tensors[name] = np.concatenate([right, right[:1]])
    with pytest.raises(CheckpointError) as raised:
        pack(write(tmp_path / "m", tensors))
    for said in (name, str(list(tensors[name].shape)), str(list(right.shape))):
        assert said in str(raised.value)


@pytest.mark.parametrize(
    "name",
    ["stray", f"{ROOT}layers.2.input_layernorm.weight", f"{ROOT}layers.0.self_attn.q_proj.bias",
     f"{ROOT}layers.0.mlp.experts.0.gate_proj.weight"],
)  # fmt: skip
def test_an_extra_tensor_is_named(name: str, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {**hf_tensors(CASE), name: np.zeros((2, 2), np.float32)}
    with pytest.raises(CheckpointError) as raised:
        pack(write(tmp_path / "m", tensors))
    assert name in str(raised.value)


def test_an_integer_tensor_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    raw = (folder / "model.safetensors").read_bytes()
    name = b'"lm_head.weight": {"dtype": "BF16"'
    assert raw.count(name) == 1
    (folder / "model.safetensors").write_bytes(raw.replace(name, name.replace(b"BF16", b"I16 ")))
    with pytest.raises(CheckpointError):
        pack(folder)
    (folder / "model.safetensors").write_bytes(
        raw.replace(name + b",", name.replace(b'"BF16"', b'"I16"') + b", ")
    )
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is I16"):
        pack(folder)


@pytest.mark.parametrize(
    ("key", "default"), [("hidden_size", 2048), ("num_experts", 256), ("vocab_size", 248320)]
)
def test_an_absent_size_is_the_familys_which_the_tensors_must_have(
    key: str, default: int, tmp_path: Path
) -> None:
    folder = write(tmp_path / "m")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace(f'"{key}"', '"other"', 1))
    with pytest.raises(CheckpointError, match=rf"config\.json requires \[.*{default}"):
        pack(folder)


def test_another_model_type_is_refused_by_its_value(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"qwen3_5_moe"', '"mamba"'))
    with pytest.raises(CheckpointError, match="mamba"):
        pack(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_a_malformed_config_is_refused_by_file(name: str, text: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        pack(folder)


def test_a_format_that_does_not_divide_a_shape_is_refused_before_writing(
    tmp_path: Path,
) -> None:
    narrow = Case("narrow", 9, 64, "a", (2, 1, 32), 0.5, (1, 1, 32, 32), (3, 2, 16), 16, True, 20)
    folder = write(tmp_path / "m", case=narrow, tensors=hf_tensors(narrow))
    assert hf_config(narrow)["text_config"]["moe_intermediate_size"] == 16
    with pytest.raises(ConfigError, match="16"):
        pack(folder)
    with pytest.raises(OsmiumError, match="shared_down"):
        pack(folder, gpu_expert_bits=8, shared_expert_quant="int4")
    assert not list((tmp_path / "cache").glob("*.partial"))
    pack(folder, gpu_expert_bits=8)
