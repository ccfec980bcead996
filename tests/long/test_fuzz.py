"""More than 10^6 random cases without a server, two processes at a time; fuzz.py makes them.

A case that is found is kept as a quick test, beside the tests of what it broke.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest

from tests.long.conftest import HERE
from tests.long.fuzz import CASES

PROCESSES = 2


def test_there_are_a_million_cases() -> None:
    assert sum(CASES.values()) >= 10**6


@pytest.mark.parametrize("kind", CASES)
def test_random_cases_keep_what_is_promised(
    kind: str, seed: int, record_property: Callable[[str, object], None]
) -> None:
    each = -(-CASES[kind] // PROCESSES)
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.long.fuzz", kind, str(seed), str(i * each), str(each)],
            cwd=HERE.parents[1], stdout=subprocess.PIPE, text=True,
        )
        for i in range(PROCESSES)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * PROCESSES
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    outcomes: Counter[str] = Counter()
    for one in found:
        outcomes += Counter(one["outcomes"])
    record_property("cases", sum(outcomes.values()))
    print(kind, dict(outcomes), "slowest case", max(one["slowest_s"] for one in found), "s")
    failures = [failure for one in found for failure in one["failures"]]
    assert not failures, "\n".join(failures)
    assert outcomes.total() >= CASES[kind]
    assert min(outcomes.values()) >= 0.01 * CASES[kind], outcomes
