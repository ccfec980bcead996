"""What lets a Python tool run from a fresh clone, without an activated environment.

A tool begins so, before it imports anything that Python does not bring along:

    from checkout import run_tool, use_environment

    use_environment()

and ends with `run_tool(main)`.
Where the running Python is too old or lacks one of the project's dependencies, .venv is made
(environment.sh) and the tool runs again in it, with the same arguments.  The checkout is first on
the path then, whatever is installed.  Imported by a test, a tool stays where it is.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # not there in Python 3.8, which runs this far
    from collections.abc import Callable

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent

AGAIN = "OSMIUM_TOOL_RUNS_AGAIN"
"""Set for the second run, which must not lead to a third."""


def use_environment(extra: str = "gpu", needs: tuple[str, ...] = ()) -> None:
    """Run the tool in an environment with the project's dependencies, and with `needs`.

    extra  what .venv is made with: an extra of pyproject.toml, "" or "gpu", that for the driver
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
    wanted = '"$(gpu_extra)"' if extra == "gpu" else f"'{extra}'"
    command = f'. "$0" && environment {wanted}'
    try:
        done = subprocess.run(
            ["bash", "-c", command, str(TOOLS / "environment.sh")], stdout=sys.stderr
        )
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"{name}: bash makes .venv, and cannot be run: {error}")
    if done.returncode:
        sys.exit(f"{name}: {', '.join(lacking)} is missing, and .venv could not be made (above).")
    python = str(ROOT / ".venv" / "bin" / "python")
    sys.stdout.flush()
    os.execve(python, [python, tool, *sys.argv[1:]], {**os.environ, AGAIN: "1"})


def run_tool(main: Callable[[], int]) -> NoReturn:
    """Exit with what `main` returns; what Osmium refuses is one line and exit code 2."""
    from osmium.errors import OsmiumError  # here: the checkout is on the path by now

    try:
        sys.exit(main())
    except OsmiumError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more is flushed
        sys.exit(1)


def missing(needs: tuple[str, ...] = ()) -> list[str]:
    """What this Python lacks to run a tool, by name."""
    if sys.version_info < (3, 11):  # noqa: UP036 - whatever python3 is
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
    import tomllib  # here: Python 3.11 brings it, and this must run under any

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [re.split(r"[^\w.-]", line)[0] for line in project["dependencies"]]
