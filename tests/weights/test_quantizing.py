"""Kernels that quantise a checkpoint give the bytes that NumPy gives."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from osmium.config import EngineConfig
from osmium.ops import Ops
from osmium.ops.gpu import GpuOps
from osmium.ops.reference import ReferenceOps
from osmium.weights import open_model
from osmium.weights.checkpoint import Checkpoint, Formats
from osmium.weights.packing import CpuQuantizer
from osmium.weights.quantizing import GpuQuantizer
from osmium.weights.shards import open_shards
from tests.models.build import Tensor, hf_tensors
from tests.ptx.interpreter import InterpretedMachine
from tests.weights.files import CASE, per_expert, wide, write

BACKENDS: dict[str, Callable[[], Ops]] = {
    "numpy": ReferenceOps,
    "interpreted": lambda: GpuOps(InterpretedMachine()),
}


def as_it_is(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(tensors)


def packed(folder: Path, config: EngineConfig, ops: Ops | None) -> bytes:
    return open_model(folder, config, None, ops).path.read_bytes()


@pytest.mark.parametrize("form", [as_it_is, per_expert], ids=["fused", "per expert"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_packed_file_is_that_of_numpy(
    tmp_path: Path, backend: str, bits: int, form: Callable[..., dict[str, Tensor]]
) -> None:
    folder = write(tmp_path / "model", form(hf_tensors(CASE)), shards=2)
    ops = BACKENDS[backend]()
    made = []
    for where, how in (("a", ops), ("b", None)):
        config = EngineConfig(
            cache_dir=str(tmp_path / where), gpu_expert_bits=bits, attention_quant="int4"
        )
        made.append(packed(folder, config, how))
    assert made[0] == made[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_experts_a_turn_gives_the_same(tmp_path: Path, backend: str) -> None:
    folder = write(tmp_path / "model")
    config = EngineConfig(attention_quant="int8")
    shards = open_shards(folder)
    model = open_model(folder, EngineConfig(cache_dir=str(tmp_path))).config
    checkpoint = Checkpoint(shards, model, Formats.of(config))
    plain = CpuQuantizer(checkpoint)
    wanted = [records.copy() for records in plain.layers(range(model.num_layers))]
    one = 2 * 3 * checkpoint.record.inner * checkpoint.record.hidden
    for room in (1, 3 * one, 1 << 30):
        ops = BACKENDS[backend]()
        with contextlib.closing(GpuQuantizer(ops, checkpoint, room)) as made:
            assert made.batch_experts == min(max(1, room // one), model.num_experts)
            order = [1, 0]
            for layer, records in zip(order, made.layers(order), strict=True):
                assert np.array_equal(records, wanted[layer])
            for part in checkpoint.parts:
                mine, other = made.arrays(part), plain.arrays(part)
                assert mine.keys() == other.keys()
                assert all(np.array_equal(mine[kind], other[kind]) for kind in mine), part.name


def test_what_is_not_bf16_is_left_to_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "model", wide(hf_tensors(CASE)))

    def refuse(*_: object) -> None:
        raise AssertionError("f32 went to a kernel for bf16")

    ops = ReferenceOps()
    for name in ("quantize_int4", "quantize_int8"):
        monkeypatch.setattr(ops, name, refuse)
    made = packed(folder, EngineConfig(cache_dir=str(tmp_path / "a")), ops)
    assert made == packed(folder, EngineConfig(cache_dir=str(tmp_path / "b")), None)


def test_the_memory_is_given_back(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    held: list[object] = []

    class Counting(ReferenceOps):
        def zeros_mapped(self, *args: object) -> object:
            held.append(made := super().zeros_mapped(*args))  # type: ignore[arg-type]
            return made

        def release(self, array: object) -> None:
            held[:] = [one for one in held if one is not array]

    packed(folder, EngineConfig(cache_dir=str(tmp_path / "a")), Counting())
    assert not held
