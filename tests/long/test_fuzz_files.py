"""Damaged packed files, truncated or with flipped bits.

Loading must raise CheckpointError or give the right model; it must not crash or load a wrong model.
"""

import json

import numpy as np
import pytest

from tests.long.conftest import run_python
from tests.long.damage import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_or_loads_the_right_model(kind: str, seed: int) -> None:
    done = run_python("-m", "tests.long.damage", kind, str(seed))
    assert done.returncode == 0, f"it ends with {done.returncode}\n{done.stderr[-3000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == [], "another error than CheckpointError, or another model"
    assert found["refused"] > 0.5 * found["cases"] or kind == "padding", found
    assert found["cases"] >= 40 and np.isfinite(found["seconds"])
