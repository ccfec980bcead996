"""The long group: `tools/test --long`.

Every test in this folder gets the marker `long`, which the other groups exclude. A report of
passed, failed and not run tests per file is printed and written.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from osmium.bench.environment import environment
from tests.long.server import Server, run_server

HERE = Path(__file__).resolve().parent

TIMEOUT_S = 900
"""Per test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long-report", metavar="FILE", help="write what the long ring found")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.long)
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--long-report", default=None)
    if path:
        config.pluginmanager.register(Report(Path(path)), "long-report")


class Report:
    """One row per file."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.monotonic()
        self.groups: dict[str, dict[str, Any]] = {}

    def _group(self, nodeid: str) -> dict[str, Any]:
        name = Path(nodeid.partition("::")[0]).stem.removeprefix("test_").replace("_", " ")
        empty: dict[str, Any] = {
            "group": name, "passed": 0, "failed": 0, "not_run": 0, "cases": 0, "seconds": 0.0,
            "why_not": [], "failures": [],
        }  # fmt: skip
        return self.groups.setdefault(name, empty)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        group = self._group(report.nodeid)
        group["seconds"] += report.duration
        if report.skipped:
            group["not_run"] += 1
            reason = report.longreprtext.rpartition("Skipped: ")[2].strip("')")
            if reason not in group["why_not"]:
                group["why_not"].append(reason)
        elif report.failed:
            group["failed"] += 1
            group["failures"].append(report.nodeid.partition("::")[2])
        elif report.when == "call":
            group["passed"] += 1
        if report.when == "call":
            group["cases"] += sum(
                int(str(n)) for name, n in report.user_properties if name == "cases"
            )

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            group = self._group(report.nodeid)
            group["failed"] += 1
            group["failures"].append("cannot be collected")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        rows = list(self.groups.values())
        if not rows:
            return
        for row in rows:
            row["seconds"] = round(row["seconds"], 1)
        cases = sum(row["cases"] for row in rows)
        seconds = round(time.monotonic() - self.start, 1)
        found = {**machine(), "seconds": seconds, "cases": cases, "groups": rows}
        self.path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        terminalreporter.section("long ring")
        for line in table(rows):
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"{cases:,} random cases; written to {self.path}")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as text lines."""
    lines = [f"{'group':18}{'passed':>7}{'failed':>7}{'not run':>8}{'cases':>10}{'seconds':>9}"]
    for row in rows:
        line = f"{row['group']:18}{row['passed']:7}{row['failed']:7}{row['not_run']:8}"
        cases = f"{row['cases']:,}" if row["cases"] else ""
        lines.append(f"{line}{cases:>10}{row['seconds']:9.1f}")
        lines += [f"  not run: {reason}" for reason in row["why_not"]]
        lines += [f"  FAILED: {name}" for name in row["failures"]]
    return lines


def machine() -> dict[str, Any]:
    """The machine and versions that the report names."""
    here = environment("cpu")
    ram = psutil.virtual_memory().total / (1 << 30)
    words = (
        f"{len(os.sched_getaffinity(0))} cores of {_processor()}, {ram:.0f} GiB, {here['system']}, "
        f"Python {here['python']}, NumPy {np.__version__}"
    )
    return {
        "date": datetime.date.today().isoformat(),
        "version": here["version"],
        "commit": here["commit"],
        "machine": words,
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


# -- fixtures --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> Iterator[Server]:
    """The bundled model, served on the CPU in a separate process."""
    with run_server() as server:
        yield server


@pytest.fixture
def seed() -> int:
    """A new seed, printed when a test fails; OSMIUM_SEED sets it."""
    found = int(os.environ.get("OSMIUM_SEED") or time.time_ns() % (1 << 32))
    print(f"OSMIUM_SEED={found}")
    return found


def run_python(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in the repository."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=HERE.parents[1], capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
