"""TLS: the certificate from files, and handshakes with limits of their time and number.

A handshake is not a connection yet, so the limits of server/connections.py do not apply to it.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from osmium.errors import ConfigError

__all__ = ["Handshake", "close_late", "tls_context"]

CLOSE_S = 1.0
"""Seconds in which a client confirms the end of a connection."""


def tls_context(
    certfile: str | None,
    keyfile: str | None = None,
    password: str | None = None,
    ca_certs: str | None = None,
) -> ssl.SSLContext | None:
    """The server's TLS settings from PEM files; None without any of them.

    Without `keyfile` the certificate's file has the key.  With `ca_certs` clients need a
    certificate that one of these signed.  Raises: ConfigError that names the flag and the file.
    """
    if certfile is None:
        for flag, value in (
            ("--ssl-keyfile", keyfile), ("--ssl-keyfile-password", password),
            ("--ssl-ca-certs", ca_certs),
        ):  # fmt: skip
            if value is not None:
                raise ConfigError(f"{flag} is given without --ssl-certfile; give both or none.")
        return None
    for flag, file in (
        ("--ssl-certfile", certfile), ("--ssl-keyfile", keyfile), ("--ssl-ca-certs", ca_certs),
    ):  # fmt: skip
        if file is not None:
            _check_readable(flag, file)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    _load_certificate(context, certfile, keyfile, password)
    if ca_certs is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(ca_certs)
        except ssl.SSLError as error:
            raise ConfigError(
                f"--ssl-ca-certs {ca_certs} has no certificate that can be used "
                f"({_reason(error)}); it must be a PEM file."
            ) from None
    return context


def _check_readable(flag: str, file: str) -> None:
    """Raises: ConfigError."""
    try:
        with open(file, "rb") as opened:
            opened.read(1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{flag} {file} cannot be read: {reason}.") from None


def _load_certificate(
    context: ssl.SSLContext, certfile: str, keyfile: str | None, password: str | None
) -> None:
    """Raises: ConfigError."""
    is_encrypted = False

    def given_password() -> str:
        nonlocal is_encrypted
        is_encrypted = True
        return password or ""

    key = f"--ssl-keyfile {keyfile}" if keyfile else f"the key in --ssl-certfile {certfile}"
    try:
        # Without a function as password OpenSSL would ask for one on the terminal.
        context.load_cert_chain(certfile, keyfile, password=given_password)
    except (OSError, ValueError) as error:  # ValueError: a password that is too long
        if is_encrypted and password is None:
            raise ConfigError(
                f"{key} is encrypted; give its password with --ssl-keyfile-password-file."
            ) from None
        if is_encrypted:
            raise ConfigError(f"The password of {key} is wrong.") from None
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"{key} is not the key of --ssl-certfile {certfile}; give the files of one pair."
            ) from None
        files = f"--ssl-certfile {certfile}"
        if keyfile:
            files += f" and --ssl-keyfile {keyfile}"
        raise ConfigError(
            f"{files} cannot be used ({_reason(error)}); they must be PEM files with the "
            "certificate and its key."
        ) from None


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error)


class Handshake(asyncio.Protocol):
    """One TLS handshake, after which the connection gets its own protocol."""

    def __init__(
        self,
        context: ssl.SSLContext,
        timeout_s: float,
        running: set["Handshake"],
        has_room: Callable[[], bool],
        make: Callable[[], asyncio.Protocol],
    ) -> None:
        """`running` has all handshakes that run.  Without room the connection is closed.

        `make` makes the protocol of a connection whose handshake has succeeded.
        """
        self._context, self._timeout_s = context, timeout_s
        self._running, self._has_room, self._make = running, has_room, make
        self.since = time.monotonic()
        self._task: asyncio.Task[None] | None = None
        self._early: list[bytes] = []
        """What arrived before the connection had its protocol."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self._task is not None:
            return  # of the encrypted transport
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()  # the handshake reads
        if not self._has_room():
            transport.abort()
            return
        self._running.add(self)
        self._task = asyncio.get_running_loop().create_task(self._run(transport))

    def data_received(self, data: bytes) -> None:
        self._early.append(data)

    def abort(self) -> None:
        """End the handshake and its connection."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self, transport: asyncio.Transport) -> None:
        encrypted: Any = None
        try:
            with suppress(OSError):  # a client without TLS, of another version, or gone
                encrypted = await asyncio.get_running_loop().start_tls(
                    transport, self, self._context, server_side=True,
                    ssl_handshake_timeout=self._timeout_s, ssl_shutdown_timeout=CLOSE_S,
                )  # fmt: skip
        finally:
            self._running.discard(self)
            if encrypted is None:
                transport.abort()
        if encrypted is None or encrypted.is_closing():
            return
        protocol = self._make()
        encrypted.set_protocol(protocol)
        protocol.connection_made(encrypted)
        for data in self._early:
            protocol.data_received(data)


def close_late(handshakes: Collection[Handshake], seconds: float, most: int = 1 << 16) -> int:
    """Abort the oldest handshakes that run for these seconds or longer; returns their number."""
    end = time.monotonic() - seconds
    late = sorted((one for one in handshakes if one.since < end), key=lambda one: one.since)[:most]
    for handshake in late:
        handshake.abort()
    return len(late)
