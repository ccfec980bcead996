"""Models on the Hugging Face hub: what one is, without its weights, and how it is downloaded.

`look_up` reads the list of files, config.json, generation_config.json and the index; `hub_shards`
the headers of the shards, by HTTP ranges; neither reads a byte of a tensor.  All requests are
huggingface_hub's: HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME, tokens and its cache mean what they do
everywhere else.  The package takes half a second to import, so it is imported when it is needed.
"""

import contextlib
import importlib
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osmium.config import Progress
from osmium.errors import CheckpointError, ConfigError
from osmium.weights.packed import FILES
from osmium.weights.shards import (
    INDEX,
    MAX_HEADER,
    Shards,
    Tensor,
    listed_shards,
    parse_header,
    read_json,
    shards_of,
)
from osmium.weights.unsupported import refuse_files

__all__ = ["HubFile", "HubModel", "download", "hub_id", "hub_shards", "look_up", "small_file"]

TIMEOUT_S = 20.0
"""For an answer to begin."""

TRIES = 3
"""Of a range that a broken connection or a busy server does not give."""

RANGES = 8
"""Requests for headers at once."""

DOWNLOADS = 4
"""Files at once.  The hub drops a file that is stopped midway, so a few at once are better than
many: they bring the same rate and lose less."""


@dataclass(frozen=True)
class HubFile:
    """One file on the hub."""

    nbytes: int | None
    """None where neither the hub nor the cache has it."""
    etag: str
    """sha256 of a large file, git's hash of a small one: another for other contents."""


@dataclass(frozen=True)
class HubModel:
    """A model on the hub, as it is now or, without a network, as the cache has it."""

    name: str
    """owner/name."""
    revision: str
    """The commit."""
    texts: dict[str, dict[str, Any]]
    """config.json, and generation_config.json and the index where there are any, parsed."""
    files: dict[str, HubFile]
    """Of what is loaded: shards, index and the small files of packed.FILES."""
    shards: tuple[str, ...]
    cache: Path
    """The hub's cache, for all models."""
    online: bool

    @property
    def folder(self) -> Path:
        """This model's place in the cache."""
        return self.cache / ("models--" + self.name.replace("/", "--"))

    @property
    def snapshot(self) -> Path:
        """The folder of this revision's files, as far as they are cached."""
        return self.folder / "snapshots" / self.revision

    @property
    def etags(self) -> dict[str, str]:
        """What a packed file was made from."""
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
        """Bytes of all shards; None where that is not known."""
        return _sum(self.files[name] for name in self.shards)

    @property
    def download_bytes(self) -> int | None:
        """Bytes of what is not in the cache; None where that is not known."""
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


# -- looking up ------------------------------------------------------------------------------------


def look_up(name: str) -> HubModel:
    """A model by its hub id; what the cache has of it where the hub cannot be reached.

    Raises: ConfigError, CheckpointError.
    """
    try:
        with _refusals(name):
            return _listed(name)
    except ConfigError:
        found = _cached(name)
        if found is None:
            raise
        return found


def _listed(name: str) -> HubModel:
    """As the hub has it now."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    info = HfApi().model_info(name, files_metadata=True, timeout=TIMEOUT_S)
    listed = {
        one.rfilename: HubFile(one.size, one.lfs.sha256 if one.lfs else one.blob_id or "")
        for one in info.siblings or []
    }
    texts = {
        file: read_json(Path(hf_hub_download(name, file)))
        for file in (*FILES[:2], INDEX)
        if file in listed
    }
    return _model(name, info.sha or "", texts, listed, Path(constants.HF_HUB_CACHE), True)


def _cached(name: str) -> HubModel | None:
    """As the cache has it, with its shards or without; None where it has nothing of it."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, FILES[0])
    except (HFValidationError, OSError):
        return None
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    texts = {
        file: read_json(folder / file) for file in (*FILES[:2], INDEX) if (folder / file).is_file()
    }
    listed = {
        file.name: HubFile(file.stat().st_size, file.resolve().name)
        for file in folder.iterdir()
        if file.is_file()
    }
    for shard in listed_shards(texts[INDEX], name).values() if INDEX in texts else ():
        listed.setdefault(shard, HubFile(None, ""))
    return _model(name, folder.name, texts, listed, Path(constants.HF_HUB_CACHE), False)


def _model(
    name: str,
    revision: str,
    texts: dict[str, dict[str, Any]],
    listed: dict[str, HubFile],
    cache: Path,
    online: bool,
) -> HubModel:
    """What is loaded of all that is listed.  Raises: CheckpointError."""
    if FILES[0] not in texts:
        refuse_files(listed, name)
        raise CheckpointError(f"{name} has no {FILES[0]} on the hub, so it is no checkpoint.")
    if INDEX in texts:
        shards = sorted(set(listed_shards(texts[INDEX], name).values()))
    else:
        shards = sorted(x for x in listed if x.endswith(".safetensors") and "/" not in x)
    if online and not shards:
        raise CheckpointError(f"{name} has neither {INDEX} nor a .safetensors file on the hub.")
    for shard in shards:
        if shard not in listed:
            raise CheckpointError(f"{INDEX} names {shard}, which is not in {name} on the hub.")
    wanted = (*FILES, INDEX, *shards)
    files = {file: listed[file] for file in wanted if file in listed}
    return HubModel(name, revision, texts, files, tuple(shards), cache, online)


@contextlib.contextmanager
def _refusals(name: str) -> Iterator[None]:
    """What huggingface_hub raises, as ConfigError with the way out."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    # HTTPError of httpx or httpx2, whichever this hub is built on: a line that breaks midway.
    transport: type[Exception] = HfHubHTTPError.__mro__[1]
    site = constants.ENDPOINT
    try:
        yield
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{site} does not answer"
        raise ConfigError(
            f"{name} is not in the hub's cache {constants.HF_HUB_CACHE}, and {offline}. Download "
            "it where there is a network, or give a folder."
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
    """A small file, downloaded into the cache; None where the model has no such file.

    Raises: ConfigError.
    """
    from huggingface_hub import hf_hub_download

    if name not in model.files:
        return None
    with _refusals(model.name):
        return Path(hf_hub_download(model.name, name, revision=model.revision))


# -- headers ---------------------------------------------------------------------------------------


def hub_shards(model: HubModel, progress: Progress | None = None) -> Shards | None:
    """A model's tensors, without their bytes; None where neither the hub nor the cache has them.

    Two ranges of each shard are read that is not in the cache: eight bytes, and the header.
    Raises: ConfigError, CheckpointError.
    """
    done, lock = 0, threading.Lock()

    def header(name: str) -> tuple[Path, dict[str, Tensor]]:
        nonlocal done
        found = _header(model, name)
        with lock:
            done += 1
            if progress:
                progress("headers", done, len(model.shards))
        return Path(name), found

    if not model.shards or (
        not model.online and any(name in model.missing for name in model.shards)
    ):
        return None
    with _refusals(model.name), ThreadPoolExecutor(RANGES) as pool:
        headers = dict(pool.map(header, model.shards))
    listed = listed_shards(model.texts[INDEX], model.name) if INDEX in model.texts else {}
    return shards_of(Path(model.name), headers, listed)


def _header(model: HubModel, name: str) -> dict[str, Tensor]:
    local, file = model.snapshot / name, model.files[name]

    def read(start: int, stop: int) -> bytes:
        if not local.is_file():
            return _range(model, name, start, stop)
        with open(local, "rb") as raw:
            raw.seek(start)
            return raw.read(stop - start)

    size = int.from_bytes(read(0, 8), "little")
    if not 2 <= size <= MAX_HEADER:
        raise CheckpointError(f"{name} of {model.name} is no safetensors file.")
    text = read(8, 8 + size)
    return parse_header(text, Path(name), 8 + size if file.nbytes is None else file.nbytes)


def _range(model: HubModel, name: str, start: int, stop: int) -> bytes:
    """Bytes of a file on the hub.  Raises: what _refusals turns into ConfigError."""
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
            ) as answer:
                http.hf_raise_for_status(answer)
                # A server without ranges sends all of the file: stop early.  Else read to the end,
                # so that the connection is reused.
                whole = answer.status_code != 206
                skip = start if whole else 0
                need, found = skip + stop - start, bytearray()
                for piece in answer.iter_bytes():
                    found += piece
                    if len(found) > need or (whole and len(found) == need):
                        break
            if len(found) < need:
                raise CheckpointError(f"{name} of {model.name} ends inside its header.")
            return bytes(found[skip:need])
        except transport as error:
            status = getattr(getattr(error, "response", None), "status_code", 503)
            if left == 0 or (status < 500 and status != 429):
                raise
            time.sleep(0.5)
    raise AssertionError("the last try returns or raises")


# -- downloading -----------------------------------------------------------------------------------


def _utils() -> Any:
    """huggingface_hub.utils, which is documented but does not say what it exports."""
    return importlib.import_module("huggingface_hub.utils")


class _Stopped(Exception):
    """Raised in the threads of a download that is given up."""


def download(model: HubModel, progress: Progress | None = None) -> Path:
    """The folder of a model's files, downloaded into the hub's cache as far as they are not there.

    Reports ("downloading", bytes, bytes in all).  Raises: ConfigError.
    """
    if all((model.snapshot / name).is_file() for name in model.files):
        return model.snapshot
    if not model.online:
        have = sum((model.snapshot / name).is_file() for name in model.shards)
        raise ConfigError(
            f"Of {model.name} the hub's cache {model.cache} has {have} of "
            f"{len(model.shards) or 'the'} .safetensors files, and the hub cannot be reached. "
            "Start again where there is a network."
        )
    stop, outcome = threading.Event(), dict[str, Any]()

    def run() -> None:
        from huggingface_hub import snapshot_download

        try:
            with _refusals(model.name):
                outcome["folder"] = snapshot_download(
                    model.name,
                    allow_patterns=list(model.files),
                    max_workers=DOWNLOADS,
                    tqdm_class=_bar(stop, quiet=progress is not None),
                )
        except BaseException as error:  # it belongs to the thread that waits
            outcome["error"] = error

    # On a thread of its own: the hub's executor ends a file before it lets Ctrl-C through.
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
    """A progress bar for huggingface_hub, which moves with every piece: each then looks whether
    the download is to stop."""
    hub_bar: Any = _utils().tqdm

    class Bar(hub_bar):  # type: ignore[misc]
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **({**settings, "disable": True} if quiet else settings))

        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise _Stopped
            moved: bool | None = super().update(n)
            return moved

    return Bar


def _on_disk(model: HubModel) -> int:
    """Bytes that the cache holds of a model, files that are on their way included."""
    total = 0
    with contextlib.suppress(OSError):
        for file in (model.folder / "blobs").iterdir():
            with contextlib.suppress(OSError):  # renamed since
                total += file.stat().st_blocks * 512
    return total
