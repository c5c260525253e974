"""The pages put together: an ASGI app that a host mounts where it likes."""

from __future__ import annotations

import secrets
from datetime import UTC, timedelta, tzinfo
from importlib.resources import files

from sqlalchemy import Engine
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette_admin import BaseAdmin
from starlette_admin.theme import BaseTheme, IconSet

from engagement._sql.own_transactions import for_own_transactions
from engagement.admin.database import Queue
from engagement.admin.guards import Authenticated, Authentication, May, OwnCookies, Permission, SameOrigin, ShortForms
from engagement.admin.pages import MessagesPage, OverviewPage
from engagement.admin.pausing import PausesPage
from engagement.admin.people import PeoplePage
from engagement.admin.shown import Shown, path_for
from engagement.admin.suppressions import SuppressionsPage

MOUNT = "engagement"
PATIENCE = timedelta(seconds=5)


class Look(BaseTheme):
    """Our templates and our style sheet, above the library's."""

    name = MOUNT
    package = __package__

    def get_icon_set(self) -> IconSet:
        """Return no icons: words are enough."""
        return IconSet()


def create_admin(
    engine: Engine,
    *,
    authentication: Authentication,
    may_reveal: May = False,
    may_act: May = True,
    sign_out: str | None = None,
    tz: tzinfo = UTC,
    schema: str | None = None,
    secret_key: str | None = None,
    patience: timedelta = PATIENCE,
) -> ASGIApp:
    """Return an ASGI app with the admin's pages, to be mounted in a Starlette or FastAPI app, or served alone.

    `authentication(request)` returns the person's name, which is logged with each action; or a response of its own
    (a redirect to a login); or None, which keeps the door shut. It may be async, and may raise Starlette's
    `HTTPException`. Anything else (a number, a dictionary) is a `TypeError`, and nobody comes in. `anyone` lets
    everybody in, and has to be given by name.

    Personal data is masked. `may_reveal` allows a person to see it, once they ask, and `may_act` allows them to change
    messages. Each is True, False, or a function of the request that returns one of them and may be async. Any other
    answer (1, "no", None) is a `TypeError`, and nothing is shown. `sign_out` is an address that takes a POST and signs
    the person out: each page then has a button for it.

    Times are shown and read in `tz`. A page whose query takes longer than `patience` says so instead. Where several
    processes serve the page, give all the same `secret_key`: it signs the tokens of the forms and makes the pseudonyms.
    """
    if not callable(authentication):
        raise TypeError("authentication: must say who asks. To let everybody in, give engagement.admin.anyone")
    for name, given in (("secret_key", secret_key), ("sign_out", sign_out)):
        if given == "":
            raise ValueError(f"{name}: is empty, as a variable that is not set")
    queue = Queue(for_own_transactions(engine, schema), schema, patience)
    secret = secret_key or secrets.token_hex(32)
    shown = Shown(
        queue, tz, Permission("may_reveal", may_reveal), Permission("may_act", may_act), secret=secret.encode()
    )
    admin = BaseAdmin(
        title="Engagement",
        base_url="",
        route_name=MOUNT,
        theme=Look(),
        # By default the library looks into the host's directory first, whose layout.html is another.
        templates_dir=str(files(__package__) / "templates"),
        index_view=OverviewPage(shown),
        middlewares=[Middleware(OwnCookies)],
        secret_key=secret,
        timezone_config=None,
    )
    admin.templates.env.globals.update(path_for=path_for, sign_out=sign_out, **shown.words())
    # Without the library's pages that make, edit and delete rows of registered models: we register none.
    admin.routes = [route for route in admin.routes if route.name in {"static", "index"}]
    admin.add_view(MessagesPage(shown))
    admin.add_view(SuppressionsPage(shown))
    admin.add_view(PeoplePage(shown))
    admin.add_view(PausesPage(shown))
    # The library orders them by the names of their methods; the first that fits answers.
    admin.routes.sort(key=lambda route: "{message_id}" in route.path)
    before = [Middleware(SameOrigin), Middleware(ShortForms), Middleware(Authenticated, authentication)]
    app = Starlette(middleware=before)
    admin.mount_to(app)

    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        # Without the host's router: our links are looked up among our own routes, under any name of the mount.
        await app({key: scope[key] for key in scope.keys() - {"router", "app_root_path"}}, receive, send)

    return mounted
