"""`osmium list` and `osmium rm`: packed models in the cache folder; look-up of a model by name."""

import argparse
import datetime
import difflib
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from osmium.cli.progress import byte_amount
from osmium.config import EngineConfig
from osmium.errors import ConfigError
from osmium.weights import cache_folder
from osmium.weights.local import LocalModel, local_models, remove
from osmium.weights.synthetic import PREFIX
from osmium.weights.unsupported import refuse_name

__all__ = ["list_models", "named_model", "remove_models"]


def list_models(args: argparse.Namespace) -> None:
    """Print a table, or with --json one line."""
    folder = _folder(args.cache_dir)
    models = local_models(folder)
    if args.json:
        print(json.dumps([_as_dict(model) for model in models]))
        return
    if not models:
        print(f"No packed models in {folder}. `osmium pull OWNER/NAME` downloads and packs one.")
        return
    rows = [("NAME", "SIZE", "EXPERTS", "ATTENTION", "LAST USED")]
    for model in models:
        formats = model.formats
        experts = "-" if formats is None else f"{formats.expert_bits} bits"
        attention = "-" if formats is None else formats.attention
        used = model.problem or _ago(model.last_used)
        rows.append((model.name, _size(model), experts, attention, used))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[4]]))
    total = sum(model.nbytes for model in models)
    print(f"{byte_amount(total)} in {folder}")


def remove_models(args: argparse.Namespace) -> None:
    """Delete packed models, after a confirmation on the terminal.

    Raises: ConfigError if a name is unknown, a model is being packed, or stdin is no terminal and
    -y is missing.
    """
    folder = _folder(args.cache_dir)
    models = local_models(folder)
    chosen = list(dict.fromkeys(_find(name, models, folder) for name in args.names))
    if not args.yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise ConfigError("rm needs a confirmation, and stdin is no terminal; add -y.")
        names = ", ".join(f"{model.name} ({_size(model)})" for model in chosen)
        print(f"Delete {names} from {folder}? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("Nothing was deleted.", file=sys.stderr)
            return
    for model in chosen:
        models.remove(model)
        freed = remove(model, models)
        print(f"{model.name} deleted, {byte_amount(freed)} freed")


def named_model(model: str | None, cache_dir: str | None) -> str | None:
    """The loader's model argument: the packed file's path for a NAME of `osmium list`.

    Other arguments are returned unchanged.  Raises: ConfigError for a word that is no model, with
    a similar name.
    """
    if model is None or model == "demo" or "/" in model or model.lower().startswith(PREFIX):
        return model
    if model.startswith(("~", ".")) or _exists(model):
        return model
    models = local_models(_folder(cache_dir))
    matches = [local for local in models if model in _names(local)]
    if len(matches) == 1 and matches[0].formats is not None:
        return str(matches[0].path)
    if len(matches) == 1:
        raise ConfigError(f"{model} cannot be loaded: {matches[0].problem}. Pack it again.")
    refuse_name(model)
    near = difflib.get_close_matches(model, ["demo", *(local.name for local in models)], 1)
    if near:
        raise ConfigError(f"There is no model {model!r} here; did you mean {near[0]}?")
    raise ConfigError(
        f"{model!r} is no model: there is no such folder or packed file, it is not in `osmium "
        f'list`, and hub ids are owner/name. As a prompt: osmium run demo "{model}"'
    )


def _folder(cache_dir: str | None) -> Path:
    return cache_folder(replace(EngineConfig(), cache_dir=cache_dir))


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # for example a prompt: too long, or with a null byte
        return False


def _names(model: LocalModel) -> Iterable[str]:
    return model.name, model.path.name, model.path.name.removesuffix(".osmium")


def _find(name: str, models: list[LocalModel], folder: Path) -> LocalModel:
    path = Path(name).expanduser()
    if "/" in name:
        if path.resolve().parent != folder.resolve():
            raise ConfigError(
                f"{name} is not in the cache folder {folder}; osmium rm deletes nothing elsewhere."
            )
        name = path.name
    matches = [model for model in models if name in _names(model)]
    if matches:
        return matches[0]
    near = difflib.get_close_matches(name, [model.name for model in models], 1)
    hint = f"did you mean {near[0]}?" if near else "`osmium list` prints the names."
    raise ConfigError(f"There is no packed model {name!r} in {folder}; {hint}")


def _size(model: LocalModel) -> str:
    if model.nbytes == model.total:
        return byte_amount(model.total)
    return byte_amount(model.nbytes, model.total)


def _ago(time_s: float | None) -> str:
    """ "never", "today 14:02", "3 days ago", "2026-01-31"."""
    if time_s is None:
        return "never"
    then, now = datetime.datetime.fromtimestamp(time_s), datetime.datetime.now()
    days = (now.date() - then.date()).days
    if days <= 0:
        return f"today {then:%H:%M}"
    if days < 15:
        return f"{days} day{'s' * (days > 1)} ago"
    return f"{then:%Y-%m-%d}"


def _as_dict(model: LocalModel) -> dict[str, Any]:
    used = model.last_used
    return {
        "name": model.name,
        "path": str(model.path),
        "bytes": model.nbytes,
        "total_bytes": model.total,
        "formats": None if model.formats is None else vars(model.formats),
        "last_used": None if used is None else datetime.datetime.fromtimestamp(used).isoformat(),
        "problem": model.problem or None,
    }
