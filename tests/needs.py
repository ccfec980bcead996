"""Skips for optional dependencies of tests."""

import importlib
import importlib.util

import pytest

__all__ = ["numba_compiler", "numba_simulator"]


def numba_simulator() -> None:
    """Skip without Numba. The simulator runs in a separate process."""
    if importlib.util.find_spec("numba_cuda") is None:
        pytest.skip("Numba is not installed; it is in the dev extra")


def numba_compiler() -> None:
    """Skip where Numba cannot be imported: with NumPy 2.5 it raises a DeprecationWarning."""
    numba_simulator()
    try:
        importlib.import_module("numba.cuda")
    except (ImportError, Warning) as error:
        pytest.skip(f"Numba cannot be imported: {error}")
