"""The server's secrets: from a file, a flag or the environment, and out of the view of `ps`."""

import ctypes
import os
import re
from pathlib import Path

from osmium.errors import ConfigError
from osmium.server.access import parse_keys

__all__ = ["api_keys", "key_password"]

VARIABLE = "OSMIUM_API_KEY"


def api_keys(key: str | None, file: str | None) -> list[str]:
    """The keys that clients may use: the lines of `file`, else `key`, else $OSMIUM_API_KEY.

    An empty list is no key.  Overwrites the flag and the variable where `ps` reads them.
    Raises: ConfigError for both, an empty key, or a file that cannot be read.
    """
    from_environment = os.environ.pop(VARIABLE, None)
    for secret in (key, from_environment):
        if secret:
            _overwrite(secret.encode(errors="surrogateescape"))
    if key is not None and file is not None:
        raise ConfigError("--api-key and --api-key-file are both given; keep --api-key-file.")
    if file is not None:
        return parse_keys(_lines(file))
    if key is not None:
        return parse_keys([key])
    return parse_keys([from_environment]) if from_environment else []


def key_password(password: str | None, file: str | None) -> str | None:
    """The password of the TLS key: the first line of `file`, else `password`.

    Overwrites the flag where `ps` reads it.  Raises: ConfigError as `api_keys` does.
    """
    if password:
        _overwrite(password.encode(errors="surrogateescape"))
    if file is None:
        return password
    flag = "--ssl-keyfile-password"
    if password is not None:
        raise ConfigError(f"{flag} and {flag}-file are both given; keep {flag}-file.")
    lines = _read_lines(f"{flag}-file", file)
    if not lines or not lines[0]:
        raise ConfigError(f"{flag}-file {file} has no password in its first line; write it there.")
    return lines[0]


def _read_lines(flag: str, file: str) -> list[str]:
    """The lines of a file.  Raises: ConfigError."""
    try:
        return Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{flag} {file} cannot be read: {reason}.") from None


def _lines(file: str) -> list[str]:
    """The keys of a file: lines that are neither empty nor comments.  Raises: ConfigError."""
    lines = [line.strip() for line in _read_lines("--api-key-file", file)]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(
            f"--api-key-file {file} has no key; write one key per line; # begins a comment."
        )
    return keys


def _overwrite(secret: bytes) -> None:
    """Overwrite a secret in this process's arguments and environment, as `ps` shows them.

    Linux keeps both at the addresses in /proc/self/stat; elsewhere this does nothing.
    """
    try:
        stat = Path("/proc/self/stat").read_bytes()
        # Fields 48 to 51 of proc(5), counted after the name in parentheses (field 2).
        bounds = [int(field) for field in stat.rpartition(b")")[2].split()[45:49]]
    except (OSError, ValueError):
        return
    for start, end in (bounds[:2], bounds[2:]) if len(bounds) == 4 else ():
        if not 0 < start < end:
            continue
        text = ctypes.string_at(start, end - start)
        # A whole argument, or what follows `--api-key=` and `OSMIUM_API_KEY=`.
        for match in re.finditer(rb"(?<![^\0=])" + re.escape(secret) + rb"(?=\0|\Z)", text):
            ctypes.memset(start + match.start(), ord("*"), len(secret))
