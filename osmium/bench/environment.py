"""The machine and code of a measurement: part of every result."""

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from osmium.distribution import version

__all__ = ["environment"]


def environment(device: str, gpu: Any = None) -> dict[str, Any]:
    """A document for JSON; `device` is the device's name, `gpu` its cuda.Device or None."""
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
    """The commit of the checkout, with a + where files differ from it.

    $OSMIUM_COMMIT overrides it, for a copy without history.  None in an installed package.
    """
    if commit := os.environ.get("OSMIUM_COMMIT"):
        return commit
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+",
             "--exclude=*"],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def _driver() -> str | None:
    """The driver's version from NVML, as 580.159; None without NVML."""
    try:
        import pynvml  # only this function needs libnvidia-ml, and not every machine has it

        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # NVML raises its own error types; the result is complete without a version
        return None
