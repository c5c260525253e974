"""Whether, where and when: what is asked before a message is sent, at the moment when it would be.

Each policy is a transport around another one. It asks a plain function of the host's, and lets the message through or
answers in its place; nothing has left by then, so a question that fails is never in doubt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from time import monotonic, sleep
from traceback import walk_tb
from typing import Any, Literal
from zoneinfo import ZoneInfo

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from engagement._logging import logger
from engagement._sending.call import LeaseRanOut, MayHaveLeft, checked_lease
from engagement._sending.protocols import Transport
from engagement._sql import looking
from engagement._sql.errors import is_transient
from engagement._sql.own_transactions import connect, for_own_transactions
from engagement.messages import InvalidMessage, OutgoingMessage
from engagement.messages.checks import checked_destination, checked_flag, checked_jid
from engagement.models import EARLIEST, Destination, MessageStatus
from engagement.outcomes import NotSent, Outcome, Postpone, Refused, Sent, Withdraw, causes

A_MINUTE = timedelta(minutes=1)
LONGEST_WAIT_SECONDS = 2.0
"""How long the first in line for a frequency cap waits for those behind it, with a place in hand."""
LOOK_AGAIN_SECONDS = 0.02

TimeZoneOf = Callable[[OutgoingMessage], tzinfo | str]
"""The person's time zone: a `tzinfo`, or its name, such as `America/Sao_Paulo`."""


class Gate:
    """A transport around another one, that asks `check` before each send.

    `ready`, `why_not_ready`, `idempotent` and `look_up` are those of the transport inside. Around an `async def send`,
    `send` is still a plain function: the worker asks in a thread, where a look-up may block, and awaits what is
    returned in its event loop. A transport that has only `send_many` is refused: a batch that fails is answered as a
    whole, and that would call in doubt what was held back. One that has both is used message by message.

    Whatever `check` raises is `NotSent`, be it `SystemExit`. Only its type is kept: its text may be about a person. A
    time zone that this machine cannot find is `Postpone`.
    """

    def __init__(self, transport: Transport) -> None:
        send = getattr(transport, "send", transport)
        if not callable(send):
            raise TypeError("transport: must be a function or an object with send; send_many cannot be asked each time")
        self._transport = transport
        self._send: Callable[[OutgoingMessage], Any] = send
        for name in ("ready", "look_up"):
            if (inner := getattr(transport, name, None)) is not None:
                setattr(self, name, inner)

    @property
    def idempotent(self) -> bool:
        """Whether the same delivery id twice has one effect."""
        return checked_flag("idempotent", getattr(self._transport, "idempotent", False))

    @property
    def why_not_ready(self) -> Any:
        """What the transport inside says that it waits for."""
        return getattr(self._transport, "why_not_ready", None)

    def send(self, message: OutgoingMessage) -> Any:
        """Send what passes the check; else return the outcome that the check decided."""
        passed = self._ask(message)
        if not isinstance(passed, OutgoingMessage):
            return passed
        with checked_lease():  # The host's function may have taken longer.
            return self._send(passed)

    def check(self, message: OutgoingMessage) -> OutgoingMessage | Outcome:
        """Return the message, as it is to be sent, or an outcome if it is not to be sent now."""
        raise NotImplementedError

    def _ask(self, message: OutgoingMessage) -> OutgoingMessage | Outcome:
        name = type(self).__name__
        try:
            answer = self.check(message)
        except (LeaseRanOut, MayHaveLeft):
            raise
        except BaseException as error:  # noqa: BLE001 - whatever a host's function raises, nothing has left
            return for_want_of_a_zone(error, message) or NotSent(f"{name} raised {type(error).__name__}")
        if isinstance(answer, OutgoingMessage | Outcome):
            return answer
        return NotSent(f"{name} answered {type(answer).__name__}")


class Route(Gate):
    """Sends to where the person is reached now: `where(message)` returns destination and JID, or None.

    None is `Refused`, which a person sees and can try again, and so is a JID that could not be queued. A `where` that
    raises is `NotSent`.

    A delivery id that was sent to one address says nothing about another one. Unless `across_addresses` says that the
    far side recognises a delivery id at whatever address it comes, a transport under `Route` is not idempotent, and
    its `look_up` is believed when it finds the message, not when it does not.
    """

    def __init__(
        self,
        transport: Transport,
        where: Callable[[OutgoingMessage], tuple[Destination | str, str] | None],
        *,
        across_addresses: bool = False,
    ) -> None:
        super().__init__(transport)
        self._where = plain_function("where", where)
        self._across_addresses = checked_flag("across_addresses", across_addresses)
        self._look_up: Callable[[OutgoingMessage], Any] | None = getattr(transport, "look_up", None)
        if self._look_up is not None:
            self.look_up = self._look_up_where_it_goes_now

    @property
    def idempotent(self) -> bool:
        """Whether the same delivery id twice has one effect, also if the address changed in between."""
        return self._across_addresses and super().idempotent

    def check(self, message: OutgoingMessage) -> OutgoingMessage | Outcome:
        """Return the message with the address of now."""
        address = self._where(message)
        if address is None:
            return Refused("the person has no address now")
        destination, jid = address
        try:
            kind = checked_destination(destination)
            return replace(message, destination=kind, destination_jid=checked_jid(jid, kind))
        except InvalidMessage as error:
            return Refused(f"the address of now is no address: {error}")

    def _look_up_where_it_goes_now(self, message: OutgoingMessage) -> Any:
        assert self._look_up is not None
        routed = self._ask(message)
        if not isinstance(routed, OutgoingMessage):
            return None
        answer = self._look_up(routed)
        return self._believed_later(answer) if inspect.isawaitable(answer) else self._believed(answer)

    async def _believed_later(self, answer: Any) -> Any:
        return self._believed(await answer)

    def _believed(self, answer: Any) -> Any:
        return answer if self._across_addresses or isinstance(answer, Sent) else None


class Consent(Gate):
    """Sends to those who want it: `wants(message)` is asked at each send.

    False is `Withdraw`: the message is cancelled. Anything but a bool is `NotSent`.
    """

    def __init__(self, transport: Transport, wants: Callable[[OutgoingMessage], bool]) -> None:
        super().__init__(transport)
        self._wants = plain_function("wants", wants)

    def check(self, message: OutgoingMessage) -> OutgoingMessage | Outcome:
        """Return the message if the person wants it."""
        wants = self._wants(message)
        if wants is True:
            return message
        if wants is False:
            return Withdraw("opted out")
        return NotSent(f"wants answered {type(wants).__name__}, not bool")


class QuietHours(Gate):
    """Sends nothing from `start` to `end` of the person's day; `start` after `end` means across midnight.

    What would be sent then is postponed to the end, which counts as no failure; if it expires before, it is not sent
    at all. `start` belongs to the quiet hours, `end` does not.
    """

    def __init__(
        self,
        transport: Transport,
        tz_of: TimeZoneOf,
        *,
        start: time,
        end: time,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        super().__init__(transport)
        if start == end:
            raise ValueError("end: is the start: that is either no quiet hours or nothing else")
        self._tz_of = plain_function("tz_of", tz_of)
        self._start = _checked_wall_time("start", start)
        self._end = _checked_wall_time("end", end)
        self._now = now

    def check(self, message: OutgoingMessage) -> OutgoingMessage | Outcome:
        """Return the message unless it is quiet where the person is."""
        until = quiet_until(self._now(), _zone(self._tz_of(message)), self._start, self._end)
        if until is None:
            return message
        return Postpone(until, f"quiet hours from {self._start:%H:%M} to {self._end:%H:%M}")


def quiet_until(now: datetime, tz: tzinfo, start: time, end: time) -> datetime | None:
    """Return the end of the quiet hours that `now` is in, or None if it is in none.

    A wall time that the clock shows twice or skips (daylight saving) is read so that it is quiet for longer.
    """
    a_day = timedelta(days=1)
    today = now.astimezone(tz).date()
    ends = [
        ends_at
        for day in (today - a_day, today, today + a_day)
        if _earlier(day, start, tz) <= now < (ends_at := _later(day if start < end else day + a_day, end, tz))
    ]
    return max(ends, default=None)


class FrequencyCap(Gate):
    """Sends a person at most `limit` messages in each of their days, or weeks from Monday on, as the database counts.

    What was sent or may have been, in this day or week, counts, and so does what is being sent at this moment. A
    message above the limit is postponed to `resume_at`, local time, of the next day or Monday. If messages that are
    being sent stand in its way, the first in line waits here for a moment, until the others have stepped back; who
    steps back is asked again after seconds to a minute, since the others may yet fail.

    The limit holds with any number of workers, without a lock and without a transaction during the send: a message's
    claim is committed before it is counted here. So of any two messages of a person the one that counts later sees the
    other as being sent, or what became of it; and of those that pass, the last to count has seen all the others.
    It holds for the primary database only, and among workers that all have the cap.

    `message_types` limits the cap to these types: others pass, and are not counted. Each check takes a connection of
    `engine` for two short queries.
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
        self._resume_at = _checked_wall_time("resume_at", resume_at)

    def check(self, message: OutgoingMessage) -> OutgoingMessage | Outcome:
        """Return the message if the person's day or week has room for it."""
        if self._types is not None and message.message_type not in self._types:
            return message
        tz = _zone(self._tz_of(message))
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
        """Return the message, or why not; None to look again."""
        claim = connection.execute(looking.claim_of_message(), {"message_id": message.id}).one_or_none()
        if claim is None or (claim.status, claim.attempt) != (MessageStatus.SENDING, message.attempt):
            # It is no longer counted by others, so it must not leave.
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
        # Who is behind too many steps back at once; who is not, waits for that. A younger one may have passed already:
        # so nobody waits for long, and who is further back waits less, or two would wait for each other.
        if waited < LONGEST_WAIT_SECONDS * (1 - in_line / self._limit):
            return None
        wait = min(timedelta(seconds=2 ** min(message.attempt, 6)), A_MINUTE) if in_line < self._limit else A_MINUTE
        return Postpone(claim.now + wait, "other messages to this person are being sent")


def local_window(now: datetime, tz: tzinfo, per: Literal["day", "week"], resume_at: time) -> tuple[datetime, datetime]:
    """Return when the local day or week of `now` began, and `resume_at` of the first day of the next one."""
    today = now.astimezone(tz).date()
    first, days = (today, 1) if per == "day" else (today - timedelta(days=today.weekday()), 7)
    return _earlier(first, time.min, tz), _later(first + timedelta(days=days), resume_at, tz)


def for_want_of_a_zone(error: BaseException, message: OutgoingMessage) -> Postpone | None:
    """Return when to ask again if `error` comes from a look-up of a time zone; None if it does not.

    The machine has no time-zone database, or one that lacks the name, or the person's zone is empty: no fault of the
    message. So it costs no retry, and is asked ever more rarely, an hour apart at last.
    """
    traces = (frame for cause in causes(error) for frame, _ in walk_tb(cause.__traceback__))
    if not any(frame.f_globals.get("__name__", "").partition(".")[0] in _ZONE_LIBRARIES for frame in traces):
        return None
    logger.warning("engagement.no_time_zone message_id=%s error=%s", message.id, type(error).__name__)
    return Postpone(datetime.now(UTC) + A_MINUTE * 2 ** min(message.attempt - 1, 6), "a time zone could not be found")


_ZONE_LIBRARIES = frozenset({"zoneinfo", "pytz"})


def plain_function(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, or raise `TypeError`: what `async def` returns would be taken for an answer."""
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise TypeError(f"{name}: must be a plain function")
    return function


def _zone(answer: tzinfo | str) -> tzinfo:
    return answer if isinstance(answer, tzinfo) else ZoneInfo(answer)


def _checked_wall_time(name: str, value: time) -> time:
    if not isinstance(value, time) or value.tzinfo is not None:
        raise ValueError(f"{name}: must be a time without a time zone: the zone is the person's")
    return value


def _earlier(day: date, wall: time, tz: tzinfo) -> datetime:
    return min(_readings(day, wall, tz))


def _later(day: date, wall: time, tz: tzinfo) -> datetime:
    return max(_readings(day, wall, tz))


def _readings(day: date, wall: time, tz: tzinfo) -> list[datetime]:
    # In UTC, since aware datetimes of one zone are compared by their wall times.
    return [datetime.combine(day, wall.replace(fold=fold), tz).astimezone(UTC) for fold in (0, 1)]
