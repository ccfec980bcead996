"""The table of GPUs and the search by name."""

import re

import pytest

from osmium.engine.gpus import GPUS, LINK_GB_S, find_gpu, generic_gpu, mma_rates
from osmium.errors import ConfigError

GIB = 1 << 30


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_gpu_is_found_by_any_spelling_of_its_name(gpu: object) -> None:
    name = gpu.name  # type: ignore[attr-defined]
    for text in (name, name.lower(), f"NVIDIA GeForce {name}", f"  {name.upper()} "):
        assert find_gpu(text) == gpu


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("3060 12GB", "RTX 3060 12GB"),
        ("RTX3060-12G", "RTX 3060 12GB"),
        ("rtx 3060 12 GiB", "RTX 3060 12GB"),
        ("4090 24GB", "RTX 4090"),
        ("4070ti", "RTX 4070 Ti"),
        ("4070TiSUPER", "RTX 4070 Ti Super"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
        ("a6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
    ],
)
def test_names_by_users_and_drivers_are_found(text: str, name: str) -> None:
    assert find_gpu(text).name == name


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("3060", ["RTX 3060 8GB", "RTX 3060 12GB", "use one of these names"]),
        ("4060 ti", ["RTX 4060 Ti 8GB", "RTX 4060 Ti 16GB"]),
        ("4090 12GB", ["RTX 4090 (24 GiB)"]),
        ("6000", ["RTX A6000", "RTX 6000 Ada", "RTX PRO 6000"]),
        ("RTX 4095", ["RTX 4090", "--vram"]),
        ("Radeon VII", ["not in the table", "--vram"]),
        ("", ["not in the table"]),
    ],
)
def test_an_ambiguous_or_unknown_name_is_refused_with_similar_names(
    text: str, named: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        find_gpu(text)
    for word in named:
        assert word in str(refused.value)


def test_the_table_is_plausible() -> None:
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        assert gpu.pcie in LINK_GB_S and 6 <= gpu.vram_gib <= 141
        assert 200 <= gpu.memory_gb_s <= 4800 and 20 <= gpu.sm_count <= 188
        assert gpu.capability in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))
        assert gpu.vram_gib * 0.97 * GIB < gpu.vram_bytes < gpu.vram_gib * GIB
        assert gpu.vram_copy_gb_s < gpu.memory_gb_s
        assert gpu.int8_tops / gpu.sm_count > (2 if gpu.capability[0] > 8 else 1)
        size = re.search(r"(\d+)GB", gpu.name)
        assert size is None or int(size.group(1)) == gpu.vram_gib


def test_estimated_rates_are_close_to_measured_ones() -> None:
    """VRAM by a copy 2,980 and 4,160 GB/s, the link 52 to 55 (LOG.md, 2026-11)."""
    assert find_gpu("H100").vram_copy_gb_s == pytest.approx(2980, rel=0.03)
    assert find_gpu("H200").vram_copy_gb_s == pytest.approx(4160, rel=0.03)
    assert 52 <= find_gpu("H200").link_gb_s <= 55


def test_a_gpu_given_by_its_size_has_that_size() -> None:
    assert generic_gpu(12 * GIB).name == "a GPU with 12 GiB"


@pytest.mark.parametrize(
    ("name", "int8", "f16"),
    [
        ("RTX 3090", 284, 71),
        ("RTX 4090", 660.6, 165.2),
        ("RTX 5090", 838, 209.5),
        ("RTX A6000", 309.7, 154.8),
        ("RTX 6000 Ada", 728.5, 364.2),
        ("RTX PRO 6000", 1007, 503.8),
        ("A10", 250, 125),
        ("A100 80GB", 624, 312),
        ("L4", 242, 121),
        ("L40", 362, 181),
        ("L40S", 733, 362),
    ],
)
def test_rates_of_tensor_cores_are_the_published_ones(name: str, int8: float, f16: float) -> None:
    rates = find_gpu(name).mma
    assert rates is not None
    assert (rates.int8_tops, rates.f16_tflops) == pytest.approx((int8, f16), rel=0.015)


def test_hopper_has_the_measured_rates_of_mma_sync() -> None:
    """1,270 TOPS and 641 TFLOP/s on an H200, registers only (2026-11-30)."""
    rates = find_gpu("H200").mma
    assert rates is not None
    assert (rates.int8_tops, rates.f16_tflops) == pytest.approx((1270, 641), rel=0.015)


def test_rates_are_found_by_the_drivers_name_and_the_vram() -> None:
    small, large = (mma_rates("NVIDIA GeForce RTX 4060 Ti", n * GIB - 1) for n in (8, 16))
    assert small == large == find_gpu("4060 Ti 8GB").mma
    assert mma_rates("NVIDIA H200", 139 * GIB) == find_gpu("H200").mma
    assert mma_rates("a GPU with 12 GiB", 12 * GIB) is None
    assert mma_rates("Radeon VII", 16 * GIB) is None
    assert generic_gpu(12 * GIB).mma is None
