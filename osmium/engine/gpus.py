"""GPUs by name, to plan for one that is not in this machine.

Values are the makers' specifications: memory, its rate, PCIe lanes, compute capability,
multiprocessors, rate of tensor cores.  A card delivers less, by fractions measured on others:
VRAM_VISIBLE, VRAM_COPY, LINK_GB_S and HOPPER_MMA_SYNC.
"""

import difflib
import math
import re
from contextlib import suppress
from dataclasses import dataclass

from osmium.errors import ConfigError

__all__ = ["GPUS", "GpuSpec", "MmaRates", "find_gpu", "generic_gpu", "mma_rates"]

GIB = 1 << 30

VRAM_VISIBLE = 0.98
"""Usable fraction of the specified memory: 23.65 of a 4090's 24 GiB, 31.36 of a 5090's 32, 11.76 of
a 3060's 12."""

VRAM_COPY = 0.87
"""Rate of a copy inside VRAM, read plus written, as a fraction of the specified rate: H100 2,980 of
3,352 GB/s, H200 4,160 of 4,800 (2026-11)."""

LINK_GB_S = {
    (3, 8): 6.2, (3, 16): 12.4, (4, 8): 12.6, (4, 16): 25.0, (5, 8): 26.5, (5, 16): 53.0,
}  # fmt: skip
"""GB/s of large copies from page-locked host memory, by PCIe generation and lanes.

Generation 5 x16 is measured (H100, H200: 52 to 55, 2026-11).  The others are the same fraction of
their signalling rate; that agrees with a published 25.2 for generation 4 x16 (RTX 4090)."""

HOPPER_MMA_SYNC = 0.64
"""Rate of mma.sync on compute capability 9.0, as a fraction of the specified rate, which needs
wgmma: H200 1,270 of 1,979 TOPS int8, 641 of 989 TFLOP/s f16 (2026-11)."""

_GEFORCE = re.compile(r"RTX [3-5]0[5-9]0\b")
"""Names whose f16 products with f32 sums have half the rate of other cards."""


@dataclass(frozen=True)
class MmaRates:
    """Dense rates of mma.sync: each product and each sum is one operation."""

    int8_tops: float
    """Operations on int8 per second, in 1e12."""
    f16_tflops: float
    """The same on f16 and bf16 with f32 sums."""


@dataclass(frozen=True)
class GpuSpec:
    """One GPU, as specified."""

    name: str
    vram_gib: int
    """Specified memory, GiB."""
    memory_gb_s: float
    """Specified rate of VRAM."""
    pcie: tuple[int, int]
    """Generation and lanes; for laptops eight lanes, as most of them are wired."""
    capability: tuple[int, int]
    sm_count: int
    int8_tops: float
    """Specified dense rate of int8 tensor cores at the boost clock, 1e12 per second; 0: unknown."""

    @property
    def mma(self) -> MmaRates | None:
        """Expected rates of mma.sync; None where they are unknown."""
        if not self.int8_tops:
            return None
        int8 = self.int8_tops * (HOPPER_MMA_SYNC if self.capability == _HOPPER else 1)
        return MmaRates(int8, int8 / (4 if _GEFORCE.match(self.name) else 2))

    @property
    def vram_bytes(self) -> int:
        """VRAM that the driver can allocate on an idle GPU."""
        return int(self.vram_gib * GIB * VRAM_VISIBLE)

    @property
    def vram_copy_gb_s(self) -> float:
        """Expected rate of a copy inside VRAM, bytes read plus written."""
        return self.memory_gb_s * VRAM_COPY

    @property
    def link_gb_s(self) -> float:
        """Expected rate of large copies from host memory."""
        return LINK_GB_S[self.pcie]


_AMPERE, _ADA, _HOPPER, _BLACKWELL = (8, 6), (8, 9), (9, 0), (12, 0)

GPUS = tuple(
    GpuSpec(*row)
    for row in (
        ("RTX 3050 8GB", 8, 224, (4, 8), _AMPERE, 20, 73),
        ("RTX 3060 8GB", 8, 240, (4, 16), _AMPERE, 28, 102),
        ("RTX 3060 12GB", 12, 360, (4, 16), _AMPERE, 28, 102),
        ("RTX 3060 Ti", 8, 448, (4, 16), _AMPERE, 38, 130),
        ("RTX 3070", 8, 448, (4, 16), _AMPERE, 46, 163),
        ("RTX 3070 Ti", 8, 608, (4, 16), _AMPERE, 48, 174),
        ("RTX 3080 10GB", 10, 760, (4, 16), _AMPERE, 68, 238),
        ("RTX 3080 12GB", 12, 912, (4, 16), _AMPERE, 70, 245),
        ("RTX 3080 Ti", 12, 912, (4, 16), _AMPERE, 80, 273),
        ("RTX 3090", 24, 936, (4, 16), _AMPERE, 82, 285),
        ("RTX 3090 Ti", 24, 1008, (4, 16), _AMPERE, 84, 320),
        ("RTX 4060", 8, 272, (4, 8), _ADA, 24, 121),
        ("RTX 4060 Ti 8GB", 8, 288, (4, 8), _ADA, 34, 177),
        ("RTX 4060 Ti 16GB", 16, 288, (4, 8), _ADA, 34, 177),
        ("RTX 4070", 12, 504, (4, 16), _ADA, 46, 233),
        ("RTX 4070 Super", 12, 504, (4, 16), _ADA, 56, 284),
        ("RTX 4070 Ti", 12, 504, (4, 16), _ADA, 60, 321),
        ("RTX 4070 Ti Super", 16, 672, (4, 16), _ADA, 66, 353),
        ("RTX 4080", 16, 717, (4, 16), _ADA, 76, 390),
        ("RTX 4080 Super", 16, 736, (4, 16), _ADA, 80, 418),
        ("RTX 4090", 24, 1008, (4, 16), _ADA, 128, 661),
        ("RTX 5060", 8, 448, (5, 8), _BLACKWELL, 30, 153),
        ("RTX 5060 Ti 8GB", 8, 448, (5, 8), _BLACKWELL, 36, 190),
        ("RTX 5060 Ti 16GB", 16, 448, (5, 8), _BLACKWELL, 36, 190),
        ("RTX 5070", 12, 672, (5, 16), _BLACKWELL, 48, 247),
        ("RTX 5070 Ti", 16, 896, (5, 16), _BLACKWELL, 70, 352),
        ("RTX 5080", 16, 960, (5, 16), _BLACKWELL, 84, 450),
        ("RTX 5090", 32, 1792, (5, 16), _BLACKWELL, 170, 838),
        ("RTX 3060 Laptop", 6, 336, (4, 8), _AMPERE, 30, 105),
        ("RTX 3070 Laptop", 8, 448, (4, 8), _AMPERE, 40, 133),
        ("RTX 3070 Ti Laptop", 8, 448, (4, 8), _AMPERE, 46, 140),
        ("RTX 3080 Laptop 8GB", 8, 448, (4, 8), _AMPERE, 48, 168),
        ("RTX 3080 Laptop 16GB", 16, 448, (4, 8), _AMPERE, 48, 168),
        ("RTX 3080 Ti Laptop", 16, 512, (4, 8), _AMPERE, 58, 189),
        ("RTX 4060 Laptop", 8, 256, (4, 8), _ADA, 24, 116),
        ("RTX 4070 Laptop", 8, 256, (4, 8), _ADA, 36, 160),
        ("RTX 4080 Laptop", 12, 432, (4, 8), _ADA, 58, 271),
        ("RTX 4090 Laptop", 16, 576, (4, 8), _ADA, 76, 318),
        ("RTX 5070 Laptop", 8, 384, (5, 8), _BLACKWELL, 36, 173),
        ("RTX 5070 Ti Laptop", 12, 672, (5, 8), _BLACKWELL, 46, 209),
        ("RTX 5080 Laptop", 16, 896, (5, 8), _BLACKWELL, 60, 281),
        ("RTX 5090 Laptop", 24, 896, (5, 8), _BLACKWELL, 82, 363),
        ("RTX A2000 12GB", 12, 288, (4, 16), _AMPERE, 26, 64),
        ("RTX A4000", 16, 448, (4, 16), _AMPERE, 48, 153),
        ("RTX A4500", 20, 640, (4, 16), _AMPERE, 56, 189),
        ("RTX A5000", 24, 768, (4, 16), _AMPERE, 64, 222),
        ("RTX A6000", 48, 768, (4, 16), _AMPERE, 84, 310),
        ("RTX 2000 Ada", 16, 224, (4, 8), _ADA, 22, 96),
        ("RTX 4000 Ada", 20, 360, (4, 16), _ADA, 48, 214),
        ("RTX 4500 Ada", 24, 432, (4, 16), _ADA, 60, 317),
        ("RTX 5000 Ada", 32, 576, (4, 16), _ADA, 100, 522),
        ("RTX 6000 Ada", 48, 960, (4, 16), _ADA, 142, 728),
        ("RTX PRO 2000", 16, 288, (5, 8), _BLACKWELL, 34, 136),
        ("RTX PRO 4000", 24, 672, (5, 16), _BLACKWELL, 70, 375),
        ("RTX PRO 4500", 32, 896, (5, 16), _BLACKWELL, 82, 439),
        ("RTX PRO 5000 48GB", 48, 1344, (5, 16), _BLACKWELL, 110, 590),
        ("RTX PRO 5000 72GB", 72, 1344, (5, 16), _BLACKWELL, 110, 590),
        ("RTX PRO 6000", 96, 1792, (5, 16), _BLACKWELL, 188, 1008),
        ("A10", 24, 600, (4, 16), _AMPERE, 72, 250),
        ("A40", 48, 696, (4, 16), _AMPERE, 84, 299),
        ("A100 40GB", 40, 1555, (4, 16), (8, 0), 108, 624),
        ("A100 80GB", 80, 1935, (4, 16), (8, 0), 108, 624),
        ("L4", 24, 300, (4, 16), _ADA, 58, 242),
        ("L40", 48, 864, (4, 16), _ADA, 142, 362),
        ("L40S", 48, 864, (4, 16), _ADA, 142, 733),
        ("H100", 80, 3352, (5, 16), _HOPPER, 132, 1979),
        ("H100 PCIe", 80, 2039, (5, 16), _HOPPER, 114, 1513),
        ("H100 NVL", 94, 3938, (5, 16), _HOPPER, 132, 1671),
        ("H200", 141, 4800, (5, 16), _HOPPER, 132, 1979),
    )
)

GENERIC_GB_S = 500
"""Assumed VRAM rate of a GPU known only by size: between an RTX 3060 and a 4070 Ti Super."""

_NOISE = {
    "nvidia", "geforce", "rtx", "gpu", "graphics", "card", "generation", "blackwell", "workstation",
    "server", "edition", "max", "q", "sxm", "hbm", "quadro", "desktop",
}  # fmt: skip
"""Words of a name that do not distinguish GPUs."""

_WORDS = re.compile(r"ti|super|laptop|ada|pro|pcie|nvl|nvidia|geforce|rtx|sxm\d*|hbm\d*|[a-z]+|\d+")
_SIZE = re.compile(r"(\d+)\s*g(?:i?b)?\b")


def generic_gpu(vram: int) -> GpuSpec:
    """A GPU with `vram` bytes, the CUDA context included, and typical other values."""
    gib = max(1, round(vram / GIB))
    return GpuSpec(f"a GPU with {gib} GiB", gib, GENERIC_GB_S, (4, 16), (8, 6), 0, 0)


def find_gpu(text: str) -> GpuSpec:
    """Look a GPU up by name: "4090", "rtx4090", "NVIDIA GeForce RTX 4090", "3060 12GB".

    Raises: ConfigError, with the candidates of an ambiguous name or the nearest names.
    """
    words, size = _words(text)
    same_words = [gpu for gpu in GPUS if _words(gpu.name)[0] == words] or [
        gpu for gpu in GPUS if _words(gpu.name)[0] == words - {"pcie"}
    ]
    matches = [gpu for gpu in same_words if size in (None, gpu.vram_gib)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = " or ".join(gpu.name for gpu in matches)
        raise ConfigError(f"--gpu {text!r} may be {names}; use one of these names.")
    near = ", ".join(f"{gpu.name} ({gpu.vram_gib} GiB)" for gpu in same_words or _near(text, words))
    raise ConfigError(
        f"--gpu {text!r} is not in the table"
        + (f"; near matches: {near}." if near else ".")
        + " For another card use --vram SIZE and --link GB/S."
    )


def mma_rates(name: str, vram: int) -> MmaRates | None:
    """Rates of a GPU by the driver's name, and by its bytes of VRAM where cards share a name.

    None where the table has no such GPU.
    """
    for text in (name, f"{name} {math.ceil(vram / GIB)}GB"):
        with suppress(ConfigError):
            return find_gpu(text).mma
    return None


def _words(text: str) -> tuple[frozenset[str], int | None]:
    """The distinguishing words of a name, and its GiB if the name has them."""
    lower = text.lower()
    size = _SIZE.search(lower)
    parts = _WORDS.findall(_SIZE.sub(" ", lower))
    words = frozenset(part for part in parts if part.rstrip("0123456789") not in _NOISE or not part)
    return words, None if size is None else int(size.group(1))


def _near(text: str, words: frozenset[str]) -> list[GpuSpec]:
    """Up to six GPUs with the same number, else those with the most similar names."""
    numbers = {word for word in words if word.isdigit()}
    near = [gpu for gpu in GPUS if numbers & _words(gpu.name)[0]]
    if not near:
        names = {gpu.name.lower(): gpu for gpu in GPUS}
        close = difflib.get_close_matches(text.lower(), names, n=4, cutoff=0.5)
        near = [names[name] for name in close]
    return near[:6]
