"""Synthetic models in published shapes: plausible values, reproducible bytes, working engines."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import osmium
from osmium.config import EngineConfig
from osmium.errors import ConfigError
from osmium.loader import pack
from osmium.ops import LinearWeight
from osmium.ops.formulas import expert_matrices, matrix
from osmium.ops.gpu import GpuOps
from osmium.weights import open_packed
from osmium.weights.synthetic import Synthetic, open_synthetic
from tests.ptx.interpreter import InterpretedRuntime

PUBLISHED = {
    "35b-a3b": (34.661e9, 16_609_443_840),
    "122b-a10b": (122.112e9, 59_793_997_824),
    "397b-a17b": (396.346e9, 199_313_326_080),
}
"""Text parameters, and bytes of the routed experts in INT4."""


def tiny(**options: object) -> Synthetic:
    return open_synthetic("synthetic:tiny", EngineConfig(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_sizes(name: str) -> None:
    model = open_synthetic(f"synthetic:qwen3.5-{name}", EngineConfig())
    config = model.config
    experts = (
        3
        * config.hidden_size
        * config.moe_intermediate_size
        * config.num_experts
        * config.num_layers
    )
    count = sum(math.prod(part.shape) for part in model.parts.values()) + experts
    wanted, expert_bytes = PUBLISHED[name]
    assert count == pytest.approx(wanted, rel=1e-4)
    assert config.num_layers * config.num_experts * model.layout.nbytes == expert_bytes


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_weights_are_finite_and_keep_the_scale_of_activations(bits: int) -> None:
    model = tiny(gpu_expert_bits=bits, attention_quant="int4", lm_head_quant="int8")
    for name in model.names():
        value = model.tensor(name)
        if isinstance(value, LinearWeight):
            w = matrix(value.format, value.data, value.scale)
            assert w.shape == model.parts[name].shape
            assert 0.3 < np.sqrt((w.astype(np.float64) ** 2).mean() * w.shape[1]) < 3, name
        else:
            assert np.isfinite(value).all()
    up, down = expert_matrices(model.layout, model.packed_expert(1, 3))
    for w in (up, down):
        assert 0.3 < np.sqrt((w.astype(np.float64) ** 2).mean() * w.shape[1]) < 3


def test_weights_are_reproducible_and_experts_differ() -> None:
    one, other = tiny(), tiny()
    out = np.empty((one.config.num_experts, one.layout.nbytes), np.uint8)
    one.read_packed_experts(2, out)
    assert np.array_equal(out[5], other.packed_expert(2, 5))
    assert len({row.tobytes() for row in out}) == len(out)
    assert not np.array_equal(one.packed_expert(0, 5), one.packed_expert(1, 5))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_kernels_generate_the_same_bytes(bits: int) -> None:
    model = tiny(gpu_expert_bits=bits, attention_quant="int4")
    runtime = InterpretedRuntime()
    uploaded = model.upload(GpuOps(runtime))
    assert list(uploaded) == model.names()
    for name, found in uploaded.items():
        wanted = model.tensor(name)
        if not isinstance(wanted, LinearWeight):
            assert np.array_equal(found.numpy(), wanted), name
            continue
        assert replace(found, data=None, scale=None) == replace(wanted, data=None, scale=None)
        assert np.array_equal(found.data.numpy(), wanted.data), name
        assert wanted.scale is None or np.array_equal(found.scale.numpy(), wanted.scale), name
    out = runtime.empty_mapped((model.config.num_experts, model.layout.nbytes), np.uint8)
    model.generate_experts(GpuOps(runtime), 3, out)
    assert np.array_equal(out.numpy(), np.stack([model.packed_expert(3, e) for e in range(8)]))


def test_weights_of_different_layers_are_uncorrelated() -> None:
    model = tiny(gpu_expert_bits=16)
    parts = [model.tensor(f"layers.{i}.router") for i in range(3)]
    words = np.concatenate(
        [part.data.reshape(-1) for part in parts if isinstance(part, LinearWeight)]
    )
    words = np.concatenate([words, model.all_packed_experts().reshape(-1).view(np.uint16)])
    bits = (words[:, None] >> np.array([0, 1, 2, 3, 4, 5, 6, 15], np.uint16)) & 1
    correlation = np.corrcoef(bits, rowvar=False) - np.eye(8)
    assert abs(bits.mean(axis=0) - 0.5).max() < 0.01 and abs(correlation).max() < 0.02


@pytest.mark.parametrize("name", ["synthetic:tiny", "synthetic:tiny:3"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_packed_synthetic_model_equals_the_generated_one(
    tmp_path: Path, name: str, bits: int
) -> None:
    options: dict[str, Any] = {"gpu_expert_bits": bits, "cache_dir": str(tmp_path)}
    reports: list[tuple[int, int]] = []
    path = pack(name, "cpu", progress=lambda _, *at: reports.append(at), **options)
    assert path.parent == tmp_path and reports[-1][0] == reports[-1][1]
    packed, synthetic = open_packed(path), open_synthetic(name, EngineConfig(**options))
    packed.verify()
    assert (packed.config, packed.formats) == (synthetic.config, synthetic.formats)
    assert np.array_equal(packed.all_packed_experts(), synthetic.all_packed_experts())
    for part in synthetic.parts.values():
        for kind, array in synthetic.arrays(part).items():
            assert np.array_equal(packed._array(f"{part.name}.{kind}"), array), part.name
    written_at = path.stat().st_mtime_ns
    assert pack(name, "cpu", **options) == path
    assert path.stat().st_mtime_ns == written_at, "an existing file is not written again"


def test_a_packed_synthetic_model_replays_a_trace_of_more_layers(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    ids = np.stack([np.stack([rng.permutation(8)[:2] for _ in range(4)]) for _ in range(30)])
    np.savez(tmp_path / "trace.npz", ids=ids.astype(np.uint8))
    path = pack("synthetic:tiny:3", "cpu", cache_dir=str(tmp_path))
    greedy = osmium.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    responses = []
    for model in (path, "synthetic:tiny:3"):
        engine = osmium.load(
            model,
            "cpu",
            replay_routing=str(tmp_path / "trace.npz"),
            context=128,
            prefill_chunk=8,
            expert_slots=3,
        )
        responses.append([token.id for token in engine.generate([1, 2, 3], greedy)])
        engine.close()
    assert responses[0] == responses[1]
    assert engine.name.startswith("synthetic") and path.name.startswith("synthetic-tiny-3-")


@pytest.mark.parametrize("slots", [None, 3])
def test_a_synthetic_model_runs_with_and_without_a_routing_trace(
    tmp_path: Path, slots: int | None, rng: np.random.Generator
) -> None:
    ids = np.stack([np.stack([rng.permutation(8)[:2] for _ in range(4)]) for _ in range(30)])
    path = tmp_path / "trace.npz"
    np.savez(path, ids=ids.astype(np.uint8))
    more: dict[str, Any] = {"context": 128, "prefill_chunk": 8, "expert_slots": slots}
    greedy = osmium.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    responses = []
    for routing in (None, str(path)):
        engine = osmium.load("synthetic:tiny", "cpu", replay_routing=routing, **more)
        assert engine.name == "synthetic:tiny"
        recorder = engine.record_routing()
        responses.append([token.id for token in engine.generate([1, 2, 3], greedy)])
        engine.close()
        if routing:
            recorded = recorder.ids()
            assert np.array_equal(recorded, ids[: len(recorded)])
    assert responses[0] != responses[1]


def test_unknown_shapes_and_traces_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="llama"):
        open_synthetic("synthetic:llama", EngineConfig())
    for layers in ("0", "99", "x"):
        with pytest.raises(ConfigError, match=layers):
            open_synthetic(f"synthetic:qwen3.5-35b-a3b:{layers}", EngineConfig())
    assert open_synthetic("synthetic:qwen3.5-35b-a3b:8", EngineConfig()).config.num_layers == 8
    path = tmp_path / "other.npz"
    np.savez(path, ids=np.zeros((4, 3, 2), np.uint8))
    with pytest.raises(ConfigError, match="3 layers"):
        osmium.load("synthetic:tiny", "cpu", replay_routing=str(path), context=64)
