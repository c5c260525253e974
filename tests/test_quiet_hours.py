"""Quiet hours end by the person's clock, also where clocks change, and where a machine lacks the zone."""

import sys
import zoneinfo
from datetime import UTC, date, datetime, time, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from conftest import execute, new_message, queue, row
from far import LONDON, LORD_HOWE, NEW_YORK, NIGHT, Far, at, fails
from hypothesis import given, settings
from hypothesis import strategies as st

from engagement import process_message_queue
from engagement.policies import Consent, FrequencyCap, QuietHours
from engagement.policies.quiet_hours import quiet_until
from engagement.transports.rendering import words_of
from engagement.words import speaking

# Quiet hours


@pytest.mark.parametrize(
    ("tz", "now", "start", "end", "until"),
    [
        # Within a day, on both sides of both ends.
        (LONDON, (2026, 1, 5, 12, 59, 59), time(13), time(15), None),
        (LONDON, (2026, 1, 5, 13), time(13), time(15), (2026, 1, 5, 15)),
        (LONDON, (2026, 1, 5, 14, 59, 59), time(13), time(15), (2026, 1, 5, 15)),
        (LONDON, (2026, 1, 5, 15), time(13), time(15), None),
        # Across midnight.
        (LONDON, (2026, 1, 5, 20, 59, 59), time(21), time(8), None),
        (LONDON, (2026, 1, 5, 21), time(21), time(8), (2026, 1, 6, 8)),
        (LONDON, (2026, 1, 6, 0), time(21), time(8), (2026, 1, 6, 8)),
        (LONDON, (2026, 1, 6, 7, 59, 59), time(21), time(8), (2026, 1, 6, 8)),
        (LONDON, (2026, 1, 6, 8), time(21), time(8), None),
        (LONDON, (2026, 1, 5, 23), time(22), time(0), (2026, 1, 6, 0)),
        (LONDON, (2026, 1, 6, 0), time(22), time(0), None),
        # A window that began on the day before that of the UTC date.
        (ZoneInfo("Pacific/Pago_Pago"), (2026, 1, 5, 14), time(20), time(18), (2026, 1, 5, 18)),
        (ZoneInfo("Pacific/Kiritimati"), (2026, 1, 5, 1), time(20), time(18), (2026, 1, 5, 18)),
        # The night of the change is an hour shorter, or longer: its end is what the clock shows.
        (NEW_YORK, (2026, 3, 7, 22), time(21), time(8), (2026, 3, 8, 8)),
        (NEW_YORK, (2026, 10, 31, 22), time(21), time(8), (2026, 11, 1, 8)),
        # 02:30 is skipped: the end is read as 03:30, the start as 01:30.
        (NEW_YORK, (2026, 3, 8, 1, 59), time(22), time(2, 30), (2026, 3, 8, 3, 30)),
        (NEW_YORK, (2026, 3, 8, 3, 29), time(22), time(2, 30), (2026, 3, 8, 3, 30)),
        (NEW_YORK, (2026, 3, 8, 3, 30), time(22), time(2, 30), None),
        (NEW_YORK, (2026, 3, 8, 1, 29), time(2, 30), time(8), None),
        (NEW_YORK, (2026, 3, 8, 1, 30), time(2, 30), time(8), (2026, 3, 8, 8)),
        # 01:30 comes twice: it is quiet from the first one on, or up to the second one.
        (NEW_YORK, (2026, 11, 1, 1, 30), time(22), time(1, 30), (2026, 11, 1, 1, 30, "second")),
        (NEW_YORK, (2026, 11, 1, 1, 29, "second"), time(22), time(1, 30), (2026, 11, 1, 1, 30, "second")),
        (NEW_YORK, (2026, 11, 1, 1, 30, "second"), time(22), time(1, 30), None),
        (NEW_YORK, (2026, 11, 1, 1, 10, "second"), time(1, 30), time(8), (2026, 11, 1, 8)),
        (NEW_YORK, (2026, 11, 1, 1, 29), time(1, 30), time(8), None),
        # Half an hour of daylight saving.
        (LORD_HOWE, (2026, 4, 4, 23), time(22), time(7), (2026, 4, 5, 7)),
    ],
)
def test_quiet_hours_end_by_the_persons_clock(tz, now, start, end, until):
    """It is quiet from `start` to `end` as the person's clock shows them, longer rather than shorter on odd nights."""

    def moment(parts):
        numbers = [part for part in parts if part != "second"]
        return at(tz, *numbers, fold=int("second" in parts))

    expected = None if until is None else moment(until)
    assert quiet_until(moment(now), tz, start, end) == expected


ZONES = ["America/New_York", "Europe/London", "Australia/Lord_Howe", "Africa/Cairo", "Asia/Kathmandu", "America/Havana"]
MINUTES = st.integers(0, 24 * 60 - 1).map(lambda minutes: time(minutes // 60, minutes % 60))


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1_577_836_800, 1_893_456_000).map(lambda seconds: datetime.fromtimestamp(seconds, UTC)),
    st.sampled_from(ZONES),
    MINUTES,
    MINUTES,
)
def test_a_postponed_message_is_never_asked_for_the_same_night_again(now, zone, start, end):
    """The end lies ahead, within a day and an hour, and then it is no longer quiet."""
    tz = ZoneInfo(zone)
    length = (datetime.combine(date(2026, 1, 1), end) - datetime.combine(date(2026, 1, 1), start)) % timedelta(days=1)
    if start == end:
        return
    until = quiet_until(now, tz, start, end)
    wall = now.astimezone(tz).time()
    is_inside = start <= wall < end if start < end else wall >= start or wall < end

    assert until is not None or not is_inside
    if until is not None:
        assert now < until <= now + timedelta(hours=25)
        if length <= timedelta(hours=20):
            assert quiet_until(until, tz, start, end) is None
            assert (until.astimezone(tz) - timedelta(hours=1)).time() <= end or until.astimezone(tz).time() == end


def test_a_message_in_quiet_hours_waits_for_their_end(engine):
    """The message is due again at the end of the window, as a postponement that costs no retry; others are sent."""
    asleep, awake = queue(engine, new_message("asleep"), new_message("awake"))
    now = datetime.now(UTC)
    local_now = {asleep: time(23, 30), awake: time(12)}
    sent = []

    def tz_of(message):
        wall = local_now[message.id]
        offset = datetime.combine(now.date(), wall, UTC) - now
        return timezone(timedelta(minutes=offset // timedelta(minutes=1)))

    process_message_queue(engine, QuietHours(sent.append, tz_of, **NIGHT, now=lambda: now))

    found = row(engine, asleep)
    assert [message.id for message in sent] == [awake]
    assert (found.status, found.retry_count, found.history[-1]["event"]) == ("pending", 0, "postponed")
    assert found.history[-1]["reason"] == "quiet hours from 21:00 to 08:00"
    assert abs(found.next_attempt_at - (now + timedelta(hours=8, minutes=30))) <= timedelta(minutes=2)


@pytest.mark.parametrize(
    "window",
    [
        {"start": time(8), "end": time(8)},
        {"start": time(8, tzinfo=UTC), "end": time(9)},
        {"start": "21:00", "end": time(9)},
    ],
)
def test_quiet_hours_that_mean_nothing_are_refused_at_once(window):
    """A window that is empty or the whole day, or has a zone of its own, is a mistake."""
    with pytest.raises(ValueError, match=r"^(start|end): "):
        QuietHours(print, lambda _: "UTC", **window)


# Time zones


@pytest.fixture(name="without_zones")
def _without_zones(monkeypatch):
    """A machine that has no time-zone database: neither the system's nor Python's."""
    for name in {"tzdata", *(name for name in sys.modules if name.startswith("tzdata."))}:
        monkeypatch.setitem(sys.modules, name, None)
    zoneinfo.reset_tzpath(to=[])
    ZoneInfo.clear_cache()
    yield
    zoneinfo.reset_tzpath()
    ZoneInfo.clear_cache()


def asks_quiet_hours(far, zone):
    return QuietHours(far, lambda _: zone, **NIGHT)


def asks_by_itself(far, zone):
    return QuietHours(far, lambda _: ZoneInfo(zone), **NIGHT)


def asks_for_consent(far, zone):
    return Consent(far, lambda _: bool(ZoneInfo(zone)))


def asks_for_words(far, zone):
    render = speaking(lambda key, params, locale: locale, lambda _: str(ZoneInfo(zone)))
    return lambda message: words_of(lambda of: render(of) and far.send(of), message)


@pytest.mark.parametrize(
    ("make", "zone"),
    [(asks_quiet_hours, zone) for zone in ("Europe/London", "US/Pacific-New", "", None, "America")]
    + [(make, zone) for make in (asks_by_itself, asks_for_consent, asks_for_words) for zone in ("Europe/London", "")],
)
def test_a_zone_that_the_machine_lacks_costs_no_retry(engine, without_zones, make, zone):
    """No database, a name that is gone, or none at all: the message is asked about again, ever more rarely."""
    (message_id,) = queue(engine, new_message())
    far, waits = Far(), []
    far.ready = lambda: True

    for _ in range(4):
        process_message_queue(engine, make(far, zone), max_retries=3)
        found = row(engine, message_id)
        waits.append(round((found.next_attempt_at - datetime.now(UTC)) / timedelta(minutes=1)))
        execute(engine, "UPDATE engagement_message_queue SET next_attempt_at = now()")

    assert (far.sent, found.status, found.retry_count, found.history[-1]["event"]) == ([], "pending", 0, "postponed")
    assert "time zone" in found.history[-1]["reason"]
    assert waits == [1, 2, 4, 8]


def test_a_cap_without_a_zone_costs_no_retry(engine, without_zones):
    """The frequency cap asks for a zone as quiet hours do."""
    (message_id,) = queue(engine, new_message())

    process_message_queue(engine, FrequencyCap(fails, engine, lambda _: "Europe/London", limit=1, per="day"))

    found = row(engine, message_id)
    assert (found.status, found.retry_count, found.history[-1]["event"]) == ("pending", 0, "postponed")
