"""From what the user names to weights: a folder, a file, a hub id, a made-up model, or nothing.

A checkpoint folder is packed once into the cache folder, by NumPy, or by the kernels of the `ops`
that are passed along; a later start opens the packed file and reads nothing of the checkpoint but
the sizes and times of its shards.  A hub model is downloaded and packed; a later start compares
etags with the hub, if that can be reached, and needs nothing of the hub's cache.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from osmium.config import EngineConfig, ModelConfig, Progress, user_cache
from osmium.errors import CheckpointError, ConfigError
from osmium.ops import Ops
from osmium.weights.checkpoint import Checkpoint, Formats
from osmium.weights.disk import check_disk, free_text, gb
from osmium.weights.hub import HubModel, download, hub_id, hub_shards, look_up, small_file
from osmium.weights.info import (
    ModelInfo,
    folder_info,
    hub_info,
    packed_info,
    shapes_info,
    synthetic_info,
)
from osmium.weights.local import folder_name
from osmium.weights.packed import FILES, PackedModel, PackedReader, open_packed
from osmium.weights.packing import CpuQuantizer, PackSource, Provenance, locked, write_packed
from osmium.weights.quantizing import GpuQuantizer
from osmium.weights.shards import Shards, open_shards, read_json
from osmium.weights.synthetic import Synthetic, open_synthetic, synthetic_name
from osmium.weights.unsupported import (
    refuse_checkpoint,
    refuse_config,
    refuse_file,
    refuse_folder,
    refuse_name,
)

__all__ = [
    "DEMO", "CheckpointFiles", "HubFiles", "ModelInfo", "ModelSource", "PackedModel",
    "PackedReader", "cache_folder", "inspect_model", "locate", "open_model", "open_packed",
    "open_weights", "shapes_info",
]  # fmt: skip

LOG = logging.getLogger("osmium.weights")

ModelSource = PackedModel | Synthetic
"""What a model is loaded from."""


DEMO = Path(__file__).parents[1] / "demo" / "demo.osmium"
"""The bundled model."""

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""What a synthetic model takes from it."""


class CheckpointFiles:
    """The small files of a checkpoint folder, as of Packed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, name: str) -> bytes | None:
        """None where it is not there.  Raises: CheckpointError."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{self.path / name} cannot be read: {error}") from None

    def json(self, name: str) -> dict[str, Any] | None:
        """The same, parsed: an object.  Raises: CheckpointError."""
        return read_json(self.path / name) if (self.path / name).is_file() else None


class HubFiles:
    """The small files of a hub model, downloaded when they are read."""

    def __init__(self, model: HubModel) -> None:
        self._model = model
        self.path = Path(model.name)

    def file(self, name: str) -> bytes | None:
        """None where the hub has no such file.  Raises: ConfigError."""
        path = small_file(self._model, name)
        return None if path is None else path.read_bytes()

    def json(self, name: str) -> dict[str, Any] | None:
        """The same, parsed: an object.  Raises: ConfigError, CheckpointError."""
        path = small_file(self._model, name)
        return None if path is None else read_json(path)


Check = Callable[[ModelInfo, CheckpointFiles | HubFiles], None]
"""Called before weights are downloaded or packed; what it raises stops that."""


def open_weights(
    model: str | os.PathLike[str] | None,
    config: EngineConfig,
    progress: Progress | None = None,
    ops: Ops | None = None,
    check: Check | None = None,
) -> ModelSource:
    """What a model is loaded from: its packed file, or for `synthetic:NAME` something made up.

    Raises: ConfigError, CheckpointError.
    """
    synthetic = synthetic_name(model)
    if synthetic is not None:
        return _made_up(synthetic, config)
    return open_model(model, config, progress, ops, check)


def open_model(
    model: str | os.PathLike[str] | None,
    config: EngineConfig,
    progress: Progress | None = None,
    ops: Ops | None = None,
    check: Check | None = None,
) -> PackedModel:
    """The packed file of a model; downloads a hub model, and packs a checkpoint, or
    `synthetic:NAME`, where that has not been done: with `ops` by its kernels.

    Raises: ConfigError, CheckpointError.
    """
    synthetic = synthetic_name(model)
    if synthetic is not None:
        made_up = _made_up(synthetic, config)
        target = _target(config, synthetic.replace(":", "-"), synthetic)
        with _writing(target, progress):
            return _packed_synthetic(target, made_up, progress)
    path = locate(model)
    if isinstance(path, str):
        return _open_hub(path, config, progress, ops, check)
    if path.is_file():
        packed = open_packed(path)
        _same_formats(packed, config)
        return packed
    target = _target(config, folder_name(path), str(path.resolve()))
    with _writing(target, progress):
        if found := _reusable(target, path):
            return found
        refuse_checkpoint(path)
        checkpoint = _checkpoint(path, config)
        if check:
            shards, shapes = checkpoint.shards, (checkpoint.config, checkpoint.formats)
            info = folder_info(path, str(model), *shapes, shards, target)
            check(info, CheckpointFiles(path))
        return _packed_checkpoint(target, checkpoint, progress, ops)


def _made_up(name: str, config: EngineConfig) -> Synthetic:
    """A synthetic model with the bundled model's tokenizer and chat template, so that it can be
    served."""
    found = open_synthetic(name, config)
    if DEMO.is_file():
        demo = open_packed(DEMO)
        texts = {name: demo.file(name) for name in TEXT_FILES}
        found.files |= {name: raw for name, raw in texts.items() if raw is not None}
    return found


def inspect_model(
    model: str | os.PathLike[str] | None, config: EngineConfig, progress: Progress | None = None
) -> ModelInfo:
    """What is known of a model without its weights.  Downloads no weights, packs and writes
    nothing but the hub's cache of small files.

    Raises: ConfigError, CheckpointError.
    """
    synthetic = synthetic_name(model)
    if synthetic is not None:
        return synthetic_info(open_synthetic(synthetic, config))
    path = locate(model)
    if isinstance(path, str):
        target = _hub_target(config, path)
        found = _look_up(path, target)
        if isinstance(found, PackedModel):
            return packed_info(path, found, "hub")
        _hub_checkpoint(found, config, progress)
        return hub_info(found, _hub_config(found), Formats.of(config), target)
    if path.is_file():
        packed = open_packed(path)
        _same_formats(packed, config)
        return packed_info("demo" if model is None else str(model), packed)
    target = _target(config, path.resolve().name, str(path.resolve()))
    if reusable := _reusable(target, path):
        return packed_info(str(model), reusable, "folder")
    refuse_checkpoint(path)
    made = _checkpoint(path, config)
    return folder_info(path, str(model), made.config, made.formats, made.shards, target)


@contextlib.contextmanager
def _writing(target: Path, progress: Progress | None) -> Iterator[None]:
    """The right to write `target`, in a folder that is there.  Raises: ConfigError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{target.parent} cannot be made ({error}); choose another folder with --cache-dir."
        ) from None
    with locked(target, progress):
        yield


def _checkpoint(folder: Path, config: EngineConfig) -> Checkpoint:
    """A checkpoint folder, its headers read."""
    shards = open_shards(folder)
    generation = folder / "generation_config.json"
    read = read_json(generation) if generation.is_file() else None
    model_config = ModelConfig.from_hf(read_json(folder / "config.json"), read)
    return Checkpoint(shards, model_config, Formats.of(config))


def _packed_checkpoint(
    target: Path,
    checkpoint: Checkpoint,
    progress: Progress | None,
    ops: Ops | None,
    hub: dict[str, Any] | None = None,
) -> PackedModel:
    shards = checkpoint.shards
    origin = Provenance.of(checkpoint, _fingerprint(shards.folder, shards), hub)
    with contextlib.ExitStack() as stack:
        source: PackSource = CpuQuantizer(checkpoint)
        if ops is not None and checkpoint.record.bits != 16 and checkpoint.experts_are_bf16:
            source = stack.enter_context(contextlib.closing(GpuQuantizer(ops, checkpoint)))
        write_packed(target, source, origin, progress)
    return open_packed(target)


# -- from the hub ----------------------------------------------------------------------------------


def _open_hub(
    name: str,
    config: EngineConfig,
    progress: Progress | None,
    ops: Ops | None,
    check: Check | None,
) -> PackedModel:
    """A hub model's packed file.  Logs what will be downloaded, and raises before the first byte of
    a weight where names, formats, memory (by `check`) or disk do not suit."""
    target = _hub_target(config, name)
    with _writing(target, progress):
        found = _look_up(name, target)
        if isinstance(found, PackedModel):
            return found
        info = hub_info(found, _hub_config(found), Formats.of(config), target)
        if check:
            check(info, HubFiles(found))
        _hub_checkpoint(found, config, progress)
        _announce(found, info)
        checkpoint = _checkpoint(download(found, progress), config)
        hub = {"id": name, "revision": found.revision, "etags": found.etags}
        return _packed_checkpoint(target, checkpoint, progress, ops, hub)


def _look_up(name: str, target: Path) -> HubModel | PackedModel:
    """The packed file of a hub model if it was made from the hub's current files, or if the hub
    cannot be reached; else what the hub has."""
    packed = None
    if target.is_file():
        with contextlib.suppress(CheckpointError):  # damaged or of another version: packed again
            packed = open_packed(target)
    try:
        found = look_up(name)
    except ConfigError:
        if packed is None:
            raise
        return packed
    if packed is None or packed.hub is None:
        return found
    then, now = packed.hub["etags"], found.etags
    if not found.online or then == now:
        return packed
    if any(then.get(shard) != now[shard] for shard in found.shards):
        return found
    if set(found.missing).isdisjoint(found.shards):
        return found  # packing again costs no download
    changed = sorted(file for file in {*then, *now} if then.get(file) != now.get(file))
    LOG.warning(
        "%s: %s changed on the hub since it was packed; its weights did not. Using %s as it is; "
        "delete it to download and pack it again.", name, ", ".join(changed), target,
    )  # fmt: skip
    return packed


def _hub_config(model: HubModel) -> ModelConfig:
    refuse_config(model.texts[FILES[0]], model.name, model.files)
    return ModelConfig.from_hf(model.texts[FILES[0]], model.texts.get(FILES[1]))


def _hub_checkpoint(model: HubModel, config: EngineConfig, progress: Progress | None) -> None:
    """Hold names, shapes and dtypes to the config, as far as headers can be had.

    Raises: CheckpointError.
    """
    model_config = _hub_config(model)  # before 14 to 94 headers are asked for
    shards = hub_shards(model, progress)
    if shards is not None:
        Checkpoint(shards, model_config, Formats.of(config))


def _announce(model: HubModel, info: ModelInfo) -> None:
    """Log what will be downloaded and written, and where.  Raises: ConfigError where a disk has too
    little room."""
    needs, count = info.disk_needs, len(model.missing)
    fetch = f"downloading {gb(info.download_bytes or 0)} ({count} files) to {model.cache}, then "
    LOG.warning(
        "%s: %spacking %s into %s; %s of disk in all, %s free.", model.name, fetch if count else "",
        gb(needs[-1].nbytes), needs[-1].folder, gb(sum(need.nbytes for need in needs)),
        free_text(needs),
    )  # fmt: skip
    check_disk(needs)


def _packed_synthetic(target: Path, made_up: Synthetic, progress: Progress | None) -> PackedModel:
    """A made-up model on disk, to measure reading one; the file of an older way is made anew."""
    with contextlib.suppress(CheckpointError):
        if target.is_file() and (packed := open_packed(target)).fingerprint == made_up.fingerprint:
            return packed
    write_packed(target, made_up, Provenance(made_up.fingerprint, made_up.files), progress)
    return open_packed(target)


def _same_formats(packed: PackedModel, config: EngineConfig) -> None:
    """A packed file has its formats; a flag that asks for others is refused.  Defaults ask for
    nothing.  Raises: ConfigError."""
    default, asked = EngineConfig(), packed.formats
    for name, stored in (
        ("gpu_expert_bits", asked.expert_bits), ("attention_quant", asked.attention),
        ("shared_expert_quant", asked.shared), ("lm_head_quant", asked.head),
    ):  # fmt: skip
        wanted = getattr(config, name)
        if wanted not in (getattr(default, name), stored):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{packed.path.name} is packed with {flag} {stored}, not {wanted}; leave the flag "
                "out, or give the checkpoint's folder."
            )


def _reusable(target: Path, folder: Path) -> PackedModel | None:
    """The packed file if it is there, whole, of this version and of this checkpoint."""
    if not target.is_file():
        return None
    try:
        packed = open_packed(target)
        texts = all(
            not (folder / name).is_file() or (folder / name).read_bytes() == packed.file(name)
            for name in FILES
        )
    except CheckpointError:
        return None  # cut short, damaged or of another version: packed again
    now = {
        name: [stat.st_size, stat.st_mtime_ns]
        for name in packed.sources
        if (folder / name).is_file() and (stat := (folder / name).stat())
    }
    if texts and (now == packed.sources or not any(folder.glob("*.safetensors"))):
        return packed
    if texts and packed.fingerprint == _fingerprint(folder, open_shards(folder)):
        return packed  # copied or touched, but the same
    return None


def _fingerprint(folder: Path, shards: Shards) -> str:
    """sha256 over config, tensor names, dtypes and shapes, and 4 KiB of every 16 MiB of every
    tensor, so that a fine-tune of the same shapes is another model.  250 GB take 16,000 reads."""
    total = hashlib.sha256(json.dumps(read_json(folder / "config.json"), sort_keys=True).encode())
    files = {file: open(file, "rb") for file in shards.files}
    try:
        for name, tensor in sorted(shards.tensors.items()):
            total.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            for at in range(0, tensor.nbytes, 16 << 20):
                raw = files[tensor.file]
                raw.seek(tensor.offset + at)
                total.update(raw.read(min(4096, tensor.nbytes - at)))
    finally:
        for raw in files.values():
            raw.close()
    return total.hexdigest()


def _target(config: EngineConfig, name: str, where: str) -> Path:
    """The packed file of a model that is called `name`, and comes from `where`."""
    short = hashlib.sha256(where.encode()).hexdigest()[:8]
    return cache_folder(config) / f"{name}-{short}-{Formats.of(config)}.osmium"


def _hub_target(config: EngineConfig, name: str) -> Path:
    """The packed file of a hub model: one for its id, whatever its commit."""
    return _target(config, name.split("/")[1], f"hub:{name}")


def cache_folder(config: EngineConfig) -> Path:
    """--cache-dir, or osmium in $XDG_CACHE_HOME."""
    if config.cache_dir:
        return Path(config.cache_dir)
    return user_cache()


def locate(model: str | os.PathLike[str] | None) -> Path | str:
    """A packed file or a checkpoint folder on this machine, or a hub id, as a string.

    Raises: ConfigError.
    """
    if model in (None, "demo"):  # a folder of that name is ./demo
        if not DEMO.is_file():
            raise ConfigError(f"The bundled model {DEMO} is missing; name a model.")
        return DEMO
    path = _existing(model)
    if path is not None:
        return path
    refuse_name(str(model))
    name = hub_id(model)
    if name is None:
        raise ConfigError(
            f"{model} is neither a folder, nor a packed file, nor a hub id like owner/name."
        )
    return name


def _existing(model: str | os.PathLike[str] | None) -> Path | None:
    """A packed file or a checkpoint folder that is here; None where there is nothing of that name.

    Raises: ConfigError for a file or a folder of another kind.
    """
    if model is None:
        return None
    try:
        path = Path(model).expanduser()
        is_file, is_dir = path.is_file(), path.is_dir()
        has_config = is_dir and (path / "config.json").is_file()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # no access, too long, ~nobody, a null byte
        name, why = str(model), getattr(error, "strerror", None) or str(error).rstrip(".")
        short = name if len(name) <= 100 else f"{name[:100]}..."
        raise ConfigError(f"{short!r} cannot be opened: {why}.") from None
    if is_file:
        refuse_file(path)
    elif is_dir and not has_config:
        refuse_folder(path)
    return path if is_file or is_dir else None
