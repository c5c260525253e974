"""`engagement admin`: the page, for the one person at the terminal."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta, tzinfo

from sqlalchemy import Engine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount

from engagement._claim import clock
from engagement._operating import serving
from engagement.admin.application import create_admin

COOKIE = "engagement_admin"
SESSION = timedelta(hours=8)
_OPEN_THE_ADDRESS = "Open the address that `engagement admin` has printed."


@dataclass(frozen=True, slots=True)
class TokenInAddress:
    """Lets in a browser with the printed address. Others on the same machine can reach the port, but have no token.

    The token begins a session, which ends with a sign-out, or after `lasts`. A browser gives its cookies to every port
    of a host, and so to any other program that listens on the machine. The session's cookie is therefore for a `path`
    that nobody can guess; mount the page below it. A site whose name was pointed at 127.0.0.1 stays out too: the cookie
    is for another name.
    docs/decisions.md#2026-11-29--the-page-of-ones-own-lies-below-a-path-that-nobody-can-guess
    """

    token: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    path: str = field(default_factory=lambda: f"/{secrets.token_urlsafe(16)}", repr=False)
    lasts: timedelta = SESSION
    now: Callable[[], float] = clock
    ends: dict[str, float] = field(default_factory=dict, repr=False)
    """The end of each session, by `now`."""

    @property
    def sign_out(self) -> str:
        """The address of the form that ends the session."""
        return f"{self.path}/sign-out"

    def __call__(self, request: Request) -> str | Response:
        """Return "operator" for a request with a session. The token begins a session, the sign-out ends it."""
        # docs/decisions.md#2026-11-24--engagement-admin-has-a-token-in-its-address
        if secrets.compare_digest(request.query_params.get("token", "").encode(), self.token.encode()):
            return self._begin(request)
        session = request.cookies.get(COOKIE, "")
        if self.ends.get(session, 0.0) <= self.now():
            return PlainTextResponse(_OPEN_THE_ADDRESS, 403)
        if request.method == "POST" and request.url.path == self.sign_out:
            return self._end(session)
        return "operator"

    def _begin(self, request: Request) -> Response:
        for session in [session for session, end in self.ends.items() if end <= self.now()]:
            del self.ends[session]
        session = secrets.token_urlsafe(24)
        self.ends[session] = self.now() + self.lasts.total_seconds()
        response = RedirectResponse(request.url.remove_query_params("token").path, 303)
        response.set_cookie(
            COOKIE,
            session,
            path=self.path,
            max_age=int(self.lasts.total_seconds()),
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return response

    def _end(self, session: str) -> Response:
        del self.ends[session]
        response = PlainTextResponse(f"Signed out. To come in again: {_OPEN_THE_ADDRESS}")
        response.delete_cookie(COOKIE, path=self.path)
        return response


def serve(
    engine: Engine,
    host: str,
    port: int,
    announce: Callable[[str], object],
    *,
    may_reveal: bool = False,
    may_act: bool = True,
    tz: tzinfo,
    schema: str | None = None,
) -> None:
    """Serve the page until the first SIGTERM or SIGINT. `announce` gets its address. `OSError` if the port is taken."""
    gate = TokenInAddress()
    page = create_admin(
        engine,
        authentication=gate,
        may_reveal=may_reveal,
        may_act=may_act,
        sign_out=gate.sign_out,
        tz=tz,
        schema=schema,
    )
    app = Starlette(routes=[Mount(gate.path, page), Mount("", PlainTextResponse(_OPEN_THE_ADDRESS, 403))])
    serving.serve(app, host, port, lambda address: announce(f"{address}{gate.path}/?token={gate.token}"))
