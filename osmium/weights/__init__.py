"""From what the user names to weights: a folder, a file, a hub id, a made-up model, or nothing.

A checkpoint folder is packed once into the cache folder, by NumPy, or by the kernels of the `ops`
that are passed along; a later start opens the packed file and reads nothing of the checkpoint but
the sizes and times of its shards.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from osmium.config import EngineConfig, ModelConfig, Progress, user_cache
from osmium.errors import CheckpointError, ConfigError
from osmium.ops import Ops
from osmium.weights.checkpoint import Checkpoint, Formats
from osmium.weights.packed import FILES, Packed, Reading, open_packed
from osmium.weights.packing import OnCpu, Origin, Source, locked, write_packed
from osmium.weights.quantizing import Quantizer
from osmium.weights.shards import INDEX, Shards, open_shards, read_json
from osmium.weights.synthetic import PREFIX, Synthetic, open_synthetic

__all__ = [
    "DEMO", "Model", "Packed", "Reading", "cache_folder", "open_model", "open_packed",
    "open_weights", "resolve",
]  # fmt: skip

Model = Packed | Synthetic
"""What a model is loaded from."""

DEMO = Path(__file__).parents[1] / "demo" / "demo.osmium"
"""The bundled model."""


def open_weights(
    model: str | os.PathLike[str] | None,
    config: EngineConfig,
    progress: Progress | None = None,
    ops: Ops | None = None,
) -> Model:
    """What a model is loaded from: its packed file, or for `synthetic:NAME` something made up.

    Raises: ConfigError, CheckpointError.
    """
    if isinstance(model, str) and model.startswith(PREFIX):
        return open_synthetic(model, config)
    return open_model(model, config, progress, ops)


def open_model(
    model: str | os.PathLike[str] | None,
    config: EngineConfig,
    progress: Progress | None = None,
    ops: Ops | None = None,
) -> Packed:
    """The packed file of a model; packs a checkpoint, or `synthetic:NAME`, where that has not been
    done: with `ops` by its kernels.

    Raises: ConfigError, CheckpointError.
    """
    if isinstance(model, str) and model.startswith(PREFIX):
        made_up = open_synthetic(model, config)
        target = _target(config, model.replace(":", "-"), model)
        with _writing(target, progress):
            return _packed_synthetic(target, made_up, progress)
    path = resolve(model)
    if path.is_file():
        packed = open_packed(path)
        _same_formats(packed, config)
        return packed
    target = _target(config, path.resolve().name, str(path.resolve()))
    with _writing(target, progress):
        found = _reusable(target, path)
        return found or _packed_checkpoint(target, path, config, progress, ops)


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


def _packed_checkpoint(
    target: Path, folder: Path, config: EngineConfig, progress: Progress | None, ops: Ops | None
) -> Packed:
    shards = open_shards(folder)
    generation = folder / "generation_config.json"
    read = read_json(generation) if generation.is_file() else None
    model_config = ModelConfig.from_hf(read_json(folder / "config.json"), read)
    checkpoint = Checkpoint(shards, model_config, Formats.of(config))
    origin = Origin.of(checkpoint, _fingerprint(folder, shards))
    with contextlib.ExitStack() as stack:
        source: Source = OnCpu(checkpoint)
        if ops is not None and checkpoint.record.bits != 16 and checkpoint.narrow:
            source = stack.enter_context(contextlib.closing(Quantizer(ops, checkpoint)))
        write_packed(target, source, origin, progress)
    return open_packed(target)


def _packed_synthetic(target: Path, made_up: Synthetic, progress: Progress | None) -> Packed:
    """A made-up model on disk, to measure reading one; the file of an older way is made anew."""
    with contextlib.suppress(CheckpointError):
        if target.is_file() and (packed := open_packed(target)).fingerprint == made_up.fingerprint:
            return packed
    write_packed(target, made_up, Origin(made_up.fingerprint, made_up.files), progress)
    return open_packed(target)


def _same_formats(packed: Packed, config: EngineConfig) -> None:
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


def _reusable(target: Path, folder: Path) -> Packed | None:
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


def cache_folder(config: EngineConfig) -> Path:
    """--cache-dir, or osmium in $XDG_CACHE_HOME."""
    if config.cache_dir:
        return Path(config.cache_dir)
    return user_cache()


def resolve(model: str | os.PathLike[str] | None) -> Path:
    """A packed file or a checkpoint folder on this machine; a hub id is downloaded.

    Raises: ConfigError.
    """
    if model is None:
        if not DEMO.is_file():
            raise ConfigError(f"The bundled model {DEMO} is missing; name a model.")
        return DEMO
    path = Path(model).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} has no config.json, so it is no checkpoint.")
        return path
    text = str(model)
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return _download(text)
    raise ConfigError(
        f"{text} is neither a folder, nor a packed file, nor a hub id like owner/name."
    )


def _download(name: str) -> Path:
    """A hub model's files, in the hub's own cache."""
    from huggingface_hub import snapshot_download  # half a second, and only a hub id needs it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # HTTPError of httpx or httpx2, whichever this hub is built on: a line that breaks midway.
    transport: type[Exception] = HfHubHTTPError.__mro__[1]
    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.safetensors", INDEX, "*.json", "*.jinja"])
        )
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"{name} is not in the hub's cache and the hub cannot be reached; download it where "
            "there is a network, or give a folder."
        ) from None
    except (transport, HFValidationError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{name} could not be downloaded: {first}") from None
