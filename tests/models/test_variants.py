"""Checkpoints that deviate from the published ones, from disk to logits, against transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.config import EngineConfig, ModelConfig
from osmium.models.attention import rotary_frequencies
from osmium.ops import LinearWeight, Ops
from osmium.ops.gpu import GpuOps
from osmium.weights import open_model
from osmium.weights.choosing import INDEX
from tests.models.build import prompt
from tests.models.run import SequenceDriver
from tests.models.test_golden import GOLDEN
from tests.models.variants import ROPE, VARIANTS, Variant, rope_config
from tests.ptx.interpreter import InterpretedRuntime
from tests.tolerance import TOLERANCE, close, distance
from tests.weights.files import shard

each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)


def from_disk(variant: Variant, folder: Path, **options: Any) -> SequenceDriver:
    """The model of a checkpoint folder, packed without quantisation."""
    config = EngineConfig(gpu_expert_bits=16, cache_dir=str(folder / "cache"))
    packed = open_model(variant.write(folder / "checkpoint"), config)
    weights = {name: packed.tensor(name) for name in packed.names()}
    experts = packed.all_packed_experts()
    return SequenceDriver(packed.config, weights, packed.layout, experts, **options)


def golden(variant: Variant) -> dict[str, npt.NDArray[Any]]:
    with np.load(GOLDEN / "variants" / f"{variant.name}.npz") as file:
        want = dict(file)
    assert str(want["weights"]) == variant.fingerprint(), "run tools/make_golden.py"
    assert np.array_equal(want["ids"], prompt(variant.case)), "run tools/make_golden.py"
    return want


@each_variant
def test_a_checkpoint_on_disk_gives_the_logits_of_transformers(
    variant: Variant, tmp_path: Path
) -> None:
    want = golden(variant)
    driver = from_disk(variant, tmp_path)
    for chunk in (variant.case.prompt, 5):
        got = driver.logits(prompt(variant.case), chunk)[want["positions"]]
        assert close(got, want["logits"], "logits"), f"{chunk}: {distance(got, want['logits']):.2e}"


def test_a_folder_of_qwen3_6_packs_to_the_bytes_of_its_text_model(tmp_path: Path) -> None:
    """Shards, index and small files have the names of Qwen3.6-35B-A3B's."""
    variant = next(one for one in VARIANTS if one.name == "qwen3_6")
    folder, tensors = variant.write(tmp_path / "qwen3.6"), variant.hf_tensors()
    (folder / "model.safetensors").unlink()
    shards = [f"model-{i + 1:05}-of-00026.safetensors" for i in range(26)]
    where = {name: shards[i % 26] for i, name in enumerate(tensors)}
    for file in shards:
        (folder / file).write_bytes(shard({n: t for n, t in tensors.items() if where[n] == file}))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}}
    (folder / INDEX).write_text(json.dumps({**index, "weight_map": where}))
    for name in ("LICENSE", "README.md", "merges.txt", ".gitattributes", "chat_template.jinja"):
        (folder / name).write_text(name)
    for name in ("configuration.json", "preprocessor_config.json", "vocab.json",
                 "video_preprocessor_config.json", "tokenizer_config.json"):  # fmt: skip
        (folder / name).write_text("{}")
    for name in ("optimizer.pt", "training_args.bin"):  # of a fine-tune
        (folder / name).write_bytes(b"\0")
    config = EngineConfig(gpu_expert_bits=16, cache_dir=str(tmp_path / "cache"))
    packed = open_model(folder, config)
    alone = open_model(variant.write(tmp_path / "alone"), config)
    assert packed.names() == alone.names() and not any("mtp" in name for name in packed.names())
    for name in alone.names():
        got, want = (
            weight.data if isinstance(weight, LinearWeight) else weight
            for weight in (packed.tensor(name), alone.tensor(name))
        )
        assert np.array_equal(got, want), name
    assert np.array_equal(packed.all_packed_experts(), alone.all_packed_experts())
    assert packed.file("chat_template.jinja") == b"chat_template.jinja"


def test_kernels_scale_rotated_queries_and_keys_by_yarns_factor(tmp_path: Path) -> None:
    """Prefill and decode are different kernels.  A factor of 1 would be off by 6e-2 and more."""
    variant = next(one for one in VARIANTS if one.name == "yarn_with_an_attention_factor")
    ids = prompt(variant.case)[:3]
    want = from_disk(variant, tmp_path).logits(ids, 3)
    kernels = GpuOps(InterpretedRuntime())
    driver = from_disk(variant, tmp_path, ops=kernels, kv_dtype="bf16", rows=2, context=16)
    got = np.concatenate([driver.logits(ids[:2], 2), driver.step({0: ids[2:]})[0]])
    assert (np.linalg.norm(got - want, axis=1) < 1e-2 * np.linalg.norm(want, axis=1)).all()


@pytest.mark.gpu
@each_variant
@pytest.mark.parametrize("chunk", [1, 33])
def test_a_gpu_gives_the_logits_of_transformers(
    variant: Variant, chunk: int, gpu: Ops, tmp_path: Path
) -> None:
    """A few tokens route to other experts, as bf16 keys and values differ from f32."""
    want = golden(variant)
    driver = from_disk(variant, tmp_path, ops=gpu, kv_dtype="bf16")
    got = driver.logits(prompt(variant.case), chunk)[want["positions"]]
    errors = np.linalg.norm(got - want["logits"], axis=1) / np.linalg.norm(want["logits"], axis=1)
    assert np.median(errors) <= TOLERANCE["gpu_logits"], np.median(errors)


def test_rope_has_the_frequencies_of_transformers() -> None:
    """Theirs are computed in f32, where the ramp loses up to 4e-6; ours in f64, then rounded."""
    lines = (GOLDEN / "variants" / "rope.json").read_text().splitlines()
    golden = [json.loads(line) for line in lines]
    assert [parameters for parameters, *_ in golden] == ROPE, "run tools/make_golden.py"
    for parameters, factor, frequencies in golden:
        config = ModelConfig.from_hf(rope_config(parameters))
        assert config.rope_factor == pytest.approx(factor, rel=1e-12), parameters
        got = rotary_frequencies(config)
        assert got.dtype == np.float32 and got.shape == (config.rotary_dim // 2,)
        np.testing.assert_allclose(got, frequencies, rtol=1e-5, err_msg=str(parameters))
