"""Chooses the files that hold a checkpoint's weights, as transformers does.

`model.safetensors` comes first, then the files of the index.  Without both, Osmium also reads
shards by their names.  Everything else stays unread: adapters, other layouts of the same weights,
the state of an optimizer, files that macOS writes beside others.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osmium.errors import CheckpointError

__all__ = [
    "INDEX", "WHOLE", "ShardChoice", "choose_shards", "is_weight_file", "listed_shards", "summary",
]  # fmt: skip

INDEX = "model.safetensors.index.json"

WHOLE = "model.safetensors"
"""A checkpoint in one file."""

_NUMBERED = re.compile(r"(.+?)-(\d+)-of-(\d+)\.safetensors")

_OTHER = re.compile(
    r"\.|adapter_|consolidated|optimizer|scheduler|scaler|rng_state|random_states|training_|trainer_|ema[._]"
)
"""Beginnings of names that no shard of a model has."""


@dataclass(frozen=True)
class ShardChoice:
    """The files to read, and what stays unread."""

    names: tuple[str, ...]
    """Files in the order in which they are read; of two tensors of a name the last one counts."""
    listed: Mapping[str, str]
    """The file name of each tensor, from the index; empty where no index is used."""
    left_out: tuple[str, ...]
    """Files of weights and indexes that are not read."""
    missing: tuple[str, ...] = ()
    """Files that the index lists, that do not exist, and that would hold only unused tensors."""


def is_weight_file(name: str) -> bool:
    """Whether a file name may be that of a model's shard."""
    return name.endswith(".safetensors") and not _OTHER.match(name)


def choose_shards(
    names: Collection[str],
    index: Callable[[], Mapping[str, Any]],
    where: str,
    unused: tuple[str, ...] = (),
) -> ShardChoice:
    """Choose the shards among the file `names` of a folder or repository.

    `index` reads the index, if it is needed.  `unused` are beginnings of the names of tensors that
    Osmium does not use.  Raises: CheckpointError where there are no shards, or not all of them.
    """
    weights = {name for name in names if name.endswith(".safetensors") and "/" not in name}
    listed: dict[str, str] = {}
    missing: tuple[str, ...] = ()
    if WHOLE in weights:
        chosen = [WHOLE]
    elif INDEX in names:
        listed = listed_shards(index(), where)
        chosen = sorted(set(listed.values()))
        needed = {file for name, file in listed.items() if not name.startswith(unused)}
        missing = tuple(file for file in chosen if file not in names and file not in needed)
        chosen = [file for file in chosen if file not in missing]
        for file in chosen:
            if file not in names:
                raise CheckpointError(f"{INDEX} lists {file}, which is not in {where}.")
    else:
        chosen = _by_name(weights, where)
    left_out = weights - set(chosen)
    if INDEX in names and not listed:
        left_out.add(INDEX)
    return ShardChoice(tuple(chosen), listed, tuple(sorted(left_out)), missing)


def _by_name(weights: Collection[str], where: str) -> list[str]:
    """The shards of a checkpoint without an index.  Raises: CheckpointError."""
    files = sorted(name for name in weights if is_weight_file(name))
    if not files:
        raise CheckpointError(f"{where} has neither {INDEX} nor a .safetensors file of a model.")
    numbered = [match for name in files if (match := _NUMBERED.fullmatch(name))]
    if not numbered:
        return files
    sets = {(match[1], match[3]) for match in numbered}
    if len(sets) > 1:
        one, other = (f"{start}-*-of-{count}.safetensors" for start, count in sorted(sets)[:2])
        raise CheckpointError(
            f"{where} has no {INDEX}, and two sets of shards, {one} and {other}; remove one of "
            "them, or add the index."
        )
    numbers = {int(match[2]) for match in numbered}
    count = int(numbered[0][3])
    if count > 100_000 or numbers != set(range(1, count + 1)):
        raise CheckpointError(
            f"{where} has {len(numbers)} of the {count} shards that {numbered[0][0]} belongs to; "
            "the download is not complete."
        )
    return [match[0] for match in numbered]


def listed_shards(index: Mapping[str, Any], where: str) -> dict[str, str]:
    """The file name of each tensor, from an index.  Raises: CheckpointError.

    A name with a path is an error: an index must not point outside its folder.
    """
    listed = index.get("weight_map", {})
    if not isinstance(listed, Mapping) or not listed:
        raise CheckpointError(f"{INDEX} in {where} has no weight_map.")
    for name in listed.values():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise CheckpointError(f"{INDEX} in {where} lists {name!r}, which is no file name.")
    return dict(listed)


def summary(names: Collection[str], most: int = 4) -> str:
    """Up to `most` names, and the number of the others."""
    shown = sorted(names)[:most]
    others = len(names) - len(shown)
    return ", ".join(shown) + (f" and {others} more" if others else "")
