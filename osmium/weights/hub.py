"""Models on the Hugging Face hub: look-up without weights, and download.

`look_up` reads the list of files, config.json, generation_config.json and the index.  `hub_shards`
reads the headers of the shards by HTTP ranges.  Neither reads a byte of a tensor.

All requests go through huggingface_hub: HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME, tokens and its cache
have their usual meaning.  Its import takes half a second, so functions import it at first use.
"""

import contextlib
import importlib
import os
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osmium.config import Progress
from osmium.errors import CheckpointError, ConfigError
from osmium.weights.checkpoint import UNUSED
from osmium.weights.choosing import (
    INDEX,
    WHOLE,
    ShardChoice,
    choose_shards,
    is_weight_file,
    listed_shards,
)
from osmium.weights.packed import FILES
from osmium.weights.shards import MAX_HEADER, Shards, Tensor, parse_header, read_json, shards_of
from osmium.weights.unsupported import refuse_files

__all__ = ["HubFile", "HubModel", "download", "hub_id", "hub_shards", "look_up", "small_file"]

TIMEOUT_S = 20.0
"""Seconds until a response must begin."""

TRIES = 3
"""Attempts to read a range when the connection breaks or the server is busy."""

RANGES = 8
"""Concurrent requests for headers."""

DOWNLOADS = 4
"""Concurrent downloads.

huggingface_hub discards a file that was stopped midway.  Few downloads have the same rate as many
and lose less."""


@dataclass(frozen=True)
class HubFile:
    """One file on the hub."""

    nbytes: int | None
    """Size; None if neither the hub nor the cache has it."""
    etag: str
    """Hash of the contents: sha256 of a large file, git's hash of a small one."""


@dataclass(frozen=True)
class HubModel:
    """A model on the hub: its present state or, without a network, the state in the cache."""

    name: str
    """owner/name."""
    revision: str
    """The commit."""
    texts: dict[str, dict[str, Any]]
    """Parsed config.json, and generation_config.json and the index if they exist."""
    files: dict[str, HubFile]
    """The files to download: shards, index and the small files of packed.FILES."""
    choice: ShardChoice
    """The shards among its files, and the weights that are not read."""
    cache: Path
    """The hub's cache, for all models."""
    online: bool

    @property
    def shards(self) -> tuple[str, ...]:
        """The names of the files of its weights."""
        return self.choice.names

    @property
    def folder(self) -> Path:
        """The model's folder in the cache."""
        return self.cache / ("models--" + self.name.replace("/", "--"))

    @property
    def snapshot(self) -> Path:
        """The folder of this revision's cached files."""
        return self.folder / "snapshots" / self.revision

    @property
    def etags(self) -> dict[str, str]:
        """The etag of each file, which a packed file records."""
        return {name: file.etag for name, file in sorted(self.files.items())}

    @property
    def missing(self) -> list[str]:
        """Files that are not in the cache, of this revision or another one."""
        return [
            name
            for name, file in self.files.items()
            if not (self.snapshot / name).is_file()
            and not (file.etag and (self.folder / "blobs" / file.etag).is_file())
        ]

    @property
    def checkpoint_bytes(self) -> int | None:
        """Bytes of all shards; None if unknown."""
        return _sum(self.files[name] for name in self.shards)

    @property
    def download_bytes(self) -> int | None:
        """Bytes of the files that are not in the cache; None if unknown."""
        return _sum(self.files[name] for name in self.missing)


def _sum(files: Iterable[HubFile]) -> int | None:
    sizes = [file.nbytes for file in files]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def hub_id(model: str | os.PathLike[str] | None) -> str | None:
    """The model's hub id, if it is one: owner/name, and no path on this machine."""
    text = str(model)
    if model is None or text.count("/") != 1 or text.startswith((".", "/", "~")):
        return None
    return None if Path(text).exists() else text


# -- look-up ---------------------------------------------------------------------------------------


def look_up(name: str) -> HubModel:
    """A model by its hub id, from the cache if the hub cannot be reached.

    Raises: ConfigError, CheckpointError.
    """
    try:
        with _hub_errors(name):
            return _from_hub(name)
    except ConfigError:
        cached = _from_cache(name)
        if cached is None:
            raise
        return cached


def _from_hub(name: str) -> HubModel:
    """The model in its present state on the hub."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    info = HfApi().model_info(name, files_metadata=True, timeout=TIMEOUT_S)
    listed = {
        file.rfilename: HubFile(file.size, file.lfs.sha256 if file.lfs else file.blob_id or "")
        for file in info.siblings or []
    }
    texts = {
        file: read_json(Path(hf_hub_download(name, file)))
        for file in _parsed(listed)
        if file in listed
    }
    return _model(name, info.sha or "", texts, listed, Path(constants.HF_HUB_CACHE), True)


def _from_cache(name: str) -> HubModel | None:
    """The model as cached, with or without its shards; None if it is not in the cache."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, FILES[0])
    except (HFValidationError, OSError):
        return None
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    listed = {
        file.name: HubFile(file.stat().st_size, file.resolve().name)
        for file in folder.iterdir()
        if file.is_file()
    }
    texts = {file: read_json(folder / file) for file in _parsed(listed) if file in listed}
    for shard in listed_shards(texts[INDEX], name).values() if INDEX in texts else ():
        listed.setdefault(shard, HubFile(None, ""))
    return _model(name, folder.name, texts, listed, Path(constants.HF_HUB_CACHE), False)


def _parsed(listed: Collection[str]) -> tuple[str, ...]:
    """The files that are parsed: an index beside a whole file is stale, and may hold anything."""
    return FILES[:2] if WHOLE in listed else (*FILES[:2], INDEX)


def _model(
    name: str,
    revision: str,
    texts: dict[str, dict[str, Any]],
    listed: dict[str, HubFile],
    cache: Path,
    online: bool,
) -> HubModel:
    """A model with the files to download of all `listed` files.  Raises: CheckpointError."""
    if FILES[0] not in texts:
        refuse_files(listed, name)
        raise CheckpointError(f"{name} has no {FILES[0]} on the hub, so it is no checkpoint.")
    choice = ShardChoice((), {}, ())
    if online or any(is_weight_file(file) for file in listed):
        choice = choose_shards(listed, lambda: texts[INDEX], f"{name} on the hub", UNUSED)
    wanted = (*FILES, *([INDEX] if choice.listed else []), *choice.names)
    files = {file: listed[file] for file in wanted if file in listed}
    return HubModel(name, revision, texts, files, choice, cache, online)


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Convert exceptions of huggingface_hub to ConfigError with a fix."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    # HTTPError of httpx or httpx2, whichever huggingface_hub uses: a connection that breaks.
    transport: type[Exception] = HfHubHTTPError.__mro__[1]
    site = constants.ENDPOINT
    try:
        yield
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{site} does not answer"
        raise ConfigError(
            f"{name} is not in the hub's cache {constants.HF_HUB_CACHE}, and {offline}. Download "
            "it with a network connection, or give a folder."
        ) from None
    except GatedRepoError:
        raise ConfigError(
            f"{name} is gated: accept its terms on {site}/{name}, then log in with `hf auth login` "
            "or set HF_TOKEN."
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"There is no model {name} on {site}, or it is private. Check the name; for a private "
            "model log in with `hf auth login` or set HF_TOKEN."
        ) from None
    except (transport, HFValidationError, OSError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{name} could not be read from {site}: {first}") from None


def small_file(model: HubModel, name: str) -> Path | None:
    """A small file, downloaded into the cache; None if the model has no such file.

    Raises: ConfigError.
    """
    from huggingface_hub import hf_hub_download

    if name not in model.files:
        return None
    with _hub_errors(model.name):
        return Path(hf_hub_download(model.name, name, revision=model.revision))


# -- headers ---------------------------------------------------------------------------------------


def hub_shards(model: HubModel, progress: Progress | None = None) -> Shards | None:
    """A model's tensors without their bytes; None if neither the hub nor the cache has the shards.

    Of each shard outside the cache it requests two ranges: eight bytes, and the header.
    Raises: ConfigError, CheckpointError.
    """
    done, lock = 0, threading.Lock()

    def header(name: str) -> tuple[Path, dict[str, Tensor]]:
        nonlocal done
        tensors = _header(model, name)
        with lock:
            done += 1
            if progress:
                progress("headers", done, len(model.shards))
        return Path(name), tensors

    if not model.shards or (
        not model.online and any(name in model.missing for name in model.shards)
    ):
        return None
    with _hub_errors(model.name), ThreadPoolExecutor(RANGES) as pool:
        headers = dict(pool.map(header, model.shards))
    return shards_of(Path(model.name), headers, model.choice)


def _header(model: HubModel, name: str) -> dict[str, Tensor]:
    local, file = model.snapshot / name, model.files[name]

    def read(start: int, stop: int) -> bytes:
        if not local.is_file():
            return _read_range(model, name, start, stop)
        with open(local, "rb") as raw:
            raw.seek(start)
            return raw.read(stop - start)

    size = int.from_bytes(read(0, 8), "little")
    if not 2 <= size <= MAX_HEADER:
        raise CheckpointError(f"{name} of {model.name} is no safetensors file.")
    text = read(8, 8 + size)
    return parse_header(text, Path(name), 8 + size if file.nbytes is None else file.nbytes)


def _read_range(model: HubModel, name: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of a file on the hub.

    Raises: CheckpointError, and exceptions that _hub_errors converts.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    http = _utils()
    transport: type[Exception] = HfHubHTTPError.__mro__[1]
    url = hf_hub_url(model.name, name, revision=model.revision)
    headers = {
        **http.build_hf_headers(),
        "Range": f"bytes={start}-{stop - 1}",
        "Accept-Encoding": "identity",
    }
    for left in reversed(range(TRIES)):
        try:
            with http.get_session().stream(
                "GET", url, headers=headers, timeout=TIMEOUT_S
            ) as response:
                http.hf_raise_for_status(response)
                # A server without ranges sends the whole file: stop early.  Otherwise read to the
                # end, so that the connection can be reused.
                whole_file = response.status_code != 206
                skip = start if whole_file else 0
                need, received = skip + stop - start, bytearray()
                for piece in response.iter_bytes():
                    received += piece
                    if len(received) > need or (whole_file and len(received) == need):
                        break
            if len(received) < need:
                raise CheckpointError(f"{name} of {model.name} ends inside its header.")
            return bytes(received[skip:need])
        except transport as error:
            status = getattr(getattr(error, "response", None), "status_code", 503)
            if left == 0 or (status < 500 and status != 429):
                raise
            time.sleep(0.5)
    raise AssertionError("the last try returns or raises")


# -- download --------------------------------------------------------------------------------------


def _utils() -> Any:
    """huggingface_hub.utils: documented, but its exports are not declared for type checkers."""
    return importlib.import_module("huggingface_hub.utils")


class _Stopped(Exception):
    """Raised in the threads of a download that Ctrl-C stops."""


def download(model: HubModel, progress: Progress | None = None) -> Path:
    """The folder of a model's files; missing files are downloaded into the hub's cache.

    Reports ("downloading", bytes, total bytes).  Raises: ConfigError.
    """
    if all((model.snapshot / name).is_file() for name in model.files):
        return model.snapshot
    if not model.online:
        cached = sum((model.snapshot / name).is_file() for name in model.shards)
        raise ConfigError(
            f"Of {model.name} the hub's cache {model.cache} has {cached} of "
            f"{len(model.shards) or 'the'} .safetensors files, and the hub cannot be reached. "
            "Start again with a network connection."
        )
    stop, outcome = threading.Event(), dict[str, Any]()

    def run() -> None:
        from huggingface_hub import snapshot_download

        try:
            with _hub_errors(model.name):
                outcome["folder"] = snapshot_download(
                    model.name,
                    allow_patterns=list(model.files),
                    max_workers=DOWNLOADS,
                    tqdm_class=_bar(stop, quiet=progress is not None),
                )
        except BaseException as error:  # the calling thread raises it
            outcome["error"] = error

    # On a separate thread: huggingface_hub's executor finishes a file before Ctrl-C takes effect.
    thread = threading.Thread(target=run, name="osmium-download", daemon=True)
    before, total = _on_disk(model), model.download_bytes or 0
    thread.start()
    try:
        while thread.is_alive():
            if progress:
                progress("downloading", min(max(0, _on_disk(model) - before), total), total)
            thread.join(0.25)
    except BaseException:
        stop.set()
        thread.join(5)
        raise
    if "error" in outcome:
        raise outcome["error"]
    if progress:
        progress("downloading", total, total)
    return Path(outcome["folder"])


def _bar(stop: threading.Event, quiet: bool) -> Any:
    """A progress bar class that stops the download: each update checks `stop`.

    huggingface_hub updates its bars with every piece of a file.
    """
    hub_bar: Any = _utils().tqdm

    class Bar(hub_bar):  # type: ignore[misc]
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **({**settings, "disable": True} if quiet else settings))

        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise _Stopped
            refreshed: bool | None = super().update(n)
            return refreshed

    return Bar


def _on_disk(model: HubModel) -> int:
    """Bytes of a model in the cache, unfinished files included."""
    total = 0
    with contextlib.suppress(OSError):
        for file in (model.folder / "blobs").iterdir():
            with contextlib.suppress(OSError):  # renamed meanwhile
                total += file.stat().st_blocks * 512
    return total
