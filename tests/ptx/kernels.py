"""The hand-written kernels: names, files and texts."""

from pathlib import Path

from osmium.kernels.ptx_family import find_source, kernel_files

FOLDER = Path(__file__).resolve().parents[2] / "ptx"

KERNEL_FILES = kernel_files(FOLDER)
"""The file that defines each kernel; a family defines several."""

NAMES = sorted(KERNEL_FILES)


def kernel_text(name: str) -> str:
    """The PTX of a kernel; of a family's kernel the expanded text."""
    source = find_source((FOLDER,), name)
    assert source is not None, name
    return source.text
