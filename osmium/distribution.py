"""The distribution of this package: its name, how to install it, and what conflicts with it.

The distribution is called osmium-serve, the import package osmium.  On PyPI `osmium` is another
project, the OpenStreetMap library, and both write the folder osmium/ in site-packages.  `import
osmium` runs `conflict`, so this module imports only os and sys at its top.
"""

import os
import sys

__all__ = ["NAME", "REINSTALL", "conflict", "gpu_extra", "how_to_install", "version"]

NAME = "osmium-serve"
"""As in pyproject.toml."""

REINSTALL = f"Install {NAME} again: pip install --force-reinstall --no-deps {NAME}"
"""The remedy where a file of the package is missing."""

_FOLDER = os.path.dirname(os.path.abspath(__file__))

_OTHERS = ("osmium-", "pyosmium-")
"""Prefixes of the OpenStreetMap library's metadata folders; Osmium's is osmium_serve-VERSION."""


def version() -> str | None:
    """The installed version; None if the package is a plain folder on sys.path."""
    import importlib.metadata  # late: slower to import than the rest of `import osmium`

    try:
        return importlib.metadata.version(NAME)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_extra(cuda: int) -> str:
    """The extra for a driver's CUDA version, in cuDriverGetVersion's form: 13000 is CUDA 13.0."""
    return "cu13" if cuda >= 13000 else "cu12"


def how_to_install(extra: str = "", prefix: str | None = None) -> str:
    """The command that installs an extra, or the base package, with the installer of this one.

    `prefix` is the environment's folder; None is sys.prefix.
    """
    prefix = sys.prefix if prefix is None else prefix
    requirement = f"'{NAME}[{extra}]'" if extra else NAME
    parts = prefix.split(os.sep)
    if "archive-v0" in parts or any(part.startswith("environments-v") for part in parts):
        return f"uvx --from {requirement} {NAME}"
    if "pipx" in parts:
        if "venvs" in parts:
            return f"pipx install --force {requirement}"
        return f"pipx run --spec {requirement} {NAME}"
    if "uv" in parts and "tools" in parts:
        return f"uv tool install {requirement}"
    root = os.path.dirname(_FOLDER)
    if os.path.isfile(os.path.join(root, "pyproject.toml")):  # a checkout, installed editable
        return f"{sys.executable} -m pip install -e '{root}{f'[{extra}]' if extra else ''}'"
    return f"{'uv pip' if _is_uv_environment(prefix) else 'pip'} install {requirement}"


def _is_uv_environment(prefix: str) -> bool:
    """Whether uv created the environment; it then has no pip."""
    try:
        with open(os.path.join(prefix, "pyvenv.cfg"), encoding="utf-8") as file:
            return any(line.startswith("uv ") for line in file)
    except OSError:
        return False


def conflict(site: str | None = None) -> str | None:
    """The error text where the OpenStreetMap library is installed beside this package, else None.

    `site` is the folder to list; None is the folder of this installation.
    """
    site = os.path.dirname(_FOLDER) if site is None else site
    try:
        names = os.listdir(site)
    except OSError:  # a zip file, or a folder that cannot be listed
        return None
    for name in names:
        if name.startswith(_OTHERS) and name.endswith((".dist-info", ".egg-info")):
            other = name.rpartition(".")[0]
            return (
                f"{other} (the OpenStreetMap library) is installed in {site} beside {NAME}, and "
                "both write to the folder osmium/: each overwrites files of the other. Install "
                f"{NAME} in a virtual environment of its own; or remove both "
                f"(pip uninstall osmium {NAME}) and install one again."
            )
    return None
