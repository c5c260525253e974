"""The address of a request and the connection to it: name look-up, the environment's proxy, TLS, all in time."""

from __future__ import annotations

import base64
import re
import socket
import ssl
import threading
from concurrent.futures import Future
from contextlib import suppress
from time import monotonic
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from engagement.messages.checks import checked_flag

_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]*:[0-9a-f:.]*(%[a-z0-9._-]+)?")


class Origin:
    """The origin of requests, or a proxy. `basic` are the credentials in its URL."""

    def __init__(self, url: str, name: str = "url", schemes: tuple[str, ...] = ("http", "https")) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except (ValueError, AttributeError, TypeError):
            parts, port = SplitResult("", "", "", "", ""), None
        host = parts.hostname or ""
        if parts.scheme not in schemes or not _HOST.fullmatch(host):
            raise ValueError(f"{name}: must be an {' or '.join(schemes)} URL with a host")
        self.is_https = parts.scheme == "https"
        self.host = host
        self.port = port or (443 if self.is_https else 80)
        named = f"[{host}]" if ":" in host else host
        self.address = f"{named}:{self.port}"
        self.authority = f"{named}:{port}" if port else named
        self.basic = _basic(parts)
        self._path = _quoted(parts.path)
        self._query = f"?{_quoted(parts.query)}" if parts.query else ""

    def target(self, path: str) -> str:
        """Return the target of a request: `path` below the URL's, or for "" the URL's own path and query."""
        return self._path.rstrip("/") + _quoted(path) if path else (self._path or "/") + self._query


def _quoted(path: str) -> str:
    return quote(path, safe="/?:@!$&'()*+,;=%~[]")


def _basic(parts: SplitResult) -> str | None:
    if parts.username is None and parts.password is None:
        return None
    given = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return f"Basic {base64.b64encode(given.encode()).decode()}"


def proxy_of(origin: Origin) -> Origin | None:
    """Return the environment's proxy for an origin, if any. `ValueError` for a kind that we do not speak to (SOCKS)."""
    proxies = getproxies_environment()
    name = "https" if origin.is_https else "http"
    url = proxies.get(name) or proxies.get("all")
    if not url or proxy_bypass(origin.address):
        return None
    return Origin(url if "://" in url else f"http://{url}", f"{name.upper()}_PROXY", ("http",))


def tls_context(verify: ssl.SSLContext | bool) -> ssl.SSLContext:
    """Return the context for `verify`: True trusts the authorities of the system, False trusts every peer."""
    if isinstance(verify, ssl.SSLContext):
        return verify
    if checked_flag("verify", verify):
        return ssl.create_default_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def connected_to(to: Origin, deadline: float) -> socket.socket:
    """Connect to the first address that lets us. Each address has an equal share of the time that is left."""
    addresses = _addresses(to, deadline)
    error: OSError = ConnectionError("no address")
    for others, (family, kind, protocol, _, address) in zip(range(len(addresses), 0, -1), addresses, strict=True):
        connected = socket.socket(family, kind, protocol)
        try:
            connected.settimeout(seconds_left(deadline) / others)
            connected.connect(address)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException as failure:
            connected.close()
            if not isinstance(failure, OSError):
                raise
            error = failure
        else:
            return connected
    raise error


def _addresses(to: Origin, deadline: float) -> list[Any]:
    with suppress(socket.gaierror):
        return socket.getaddrinfo(to.host, to.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    # A look-up takes no time-out, and a name server may be silent: so it runs in a thread, which we stop waiting for.
    found: Future[list[Any]] = Future()

    def look_up() -> None:
        try:
            found.set_result(socket.getaddrinfo(to.host, to.port, type=socket.SOCK_STREAM))
        except BaseException as error:  # noqa: BLE001 - the future hands it on
            found.set_exception(error)

    threading.Thread(target=look_up, name="engagement-look-up", daemon=True).start()
    return found.result(seconds_left(deadline))


def seconds_left(deadline: float) -> float:
    """Return the time until `deadline`; raise `TimeoutError` if there is none."""
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError
    return left
