"""Runs a Python tool from a fresh clone, without an activated environment.

A tool begins with these lines, before imports from outside the standard library:

    from checkout import run_tool, use_environment

    use_environment()

and ends with `run_tool(main)`.  If the running Python is too old or lacks a dependency,
environment.sh creates .venv.  The tool then runs again in .venv with the same arguments, and the
checkout is first on the path, before an installed package.  A test that imports a tool stays in its
own environment.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # Python 3.8, which must run this module, lacks generic Callable
    from collections.abc import Callable

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent

AGAIN = "OSMIUM_TOOL_RUNS_AGAIN"
"""Environment variable of the second run, which must not start a third."""


def use_environment(extra: str = "gpu", needs: tuple[str, ...] = ()) -> None:
    """Run the tool in an environment with the project's dependencies and `needs`.

    extra  extra of .venv: one of pyproject.toml, "", or "gpu" for the one that matches the driver
    needs  names of packages beyond the project's dependencies
    """
    sys.path.insert(0, str(ROOT))
    tool = getattr(sys.modules["__main__"], "__file__", None)
    if tool is None or Path(tool).resolve().parent != TOOLS:
        return
    lacking = missing(needs)
    if not lacking:
        return
    name = Path(tool).name
    if os.environ.pop(AGAIN, None):
        sys.exit(f"{name}: {', '.join(lacking)} is not installed in {sys.prefix}; remove it.")
    argument = '"$(gpu_extra)"' if extra == "gpu" else f"'{extra}'"
    command = f'. "$0" && environment {argument}'
    try:
        result = subprocess.run(
            ["bash", "-c", command, str(TOOLS / "environment.sh")], stdout=sys.stderr
        )
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"{name}: bash, which creates .venv, cannot be run: {error}")
    if result.returncode:
        missing_names = ", ".join(lacking)
        sys.exit(f"{name}: {missing_names} is missing, and .venv could not be created (above).")
    python = str(ROOT / ".venv" / "bin" / "python")
    sys.stdout.flush()
    os.execve(python, [python, tool, *sys.argv[1:]], {**os.environ, AGAIN: "1"})


def run_tool(main: Callable[[], int]) -> NoReturn:
    """Exit with the result of `main`; an OsmiumError is one line and exit code 2."""
    from osmium.errors import OsmiumError  # use_environment() has put the checkout on the path

    try:
        sys.exit(main())
    except OsmiumError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # no error when Python flushes stdout at exit
        sys.exit(1)


def missing(needs: tuple[str, ...] = ()) -> list[str]:
    """Names of the packages that this Python lacks to run a tool."""
    if sys.version_info < (3, 11):  # noqa: UP036 - the tool may run under an older python3
        return ["Python 3.11"]
    from importlib import metadata

    lacking = []
    for name in [*dependencies(), *needs]:
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            lacking.append(name)
    return lacking


def dependencies() -> list[str]:
    """The names of the packages that pyproject.toml's `dependencies` lists."""
    import tomllib  # in Python 3.11 and newer; older versions must still import this module

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [re.split(r"[^\w.-]", line)[0] for line in project["dependencies"]]
