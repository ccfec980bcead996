"""Access to the server: names of the host, origins of web pages, API keys.

A page of another origin, or a name that resolves to this machine (DNS rebinding), must not reach
the server through a user's browser.  All checks run before a body is read.
"""

import hmac
import ipaddress
import re
import socket
from collections.abc import Collection, Iterable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from osmium.errors import ConfigError, RequestError
from osmium.server.anthropic_errors import error_form
from osmium.server.body import ErrorResponse

__all__ = [
    "AccessMiddleware",
    "is_address",
    "is_loopback",
    "open_to",
    "parse_hosts",
    "parse_origins",
]

PUBLIC_PATH = "/health"
"""Answered without an API key, for health checks."""

DRAIN_S = 0.5
"""Seconds in which the body of a refused request is received and dropped."""

EXPOSED = "x-osmium-ignored, x-osmium-did-you-mean, request-id, retry-after"
"""Headers of responses that web pages may read."""

_LABELS = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?"
_HOST = re.compile(rf"(?P<host>{_LABELS}|\[[0-9a-f:.]+(?:%[a-z0-9_.%-]+)?\])(?::[0-9]*)?")
_ORIGIN = re.compile(rf"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<authority>{_HOST.pattern})/?")


class AccessMiddleware:
    """Answers 403 for a Host or an Origin that is not allowed, 401 without the API key.

    Allowed hosts: loopback names, literal addresses, `allowed_hosts`.  Allowed origins: those of
    loopback hosts, `cors_origins`.  Allowed origins get CORS headers, and an answer to a preflight.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        allowed_hosts: Iterable[str] = (),
        cors_origins: Iterable[str] = (),
        api_keys: Collection[str] = (),
    ) -> None:
        """Raises: ConfigError for a host or an origin that cannot be one."""
        self.app = app
        self._hosts = [_host_pattern(host) for host in allowed_hosts]
        origins = list(cors_origins)
        self._origins = [_origin_pattern(origin) for origin in origins]
        self._any_origin = "*" in origins
        self._keys = [encoded for key in api_keys for encoded in _encodings(key)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        error = self._wrong_host(headers) or self._wrong_origin(headers)
        if error is not None:
            await self._refuse(scope, error, error.status, {})(scope, receive, send)
            return
        origin = headers.get("origin")
        if origin is not None:
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await self._preflight(origin, headers)(scope, receive, send)
                return
            send = self._with_cors(origin, send)
        if self._keys and scope["path"] != PUBLIC_PATH and not self._has_key(headers):
            error = RequestError(
                "The API key is missing or wrong; send the header `Authorization: Bearer KEY`, or "
                "`x-api-key: KEY`.",
                code="invalid_api_key",
            )
            response = self._refuse(scope, error, 401, {"WWW-Authenticate": "Bearer"})
            await response(scope, receive, send)
            return
        await self.app(scope, receive, send)

    @staticmethod
    def _refuse(
        scope: Scope, error: RequestError, status: int, headers: dict[str, str]
    ) -> Response:
        body, form_headers = error_form(scope, error, status)
        return ErrorResponse(body, status, {**headers, **form_headers}, DRAIN_S)

    # -- host and origin ---------------------------------------------------------------------------

    def _wrong_host(self, headers: Headers) -> RequestError | None:
        """The error for a Host that is not allowed.  HTTP/1.0 clients may omit it."""
        for host in headers.getlist("host"):
            found = _HOST.fullmatch(host.lower())
            if found is None or not self._allows_host(found["host"]):
                return RequestError(
                    f"The host {host[:200]!r} is not allowed; use localhost or a literal address, "
                    "or start the server with --allowed-host NAME.",
                    code="host_not_allowed",
                    status=403,
                )
        return None

    def _allows_host(self, host: str) -> bool:
        name = host.removesuffix(".")
        return (
            is_loopback(name)
            or _address(name) is not None
            or any(pattern.fullmatch(name) for pattern in self._hosts)
        )

    def _wrong_origin(self, headers: Headers) -> RequestError | None:
        """The error for a web page that is not allowed; other clients send no Origin."""
        for origin in headers.getlist("origin"):
            if not self._allows_origin(origin.lower()):
                return RequestError(
                    f"Web pages of the origin {origin[:200]!r} are not allowed; start the server "
                    "with --cors-origin ORIGIN to allow them.",
                    code="origin_not_allowed",
                    status=403,
                )
        return None

    def _allows_origin(self, origin: str) -> bool:
        if self._any_origin:
            return True
        found = _ORIGIN.fullmatch(origin)
        if found is not None and is_loopback(found["host"].removesuffix(".")):
            return True
        return any(pattern.fullmatch(_usual(origin)) for pattern in self._origins)

    def _preflight(self, origin: str, headers: Headers) -> Response:
        """What a browser asks for before it sends a request with these headers."""
        asked = headers.get("access-control-request-headers", "authorization, content-type")
        allowed = {
            "Access-Control-Allow-Methods": "GET, HEAD, POST, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": asked,
            "Access-Control-Max-Age": "600",
            **self._cors(origin),
        }
        if "access-control-request-private-network" in headers:
            allowed["Access-Control-Allow-Private-Network"] = "true"
        return Response(headers=allowed)

    def _cors(self, origin: str) -> dict[str, str]:
        if self._any_origin:
            return {"Access-Control-Allow-Origin": "*"}
        return {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}

    def _with_cors(self, origin: str, send: Send) -> Send:
        headers = {**self._cors(origin), "Access-Control-Expose-Headers": EXPOSED}

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers)
            await send(message)

        return with_headers

    # -- key ---------------------------------------------------------------------------------------

    def _has_key(self, headers: Headers) -> bool:
        """Whether `Authorization: Bearer KEY` or `x-api-key: KEY` has a key; in constant time."""
        given = [value.strip() for value in headers.getlist("x-api-key")]
        for value in headers.getlist("authorization"):
            bearer = re.fullmatch(r"bearer[ \t]+(.*)", value.strip(), re.IGNORECASE | re.DOTALL)
            given += [bearer[1].strip()] if bearer else []
        tries = [(key, one.encode("latin1")) for key in self._keys for one in given]
        matches = [hmac.compare_digest(key, one) for key, one in tries]
        return any(matches)


def _encodings(key: str) -> list[bytes]:
    """The bytes of a key in a header: UTF-8, and Latin-1 by clients that send that."""
    try:
        return list({key.encode(), key.encode("latin1")})
    except UnicodeEncodeError:
        return [key.encode()]


def is_loopback(host: str) -> bool:
    """Whether a host, without a port, is this machine only: localhost, 127.0.0.1, [::1]."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    address = _address(host)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address is not None and address.is_loopback


def is_address(host: str) -> bool:
    """Whether a host is a literal address, not a name."""
    return _address(host.lower()) is not None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """A literal address, in any form that browsers accept; None for a name."""
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        pass
    if not re.fullmatch(r"(?:0x[0-9a-f]*|[0-9]+)(?:\.(?:0x[0-9a-f]*|[0-9]+)){0,3}", host):
        return None
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))  # 127.1, 2130706433
    except OSError:
        return None


# -- flags -----------------------------------------------------------------------------------------


def _listed(values: Iterable[str]) -> list[str]:
    """The items of a flag that may be given several times and with commas."""
    return [item.strip() for value in values for item in value.split(",")]


def parse_hosts(values: Iterable[str]) -> list[str]:
    """Names of --allowed-host, which may be given several times and with commas.

    Raises: ConfigError.
    """
    hosts = _listed(values)
    for host in hosts:
        _host_pattern(host)
    return hosts


def parse_origins(values: Iterable[str]) -> list[str]:
    """Origins of --cors-origin, which may be given several times and with commas.

    Raises: ConfigError.
    """
    origins = _listed(values)
    for origin in origins:
        _origin_pattern(origin)
    return origins


def parse_keys(values: Iterable[str]) -> list[str]:
    """API keys, without spaces around them.

    Raises: ConfigError for a key that no header can have; the text of the error has no key.
    """
    keys = [value.strip() for value in values]
    if not all(keys):
        raise ConfigError("The API key is empty; set a key, or omit the flag for no key.")
    if not all(key.isprintable() for key in keys):
        raise ConfigError("The API key has a character that a header cannot have; use letters.")
    return keys


def _host_pattern(host: str) -> re.Pattern[str]:
    """Matches a host in lower case: `*` is any host, `*.example.com` any name below it."""
    if host == "*":
        return re.compile(".*")
    name = host.lower()
    if not name.isascii():
        try:
            name = name.encode("idna").decode()
        except UnicodeError:
            name = ""
    below = name.startswith(("*.", "."))
    bare = name.removeprefix("*").removeprefix(".") if below else name
    found = _HOST.fullmatch(bare)
    if found is None:
        raise ConfigError(
            f"--allowed-host is {host!r}; it must be a name such as box.lan, *.example.com, or * "
            "for any."
        )
    bare = re.escape(found["host"].removesuffix("."))
    itself = "?" if name.startswith(".") else ""
    return re.compile(rf"(?:{_LABELS}\.){itself}{bare}" if below else bare)


def _origin_pattern(origin: str) -> re.Pattern[str]:
    """Matches an origin in lower case; `*` within it is a part of a name, or a port."""
    if origin == "*":
        return re.compile(".*", re.DOTALL)
    usual = _usual(origin.lower())
    if usual == "null":
        return re.compile("null")
    if re.fullmatch("file:/*", usual):
        return re.compile("file:/*")
    if not re.fullmatch(
        r"[a-z][a-z0-9+.-]*://(?:[a-z0-9_.*-]+|\[[0-9a-f:.]+\])(?::[0-9*]+)?", usual
    ):
        raise ConfigError(
            f"--cors-origin is {origin!r}; it must be an origin such as https://app.example, "
            "https://*.example.com, null, or * for any."
        )
    return re.compile(re.escape(usual).replace(r"\*", "[a-z0-9_.-]+"))


def _usual(origin: str) -> str:
    """An origin without a slash at its end and without its scheme's usual port."""
    origin = origin.removesuffix("/")
    for scheme, port in (("http", 80), ("https", 443)):
        if origin.startswith(f"{scheme}://"):
            return origin.removesuffix(f":{port}")
    return origin


def open_to(
    address: str, allowed_hosts: Sequence[str], cors_origins: Sequence[str], has_key: bool
) -> str | None:
    """The warning of a server that others can use without a key; None if it has one, or is local.

    `address` is the one that the socket listens on.
    """
    if has_key:
        return None
    users, fixes = [], []
    if not is_loopback(address.lower()):
        users.append(f"every machine that reaches {address}")
        fixes.append("listen on 127.0.0.1")
    if "*" in cors_origins:
        users.append("every web page in a browser on this machine")
        fixes.append("list the origins with --cors-origin")
    if "*" in allowed_hosts:
        users.append("web pages by DNS rebinding")
        fixes.append("list the names with --allowed-host")
    if not users:
        return None
    return (
        f"The server has no API key and is open to {', and to '.join(users)}. Set a key with "
        f"--api-key-file, or {' and '.join(fixes)}."
    )
