"""Resolves the model argument, and opens, downloads or packs its weights.

The argument is a checkpoint folder, a packed file, a hub id, `synthetic:NAME`, or None for the
bundled model.  A checkpoint folder is quantised once into a packed file in the cache folder, by
NumPy or by the kernels of `ops`.  A later start opens the packed file; of the checkpoint it reads
only the sizes and times of the shards.

A hub model is downloaded and packed.  A later start compares etags with the hub, if it can be
reached, and needs nothing of the hub's cache.
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
from osmium.weights.checkpoint import UNUSED, Checkpoint, Formats
from osmium.weights.choosing import is_weight_file, summary
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
from osmium.weights.own_files import read_small_file
from osmium.weights.packed import FILES, PackedModel, PackedReader, open_packed
from osmium.weights.packing import CpuQuantizer, PackSource, Provenance, locked, write_packed
from osmium.weights.quantizing import GpuQuantizer
from osmium.weights.shards import Shards, choose_files, open_shards, read_json
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
"""The source of a model's weights."""


DEMO = Path(__file__).parents[1] / "demo" / "demo.osmium"
"""The bundled model."""

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Files of the bundled model that synthetic models use."""


class CheckpointFiles:
    """The small files of a checkpoint folder, with the methods of PackedModel."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, name: str) -> bytes | None:
        """A file's bytes; None if it is missing.  Raises: CheckpointError."""
        return read_small_file(self.path / name)

    def json(self, name: str) -> dict[str, Any] | None:
        """A file parsed as a JSON object; None if it is missing.  Raises: CheckpointError."""
        return read_json(self.path / name) if (self.path / name).is_file() else None


class HubFiles:
    """The small files of a hub model, downloaded when they are read."""

    def __init__(self, model: HubModel) -> None:
        self._model = model
        self.path = Path(model.name)

    def file(self, name: str) -> bytes | None:
        """A file's bytes; None if the hub has no such file.  Raises: ConfigError."""
        path = small_file(self._model, name)
        return None if path is None else read_small_file(path)

    def json(self, name: str) -> dict[str, Any] | None:
        """A file parsed as a JSON object; None if the hub has no such file.

        Raises: ConfigError, CheckpointError.
        """
        path = small_file(self._model, name)
        return None if path is None else read_json(path)


Check = Callable[[ModelInfo, CheckpointFiles | HubFiles], None]
"""Called before weights are downloaded or packed; an error that it raises prevents both."""


def open_weights(
    model: str | os.PathLike[str] | None,
    config: EngineConfig,
    progress: Progress | None = None,
    ops: Ops | None = None,
    check: Check | None = None,
) -> ModelSource:
    """The packed file of a model, or a Synthetic for `synthetic:NAME`; see open_model.

    Raises: ConfigError, CheckpointError.
    """
    synthetic = synthetic_name(model)
    if synthetic is not None:
        return _open_synthetic(synthetic, config)
    return open_model(model, config, progress, ops, check)


def open_model(
    model: str | os.PathLike[str] | None,
    config: EngineConfig,
    progress: Progress | None = None,
    ops: Ops | None = None,
    check: Check | None = None,
) -> PackedModel:
    """The packed file of a model.

    If there is none yet, a hub model is downloaded, and a checkpoint or `synthetic:NAME` is packed:
    with `ops` by its kernels, else by NumPy.  Raises: ConfigError, CheckpointError.
    """
    synthetic = synthetic_name(model)
    if synthetic is not None:
        generated = _open_synthetic(synthetic, config)
        target = _packed_path(config, synthetic.replace(":", "-"), synthetic)
        with _writing(target, progress):
            return _pack_synthetic(target, generated, progress)
    path = locate(model)
    if isinstance(path, str):
        return _open_hub(path, config, progress, ops, check)
    if path.is_file():
        packed = open_packed(path)
        _check_formats(packed, config)
        return packed
    target = _packed_path(config, folder_name(path), str(path.resolve()))
    with _writing(target, progress):
        if packed_before := _reusable(target, path):
            return packed_before
        refuse_checkpoint(path)
        checkpoint = _checkpoint(path, config)
        if check:
            shards, shapes = checkpoint.shards, (checkpoint.config, checkpoint.formats)
            info = folder_info(path, str(model), *shapes, shards, target)
            check(info, CheckpointFiles(path))
        return _pack_checkpoint(target, checkpoint, progress, ops)


def _open_synthetic(name: str, config: EngineConfig) -> Synthetic:
    """A synthetic model that can be served: it has the bundled tokenizer and chat template."""
    synthetic = open_synthetic(name, config)
    if DEMO.is_file():
        demo = open_packed(DEMO)
        texts = {name: demo.file(name) for name in TEXT_FILES}
        synthetic.files |= {name: raw for name, raw in texts.items() if raw is not None}
    return synthetic


def inspect_model(
    model: str | os.PathLike[str] | None, config: EngineConfig, progress: Progress | None = None
) -> ModelInfo:
    """Shapes, formats, sizes and paths of a model, without its weights.

    Downloads only small files into the hub's cache; packs and writes nothing else.
    Raises: ConfigError, CheckpointError.
    """
    synthetic = synthetic_name(model)
    if synthetic is not None:
        return synthetic_info(open_synthetic(synthetic, config))
    path = locate(model)
    if isinstance(path, str):
        target = _hub_target(config, path)
        source = _look_up(path, target)
        if isinstance(source, PackedModel):
            return packed_info(path, source, "hub")
        _check_hub_headers(source, config, progress)
        return hub_info(source, _hub_config(source), Formats.of(config), target)
    if path.is_file():
        packed = open_packed(path)
        _check_formats(packed, config)
        return packed_info("demo" if model is None else str(model), packed)
    target = _packed_path(config, path.resolve().name, str(path.resolve()))
    if reusable := _reusable(target, path):
        return packed_info(str(model), reusable, "folder")
    refuse_checkpoint(path)
    checkpoint = _checkpoint(path, config)
    shapes = (checkpoint.config, checkpoint.formats)
    return folder_info(path, str(model), *shapes, checkpoint.shards, target)


@contextlib.contextmanager
def _writing(target: Path, progress: Progress | None) -> Iterator[None]:
    """Create the folder of `target` and lock `target` for writing.  Raises: ConfigError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{target.parent} cannot be created ({error}); choose another folder with --cache-dir."
        ) from None
    with locked(target, progress):
        yield


def _checkpoint(folder: Path, config: EngineConfig) -> Checkpoint:
    """Read the headers of a checkpoint folder.  Raises: CheckpointError."""
    shards = open_shards(folder, UNUSED)
    if shards.left_out:
        files = summary([file.name for file in shards.files])
        LOG.warning("%s: reading %s; left out: %s.", folder, files, summary(shards.left_out, 8))
    generation = folder / "generation_config.json"
    defaults = read_json(generation) if generation.is_file() else None
    model_config = ModelConfig.from_hf(read_json(folder / "config.json"), defaults)
    return Checkpoint(shards, model_config, Formats.of(config))


def _pack_checkpoint(
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
        if ops is not None and checkpoint.layout.bits != 16 and checkpoint.experts_are_bf16:
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
    """A hub model's packed file, downloaded and packed if needed.

    Logs the download's size.  Raises before the first byte of a weight if tensor names, formats,
    memory (`check`) or disk space do not fit.
    """
    target = _hub_target(config, name)
    with _writing(target, progress):
        source = _look_up(name, target)
        if isinstance(source, PackedModel):
            return source
        info = hub_info(source, _hub_config(source), Formats.of(config), target)
        if check:
            check(info, HubFiles(source))
        _check_hub_headers(source, config, progress)
        _log_download(source, info)
        checkpoint = _checkpoint(download(source, progress), config)
        hub = {"id": name, "revision": source.revision, "etags": source.etags}
        return _pack_checkpoint(target, checkpoint, progress, ops, hub)


def _look_up(name: str, target: Path) -> HubModel | PackedModel:
    """The packed file of a hub model, else the model on the hub.

    The packed file is used if it was made from the hub's current weights, or if the hub cannot be
    reached.
    """
    packed = None
    if target.is_file():
        with contextlib.suppress(CheckpointError):  # damaged or of another version: packed again
            packed = open_packed(target)
    try:
        on_hub = look_up(name)
    except ConfigError:
        if packed is None:
            raise
        return packed
    if packed is None or packed.hub is None:
        return on_hub
    then, now = packed.hub["etags"], on_hub.etags
    if not on_hub.online or then == now:
        return packed
    if any(then.get(shard) != now[shard] for shard in on_hub.shards):
        return on_hub
    if set(on_hub.missing).isdisjoint(on_hub.shards):
        return on_hub  # packing again costs no download
    changed = sorted(file for file in {*then, *now} if then.get(file) != now.get(file))
    LOG.warning(
        "%s: %s changed on the hub since it was packed; its weights did not. Using %s as it is; "
        "delete it to download and pack it again.", name, ", ".join(changed), target,
    )  # fmt: skip
    return packed


def _hub_config(model: HubModel) -> ModelConfig:
    refuse_config(model.texts[FILES[0]], model.name, model.files)
    return ModelConfig.from_hf(model.texts[FILES[0]], model.texts.get(FILES[1]))


def _check_hub_headers(model: HubModel, config: EngineConfig, progress: Progress | None) -> None:
    """Check tensor names, shapes and dtypes against the config, if the headers can be read.

    Raises: CheckpointError.
    """
    model_config = _hub_config(model)  # first, as the headers take 14 to 94 requests
    shards = hub_shards(model, progress)
    if shards is not None:
        Checkpoint(shards, model_config, Formats.of(config))


def _log_download(model: HubModel, info: ModelInfo) -> None:
    """Log the bytes to download and to write, and their folders.

    Raises: ConfigError if a disk has too little free space.
    """
    needs, count = info.disk_needs, len(model.missing)
    if model.choice.left_out:
        unread = summary(model.choice.left_out, 8)
        LOG.warning("%s: reading %s; left out: %s.", model.name, summary(model.shards), unread)
    fetch = f"downloading {gb(info.download_bytes or 0)} ({count} files) to {model.cache}, then "
    LOG.warning(
        "%s: %spacking %s into %s; %s of disk in all, %s free.", model.name, fetch if count else "",
        gb(needs[-1].nbytes), needs[-1].folder, gb(sum(need.nbytes for need in needs)),
        free_text(needs),
    )  # fmt: skip
    check_disk(needs)


def _pack_synthetic(target: Path, synthetic: Synthetic, progress: Progress | None) -> PackedModel:
    """A synthetic model's packed file, for benchmarks of loading.

    A file whose weights another version generated is written again.
    """
    fingerprint = synthetic.fingerprint
    with contextlib.suppress(CheckpointError):
        if target.is_file() and (packed := open_packed(target)).fingerprint == fingerprint:
            return packed
    write_packed(target, synthetic, Provenance(fingerprint, synthetic.files), progress)
    return open_packed(target)


def _check_formats(packed: PackedModel, config: EngineConfig) -> None:
    """Raises: ConfigError if a flag other than its default differs from a packed file's format."""
    default, formats = EngineConfig(), packed.formats
    for name, stored in (
        ("gpu_expert_bits", formats.expert_bits), ("attention_quant", formats.attention),
        ("shared_expert_quant", formats.shared), ("lm_head_quant", formats.head),
    ):  # fmt: skip
        value = getattr(config, name)
        if value not in (getattr(default, name), stored):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{packed.path.name} is packed with {flag} {stored}, not {value}; omit the flag, "
                "or give the checkpoint's folder."
            )


def _reusable(target: Path, folder: Path) -> PackedModel | None:
    """The packed file if it exists, is complete, and matches this version and this checkpoint."""
    if not target.is_file():
        return None
    try:
        packed = open_packed(target)
        texts = all(
            (raw := read_small_file(folder / name)) is None or raw == packed.file(name)
            for name in FILES
        )
    except CheckpointError:
        return None  # cut short, damaged or of another version: packed again
    now = {
        name: [stat.st_size, stat.st_mtime_ns]
        for name in packed.sources
        if (folder / name).is_file() and (stat := (folder / name).stat())
    }
    if not any(is_weight_file(name) for name in os.listdir(folder)):
        return packed if texts else None
    same_files = set(choose_files(folder, UNUSED).names) == set(packed.sources)
    if texts and same_files and now == packed.sources:
        return packed
    if texts and packed.fingerprint == _fingerprint(folder, open_shards(folder, UNUSED)):
        return packed  # the checkpoint was copied or touched, its contents are the same
    return None


def _fingerprint(folder: Path, shards: Shards) -> str:
    """sha256 over config, tensor names, dtypes and shapes, and 4 KiB of each 16 MiB of a tensor.

    The samples distinguish a fine-tune of the same shapes.  250 GB take 16,000 reads.
    """
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


def _packed_path(config: EngineConfig, name: str, origin: str) -> Path:
    """The path of the packed file of model `name`; `origin` distinguishes models of one name."""
    short = hashlib.sha256(origin.encode()).hexdigest()[:8]
    return cache_folder(config) / f"{name}-{short}-{Formats.of(config)}.osmium"


def _hub_target(config: EngineConfig, name: str) -> Path:
    """The path of a hub model's packed file, the same for all its commits."""
    return _packed_path(config, name.split("/")[1], f"hub:{name}")


def cache_folder(config: EngineConfig) -> Path:
    """--cache-dir, else the user's cache folder, osmium in $XDG_CACHE_HOME."""
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
    """A packed file or a checkpoint folder on this machine; None if the path does not exist.

    Raises: ConfigError for a file or a folder of another kind.
    """
    if model is None:
        return None
    try:
        path = Path(model).expanduser()
        is_file, is_dir = path.is_file(), path.is_dir()
        has_config = is_dir and (path / "config.json").is_file()
    except (OSError, RuntimeError, ValueError) as error:
        # no access, a name that is too long, an unknown user after ~, a null byte
        name, reason = str(model), getattr(error, "strerror", None) or str(error).rstrip(".")
        short = name if len(name) <= 100 else f"{name[:100]}..."
        raise ConfigError(f"{short!r} cannot be opened: {reason}.") from None
    if is_file:
        refuse_file(path)
    elif is_dir and not has_config:
        refuse_folder(path)
    return path if is_file or is_dir else None
