"""Nothing is sent in a person's night."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, time, timedelta, tzinfo

from engagement._sending.protocols import Transport
from engagement.messages import OutgoingMessage
from engagement.outcomes import Outcome, Postpone
from engagement.policies.gates import Gate, plain_function
from engagement.policies.local_time import TimeZoneOf, checked_wall_time, earlier, later, zone


class QuietHours(Gate):
    """Sends nothing from `start` to `end` of the person's day; `start` after `end` means across midnight.

    A message in these hours is postponed to their end, which counts as no failure. If it expires before, it is not sent
    at all. `start` belongs to the quiet hours, `end` does not (from 22:00 to 8:00, 22:00 is quiet and 8:00 is not).
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
        self._start = checked_wall_time("start", start)
        self._end = checked_wall_time("end", end)
        self._now = now

    def check(self, message: OutgoingMessage) -> OutgoingMessage | Outcome:
        """Return the message unless it is quiet where the person is."""
        until = quiet_until(self._now(), zone(self._tz_of(message)), self._start, self._end)
        if until is None:
            return message
        return Postpone(until, f"quiet hours from {self._start:%H:%M} to {self._end:%H:%M}")


def quiet_until(now: datetime, tz: tzinfo, start: time, end: time) -> datetime | None:
    """Return the end of the quiet hours that `now` is in, or None if it is in none.

    If the clock shows a wall time twice or skips it (daylight saving), the longer quiet window counts.
    """
    a_day = timedelta(days=1)
    today = now.astimezone(tz).date()
    ends = [
        ends_at
        for day in (today - a_day, today, today + a_day)
        if earlier(day, start, tz) <= now < (ends_at := later(day if start < end else day + a_day, end, tz))
    ]
    return max(ends, default=None)
