"""From what the user names to weights: a folder, a file, a hub id, a made-up model, or nothing.

A checkpoint folder is packed once into the cache folder, by NumPy, or by the kernels of the `ops`
that are passed along; a later start opens the packed file and reads nothing of the checkpoint but
the sizes and times of its shards.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from osmium.config import EngineConfig, ModelConfig, Progress, user_cache
from osmium.errors import CheckpointError, ConfigError
from osmium.ops import Ops
from osmium.weights.checkpoint import Checkpoint, Formats
from osmium.weights.local import folder_name
from osmium.weights.packed import FILES, Packed, Reading, open_packed
from osmium.weights.packing import OnCpu, Origin, Source, locked, write_packed
from osmium.weights.quantizing import Quantizer
from osmium.weights.shards import INDEX, Shards, open_shards, read_json
from osmium.weights.synthetic import Synthetic, open_synthetic, synthetic_name
from osmium.weights.unsupported import (
    refuse_checkpoint,
    refuse_file,
    refuse_folder,
    refuse_name,
)

__all__ = [
    "DEMO", "CheckFolder", "CheckpointFiles", "Model", "Packed", "Reading", "cache_folder",
    "open_model", "open_packed", "open_weights", "planned_config", "resolve",
]  # fmt: skip

LOG = logging.getLogger("osmium.weights")

Model = Packed | Synthetic
"""What a model is loaded from."""

DEMO = Path(__file__).parents[1] / "demo" / "demo.osmium"
"""The bundled model."""

DEMO_MAX_CONTEXT = 262144
"""Most tokens that --context takes of it; it was trained for 4,096."""

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


CheckFolder = Callable[[CheckpointFiles], object]
"""Called before a folder is packed; what it raises ends the start."""


def open_weights(
    model: str | os.PathLike[str] | None,
    config: EngineConfig,
    progress: Progress | None = None,
    ops: Ops | None = None,
    check: CheckFolder | None = None,
) -> Model:
    """What a model is loaded from: its packed file, or for `synthetic:NAME` something made up.
    A folder that has not been packed is checked first.

    Raises: ConfigError, CheckpointError, what `check` raises.
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
    check: CheckFolder | None = None,
) -> Packed:
    """The packed file of a model; packs a checkpoint, or `synthetic:NAME`, where that has not been
    done: with `ops` by its kernels.

    Raises: ConfigError, CheckpointError, what `check` raises.
    """
    synthetic = synthetic_name(model)
    if synthetic is not None:
        made_up = _made_up(synthetic, config)
        target = _target(config, synthetic.replace(":", "-"), synthetic)
        with _writing(target, progress):
            return _packed_synthetic(target, made_up, progress)
    path = resolve(model)
    if path.is_file():
        packed = open_packed(path)
        _same_formats(packed, config)
        return packed
    target = _target(config, folder_name(path), str(path.resolve()))
    with _writing(target, progress):
        found = _reusable(target, path)
        if found is not None:
            return found
        refuse_checkpoint(path)
        if check is not None:
            check(CheckpointFiles(path))
        return _packed_checkpoint(target, path, config, progress, ops)


def _made_up(name: str, config: EngineConfig) -> Synthetic:
    """A synthetic model with the bundled model's tokenizer and chat template, so that it can be
    served."""
    found = open_synthetic(name, config)
    if DEMO.is_file():
        demo = open_packed(DEMO)
        texts = {name: demo.file(name) for name in TEXT_FILES}
        found.files |= {name: raw for name, raw in texts.items() if raw is not None}
    return found


def planned_config(packed: Model, options: EngineConfig) -> ModelConfig:
    """The model's config to plan memory by.  The demo takes a --context beyond its training, with a
    warning, so that clients with long prompts can be tried on it; other models refuse that."""
    config, asked = packed.config, options.context
    if packed.path != DEMO or asked is None or not config.max_context < asked <= DEMO_MAX_CONTEXT:
        return config
    LOG.warning(
        "--context is %d; the demo was trained for %d tokens, and what it writes after longer "
        "prompts makes no sense.", asked, config.max_context,
    )  # fmt: skip
    return replace(config, max_context=DEMO_MAX_CONTEXT)


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
    if model in (None, "demo"):  # a folder of that name is ./demo
        if not DEMO.is_file():
            raise ConfigError(f"The bundled model {DEMO} is missing; name a model.")
        return DEMO
    path = _existing(model)
    if path is not None:
        return path
    text = str(model)
    refuse_name(text)
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return _download(text)
    raise ConfigError(
        f"{text} is neither a folder, nor a packed file, nor a hub id like owner/name."
    )


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
