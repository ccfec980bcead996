"""Checkpoints that deviate from the published ones, from disk to logits, against transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.config import EngineConfig, ModelConfig
from osmium.models.attention import rotary_frequencies
from osmium.ops import Ops
from osmium.weights import open_model
from tests.models.build import prompt
from tests.models.run import SequenceDriver
from tests.models.test_golden import GOLDEN
from tests.models.variants import ROPE, VARIANTS, Variant, rope_config
from tests.tolerance import TOLERANCE, close, distance

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
