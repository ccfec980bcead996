"""Fixtures that several groups share."""

import os
import secrets

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh random numbers; the seed is printed when a test fails, OSMIUM_SEED sets it."""
    seed = int(os.environ.get("OSMIUM_SEED") or secrets.randbits(32))
    print(f"OSMIUM_SEED={seed}")
    return np.random.default_rng(seed)
