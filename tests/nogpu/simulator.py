"""Numba's CUDA simulator, made safe for shared arrays while the machine is busy."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["prepare_simulator", "run_simulated"]

ROOT = Path(__file__).resolve().parents[2]


def run_simulated(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module as a program in a process with the simulator."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def prepare_simulator() -> None:
    """Set the simulator up; call it in a process with NUMBA_ENABLE_CUDASIM=1.

    The simulator looks a shared array up and adds it without a lock: two threads of a block may
    get two arrays.  It polls its threads, and Python's default switch interval of 5 ms would make
    each barrier wait for as long.
    """
    from numba.core import types
    from numba.cuda.simulator.kernelapi import FakeCUDAShared
    from numba.np import numpy_support

    lock = threading.Lock()

    def array(self: Any, shape: Any, dtype: Any) -> Any:
        frame = sys._getframe(1)
        place = frame.f_code.co_filename, frame.f_lineno
        with lock:
            if place not in self._allocations:
                known = isinstance(dtype, types.Type)
                self._allocations[place] = np.empty(
                    shape, numpy_support.as_dtype(dtype) if known else dtype
                )
            return self._allocations[place]

    FakeCUDAShared.array = array
    sys.setswitchinterval(5e-5)
