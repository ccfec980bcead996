"""What a test may need and not find: it is then skipped, with the reason."""

import importlib
import importlib.util

import pytest

__all__ = ["numba_compiler", "numba_simulator"]


def numba_simulator() -> None:
    """Skip where Numba is not installed.  The simulator runs in a process of its own."""
    if importlib.util.find_spec("numba_cuda") is None:
        pytest.skip("Numba is not installed; it is of the dev extra")


def numba_compiler() -> None:
    """Skip where Numba cannot be imported: beside NumPy 2.5 it raises a DeprecationWarning."""
    numba_simulator()
    try:
        importlib.import_module("numba.cuda")
    except (ImportError, Warning) as error:
        pytest.skip(f"Numba cannot be imported: {error}")
