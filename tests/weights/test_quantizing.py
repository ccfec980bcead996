"""Quantisation of a checkpoint by kernels gives the same bytes as by NumPy."""

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
from tests.ptx.interpreter import InterpretedRuntime
from tests.weights.files import CASE, per_expert, wide, write

BACKENDS: dict[str, Callable[[], Ops]] = {
    "numpy": ReferenceOps,
    "interpreted": lambda: GpuOps(InterpretedRuntime()),
}


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(tensors)


def packed(folder: Path, config: EngineConfig, ops: Ops | None) -> bytes:
    return open_model(folder, config, None, ops).path.read_bytes()


@pytest.mark.parametrize("form", [fused, per_expert], ids=["fused", "per expert"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_packed_file_equals_that_of_numpy(
    tmp_path: Path, backend: str, bits: int, form: Callable[..., dict[str, Tensor]]
) -> None:
    folder = write(tmp_path / "model", form(hf_tensors(CASE)), shards=2)
    ops = BACKENDS[backend]()
    files = []
    for folder_name, backend_ops in (("a", ops), ("b", None)):
        config = EngineConfig(
            cache_dir=str(tmp_path / folder_name), gpu_expert_bits=bits, attention_quant="int4"
        )
        files.append(packed(folder, config, backend_ops))
    assert files[0] == files[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_experts_per_launch_gives_the_same_bytes(
    tmp_path: Path, backend: str
) -> None:
    folder = write(tmp_path / "model")
    config = EngineConfig(attention_quant="int8")
    shards = open_shards(folder)
    model = open_model(folder, EngineConfig(cache_dir=str(tmp_path))).config
    checkpoint = Checkpoint(shards, model, Formats.of(config))
    cpu_quantizer = CpuQuantizer(checkpoint)
    wanted = [experts.copy() for experts in cpu_quantizer.layers(range(model.num_layers))]
    expert_bytes = 2 * 3 * checkpoint.layout.inner * checkpoint.layout.hidden
    for buffer_bytes in (1, 3 * expert_bytes, 1 << 30):
        ops = BACKENDS[backend]()
        with contextlib.closing(GpuQuantizer(ops, checkpoint, buffer_bytes)) as files:
            assert files.batch_experts == min(
                max(1, buffer_bytes // expert_bytes), model.num_experts
            )
            order = [1, 0]
            for layer, experts in zip(order, files.layers(order), strict=True):
                assert np.array_equal(experts, wanted[layer])
            for part in checkpoint.parts:
                got, want = files.arrays(part), cpu_quantizer.arrays(part)
                assert got.keys() == want.keys()
                assert all(np.array_equal(got[kind], want[kind]) for kind in got), part.name


def test_weights_other_than_bf16_are_quantised_by_numpy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "model", wide(hf_tensors(CASE)))

    def refuse(*_: object) -> None:
        raise AssertionError("f32 went to a kernel for bf16")

    ops = ReferenceOps()
    for name in ("quantize_int4", "quantize_int8"):
        monkeypatch.setattr(ops, name, refuse)
    files = packed(folder, EngineConfig(cache_dir=str(tmp_path / "a")), ops)
    assert files == packed(folder, EngineConfig(cache_dir=str(tmp_path / "b")), None)


def test_buffers_are_released(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    buffers: list[object] = []

    class Counting(ReferenceOps):
        def zeros_mapped(self, *args: object) -> object:
            buffers.append(files := super().zeros_mapped(*args))  # type: ignore[arg-type]
            return files

        def release(self, array: object) -> None:
            buffers[:] = [expert_bytes for expert_bytes in buffers if expert_bytes is not array]

    packed(folder, EngineConfig(cache_dir=str(tmp_path / "a")), Counting())
    assert not buffers
