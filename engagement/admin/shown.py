"""How pages show things: values in words, links, and whether what is personal is seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta, tzinfo
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette_admin.flash import get_flashed_messages
from starlette_admin.views import CustomView

from engagement._operating.masking import pseudonym
from engagement.admin.database import Queue
from engagement.admin.guards import Permission
from engagement.messages import delivery_id
from engagement.models import MessageStatus

NOTHING = "-"


def path_for(request: Request, name: str, /, **parameters: Any) -> str:
    """Return where a page of ours is, without scheme and host: behind a proxy we may not know them."""
    return request.url_for(f"{request.app.state.ROUTE_NAME}:{name}", **parameters).path


@dataclass(frozen=True, slots=True)
class Shown:
    """What all pages share: the queue, and how it is shown."""

    queue: Queue
    tz: tzinfo
    may_reveal: Permission
    may_act: Permission
    secret: bytes = field(repr=False)

    def pseudonym(self, user_id: str) -> str:
        """Return what stands for a user."""
        return pseudonym(user_id, self.secret)

    async def reveals(self, request: Request) -> bool:
        """Tell whether this page shows what is personal: it was asked for, and is allowed."""
        return request.query_params.get("reveal") == "1" and await self.may_reveal(request)

    def words(self) -> dict[str, Any]:
        """Return what templates call to put values in words."""
        return {
            "moment": self._moment,
            "clock": lambda at, form: self._local(at).strftime(form),
            "zone": str(self.tz),
            "long": long_words,
            "size": _size,
            "spoken": lambda word: str(word).replace("_", " "),
            "statuses": tuple(MessageStatus),
            "delivery_id": delivery_id,
        }

    def _moment(self, at: datetime) -> str:
        return self._local(at).strftime("%Y-%m-%d %H:%M:%S")

    def _local(self, at: datetime) -> datetime:
        try:
            return at.astimezone(self.tz)
        except OverflowError:  # The first and the last hours that there are have no time in every zone.
            return at


def long_words(duration: timedelta | None) -> str:
    """Say roughly how long: the two largest units."""
    if duration is None:
        return NOTHING
    seconds = max(int(duration.total_seconds()), 0)
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    parts = [f"{seconds // length % (10**9 if name == 'd' else _FULL[name])} {name}" for name, length in units]
    first = next((place for place, (_, length) in enumerate(units) if seconds >= length), len(units) - 1)
    return " ".join(parts[first : first + 2])


_FULL = {"h": 24, "min": 60, "s": 60}


def _size(count: int | None) -> str:
    """Say roughly how many bytes."""
    if count is None:
        return NOTHING
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:  # noqa: PLR2004 - what the units mean
            return f"{amount:.0f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


class Page(CustomView):
    """A page of ours, rendered by the admin that it was added to."""

    def __init__(self, shown: Shown) -> None:
        super().__init__()
        self.shown = shown

    async def render(self, request: Request, name: str, **context: Any) -> Response:
        """Return the page `name`."""
        assert self.templates is not None
        context |= {
            "may_reveal": await self.shown.may_reveal(request),
            "reveal": await self.shown.reveals(request),
            "flashed_messages": get_flashed_messages(request),
        }
        return self.templates.TemplateResponse(request, name, context)
