"""Some of the long group's random cases, so that their generators keep working."""

import numpy as np
import pytest

from tests.long.fuzz import KINDS, run


@pytest.mark.parametrize("kind", KINDS)
def test_some_random_cases_keep_what_is_promised(kind: str, rng: np.random.Generator) -> None:
    found = run(kind, str(rng.integers(1 << 30)), 0, 20)
    assert found["failures"] == [] and found["cases"] == 20
