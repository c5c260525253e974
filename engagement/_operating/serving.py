"""Serves an ASGI application for a command, by uvicorn, until a signal."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

_GRACE_SECONDS = 3


def serve(app: Any, host: str, port: int, announce: Callable[[str], object], *, connections: int | None = None) -> None:
    """Serve until the first SIGTERM or SIGINT. `announce` gets the address (`http://127.0.0.1:8025`).

    Beyond so many `connections`, requests are answered with 503. `OSError` or `OverflowError` if nobody can listen
    there.
    """
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        # Without it each answer waits 40 ms for its reader. asyncio sets it only on a socket that names its protocol.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,  # Addresses hold searches, and so the names of users, and the token of a handshake.
            lifespan="off",
            ws="none",
            limit_concurrency=connections,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            # uvicorn stops at a signal, and then raises it again for the handler before its own.
            signal.signal(number, lambda *_: None)
        name = f"[{host}]" if ":" in host else host
        announce(f"http://{name}:{listening.getsockname()[1]}")
        uvicorn.Server(config).run(sockets=[listening])
