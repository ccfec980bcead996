"""Fixtures that several groups share."""

import os
import secrets
from collections.abc import Iterator

import numpy as np
import pytest

from osmium.cuda.driver import Device
from osmium.cuda.stream import CudaRuntime
from osmium.errors import NoDevice
from osmium.ops.gpu import GpuOps


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh random numbers; the seed is printed when a test fails, OSMIUM_SEED sets it."""
    seed = int(os.environ.get("OSMIUM_SEED") or secrets.randbits(32))
    print(f"OSMIUM_SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def gpu() -> Iterator[GpuOps]:
    """The operations on this machine's GPU.  Skips where there is none; OSMIUM_NEED_GPU=1 fails."""
    try:
        machine = CudaRuntime(Device())
    except NoDevice as error:
        if os.environ.get("OSMIUM_NEED_GPU") == "1":
            raise
        pytest.skip(str(error))
    yield GpuOps(machine)
    machine.close()
