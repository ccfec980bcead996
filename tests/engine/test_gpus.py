"""The table of GPUs and the search by name."""

import re

import pytest

from osmium.engine.gpus import GPUS, LINK_GB_S, find_gpu, generic_gpu
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
        size = re.search(r"(\d+)GB", gpu.name)
        assert size is None or int(size.group(1)) == gpu.vram_gib


def test_estimated_rates_are_close_to_measured_ones() -> None:
    """VRAM by a copy 2,980 and 4,160 GB/s, the link 52 to 55 (LOG.md, 2026-11)."""
    assert find_gpu("H100").vram_copy_gb_s == pytest.approx(2980, rel=0.03)
    assert find_gpu("H200").vram_copy_gb_s == pytest.approx(4160, rel=0.03)
    assert 52 <= find_gpu("H200").link_gb_s <= 55


def test_a_gpu_given_by_its_size_has_that_size() -> None:
    assert generic_gpu(12 * GIB).name == "a GPU with 12 GiB"
