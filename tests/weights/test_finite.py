"""Weights that are not finite are refused at packing, by the tensor's name, on both devices."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from osmium.config import EngineConfig
from osmium.errors import CheckpointError
from osmium.ops import Ops
from osmium.quant import int4, int8
from osmium.quant.finite import first_not_finite, is_finite
from osmium.quant.floats import bf16_from_f32, f32_from_bf16
from osmium.weights import open_model
from tests.models.build import Tensor, hf_tensors
from tests.weights.files import CASE, ROOT, per_expert, wide, write
from tests.weights.test_quantizing import BACKENDS, fused

NAN, INF, MINUS_INF = np.nan, np.inf, -np.inf

UNQUANTISED = sorted(name for name in hf_tensors(CASE) if "layers.0.mlp.experts" not in name)


def spoiled(tensors: dict[str, Tensor], name: str, value: float, last: bool) -> dict[str, Tensor]:
    """The tensors with `value` as the first or the last of `name`."""
    tensor = tensors[name].copy()
    flat = tensor.reshape(-1)
    number = np.array([value], np.float32)
    flat[-1 if last else 0] = (bf16_from_f32(number) if flat.dtype == np.uint16 else number)[0]
    return {**tensors, name: tensor}


def refuses(folder: Path, name: str, ops: Ops | None = None, **options: object) -> str:
    """The text of the error that packing `folder` raises, which must name `name`."""
    config = EngineConfig(cache_dir=str(folder / "cache"), **options)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError) as found:
        open_model(folder, config, None, ops)
    assert str(found.value).startswith(f"{name} has "), found.value
    assert not list((folder / "cache").glob("*.osmium")), "nothing was published"
    return str(found.value)


@pytest.mark.parametrize("value", [NAN, INF, MINUS_INF])
@pytest.mark.parametrize("name", UNQUANTISED)
def test_a_value_that_is_not_finite_is_refused_in_any_tensor(
    name: str, value: float, tmp_path: Path
) -> None:
    write(tmp_path, spoiled(hf_tensors(CASE), name, value, last=True))
    text = refuses(tmp_path, name)
    assert ("NaN" if np.isnan(value) else "infinity") in text


@pytest.mark.parametrize("options", [{"attention_quant": "int8"}, {"attention_quant": "int4",
    "shared_expert_quant": "int4", "lm_head_quant": "int4"}, {"attention_quant": "bf16",
    "shared_expert_quant": "bf16", "lm_head_quant": "bf16"}])  # fmt: skip
@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", f"{ROOT}layers.0.linear_attn.in_proj_z.weight",
     f"{ROOT}layers.1.self_attn.v_proj.weight", f"{ROOT}layers.1.self_attn.o_proj.weight",
     f"{ROOT}layers.0.mlp.shared_expert.up_proj.weight",
     f"{ROOT}layers.1.mlp.shared_expert.down_proj.weight"],
)  # fmt: skip
@pytest.mark.parametrize("backend", [None, "numpy"])
def test_a_quantised_matrix_is_checked_on_both_devices(
    backend: str | None, name: str, options: dict[str, str], tmp_path: Path
) -> None:
    write(tmp_path, spoiled(hf_tensors(CASE), name, NAN, last=False))
    refuses(tmp_path, name, BACKENDS[backend]() if backend else None, **options)


@pytest.mark.parametrize("form", [fused, per_expert], ids=["fused", "per expert"])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("value", [NAN, MINUS_INF])
@pytest.mark.parametrize("backend", [None, "numpy"])
def test_an_expert_is_checked_on_both_devices(
    backend: str | None,
    value: float,
    bits: int,
    form: Callable[..., dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    prefix = f"{ROOT}layers.1.mlp.experts."
    names = {
        fused: ("gate_up_proj", "down_proj"),
        per_expert: ("3.gate_proj.weight", "0.up_proj.weight", "3.down_proj.weight"),
    }
    for i, name in enumerate(names[form]):
        folder = tmp_path / str(i)
        write(folder, spoiled(form(hf_tensors(CASE)), prefix + name, value, last=True))
        ops = BACKENDS[backend]() if backend else None
        text = refuses(folder, prefix + name, ops, gpu_expert_bits=bits)
        assert form is per_expert or "[3, " in text, "the expert's number is in the index"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [NAN, MINUS_INF])
def test_the_kernels_mark_an_expert_that_is_not_finite(
    value: float, bits: int, tmp_path: Path
) -> None:
    name = f"{ROOT}layers.0.mlp.experts.gate_up_proj"
    write(tmp_path, spoiled(hf_tensors(CASE), name, value, last=False))
    assert "[0, 0, 0]" in refuses(tmp_path, name, BACKENDS["interpreted"](), gpu_expert_bits=bits)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize(
    "values", [(INF, MINUS_INF), (NAN, INF), (3e38, -3e38), (1e30, 1e-30), (6e5, 6e5)]
)
def test_groups_of_which_no_int4_scale_is_a_number_are_refused(
    backend: str | None, values: tuple[float, float], tmp_path: Path
) -> None:
    """Infinities of both signs, and sums that overflow, have no best clip."""
    name = f"{ROOT}layers.0.mlp.experts.down_proj"
    tensors = spoiled(hf_tensors(CASE), name, values[0], last=False)
    tensors[name].reshape(-1)[1:32] = bf16_from_f32(np.full(31, values[1], np.float32))
    write(tmp_path, tensors)
    text = refuses(tmp_path, name, BACKENDS[backend]() if backend else None)
    assert ("too large" in text) == bool(np.isfinite(values).all())
    if np.isfinite(values).all():
        open_model(tmp_path, EngineConfig(cache_dir=str(tmp_path), gpu_expert_bits=16))


@pytest.mark.parametrize("name", ["lm_head.weight", f"{ROOT}layers.0.mlp.gate.weight",
                                  f"{ROOT}embed_tokens.weight"])  # fmt: skip
def test_a_value_that_bf16_does_not_hold_is_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path, spoiled(wide(hf_tensors(CASE)), name, 3.4e38, last=True))
    assert "too large" in refuses(tmp_path, name, lm_head_quant="bf16")


def test_the_largest_finite_values_are_accepted(tmp_path: Path) -> None:
    name = f"{ROOT}layers.0.mlp.experts.gate_up_proj"
    largest = float(f32_from_bf16(np.array([0x7F7F], np.uint16))[0])
    write(tmp_path, spoiled(hf_tensors(CASE), name, largest, last=True))
    for bits in (16, 8):
        config = EngineConfig(cache_dir=str(tmp_path / "cache"), gpu_expert_bits=bits)
        open_model(tmp_path, config).verify()


def test_tensors_that_are_not_used_may_have_any_value(tmp_path: Path) -> None:
    unused: dict[str, Tensor] = {"mtp.fc.weight": np.full((2, 2), np.nan, np.float32),
              "model.visual.x": np.full(3, np.inf, np.float16)}  # fmt: skip
    write(tmp_path, {**hf_tensors(CASE), **unused})
    open_model(tmp_path, EngineConfig(cache_dir=str(tmp_path / "cache")))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint16])
@pytest.mark.parametrize("size", [1, 1000, (1 << 17) - 1, 1 << 17, (1 << 17) + 1, 300_000])
def test_one_value_among_many_is_found(dtype: type, size: int) -> None:
    def values(x: np.ndarray) -> np.ndarray:
        return bf16_from_f32(x) if dtype is np.uint16 else x.astype(dtype)

    x = np.linspace(-60000, 60000, size, dtype=np.float32)
    assert is_finite(values(x)) and first_not_finite(values(x)) is None
    for at in {0, size // 2, size - 1}:
        for value, kind in ((np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")):
            bad = x.copy()
            bad[at] = value
            assert not is_finite(values(bad))
            assert first_not_finite(values(bad)) == ((at,), kind, 1)
    assert is_finite(np.empty(0, np.float32))


def test_scales_of_finite_values_are_finite_and_of_others_are_not(
    rng: np.random.Generator,
) -> None:
    w = rng.standard_normal((4, 64)).astype(np.float32)
    w[1] = 0
    assert np.isfinite(int4.quantize(w, 32)[1]).all() and np.isfinite(int8.quantize(w)[1]).all()
    for value in (np.nan, np.inf, -np.inf):
        w[2, 40] = value
        assert np.isfinite(int4.quantize(w, 32)[1]).tolist() == [
            [True, True], [True, True], [True, False], [True, True]]  # fmt: skip
        assert np.isfinite(int8.quantize(w)[1]).tolist() == [True, True, False, True]
