"""Prefill attention whose contexts have several parts at few positions."""

import pytest

from osmium.kernels import ptx, ptx_family
from osmium.kernels.ptx import Contract, Kernel
from osmium.ops import gpu, tiling

__all__ = ["use_parts"]

NAME = "gqa_prefill_bf16_128"
"""A kernel of the family."""


def use_parts(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    """Divide contexts into parts of `positions`, in the kernels and in their launches."""
    path = next(
        files[NAME] for files in map(ptx_family.kernel_files, ptx._FOLDERS) if NAME in files
    )
    line = "// -- let PART {}\n"
    before, after = path.read_text().split(line.format(tiling.PREFILL_PART))
    text = before + line.format(positions) + after

    def made(entry: str) -> Kernel:
        def load() -> Contract:
            source = ptx_family.expand(text, path.name, entry)
            return ptx.parse(source.text, source.where, source.origins)

        return Kernel(entry, load)

    kernels = {key: made(one.name) for key, one in gpu.GQA_PREFILL.items()}
    monkeypatch.setattr(gpu, "GQA_PREFILL", kernels)
    monkeypatch.setattr(gpu, "PREFILL_PART", positions)
