"""The guards before every page and its style sheets: the person, the form, the cookies, the site that asks."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from inspect import isawaitable
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engagement.messages.checks import checked_flag

Authentication = Callable[[Request], str | Response | Awaitable[str | Response | None] | None]
"""Returns the person's name, or a response (a redirect to a login), or None, which keeps the door shut.

Anything else is a mistake (a host that returns credentials before it has checked them): nobody comes in.
"""

May = bool | Callable[[Request], bool | Awaitable[bool]]
"""Whether a request is allowed something. May be async.
docs/decisions.md#2026-11-29--a-guard-believes-only-true"""

FORM = "application/x-www-form-urlencoded"
LONGEST_FORM = 64 * 1024
"""In bytes. The longest reason that is kept takes six thousand."""
MOST_FIELDS = 100


def anyone(request: Request) -> str:  # noqa: ARG001 - an `Authentication`
    """Let everybody in. For an app that a proxy or a network protects as a whole."""
    return "anyone"


@dataclass(frozen=True, slots=True)
class Permission:
    """The answer of `may` to a request. Anything but True and False is a `TypeError`, and the page fails.

    It is asked once for each request, so that the page and the log go by the same answer.
    """

    name: str
    may: May

    def __post_init__(self) -> None:
        """Refuse at once a value that can never be an answer (1, "no")."""
        if not callable(self.may):
            checked_flag(self.name, self.may)

    async def __call__(self, request: Request) -> bool:
        """Ask."""
        answers: dict[str, bool] = request.scope.setdefault("engagement_permissions", {})
        if self.name not in answers:
            answer = self.may(request) if callable(self.may) else self.may
            answers[self.name] = checked_flag(self.name, await answer if isawaitable(answer) else answer)
        return answers[self.name]


class Authenticated:
    """Lets a request pass once `authentication` has named the person, in `request.state.operator` for the pages."""

    def __init__(self, app: ASGIApp, authentication: Authentication) -> None:
        self._app = app
        self._authentication = authentication

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask, and pass on or answer."""
        if scope["type"] != "http":  # There are no pages behind it.
            await self._app(scope, receive, send)
            return
        answer = await self._ask(Request(scope, receive))
        if isinstance(answer, Response):
            await answer(scope, receive, send)
            return
        # A name from a header's bytes may hold a lone surrogate, which could be neither shown nor stored.
        scope.setdefault("state", {})["operator"] = answer.encode("utf-8", "replace").decode()
        await self._app(scope, receive, send)

    async def _ask(self, request: Request) -> str | Response:
        try:
            answer = self._authentication(request)
            who = await answer if isawaitable(answer) else answer
        except HTTPException as error:  # As FastAPI's security schemes say no.
            return PlainTextResponse(error.detail, error.status_code, error.headers)
        if not who:
            return PlainTextResponse("Not signed in.", 403)
        if not isinstance(who, (str, Response)):
            raise TypeError(f"authentication: must return a name, a Response or None, not {type(who).__name__}")
        return who


SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class ShortForms:
    """Reads a form before all others do, and refuses a foreign one: ours are short and hold no files.

    So the library and the host's `authentication` only meet forms that they can read.
    docs/decisions.md#2026-11-29--the-page-reads-a-form-before-anybody-else-does
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the form on, or refuse it."""
        if scope["type"] != "http" or scope["method"] in SAFE:
            await self._app(scope, receive, send)
            return
        if Headers(scope=scope).get("content-type", FORM).partition(";")[0].strip().lower() != FORM:
            await PlainTextResponse("This is no form of this page.", 400)(scope, receive, send)
            return
        body, is_whole = bytearray(), False
        while not is_whole:
            message = await receive()
            if message["type"] != "http.request":
                return  # The browser is gone.
            body += message.get("body", b"")
            is_whole = not message.get("more_body", False)
            if len(body) > LONGEST_FORM:
                await PlainTextResponse("This form is too long.", 413)(scope, receive, send)
                return
        if body.count(b"&") >= MOST_FIELDS:
            await PlainTextResponse("This form has too many fields.", 400)(scope, receive, send)
            return
        messages: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receive_again() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, receive_again, send)


class OwnCookies:
    """Keeps the library's cookies to the path that the page is mounted at: no other app or port is given them.

    docs/decisions.md#2026-11-29--the-page-of-ones-own-lies-below-a-path-that-nobody-can-guess
    """

    _FOR_THE_WHOLE_HOST = re.compile(rb"; path=/(?=;|$)", re.IGNORECASE)

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and narrow the cookies of the answer to our path."""
        own = b"; Path=" + quote(scope.get("root_path", "") or "/").encode()

        async def send_own(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    (name, self._FOR_THE_WHOLE_HOST.sub(own, value) if name == b"set-cookie" else value)
                    for name, value in message["headers"]
                ]
            await send(message)

        await self._app(scope, receive, send_own)


class SameOrigin:
    """Refuses a request that another site made a browser send, and tells browsers how to treat our pages.

    The library's token is a cookie said twice. A sibling domain or another port of the host can plant a cookie, and
    with it a token. docs/decisions.md#2026-11-24--the-admin-page-also-asks-where-a-form-comes-from
    """

    _HEADERS = {  # noqa: RUF012 - never changed
        "Cache-Control": "no-store",
        "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src data:; form-action 'self'; "
        "frame-ancestors 'none'; base-uri 'none'",
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
    }

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        is_static = scope["path"].removeprefix(scope.get("root_path", "")).startswith("/static/")

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._add_headers(message, is_static=is_static and message["status"] in {200, 206, 304})
            await send(message)

        request = Request(scope)
        refused = request.method not in SAFE and self._is_foreign(request)
        app = PlainTextResponse("This came from another site.", 403) if refused else self._app
        await app(scope, receive, send_with_headers)

    @staticmethod
    def _is_foreign(request: Request) -> bool:
        site = request.headers.get("sec-fetch-site")
        if site is not None:
            return site not in {"same-origin", "none"}
        # Browsers leave that out on plain HTTP. A client that sends neither header is no browser: no site can trick it.
        origin = request.headers.get("origin")
        return origin is not None and origin.partition("://")[2] != request.headers.get("host")

    def _add_headers(self, message: MutableMapping[str, Any], *, is_static: bool) -> None:
        headers = MutableHeaders(scope=message)
        for name, value in self._HEADERS.items():
            if not (is_static and name == "Cache-Control"):
                headers.setdefault(name, value)
