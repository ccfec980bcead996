"""Models made up in published shapes: sane numbers, the same every time, engines that run."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import osmium
from osmium.config import EngineConfig
from osmium.errors import ConfigError
from osmium.ops import Linear
from osmium.ops.formulas import expert_matrices, matrix
from osmium.weights.synthetic import Synthetic, open_synthetic

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
    experts = 3 * config.hidden * config.expert_size * config.experts * config.layers
    count = sum(math.prod(part.shape) for part in model.parts.values()) + experts
    wanted, record_bytes = PUBLISHED[name]
    assert count == pytest.approx(wanted, rel=1e-4)
    assert config.layers * config.experts * model.record.nbytes == record_bytes


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_every_part_is_finite_and_keeps_the_size_of_what_it_multiplies(bits: int) -> None:
    model = tiny(gpu_expert_bits=bits, attention_quant="int4", lm_head_quant="int8")
    for name in model.names():
        value = model.tensor(name)
        if isinstance(value, Linear):
            w = matrix(value.format, value.data, value.scale)
            assert w.shape == model.parts[name].shape
            assert 0.3 < np.sqrt((w.astype(np.float64) ** 2).mean() * w.shape[1]) < 3, name
        else:
            assert np.isfinite(value).all()
    up, down = expert_matrices(model.record, model.one_record(1, 3))
    for w in (up, down):
        assert 0.3 < np.sqrt((w.astype(np.float64) ** 2).mean() * w.shape[1]) < 3


def test_a_part_is_the_same_every_time_and_no_two_experts_are_alike() -> None:
    one, other = tiny(), tiny()
    out = np.empty((one.config.experts, one.record.nbytes), np.uint8)
    one.read_records(2, out)
    assert np.array_equal(out[5], other.one_record(2, 5))
    assert len({row.tobytes() for row in out}) == len(out)
    assert not np.array_equal(one.one_record(0, 5), one.one_record(1, 5))


@pytest.mark.parametrize("slots", [None, 3])
def test_it_runs_with_its_own_routing_and_with_a_trace(
    tmp_path: Path, slots: int | None, rng: np.random.Generator
) -> None:
    ids = np.stack([np.stack([rng.permutation(8)[:2] for _ in range(4)]) for _ in range(30)])
    path = tmp_path / "trace.npz"
    np.savez(path, ids=ids.astype(np.uint8))
    more: dict[str, Any] = {"context": 128, "chunk": 8, "slots": slots}
    greedy = osmium.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    replies = []
    for routing in (None, str(path)):
        engine = osmium.load("synthetic:tiny", "cpu", routing=routing, **more)
        assert engine.name == "synthetic:tiny"
        recorder = engine.record_routing()
        replies.append([token.id for token in engine.generate([1, 2, 3], greedy)])
        engine.close()
        if routing:
            told = recorder.ids()
            assert np.array_equal(told, ids[: len(told)])
    assert replies[0] != replies[1]


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="llama"):
        open_synthetic("synthetic:llama", EngineConfig())
    for layers in ("0", "99", "x"):
        with pytest.raises(ConfigError, match=layers):
            open_synthetic(f"synthetic:qwen3.5-35b-a3b:{layers}", EngineConfig())
    assert open_synthetic("synthetic:qwen3.5-35b-a3b:8", EngineConfig()).config.layers == 8
    path = tmp_path / "other.npz"
    np.savez(path, ids=np.zeros((4, 3, 2), np.uint8))
    with pytest.raises(ConfigError, match="3 layers"):
        osmium.load("synthetic:tiny", "cpu", routing=str(path), context=64)
