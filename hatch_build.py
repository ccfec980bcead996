"""Compiles the Numba kernels into a wheel, so that whoever installs it needs no compiler.

Where Numba is not installed, as in a build that pip isolates, the wheel is made without them and
says so; on a GPU it then needs `osmium[build]`.  tools/wheel makes the wheels that are given out
and refuses one that lacks a kernel.  An editable install compiles at first use.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileKernels(BuildHookInterface[Any]):
    """The hook that pyproject.toml names."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before a wheel: compile what can be compiled here."""
        if version == "editable":
            return
        if importlib.util.find_spec("numba_cuda") is None:
            self.app.display_warning(
                "Numba is not here: this wheel lacks the compiled kernels. tools/wheel makes one "
                "that has them."
            )
            return
        root = Path(self.root)
        folder = root / "osmium" / "kernels" / "compiled"
        done = subprocess.run(
            [sys.executable, "-m", "osmium.kernels.python", str(folder)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"The Numba kernels do not compile:\n{done.stderr[-2000:]}")
        for path in done.stdout.splitlines():
            build_data["force_include"][path] = f"osmium/kernels/compiled/{Path(path).name}"
