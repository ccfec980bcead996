"""Fixtures for several groups."""

import os
import secrets
import tempfile
from collections.abc import Iterator

import numpy as np
import pytest

from osmium.cuda.driver import Device
from osmium.cuda.stream import CudaRuntime
from osmium.errors import NoDevice
from osmium.ops.gpu import GpuOps

_CACHE = tempfile.TemporaryDirectory(prefix="osmium-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
"""Packed files and locks of tests, and of processes they start, are not the user's."""


@pytest.fixture
def rng() -> np.random.Generator:
    """New random numbers; a failing test prints the seed, and OSMIUM_SEED sets it."""
    seed = int(os.environ.get("OSMIUM_SEED") or secrets.randbits(32))
    print(f"OSMIUM_SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def gpu() -> Iterator[GpuOps]:
    """The operations on this machine's GPU.  Skips where there is none; OSMIUM_NEED_GPU=1 fails."""
    try:
        runtime = CudaRuntime(Device())
    except NoDevice as error:
        if os.environ.get("OSMIUM_NEED_GPU") == "1":
            raise
        pytest.skip(str(error))
    yield GpuOps(runtime)
    runtime.close()
