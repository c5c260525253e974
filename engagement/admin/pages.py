"""The pages: the overview, the list, one message, and the question before each action."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from urllib.parse import urlencode

from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette_admin.flash import flash
from starlette_admin.routing import route

from engagement._operating.lists import Filters, list_messages
from engagement._operating.masking import HIDDEN, mask_address, masked
from engagement._operating.overview import activity, overview
from engagement._operating.pauses import holding
from engagement._operating.person import time_in
from engagement._operating.timeline import timeline
from engagement._operating.workers import whose
from engagement._receiving.weighing import latest_receipt
from engagement.admin.actions import ACTIONS, Action, act, actions_for
from engagement.admin.chart import chart_of
from engagement.admin.shown import Page, message_id_of, path_for
from engagement.admin.suppressing import Asked, look_at
from engagement.messages import InvalidMessage, Pause, delivery_id, key_hash
from engagement.messages.checks import id_typed
from engagement.models import EngagementMessage, MessageStatus
from engagement.pausing import Pauses
from engagement.repository import EngagementMessageRepository

PAGE = 50
COUNT_UP_TO = 10_000
"""A larger table is not counted whole: a page must not read a million rows to show their number.
docs/decisions.md#2026-11-24--the-page-estimates-what-is-finished"""

MOST_WORKERS = 20
"""Workers that are named; those that are gone come first."""


@dataclass(frozen=True, slots=True)
class Span:
    """A period that the chart can show: its name, the length and number of its buckets, the form of their times."""

    name: str
    bucket: timedelta
    buckets: int
    clock: str


SPANS = {
    "day": Span("24 hours", timedelta(hours=1), 24, "%H:%M"),
    "week": Span("7 days", timedelta(hours=6), 28, "%a %d"),
}


class OverviewPage(Page):
    """The state of the queue, at one look."""

    menu_label = "Overview"
    path = "/"

    @route("")
    async def index(self, request: Request) -> Response:
        """Show counts, ages, rates and sizes, and a chart of the messages due and sent."""
        span = request.query_params.get("span")
        chosen = span if span in SPANS else "day"
        bucket = SPANS[chosen].bucket
        since = _on_the_hour(datetime.now(self.shown.tz), bucket) - (SPANS[chosen].buckets - 1) * bucket
        queue = self.shown.queue

        standing = await queue.run(lambda session: overview(session, schema=queue.schema, count_up_to=COUNT_UP_TO))
        try:
            past = await queue.run(lambda session: activity(session, since, bucket, schema=queue.schema))
        except HTTPException:
            past = None  # The counts are worth showing without it.
        return await self.render(
            request,
            "overview.html",
            overview=standing,
            count_up_to=COUNT_UP_TO,
            most_workers=MOST_WORKERS,
            chart=None if past is None else chart_of(past),
            spans=SPANS,
            chosen=chosen,
        )


def _on_the_hour(now: datetime, bucket: timedelta) -> datetime:
    """Return when the current bucket began, counted from midnight."""
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight + (now - midnight) // bucket * bucket


class MessagesPage(Page):
    """The messages: a list, a page for each, and the actions on it."""

    menu_label = "Messages"
    path = "/messages"

    @route("", name="messages")
    async def index(self, request: Request) -> Response:
        """List the messages that fit the filters, the newest first, a page at a time."""
        asked = request.query_params
        queue = self.shown.queue
        try:
            filters = _filters(asked, self.shown.tz)
            before, after = (id_typed(asked[name]) if asked.get(name) else None for name in ("before", "after"))

            def look(session: Session) -> list[EngagementMessage]:
                return list_messages(
                    session, before=before, after=after, limit=PAGE + 1, schema=queue.schema, **filters
                )

            found, problem = await queue.run(look, if_too_long="Narrow the filters, or try again."), None
        except InvalidMessage as error:
            found, problem, before, after = [], f"{_FILTERS[error.field]} {error.problem}.", None, None
        page = found[-PAGE:] if after is not None and before is None else found[:PAGE]
        there_is_more = len(found) > PAGE
        goes_up = after is not None and before is None
        if page and await self.shown.reveals(request):
            self.log(request, "reveal", "revealed", *(message.id for message in page))
        return await self.render(
            request,
            "messages.html",
            messages=page,
            mask=mask_address,
            receipts=RECEIPTS,
            receipt_of=latest_receipt,
            pseudonym=self.shown.pseudonym,
            problem=problem,
            pauses=await self._pauses(),
            newer=_page_link(request, after=page[0].id) if page and (there_is_more if goes_up else before) else None,
            older=_page_link(request, before=page[-1].id) if page and (goes_up or there_is_more) else None,
        )

    @route("/{message_id}", name="message")
    async def message(self, request: Request) -> Response:
        """Show one message: its fields, its timeline, and its actions."""
        message = await self._message(request)
        now = await self.shown.queue.run(lambda session: time_in(session, schema=self.shown.queue.schema))
        listed = await look_at(self.shown.queue, message)
        may_act = await self.shown.may_act(request)
        reveals = await self.shown.reveals(request)
        if reveals:
            self.log(request, "reveal", "revealed", message.id)
        # Masking a long history (one written by hand) takes a while: in a thread, so that other pages need not wait.
        moments = await run_in_threadpool(timeline, message, reveal=reveals)
        facts = await run_in_threadpool(_facts, message, self.shown.pseudonym, reveal=reveals)
        queue = self.shown.queue
        if worker := await queue.run(lambda session: whose(session, message, schema=queue.schema)):
            facts.append(("Worker", worker))
        return await self.render(
            request,
            "message.html",
            message=message,
            timeline=moments,
            stands=self.shown.stands(message, moments, now),
            facts=facts,
            receipt=latest_receipt(message),
            pauses=holding(await self._pauses(), message),
            actions=actions_for(message) if may_act else [],
            listed=listed,
            deeds=listed.deeds if may_act and isinstance(listed, Asked) else [],
        )

    @route("/{message_id}/{action}", name="ask")
    async def ask(self, request: Request) -> Response:
        """Ask before an action."""
        action = await self._action(request)
        message = await self._message(request)
        return await self._question(request, message, action)

    @route("/{message_id}/{action}", methods=["POST"], name="act")
    async def act(self, request: Request) -> Response:
        """Act, and show the answer on the message's page."""
        action, message_id, form = await self._action(request), message_id_of(request), await request.form()
        queue, by = self.shown.queue, request.state.operator
        try:
            answer = await queue.run(
                lambda session: act(session, action, message_id, form, by=by, tz=self.shown.tz, schema=queue.schema),
                if_too_long="Nothing was done. Try again.",
            )
        except InvalidMessage as error:
            message = await self._message(request)
            page = await self._question(request, message, action, f"The time {error.problem}.")
            page.status_code = 422
            return page
        except HTTPException:
            self.log(request, action.name, "failed", message_id)
            raise
        self.log(request, action.name, answer.word, message_id)
        flash(request, answer.sentence, "success" if answer.is_done else "warning")
        name, parameters = ("messages", {}) if answer.word == "not_found" else ("message", {"message_id": message_id})
        return RedirectResponse(path_for(request, name, **parameters), 303)

    async def _question(
        self, request: Request, message: EngagementMessage, action: Action, problem: str | None = None
    ) -> Response:
        fits = action in actions_for(message)
        return await self.render(request, "ask.html", message=message, action=action, fits=fits, problem=problem)

    async def _pauses(self) -> list[Pause]:
        schema = self.shown.queue.schema
        return await self.shown.queue.run(lambda session: Pauses(session, schema=schema).in_force())

    async def _action(self, request: Request) -> Action:
        action = ACTIONS.get(request.path_params["action"])
        if action is None:
            raise HTTPException(404, "There is no such action.")
        await self.check_may_act(request)
        return action

    async def _message(self, request: Request) -> EngagementMessage:
        message_id, schema = message_id_of(request), self.shown.queue.schema
        message = await self.shown.queue.run(
            lambda session: EngagementMessageRepository(session, schema=schema).get_message(message_id)
        )
        if message is None:
            raise HTTPException(404, "There is no such message.")
        return message


_FILTERS = {
    "status": "Status",
    "user_id": "User id",
    "message_type": "Type",
    "receipt": "Receipt",
    "scheduled_since": "Scheduled from",
    "scheduled_until": "Scheduled until",
    "message_id": "The message's number",
}
"""The page's names for the fields of a filter."""


RECEIPTS: dict[str, Filters] = {
    "delivered": {"delivered": True},
    "not delivered": {"delivered": False},
    "read": {"read": True},
    "not read": {"read": False},
    "undeliverable": {"undeliverable": True},
}
"""The choices of the filter by receipts."""


def _filters(asked: Mapping[str, str], tz: tzinfo) -> Filters:
    filters: Filters = {}
    if status := asked.get("status"):
        if status not in set(MessageStatus):
            raise InvalidMessage("status", "must be one of the list")
        filters["status"] = [status]
    if receipt := asked.get("receipt"):
        if receipt not in RECEIPTS:
            raise InvalidMessage("receipt", "must be one of the list")
        filters |= RECEIPTS[receipt]
    if user_id := asked.get("user", "").strip():
        filters["user_id"] = user_id
    if message_type := asked.get("type", "").strip():
        filters["message_type"] = message_type
    if since := _day(asked, "since", tz):
        filters["scheduled_since"] = since
    if until := _day(asked, "until", tz, later=timedelta(days=1)):
        filters["scheduled_until"] = until
    return filters


def _day(asked: Mapping[str, str], name: str, tz: tzinfo, later: timedelta = timedelta(0)) -> datetime | None:
    text = asked.get(name)
    if not text:
        return None
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=tz) + later
    except (ValueError, OverflowError):
        raise InvalidMessage(f"scheduled_{name}", "is no date") from None


def _page_link(request: Request, **place: int) -> str:
    kept = {key: value for key, value in request.query_params.items() if key not in {"before", "after"}}
    return f"?{urlencode(kept | place)}"


def _facts(message: EngagementMessage, pseudonym: Callable[[str], str], *, reveal: bool) -> list[tuple[str, object]]:
    """Return the fields of a message, without its timeline, as (name, value) pairs. None is shown as a dash."""
    error, key = message.error_message, message.idempotency_key
    params = json.dumps(message.message_params, ensure_ascii=False, indent=2)
    return [
        ("User", message.user_id if reveal else pseudonym(message.user_id)),
        ("To", message.destination_jid if reveal else mask_address(message.destination_jid)),
        ("Destination", message.destination),
        ("Type", message.message_type),
        ("Message key", message.message_key),
        ("Parameters", params if reveal or not message.message_params else HIDDEN),
        ("Attempts", message.attempt),
        ("Failures", message.retry_count),
        ("Last error", error if reveal or error is None else masked(error, message)),
        ("Provider's id", message.provider_message_id if reveal or not message.provider_message_id else HIDDEN),
        ("Delivery id", delivery_id(key)),
        ("Idempotency key", key) if reveal else ("Hash of its key", key_hash(key)),
    ]
