"""The page for the person who starts it: what `engagement admin` serves."""

from __future__ import annotations

import secrets
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import tzinfo
from ipaddress import ip_address

import uvicorn
from sqlalchemy import Engine
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from engagement.admin.application import create_admin

_GRACE_SECONDS = 3


@dataclass(frozen=True, slots=True)
class TokenInAddress:
    """Lets in who has the address that was printed: others on the same machine can reach a port of it, too.

    It also keeps out a site whose name was pointed at our address: the cookie is not of that name.
    """

    port: int
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)

    def __call__(self, request: Request) -> str | Response:
        """Turn the token in the address into a cookie, once."""
        cookie = f"engagement_admin_{self.port}"  # Browsers do not tell ports apart.
        if self._is_right(request.query_params.get("token", "")):
            response = RedirectResponse(request.url.remove_query_params("token").path, 303)
            response.set_cookie(cookie, self.token, httponly=True, samesite="strict")
            return response
        if self._is_right(request.cookies.get(cookie, "")):
            return "operator"
        return PlainTextResponse("Open the address that `engagement admin` has printed.", 403)

    def _is_right(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.token.encode())


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach `host`."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    engine: Engine,
    host: str,
    port: int,
    announce: Callable[[str], object],
    *,
    may_reveal: bool = False,
    tz: tzinfo,
    schema: str | None = None,
) -> None:
    """Serve the page until the first SIGTERM or SIGINT; `announce` is given its address. `OSError` if it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:
        # asyncio sets it only where the socket names its protocol; without it, each page waits 40 ms for the browser.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        token = TokenInAddress(listening.getsockname()[1])
        app = create_admin(engine, authentication=token, may_reveal=may_reveal, tz=tz, schema=schema)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,  # It would write down whom was searched for.
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            # uvicorn stops at a signal, and then raises it again for whoever was there before it.
            signal.signal(number, lambda *_: None)
        name = f"[{host}]" if ":" in host else host
        announce(f"http://{name}:{token.port}/?token={token.token}")
        uvicorn.Server(config).run(sockets=[listening])
