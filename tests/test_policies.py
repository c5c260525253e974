"""Whether, where and when: policies around a transport, asked at send time, on real messages in a real queue."""

import asyncio
import json
import sys
import threading
import zoneinfo
from collections import Counter
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta, timezone
from time import sleep
from zoneinfo import ZoneInfo

import pytest
from conftest import execute, in_thread, new_message, outgoing, queue, row
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, event
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from engagement import (
    Destination,
    EngagementMessageRepository,
    InDoubt,
    NotSent,
    Postpone,
    Refused,
    Sent,
    Withdraw,
    migrations,
    process_message_queue,
)
from engagement.policies import Consent, FrequencyCap, Gate, QuietHours, Route, local_window, quiet_until
from engagement.transports.rendering import words_of
from engagement.transports.webhook import Webhook
from engagement.words import FluentRenderer, Rendered, speaking

PATIENCE = 20
NEW_YORK, LONDON, LORD_HOWE = ZoneInfo("America/New_York"), ZoneInfo("Europe/London"), ZoneInfo("Australia/Lord_Howe")
NIGHT = {"start": time(21), "end": time(8)}
JID = "5511999999999@s.whatsapp.net"
OTHER_JID = "5511888888888@s.whatsapp.net"


def fails(_message):
    raise TimeoutError("5511999999999 is not in the table")


class Far:
    """A transport with everything optional, that remembers what it was given."""

    idempotent = True

    def __init__(self, found=None):
        self.found = found
        self.sent = []
        self.looked_up = []

    def send(self, message):
        """Remember, and say sent."""
        self.sent.append(message)
        return Sent("far")

    def look_up(self, message):
        """Remember, and say what was found."""
        self.looked_up.append(message)
        return self.found

    def ready(self):
        """Never be ready."""
        return False


# Around any transport


def gates(transport):
    return [
        Consent(transport, lambda _: True),
        Route(transport, lambda message: (message.destination, message.destination_jid), across_addresses=True),
        QuietHours(transport, lambda _: "UTC", **NIGHT, now=lambda: datetime(2026, 1, 1, 12, tzinfo=UTC)),
    ]


@pytest.mark.parametrize("place", range(3))
def test_a_policy_keeps_what_the_transport_can_do(place):
    """`send`, `ready`, `look_up` and `idempotent` of what is wrapped are kept, through any number of wraps."""
    far = Far(found=Sent("far"))
    gate = Consent(gates(far)[place], lambda _: True)

    assert gate.send(outgoing()) == Sent("far")
    assert gate.look_up(outgoing()) == Sent("far")
    assert gate.ready() is False
    assert gate.idempotent is True
    assert far.sent == far.looked_up == [outgoing()]


@pytest.mark.parametrize("place", range(3))
def test_a_policy_adds_nothing_that_the_transport_lacks(place):
    """Around a plain function there is no `look_up` and no `ready`, or a worker would ask what nobody can answer."""
    gate = gates(lambda _: "id")[place]

    assert gate.send(outgoing()) == "id"
    assert not gate.idempotent
    assert not any(hasattr(gate, name) for name in ("look_up", "ready", "send_many"))


def test_a_batch_transport_is_refused_at_once():
    """What has only `send_many` cannot be asked message by message, and says so before anything is claimed."""

    class Batch:
        def send_many(self, messages):
            raise AssertionError

    with pytest.raises(TypeError, match="send_many"):
        Consent(Batch(), lambda _: True)


async def _answers_later(_message):
    return True


@pytest.mark.parametrize(
    "make",
    [
        lambda: Consent(print, _answers_later),
        lambda: Route(print, _answers_later),
        lambda: QuietHours(print, _answers_later, **NIGHT),
        lambda: Consent(print, None),
    ],
)
def test_an_async_question_is_refused_at_once(make):
    """A coroutine is true: taken for an answer, it would send to people who opted out."""
    with pytest.raises(TypeError, match="plain function"):
        make()


def test_an_async_transport_is_asked_in_a_thread_and_awaited_in_the_loop(engine):
    """Around `async def` a policy may block without holding up the loop, and both its answers reach the row."""
    wanted, unwanted = queue(engine, new_message("a"), new_message("b"))
    threads = {}

    async def send(message):
        await asyncio.sleep(0)
        threads["send"] = threading.current_thread().name
        return Sent(f"far-{message.id}")

    def wants(message):
        threads["wants"] = threading.current_thread().name
        return message.id == wanted

    process_message_queue(engine, Consent(send, wants), concurrency=2)

    assert row(engine, wanted).provider_message_id == f"far-{wanted}"
    assert row(engine, unwanted).status == "cancelled"
    assert threads["send"] == "engagement-loop"
    assert threads["wants"].startswith("engagement-send")


@pytest.mark.parametrize(
    "make",
    [
        lambda far: Consent(far, fails),
        lambda far: Route(far, fails),
        lambda far: QuietHours(far, fails, **NIGHT),
        lambda far: Consent(far, lambda _: 1),
        lambda far: Consent(far, lambda _: None),
        lambda far: Route(far, lambda _: (JID,)),
    ],
)
def test_a_question_that_fails_is_not_sent(engine, make):
    """A look-up that raises, even a time-out, or answers nonsense, is tried again, sends nothing and quotes nothing."""
    (message_id,) = queue(engine, new_message())
    far = Far()
    far.ready = lambda: True
    process_message_queue(engine, make(far))

    found = row(engine, message_id)
    assert far.sent == []
    assert (found.status, found.retry_count, found.history[-1]["event"]) == ("pending", 1, "not_sent")
    assert "5511" not in found.error_message


@pytest.mark.parametrize("ends", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError])
@pytest.mark.parametrize(
    "make",
    [
        Consent,
        Route,
        lambda far, ask: QuietHours(far, ask, **NIGHT),
        lambda far, ask: Consent(Route(far, ask), lambda _: True),
        lambda far, ask: Rendered(far, FluentRenderer(), ask),
        lambda _, ask: Webhook(url="http://127.0.0.1:9/", render=ask).send,
    ],
)
def test_what_ends_a_process_is_no_doubt_in_a_question(engine, make, ends):
    """`sys.exit()` in what is asked before the send: nothing has left, so it is tried again."""
    (message_id,) = queue(engine, new_message())
    far = Far()
    far.ready = lambda: True

    def ask(_message):
        raise ends

    process_message_queue(engine, make(far, ask))

    found = row(engine, message_id)
    assert (far.sent, found.status, found.retry_count, found.history[-1]["event"]) == ([], "pending", 1, "not_sent")
    assert ends.__name__ in found.error_message


def test_a_policy_of_ones_own_that_forgets_to_answer_sends_nothing():
    """A `check` without a return sends nothing, rather than anything."""

    class Forgetful(Gate):
        def check(self, message):
            pass

    far = Far()

    assert Forgetful(far).send(outgoing()) == NotSent("Forgetful answered NoneType")
    assert far.sent == []


def test_an_error_of_the_transport_passes_through():
    """What the transport itself raises is for the worker to classify: a policy never calls it not sent."""
    with pytest.raises(TimeoutError):
        Consent(fails, lambda _: True).send(outgoing())


# Route


def test_a_message_goes_to_the_address_of_now(engine):
    """Destination and JID are those that the host gives at the send; the row keeps what was queued."""
    (message_id,) = queue(engine, new_message())
    queued_for = row(engine, message_id).destination_jid
    sent = []

    process_message_queue(engine, Route(sent.append, lambda _: ("group", "120363000000000003@g.us")))

    assert [(message.destination, message.destination_jid) for message in sent] == [
        (Destination.GROUP, "120363000000000003@g.us")
    ]
    assert row(engine, message_id).destination_jid == queued_for


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (None, "no address"),
        (("individual", "120363000000000003@g.us"), "destination_jid"),
        (("group", JID), "destination_jid"),
        (("individual", "5511999999999@s.whatsapp.net\n"), "destination_jid"),
        (("individual", ""), "destination_jid"),
        (("individual", None), "destination_jid"),
        (("nobody", JID), "destination"),
    ],
)
def test_no_address_or_a_wrong_one_is_refused(engine, address, reason):
    """Without an address that could be queued nothing is sent; the message fails, so that a person can try it again."""
    (message_id,) = queue(engine, new_message())
    sent = []

    process_message_queue(engine, Route(sent.append, lambda _: address))

    found = row(engine, message_id)
    assert (sent, found.status, found.history[-1]["event"]) == ([], "failed", "refused")
    assert reason in found.error_message
    assert "5511" not in found.error_message


@pytest.mark.parametrize(
    ("found", "across_addresses", "told"),
    [
        (Sent("x"), False, Sent("x")),
        (NotSent("unknown"), False, None),
        (None, False, None),
        (NotSent("unknown"), True, NotSent("unknown")),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_look_up_at_another_address_does_not_prove_that_nothing_left(found, across_addresses, told, is_async):
    """Looked up where the person is now: finding it is a fact, and not finding it says nothing of the last address."""

    class AsyncFar(Far):
        async def look_up(self, message):
            return Far.look_up(self, message)

    far = AsyncFar(found) if is_async else Far(found)
    route = Route(far, lambda _: ("individual", OTHER_JID), across_addresses=across_addresses)
    answer = route.look_up(outgoing())

    assert (asyncio.run(answer) if is_async else answer) == told
    assert [message.destination_jid for message in far.looked_up] == [OTHER_JID]


@pytest.mark.parametrize("where", [fails, lambda _: None])
def test_a_look_up_without_an_address_knows_nothing(where):
    """A routing error during recovery must not become `NotSent`, which would send a second time."""
    far = Far(NotSent("unknown"))

    assert Route(far, where, across_addresses=True).look_up(outgoing()) is None
    assert far.looked_up == []


def test_the_same_delivery_id_at_two_addresses_is_not_idempotent():
    """A repeat to a new address would be a second message: only the host can say that the far side sees through it."""
    assert not Route(Far(), lambda _: None).idempotent
    assert Route(Far(), lambda _: None, across_addresses=True).idempotent
    assert not Route(print, lambda _: None, across_addresses=True).idempotent


# Consent


def test_who_opted_out_gets_nothing(engine):
    """Consent is asked at the send, not when the message was queued; the message is cancelled, with the reason."""
    stays, leaves = queue(engine, new_message("stays"), new_message("leaves"))
    sent = []

    process_message_queue(engine, Consent(sent.append, lambda message: message.user_id != "leaves"))

    assert [message.id for message in sent] == [stays]
    found = row(engine, leaves)
    assert (found.status, found.history[-1]["event"], found.history[-1]["reason"]) == (
        "cancelled",
        "withdrawn",
        "opted out",
    )


# Quiet hours


def at(tz, *wall, fold=0):
    return datetime(*wall, tzinfo=tz, fold=fold).astimezone(UTC)


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


# Frequency cap


@pytest.mark.parametrize(
    ("tz", "now", "per", "starts", "resumes"),
    [
        (LONDON, (2026, 1, 5, 0), "day", (2026, 1, 5), (2026, 1, 6, 9)),
        (LONDON, (2026, 1, 4, 23, 59, 59), "day", (2026, 1, 4), (2026, 1, 5, 9)),
        (LONDON, (2026, 1, 5, 0), "week", (2026, 1, 5), (2026, 1, 12, 9)),
        (LONDON, (2026, 1, 4, 23, 59, 59), "week", (2025, 12, 29), (2026, 1, 5, 9)),
        (NEW_YORK, (2026, 3, 8, 12), "day", (2026, 3, 8), (2026, 3, 9, 9)),
        (NEW_YORK, (2026, 11, 1, 12), "week", (2026, 10, 26), (2026, 11, 2, 9)),
        # The day has no midnight: it begins at one o'clock, which is when midnight would have been.
        (ZoneInfo("Africa/Cairo"), (2025, 4, 25, 12), "day", (2025, 4, 24, 23), (2025, 4, 26, 9)),
        # It has two: it begins at the first.
        (ZoneInfo("America/Havana"), (2025, 11, 2, 12), "day", (2025, 11, 2), (2025, 11, 3, 9)),
    ],
)
def test_a_day_and_a_week_are_the_persons(tz, now, per, starts, resumes):
    """A day begins at local midnight and a week on Monday, rather earlier than later where the clock is changed."""
    assert local_window(at(tz, *now), tz, per, time(9)) == (at(tz, *starts), at(tz, *resumes))


@pytest.fixture(name="noon")
def _noon():
    """A zone where it is noon now, so that its day began twelve hours ago."""
    now = datetime.now(UTC)
    offset = datetime.combine(now.date(), time(12), UTC) - now
    return timezone(timedelta(minutes=offset // timedelta(minutes=1)))


def cap(transport, engine, noon, **options):
    return FrequencyCap(transport, engine, lambda _: noon, **{"limit": 1, "per": "day"} | options)


def put(engine, message_id, status, *, when=None, events="", has_doubt=False):
    """Put a message into `status`; `when` is when it was sent, or the entries of its history were made."""
    entries = [{"at": str(when), "attempt": 1, "event": event} for event in events.split()]
    execute(
        engine,
        """
        UPDATE engagement_message_queue
           SET status = :status,
               attempt = 1,
               sent_at = CASE :status WHEN 'sent' THEN CAST(:when AS timestamptz) END,
               lease_expires_at = CASE :status WHEN 'sending' THEN now() + interval '1 h' END,
               next_attempt_at = now() + interval '1 d',
               has_doubt = :has_doubt,
               history = CAST(:history AS jsonb)
         WHERE id = :id
        """,
        id=message_id,
        status=status,
        when=when,
        has_doubt=has_doubt,
        history=json.dumps(entries),
    )


def user_messages(*types, user_id="ana", **fields):
    return [new_message(user_id, message_type=message_type, **fields) for message_type in types]


def midnight(noon):
    return datetime.combine(datetime.now(noon).date(), time.min, noon)


A_SECOND = timedelta(seconds=1)


@pytest.mark.parametrize(
    ("state", "counts"),
    [
        (("sent", "", timedelta(0)), True),
        (("sent", "", -A_SECOND), False),
        (("in_doubt", "in_doubt", A_SECOND), True),
        (("in_doubt", "in_doubt", -A_SECOND), False),
        (("in_doubt", "forgotten", -A_SECOND), False),
        (("in_doubt", "", None), True),
        (("sending", "", None), True),
        # An idempotent transport is asked again after a doubt: until it has an answer, the message may have left.
        (("pending", "in_doubt not_sent", A_SECOND, True), True),
        (("pending", "in_doubt not_sent", -A_SECOND, True), False),
        (("pending", "in_doubt resolved", A_SECOND), False),
        (("pending", "not_sent", A_SECOND), False),
        (("pending", "", None), False),
        (("failed", "refused", A_SECOND), False),
        (("cancelled", "cancelled", A_SECOND), False),
        (("expired", "expired", A_SECOND), False),
    ],
)
def test_what_left_or_may_have_left_counts(engine, noon, state, counts):
    """What was sent today, may have been, or is being sent, uses up the limit; what provably did not leave does not."""
    status, events, after_midnight, has_doubt = (*state, False)[:4]
    other, message_id = queue(engine, *user_messages("other", "this"))
    when = None if after_midnight is None else midnight(noon) + after_midnight
    put(engine, other, status, when=when, events=events, has_doubt=has_doubt)
    sent = []

    process_message_queue(engine, cap(sent.append, engine, noon))

    assert [message.id for message in sent] == ([] if counts else [message_id])
    assert row(engine, message_id).status == ("pending" if counts else "sent")


def test_above_the_limit_a_message_waits_for_the_next_day(engine, noon):
    """The limit is reached, not passed; what is above it comes in the morning, as a postponement, with the reason."""
    ids = queue(engine, *user_messages("one", "two", "three"), *user_messages("one", user_id="bea"))
    sent = []

    process_message_queue(engine, cap(sent.append, engine, noon, limit=2, resume_at=time(10, 30)))

    found = row(engine, ids[2])
    assert [message.id for message in sent] == [ids[0], ids[1], ids[3]]
    assert (found.status, found.retry_count, found.history[-1]["reason"]) == ("pending", 0, "2 per day reached")
    assert found.next_attempt_at == midnight(noon) + timedelta(days=1, hours=10, minutes=30)


def test_a_week_counts_from_monday(engine, noon):
    """With `per="week"` the days before count too, back to Monday and no further."""
    monday = midnight(noon) - timedelta(days=datetime.now(noon).weekday())
    first, second, message_id = queue(engine, *user_messages("first", "second", "this"))
    put(engine, first, "sent", when=monday)
    put(engine, second, "sent", when=monday - A_SECOND)
    sent = []

    process_message_queue(engine, cap(sent.append, engine, noon, per="week", limit=2))
    assert [message.id for message in sent] == [message_id]

    put(engine, message_id, "pending")
    execute(engine, "UPDATE engagement_message_queue SET next_attempt_at = now() WHERE id = :id", id=message_id)
    process_message_queue(engine, cap(sent.append, engine, noon, per="week", limit=1))

    assert len(sent) == 1
    assert row(engine, message_id).next_attempt_at == monday + timedelta(days=7, hours=9)


def test_a_cap_for_some_types_neither_holds_nor_counts_the_others(engine, noon):
    """`message_types` limits these types only."""
    ids = queue(engine, *user_messages("receipt", "reminder", "receipt_too", "review", "reminder_too"))
    sent = []

    process_message_queue(engine, cap(sent.append, engine, noon, message_types={"reminder", "reminder_too"}))

    assert [message.id for message in sent] == ids[:4]
    with pytest.raises(TypeError, match="message_types"):
        cap(print, engine, noon, message_types="reminder")


def runs_at_once(engine, send, noon, *, runs, limit):
    """Start so many runs that each have a message in hand when the cap is first asked, and wait for their end."""
    all_have_claimed, asked = threading.Barrier(runs, timeout=PATIENCE), threading.local()

    def tz_of(_message):
        if not hasattr(asked, "once"):
            asked.once = all_have_claimed.wait()
        return noon

    capped = FrequencyCap(send, engine, tz_of, limit=limit, per="day")
    for run in [in_thread(process_message_queue, engine, capped) for _ in range(runs)]:
        run.result(PATIENCE)


@pytest.mark.parametrize("order", ["oldest first", "youngest first"])
@pytest.mark.parametrize(
    ("runs", "limit", "send_seconds"), [(2, 1, 0), (3, 1, 0.2), (3, 2, 0), (3, 2, 0.2), (3, 3, 0), (6, 3, 0.2)]
)
def test_runs_that_begin_at_once_reach_the_cap(engine, noon, order, runs, limit, send_seconds):  # noqa: PLR0917
    """Ten messages of one person are due: so many as may are sent in the first round, and not one more."""
    ids = queue(engine, *user_messages(*"abcdefghij"))
    if order == "youngest first":
        execute(engine, "UPDATE engagement_message_queue SET next_attempt_at = now() - id * interval '1 s'")
    sent = []

    def send(message):
        sleep(send_seconds)
        sent.append(message.id)

    runs_at_once(engine, send, noon, runs=runs, limit=limit)

    assert len(sent) == limit
    assert {row(engine, message_id).status for message_id in set(ids) - set(sent)} == {"pending"}


def test_of_two_that_meet_the_older_is_sent(engine, noon):
    """Two workers that are about to send to one person do not both send, and the second message waits for its turn."""
    older, younger = queue(engine, *user_messages("one", "two"))
    sent = []

    runs_at_once(engine, lambda message: sent.append(message.id), noon, runs=2, limit=1)

    assert sent == [older]
    waits = row(engine, younger)
    assert waits.history[-1]["reason"] == "other messages to this person are being sent"
    assert waits.next_attempt_at <= datetime.now(UTC) + timedelta(minutes=1, seconds=5)

    make_due(engine)
    process_message_queue(engine, cap(fails, engine, noon))

    assert row(engine, younger).next_attempt_at > datetime.now(UTC) + timedelta(hours=12)


def test_two_older_ones_do_not_wait_for_each_other_while_a_younger_one_is_being_sent(engine, noon):
    """Of two places the younger has one: of the two older ones the second steps back, and the first has the other."""
    first, second, younger = queue(engine, *user_messages("one", "two", "three"))
    put(engine, younger, "sending")
    sent = []

    runs_at_once(engine, lambda message: sent.append(message.id), noon, runs=2, limit=2)

    assert sent == [first]
    assert row(engine, second).status == "pending"


def test_an_older_message_does_not_pass_a_younger_one_that_is_being_sent(engine, noon):
    """The order of the ids is not the order of the claims: what passed before counts, whatever its id."""
    older, younger = queue(engine, *user_messages("one", "two"))
    put(engine, older, "pending")  # due tomorrow
    is_sending, go_on = threading.Event(), threading.Event()
    sent = []

    def send(message):
        sent.append(message.id)
        is_sending.set()
        assert go_on.wait(PATIENCE)

    worker = threading.Thread(target=process_message_queue, args=(engine, cap(send, engine, noon)))
    worker.start()
    assert is_sending.wait(PATIENCE)
    execute(engine, "UPDATE engagement_message_queue SET next_attempt_at = now() WHERE id = :id", id=older)
    process_message_queue(engine, cap(send, engine, noon), limit=1)
    stepped_back = row(engine, older)
    go_on.set()
    worker.join()

    assert sent == [younger]
    assert stepped_back.history[-1]["reason"] == "other messages to this person are being sent"
    # It is asked again after seconds: the one that is being sent may yet fail.
    assert stepped_back.next_attempt_at < datetime.now(UTC) + timedelta(seconds=10)


def make_due(engine):
    """Let time pass until the next message that waits for less than five minutes is due, and those of its second."""
    execute(
        engine,
        """
        UPDATE engagement_message_queue
           SET next_attempt_at = next_attempt_at - (next_one.at + interval '1 s' - statement_timestamp())
          FROM (SELECT min(next_attempt_at) AS at FROM engagement_message_queue WHERE status = 'pending') AS next_one
         WHERE status = 'pending' AND next_attempt_at < statement_timestamp() + interval '5 min'
        """,
    )


def test_many_workers_send_each_person_exactly_the_limit(engine, noon):
    """Whatever meets whatever: nobody gets more than the limit, and in the end everybody gets it."""
    people = [f"u{n}" for n in range(12)]
    queue(engine, *(message for user_id in people for message in user_messages(*"abcde", user_id=user_id)))
    sent = Counter()
    lock = threading.Lock()

    def send(message):
        with lock:
            sent[message.user_id] += 1

    for _ in range(20):
        make_due(engine)
        workers = [
            threading.Thread(
                target=process_message_queue,
                args=(engine, cap(send, engine, noon, limit=2)),
                kwargs={"concurrency": 2},
            )
            for _ in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert max(sent.values()) <= 2
        if sum(sent.values()) == 2 * len(people):
            break

    assert sent == dict.fromkeys(people, 2)


def test_a_doubt_counts_for_when_it_arose(engine, noon):
    """What was postponed today, after a doubt of yesterday, is no message of today."""
    other, message_id = queue(engine, *user_messages("other", "this"))
    put(engine, other, "pending", when=midnight(noon) - A_SECOND, events="in_doubt", has_doubt=True)
    execute(
        engine,
        "UPDATE engagement_message_queue SET history = history || jsonb_build_array("
        " jsonb_build_object('at', now(), 'event', 'postponed')) WHERE id = :id",
        id=other,
    )
    sent = []

    process_message_queue(engine, cap(sent.append, engine, noon))

    assert [message.id for message in sent] == [message_id]


@pytest.mark.parametrize(("before_midnight", "counts"), [(A_SECOND, False), (-A_SECOND, True)])
def test_a_resolved_doubt_counts_for_when_it_arose(engine, noon, before_midnight, counts):
    """Who says today that a message of yesterday was sent takes no room of today."""
    other, message_id = queue(engine, *user_messages("other", "this"))
    doubted_at = midnight(noon) - before_midnight
    put(engine, other, "in_doubt", when=doubted_at, events="in_doubt")
    with Session(engine) as session, session.begin():
        assert EngagementMessageRepository(session).resolve_message(other, sent=True)
    sent = []

    process_message_queue(engine, cap(sent.append, engine, noon))

    assert [message.id for message in sent] == ([] if counts else [message_id])
    assert row(engine, other).sent_at == doubted_at


def test_nothing_is_open_while_a_capped_message_is_sent(engine, noon):
    """The count holds no transaction and no lock during the send."""
    queue(engine, new_message())
    seen = []

    def send(_message):
        seen.append(
            execute(
                engine,
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE state LIKE 'idle in transaction%' AND datname = current_database()",
            ).scalar_one()
        )
        seen.append(execute(engine, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").scalar_one())

    process_message_queue(engine, cap(send, engine, noon))

    assert seen == [0, 0]


@pytest.mark.parametrize("change", ["attempt = attempt + 1", "status = 'in_doubt', lease_expires_at = NULL"])
def test_a_message_whose_claim_was_lost_is_not_sent(engine, noon, change):
    """A worker that froze before the count finds its claim gone, and sends nothing: others no longer count it."""
    (message_id,) = queue(engine, new_message())
    sent = []

    def tz_of(_message):
        execute(engine, f"UPDATE engagement_message_queue SET {change} WHERE id = :id", id=message_id)
        return noon

    process_message_queue(engine, FrequencyCap(sent.append, engine, tz_of, limit=1, per="day"))

    assert sent == []
    assert row(engine, message_id).history == []


def test_a_lost_database_costs_no_retry(engine, noon):
    """A cap that cannot be counted lets nothing through, and is no failure of the message."""
    (message_id,) = queue(engine, new_message())
    unreachable = create_engine("postgresql+psycopg://nobody@127.0.0.1:1/nothing", connect_args={"connect_timeout": 2})
    sent = []

    process_message_queue(engine, cap(sent.append, unreachable, noon))
    unreachable.dispose()

    found = row(engine, message_id)
    assert (sent, found.status, found.retry_count, found.history[-1]["event"]) == ([], "pending", 0, "postponed")
    assert datetime.now(UTC) < found.next_attempt_at < datetime.now(UTC) + timedelta(minutes=2)


def test_a_hook_of_the_host_that_fails_costs_no_retry(engine, noon):
    """Nor does what the host does to get a connection: a token, say."""
    queue(engine, new_message())
    hooked = create_engine(engine.url, poolclass=NullPool)

    @event.listens_for(hooked, "do_connect")
    def token(*_):
        raise LookupError("no token")

    result = process_message_queue(engine, cap(fails, hooked, noon))

    assert (result.postponed, result.retried) == (1, 0)


def test_a_database_without_the_table_is_a_failure(engine, empty_engine, noon):
    """What waiting does not mend is told as a failure, which ends after the retries."""
    (message_id,) = queue(engine, new_message())
    sent = []

    process_message_queue(engine, cap(sent.append, empty_engine, noon))

    found = row(engine, message_id)
    assert (sent, found.retry_count, found.error_message) == ([], 1, "FrequencyCap raised ProgrammingError")


def test_a_cap_counts_in_the_schema_of_the_table(empty_engine, noon):
    """With `schema` the cap counts where the messages are."""
    migrations.upgrade(empty_engine, schema="guests")
    with Session(empty_engine) as session, session.begin():
        repository = EngagementMessageRepository(session, schema="guests")
        repository.queue_messages(user_messages("one", "two"))
    sent = []

    capped = cap(sent.append, empty_engine, noon, schema="guests")
    result = process_message_queue(empty_engine, capped, schema="guests")

    assert (len(sent), result.succeeded, result.postponed) == (1, 1, 1)


@pytest.mark.parametrize("options", [{"limit": 0}, {"per": "month"}, {"resume_at": time(9, tzinfo=UTC)}])
def test_a_cap_that_means_nothing_is_refused_at_once(engine, noon, options):
    """A limit below one, another period, or a time with a zone of its own, is a mistake."""
    with pytest.raises(ValueError, match=next(iter(options))):
        cap(print, engine, noon, **options)


# All together


def test_policies_compose(engine, noon):
    """Around one another they ask from the outside in, and the first that says no has the last word."""
    ids = queue(engine, *(new_message(user_id) for user_id in ("out", "asleep", "capped", "nowhere", "ok")))
    out, asleep, capped, nowhere, ok = ids
    (earlier,) = queue(engine, new_message("capped", message_type="earlier"))
    put(engine, earlier, "sent", when=midnight(noon))
    asked = []

    def asking(name, answer):
        def ask(message):
            asked.append((name, message.user_id))
            return answer(message)

        return ask

    night = timezone(datetime.now(noon).utcoffset() - timedelta(hours=11, minutes=59))
    sent = []
    routed = Route(sent.append, asking("where", lambda m: None if m.user_id == "nowhere" else ("individual", JID)))
    capped_transport = FrequencyCap(routed, engine, asking("cap", lambda _: noon), limit=1, per="day")
    quiet = QuietHours(
        capped_transport, lambda m: night if m.user_id == "asleep" else noon, start=time(22), end=time(7)
    )

    process_message_queue(engine, Consent(quiet, asking("wants", lambda m: m.user_id != "out")))

    events = {name: row(engine, name).history[-1]["event"] for name in (out, asleep, capped, nowhere)}
    assert events == {out: "withdrawn", asleep: "postponed", capped: "postponed", nowhere: "refused"}
    assert [(message.id, message.destination_jid) for message in sent] == [(ok, JID)]
    assert [name for name, user_id in asked if user_id == "ok"] == ["wants", "cap", "where"]
    assert [name for name, user_id in asked if user_id == "out"] == ["wants"]


def test_no_outcome_of_a_policy_tells_about_a_person():
    """Reasons end in the history, which outlives the message: they hold no address and no name."""
    message = outgoing(message_params={"name": "Ana"})
    night = datetime(2026, 1, 1, 23, tzinfo=UTC)
    outcomes = [
        Consent(print, lambda _: False).send(message),
        Route(print, lambda _: ("individual", "Ana@5511999999999")).send(message),
        Route(print, fails).send(message),
        QuietHours(print, lambda _: "UTC", **NIGHT, now=lambda: night).send(message),
    ]

    assert [type(outcome) for outcome in outcomes] == [Withdraw, Refused, NotSent, Postpone]
    assert not any(secret in outcome.reason for outcome in outcomes for secret in ("Ana", "5511", "user1"))


def test_a_policy_does_not_touch_the_message():
    """What passes a check is the very message that came in, in every field but those it is about."""
    routed = []
    Route(routed.append, lambda _: ("individual", OTHER_JID)).send(outgoing())

    assert routed == [replace(outgoing(), destination_jid=OTHER_JID)]
    assert Consent(lambda message: InDoubt(str(message.id)), lambda _: True).send(outgoing()) == InDoubt("1")
