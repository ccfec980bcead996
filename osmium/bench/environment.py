"""Where a measurement was made and of what: what every result says of its machine and code."""

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from osmium.distribution import version

__all__ = ["environment"]


def environment(device: str, gpu: Any = None) -> dict[str, Any]:
    """`device` is its name, `gpu` the cuda.Device where there is one."""
    cuda = 0 if gpu is None else gpu.driver_version
    return {
        "device": device,
        "driver": None if gpu is None else _driver(),
        "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
        "machine": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "version": version(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Of the checkout, with a + where it has been changed; $OSMIUM_COMMIT where it is a copy
    without its history; None of an installed package."""
    if told := os.environ.get("OSMIUM_COMMIT"):
        return told
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+",
             "--exclude=*"],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _driver() -> str | None:
    """The driver's own version, as 580.159, by NVML."""
    try:
        import pynvml  # not every machine has libnvidia-ml, and only this needs it

        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # NVML's own errors, of a library that may not be there: no word is a word
        return None
