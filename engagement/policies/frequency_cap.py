"""How many messages a person gets in a day or a week, as the database counts."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime, time, timedelta, tzinfo
from time import monotonic, sleep
from typing import Literal

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from engagement._sending.protocols import Transport
from engagement._sql import looking
from engagement._sql.errors import is_transient
from engagement._sql.own_transactions import connect, for_own_transactions
from engagement.messages import OutgoingMessage
from engagement.models import EARLIEST, MessageStatus
from engagement.outcomes import Outcome, Postpone
from engagement.policies.gates import A_MINUTE, Gate, plain_function
from engagement.policies.local_time import TimeZoneOf, checked_wall_time, earlier, later, zone

LONGEST_WAIT_SECONDS = 2.0
"""How long the first in line for a frequency cap waits for those behind it, with a place in hand."""
LOOK_AGAIN_SECONDS = 0.02


class FrequencyCap(Gate):
    """Sends a person at most `limit` messages in each of their days, or weeks from Monday on, as the database counts.

    Messages of this day or week count that were sent, may have been sent, or are being sent. A message above the limit
    is postponed to `resume_at`, local time, of the next day or Monday (one a day: the second of Tuesday is sent on
    Wednesday at 9). If several are being sent at once, those beyond the limit step back: they are postponed for seconds
    to a minute, since the others may yet fail. The first in line waits here for a moment until they have. See
    docs/decisions.md#2026-11-29--the-first-in-line-for-a-frequency-cap-waits-for-the-others-to-step-back.

    The limit holds with any number of workers, without a lock and without a transaction during the send: a message's
    claim is committed before it is counted here. So of any two messages of a person the later counter sees the other as
    `sending`, or its end, and the last one to pass has seen all the others. The limit holds on the primary database
    only, and among workers that all have the cap.
    See docs/decisions.md#2026-11-24--the-frequency-cap-counts-and-takes-no-lock.

    `message_types` limits the cap to these types (`{"offer"}`): others pass and are not counted. Each check takes a
    connection of `engine` for two short queries.
    """

    def __init__(
        self,
        transport: Transport,
        engine: Engine,
        tz_of: TimeZoneOf,
        *,
        limit: int,
        per: Literal["day", "week"],
        message_types: Collection[str] | None = None,
        resume_at: time = time(9),
        schema: str | None = None,
    ) -> None:
        super().__init__(transport)
        if limit < 1:
            raise ValueError("limit: must be at least 1")
        if per not in {"day", "week"}:
            raise ValueError("per: must be day or week")
        if isinstance(message_types, str):
            raise TypeError("message_types: must be a collection of types")
        self._engine = for_own_transactions(engine, schema)
        self._tz_of = plain_function("tz_of", tz_of)
        self._limit = limit
        self._per = per
        self._types = None if message_types is None else sorted(message_types)
        self._resume_at = checked_wall_time("resume_at", resume_at)

    def check(self, message: OutgoingMessage) -> OutgoingMessage | Outcome:
        """Return the message if the person's day or week has room for it."""
        if self._types is not None and message.message_type not in self._types:
            return message
        tz = zone(self._tz_of(message))
        began = monotonic()
        try:
            while True:
                waited = monotonic() - began
                with connect(self._engine) as connection, connection.begin():
                    answer = self._count(connection, message, tz, waited)
                if answer is not None:
                    return answer
                sleep(LOOK_AGAIN_SECONDS)
        except SQLAlchemyError as error:
            if not is_transient(error):
                raise
            # A lost database is no failure of the message.
            return Postpone(datetime.now(UTC) + A_MINUTE, "the database did not answer the frequency cap")

    def _count(
        self, connection: Connection, message: OutgoingMessage, tz: tzinfo, waited: float
    ) -> OutgoingMessage | Outcome | None:
        """Return the message, or the outcome that holds it back; None to look again."""
        claim = connection.execute(looking.claim_of_message(), {"message_id": message.id}).one_or_none()
        if claim is None or (claim.status, claim.attempt) != (MessageStatus.SENDING, message.attempt):
            # Others no longer count it, so it must not leave.
            return Postpone(EARLIEST, "the claim was lost before the send")
        starts_at, resumes_at = local_window(claim.now, tz, self._per, self._resume_at)
        values = {"message_id": message.id, "of_user": message.user_id, "since": starts_at}
        if self._types is not None:
            values["types"] = self._types
        counting = looking.count_others_of_user(of_types=self._types is not None)
        counted = connection.execute(counting, values).one()
        if counted.left >= self._limit:
            return Postpone(resumes_at, f"{self._limit} per {self._per} reached")
        in_line = counted.left + counted.ahead
        if in_line + counted.behind < self._limit:
            return message
        # A message behind too many others steps back at once; the others wait for that. A younger one may have passed
        # already, so no wait is long, and those further back wait less, or two would wait for each other.
        if waited < LONGEST_WAIT_SECONDS * (1 - in_line / self._limit):
            return None
        wait = min(timedelta(seconds=2 ** min(message.attempt, 6)), A_MINUTE) if in_line < self._limit else A_MINUTE
        return Postpone(claim.now + wait, "other messages to this person are being sent")


def local_window(now: datetime, tz: tzinfo, per: Literal["day", "week"], resume_at: time) -> tuple[datetime, datetime]:
    """Return when the local day or week of `now` began, and `resume_at` of the first day of the next one."""
    today = now.astimezone(tz).date()
    first, days = (today, 1) if per == "day" else (today - timedelta(days=today.weekday()), 7)
    return earlier(first, time.min, tz), later(first + timedelta(days=days), resume_at, tz)
