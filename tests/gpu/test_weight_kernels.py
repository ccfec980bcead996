"""Weights written by kernels on a GPU: quantised from a checkpoint, or synthetic."""

from pathlib import Path

import numpy as np
import pytest

from osmium.config import EngineConfig
from osmium.cuda.memory import DeviceArray
from osmium.cuda.stream import CudaRuntime
from osmium.errors import CheckpointError
from osmium.loader import Loader, pack
from osmium.ops import LinearWeight
from osmium.ops.gpu import GpuOps
from osmium.quant.floats import bf16_from_f32
from osmium.weights import open_model
from osmium.weights.synthetic import open_synthetic
from tests.models.build import hf_tensors
from tests.weights.files import CASE, ROOT, per_expert, write

NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.gpu


def test_released_host_memory_is_unmapped(gpu: GpuOps) -> None:
    assert isinstance(gpu.runtime, CudaRuntime)
    held = len(gpu.runtime._buffers)
    for make, shape in ((gpu.empty_mapped, (3, 5)), (gpu.zeros_mapped, (1 << 20,))):
        made = make(shape, np.float32)
        gpu.release(made)
        assert len(gpu.runtime._buffers) == held
        with pytest.raises(KeyError):
            gpu.host_view(made)


def test_bytes_can_be_viewed_as_another_dtype(gpu: GpuOps, rng: np.random.Generator) -> None:
    source = rng.integers(0, 256, (3, 24), dtype=np.uint8)
    array: DeviceArray = gpu.to_device(source)
    for dtype in (np.uint16, np.float32, np.int64):
        found = gpu.copy_d2h(array.view(dtype))
        assert np.array_equal(found.view(np.uint8), source)
    with pytest.raises(ValueError, match="24"):
        array.view(np.dtype("V7"))


@pytest.mark.parametrize("bits", [8, 4])
def test_packing_on_the_gpu_gives_the_bytes_of_numpy(
    gpu: GpuOps, tmp_path: Path, bits: int
) -> None:
    for form in (dict, per_expert):
        folder = write(tmp_path / form.__name__, form(hf_tensors(CASE)), shards=2)
        made = []
        for folder_name, ops in (("a", gpu), ("b", None)):
            config = EngineConfig(
                cache_dir=str(tmp_path / folder_name), gpu_expert_bits=bits, attention_quant="int4"
            )
            made.append(open_model(folder, config, None, ops).path.read_bytes())
        assert made[0] == made[1]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("values", [(NAN, 1), (INF, 1), (-INF, 1), (INF, -INF), (NAN, INF)])
def test_packing_on_the_gpu_refuses_weights_that_are_not_finite(
    gpu: GpuOps, tmp_path: Path, bits: int, values: tuple[float, float]
) -> None:
    for name in ("layers.1.mlp.experts.down_proj", "layers.0.linear_attn.out_proj.weight"):
        tensors = hf_tensors(CASE)
        spoiled = tensors[ROOT + name].copy()
        spoiled.reshape(-1)[-2:] = bf16_from_f32(np.array(values, np.float32))
        folder = write(tmp_path / name, {**tensors, ROOT + name: spoiled})
        config = EngineConfig(cache_dir=str(tmp_path), gpu_expert_bits=bits, attention_quant="int4")
        with pytest.raises(CheckpointError, match=ROOT + name):
            open_model(folder, config, None, gpu)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_synthetic_model_is_the_same_on_gpu_and_cpu(gpu: GpuOps, bits: int) -> None:
    config = EngineConfig(gpu_expert_bits=bits, attention_quant="int4")
    model = open_synthetic("synthetic:qwen3.5-35b-a3b:1", config)
    shape = (24, model.layout.nbytes)
    for out in (gpu.empty_mapped(shape, np.uint8), gpu.empty(shape, np.uint8)):
        model.generate_experts(gpu, 0, out, 3)
        assert np.array_equal(
            gpu.copy_d2h(out)[[0, 23]], [model.packed_expert(0, e) for e in (3, 26)]
        )
    for name in ("layers.0.qkvz", "layers.0.router", "layers.0.shared_up", "layers.0.conv"):
        found, wanted = model.make(gpu, name), model.tensor(name)
        if not isinstance(wanted, LinearWeight):
            assert np.array_equal(gpu.copy_d2h(found), wanted)
            continue
        assert np.array_equal(gpu.copy_d2h(found.data), wanted.data), name
        assert wanted.scale is None or np.array_equal(gpu.copy_d2h(found.scale), wanted.scale)


@pytest.mark.parametrize("slots", [None, 3])
def test_a_synthetic_model_equals_its_packed_file(
    gpu: GpuOps, tmp_path: Path, slots: int | None
) -> None:
    """Generated in VRAM or host memory, and read from its packed file: the same responses."""
    path = pack("synthetic:tiny", cache_dir=str(tmp_path))
    wanted = open_synthetic("synthetic:tiny", EngineConfig()).all_packed_experts()
    responses = []
    for model in ("synthetic:tiny", path):
        loader = Loader(model, "gpu", expert_slots=slots, context=256, prefill_chunk=16)
        try:
            engine = loader.engine()
            responses.append(np.asarray(engine.logits([1, 2, 3, 4])))
            engine.close()
            if loader._host_experts is not None and loader.gpu is not None:
                found = loader.gpu.copy_d2h(loader._host_experts.packed)
                assert np.array_equal(found, wanted)
        finally:
            loader.close()
    assert np.array_equal(responses[0], responses[1])
