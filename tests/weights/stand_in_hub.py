"""A Hugging Face hub on 127.0.0.1 that counts the bytes it serves.

It implements the endpoints that huggingface_hub uses: a model's list of files, HEAD, and GET with
ranges. Like on the hub, large files are identified by sha256, small ones by git's hash. A virtual
file has a size and its first bytes; a request past them is an error.
"""

import hashlib
import json
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

__all__ = ["HubFile", "StandInHub", "folder_files", "use"]


@dataclass(frozen=True)
class HubFile:
    """A file, complete or virtual."""

    head: bytes
    """All bytes, or the first ones."""
    nbytes: int

    @classmethod
    def whole(cls, content: bytes) -> "HubFile":
        return cls(content, len(content))


def folder_files(folder: Path) -> dict[str, HubFile]:
    """The files of a folder."""
    return {f.name: HubFile.whole(f.read_bytes()) for f in folder.iterdir() if f.is_file()}


@dataclass
class StandInHub:
    """The server; `models` are files by name by hub id."""

    models: dict[str, dict[str, HubFile]] = field(default_factory=dict)
    served: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Bytes of bodies, by path."""
    tensor_bytes: int = 0
    """Bytes served from behind the headers of .safetensors files."""
    gated: set[str] = field(default_factory=set)
    ranges: bool = True
    """Whether the Range header is honoured."""
    failures: int = 0
    """So many requests of shards get a 503 first."""
    delay_s: float = 0.0
    """Seconds between pieces of 16 KiB."""
    tokens: set[str] = field(default_factory=set)
    """Received Authorization headers."""

    def __enter__(self) -> "StandInHub":
        hub = self

        class Handler(_Handler):
            stand_in = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def total(self) -> int:
        """Bytes of all served bodies."""
        return sum(self.served.values())

    def revision(self, name: str) -> str:
        """The commit hash, which depends on the files."""
        text = json.dumps({f: etag(f, x) for f, x in sorted(self.models[name].items())})
        return hashlib.sha1(text.encode()).hexdigest()

    def environment(self, home: Path) -> dict[str, str]:
        """Environment variables for a process that uses this hub."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}


def use(monkeypatch: pytest.MonkeyPatch, hub: StandInHub, cache: Path) -> None:
    """Make huggingface_hub in this process use the stand-in, with a separate cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")


def is_large(name: str) -> bool:
    """Whether the hub stores it in LFS."""
    return name.endswith(".safetensors")


def etag(name: str, file: HubFile) -> str:
    """sha256 of a large file, or of a virtual one's head and size; git's hash of a small one."""
    if is_large(name):
        more = b"" if file.nbytes == len(file.head) else str(file.nbytes).encode()
        return hashlib.sha256(file.head + more).hexdigest()
    return hashlib.sha1(b"blob %d\0" % file.nbytes + file.head).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    stand_in: StandInHub
    protocol_version = "HTTP/1.1"
    # otherwise a body waits 40 ms for the acknowledgement of its headers
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        hub, path = self.stand_in, unquote(urlsplit(self.path).path)
        hub.tokens.add(self.headers.get("Authorization", ""))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, kind = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else ""
            if name not in hub.models:
                return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
            made = self.tree(name) if kind == "tree" else self.model(name)
            return self.send(200, json.dumps(made).encode(), body)
        name, file = "/".join(parts[:2]), "/".join(parts[4:])
        if name not in hub.models:
            return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        if name in hub.gated:
            return self.send(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
        found = hub.models[name].get(file)
        if found is None:
            return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
        if is_large(file) and hub.failures > 0:
            hub.failures -= 1
            return self.send(503, b"busy", body)
        return self.send_file(name, file, found, body)

    def model(self, name: str) -> dict[str, Any]:
        files = self.stand_in.models[name]
        siblings = []
        for file, content in files.items():
            sha = etag(file, content)
            one: dict[str, Any] = {"rfilename": file, "size": content.nbytes, "blobId": sha}
            if is_large(file):
                one["lfs"] = {"sha256": sha, "size": content.nbytes, "pointerSize": 134}
            siblings.append(one)
        return {"id": name, "sha": self.stand_in.revision(name), "siblings": siblings}

    def tree(self, name: str) -> list[dict[str, Any]]:
        found = []
        for file, content in self.stand_in.models[name].items():
            sha = etag(file, content)
            one: dict[str, Any] = {"type": "file", "path": file, "size": content.nbytes, "oid": sha}
            if is_large(file):
                one["lfs"] = {"oid": sha, "size": content.nbytes, "pointerSize": 134}
            found.append(one)
        return found

    def send_file(self, name: str, file: str, found: HubFile, body: bool) -> None:
        start, stop, status = 0, found.nbytes, 200
        asked = self.headers.get("Range")
        if asked and self.stand_in.ranges:
            first, last = asked.removeprefix("bytes=").split("-")
            start, status = int(first), 206
            stop = min(int(last) + 1, found.nbytes) if last else found.nbytes
        more = {
            "ETag": f'"{etag(file, found)}"',
            "X-Repo-Commit": self.stand_in.revision(name),
            "X-Linked-Size": str(found.nbytes),
            "Accept-Ranges": "bytes",
        }
        if status == 206:
            more["Content-Range"] = f"bytes {start}-{stop - 1}/{found.nbytes}"
        if not body:
            self.send(status, b"", False, more, stop - start)
            return
        if stop > len(found.head) and self.stand_in.ranges:
            self.send(500, f"{file} has no bytes {start} to {stop}".encode(), body)
            return
        header = 8 + int.from_bytes(found.head[:8], "little") if is_large(file) else stop
        self.send(status, found.head[start:stop], True, more, stop - start, header - start)

    def send(
        self,
        status: int,
        content: bytes,
        body: bool,
        more: dict[str, str] | None = None,
        length: int | None = None,
        header: int | None = None,
    ) -> None:
        """The first `header` bytes of the content are not tensor data."""
        hub, path = self.stand_in, urlsplit(self.path).path
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for key, value in (more or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if not body:
            return
        try:
            for at in range(0, len(content), 16 << 10):
                piece = content[at : at + (16 << 10)]
                # counted first: the client may read the counts once it has the bytes
                hub.served[path] += len(piece)
                if header is not None:
                    hub.tensor_bytes += max(0, at + len(piece) - max(at, header))
                self.wfile.write(piece)
                time.sleep(hub.delay_s)
        except OSError:  # the client closed the connection
            self.close_connection = True
