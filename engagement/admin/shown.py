"""The showing of values: in words, as links, and masked where they are personal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, tzinfo
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette_admin.flash import get_flashed_messages
from starlette_admin.views import CustomView

from engagement._logging import logger
from engagement._operating.masking import masked, pseudonym
from engagement._operating.pauses import in_words
from engagement._operating.standing import standing
from engagement._operating.timeline import Moment
from engagement.admin.database import Queue
from engagement.admin.guards import Permission
from engagement.messages import InvalidMessage, delivery_id
from engagement.messages.checks import id_typed
from engagement.models import EngagementMessage, MessageStatus

NOTHING = "-"


def path_for(request: Request, name: str, /, **parameters: Any) -> str:
    """Return the path of a page of ours, without scheme and host: behind a proxy we may not know them."""
    return request.url_for(f"{request.app.state.ROUTE_NAME}:{name}", **parameters).path


def message_id_of(request: Request) -> int:
    """Return the number of the message that the path names."""
    try:
        return id_typed(request.path_params["message_id"])
    except InvalidMessage:
        raise HTTPException(404, "There is no such message.") from None


@dataclass(frozen=True, slots=True)
class Shown:
    """Shared by all pages: the queue, the time zone, and the permissions."""

    queue: Queue
    tz: tzinfo
    may_reveal: Permission
    may_act: Permission
    secret: bytes = field(repr=False)

    def pseudonym(self, user_id: str) -> str:
        """Return the pseudonym of a user.

        docs/decisions.md#2026-11-29--a-pseudonym-is-made-with-a-secret-and-masking-of-one-message-hides-from-a-glance-only
        """
        return pseudonym(user_id, self.secret)

    def stands(self, message: EngagementMessage, moments: Sequence[Moment], now: datetime) -> str:
        """Return how a message stands, in a sentence with times of the page's zone."""
        return standing(message, moments, now=now, at=self._moment)

    async def reveals(self, request: Request) -> bool:
        """Whether this page shows personal data: the person asked for it, and may see it."""
        return request.query_params.get("reveal") == "1" and await self.may_reveal(request)

    def words(self) -> dict[str, Any]:
        """Return the functions by which templates put values in words."""
        return {
            "moment": self._moment,
            "pause_in_words": lambda pause: in_words(pause, self._moment),
            "clock": lambda at, form: self._local(at).strftime(form),
            "zone": str(self.tz),
            "long": long_words,
            "size": _size,
            "spoken": lambda word: str(word).replace("_", " "),
            "statuses": tuple(MessageStatus),
            "delivery_id": delivery_id,
            "masked": masked,
        }

    def _moment(self, at: datetime) -> str:
        return self._local(at).strftime("%Y-%m-%d %H:%M:%S")

    def _local(self, at: datetime) -> datetime:
        try:
            return at.astimezone(self.tz)
        except OverflowError:  # In some zones the first and the last hours of the calendar lie outside of it.
            return at


def long_words(duration: timedelta | None) -> str:
    """Return a duration in its two largest units (`2 h 5 min`)."""
    if duration is None:
        return NOTHING
    seconds = max(int(duration.total_seconds()), 0)
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    parts = [f"{seconds // length % (10**9 if name == 'd' else _FULL[name])} {name}" for name, length in units]
    first = next((place for place, (_, length) in enumerate(units) if seconds >= length), len(units) - 1)
    return " ".join(parts[first : first + 2])


_FULL = {"h": 24, "min": 60, "s": 60}


def _size(count: int | None) -> str:
    """Return a number of bytes, rounded (`12 MB`)."""
    if count is None:
        return NOTHING
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:  # noqa: PLR2004 - a thousand of one unit is one of the next
            return f"{amount:.0f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


class Page(CustomView):
    """A page of ours, rendered by the admin that it was added to."""

    def __init__(self, shown: Shown) -> None:
        super().__init__()
        self.shown = shown

    def is_active(self, request: Request) -> bool:
        """Also of a page below its own (one message)."""
        path: str = request.scope["path"]
        mine = request.scope["root_path"] + self.path
        return path == mine or path.startswith(f"{mine}/")

    async def check_may_act(self, request: Request) -> None:
        """Refuse a person without `may_act`.

        docs/decisions.md#2026-11-29--who-may-act-is-asked-as-who-may-see
        """
        if not await self.shown.may_act(request):
            raise HTTPException(403, "You may look, and not act.")

    async def render(self, request: Request, name: str, **context: Any) -> Response:
        """Return the page `name`."""
        assert self.templates is not None
        context |= {
            "may_reveal": await self.shown.may_reveal(request),
            "reveal": await self.shown.reveals(request),
            "flashed_messages": get_flashed_messages(request),
        }
        return self.templates.TemplateResponse(request, name, context)

    def log(self, request: Request, action: str, verdict: str, *names: object, of: str = "message_id") -> None:
        """Log the deed of a person, or a look at personal data, with the numbers (or other names) of its subjects."""
        by = request.state.operator
        logger.info(
            "engagement.admin action=%s %s=%s verdict=%s by=%r", action, of, ",".join(map(str, names)), verdict, by
        )
