"""What may be queued: every bad input is refused by name before the database is touched, and the rest comes back."""

import json
import pickle
import re
import sys
import uuid
from collections import OrderedDict
from dataclasses import FrozenInstanceError, fields, replace
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from types import MappingProxyType

import pytest
from conftest import new_message
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.orm import Session

from engagement import (
    Destination,
    EngagementMessage,
    EngagementMessageRepository,
    InvalidMessage,
    NewMessage,
    OutgoingMessage,
    Queued,
    idempotency_key,
    repository,
    weekly_idempotency_key,
)
from engagement._operating.inspection import list_messages
from engagement.messages import MAX_PARAMS_BYTES, MAX_PARAMS_DEPTH, MAX_TEXT, MAX_TYPE, delivery_id
from engagement.models import EARLIEST, LATEST, MessageStatus

NOON = datetime(2025, 11, 21, 12, tzinfo=UTC)
A_MICROSECOND = timedelta(microseconds=1)
SECRET = "Zx9secret"
TEXT_FIELDS = ["user_id", "message_type", "message_key", "destination_jid", "idempotency_key"]
ARABIC = "٥٥١١٩٩٩٩٩٩٩٩٩"


class Clocks(tzinfo):
    """A place whose clocks are set back by an hour at 02:00 on 2 November 2025: 01:30 comes twice."""

    def utcoffset(self, moment):
        """Return 4 hours behind until the second 01:00, and 5 from then on."""
        night = moment.replace(tzinfo=None, fold=0)
        is_summer = night < datetime(2025, 11, 2, 1) or (night < datetime(2025, 11, 2, 2) and moment.fold == 0)  # noqa: DTZ001 - wall-clock times
        return timedelta(hours=-4 if is_summer else -5)

    def dst(self, moment):
        """Return how far the clocks are set forward."""
        return self.utcoffset(moment) + timedelta(hours=5)


CLOCKS = Clocks()


def refused(**given_fields) -> InvalidMessage:
    """Return the error for a message with these fields, raised by a repository that has no database to touch."""
    given = {name: value for name, value in _valid().items() if name not in given_fields} | given_fields
    with pytest.raises(InvalidMessage) as caught:
        EngagementMessageRepository(Session()).queue_message(**given)
    return caught.value


def accepted(**given_fields) -> NewMessage | None:
    try:
        return NewMessage(**given_fields)
    except InvalidMessage:
        return None


def _valid() -> dict:
    message = new_message()
    return {
        "user_id": message.user_id,
        "message_type": message.message_type,
        "message_key": message.message_key,
        "message_params": message.message_params,
        "destination": message.destination,
        "destination_jid": message.destination_jid,
    }


def assert_names(error: InvalidMessage, field: str) -> None:
    assert error.field == field
    assert str(error).startswith(f"{field}: ")


# Texts


@pytest.mark.parametrize("field", TEXT_FIELDS)
@pytest.mark.parametrize(
    "bad",
    [
        pytest.param("", id="empty"),
        pytest.param(" \t\u2003", id="only blanks"),
        pytest.param(f"{SECRET}\x00", id="NUL"),
        pytest.param(f"{SECRET}\x1f", id="control character"),
        pytest.param(f"{SECRET}\x7f", id="delete"),
        pytest.param(f"{SECRET}\n", id="newline"),
        pytest.param(f"{SECRET}\ud800", id="lone high surrogate"),
        pytest.param(f"\udfff{SECRET}", id="lone low surrogate"),
        pytest.param(SECRET + "x" * 513, id="too long"),
        pytest.param(SECRET.encode(), id="bytes"),
        pytest.param(7, id="number"),
        pytest.param([SECRET], id="list"),
    ],
)
def test_a_text_that_cannot_be_stored_is_refused(field, bad):
    """Each text field refuses what is empty, over-long, no text, or what PostgreSQL cannot store."""
    error = refused(**{field: bad})

    assert_names(error, field)
    assert SECRET not in str(error)


@pytest.mark.parametrize("field", [name for name in TEXT_FIELDS if name != "idempotency_key"])
def test_a_required_text_is_not_none(field):
    """None is no text; only the idempotency key may be left to be computed."""
    assert_names(refused(**{field: None}), field)


@pytest.mark.parametrize(("field", "longest"), [("user_id", MAX_TEXT), ("message_key", MAX_TEXT)])
def test_a_text_has_a_longest_length(field, longest):
    """The longest length is taken, counted in characters, and one more is refused."""
    key = {"idempotency_key": "k"}

    assert getattr(new_message(**{field: "é" * longest} | key), field) == "é" * longest
    assert_names(refused(**{field: "é" * (longest + 1)} | key), field)


def test_a_message_type_has_a_longest_length():
    """The longest type is taken, and one more character is refused."""
    assert new_message(message_type="a" * MAX_TYPE).message_type == "a" * MAX_TYPE
    assert_names(refused(message_type="a" * (MAX_TYPE + 1)), "message_type")


@pytest.mark.parametrize("letter", ["k", "é", "日", "😀"])
def test_an_idempotency_key_has_at_most_512_bytes(letter):
    """The limit of a key is counted in bytes of UTF-8, and holds on both sides."""
    fits = letter * (512 // len(letter.encode()))
    fits += "k" * (512 - len(fits.encode()))

    assert len(fits.encode()) == 512
    assert new_message(idempotency_key=fits).key == fits
    assert_names(refused(idempotency_key=fits + "k"), "idempotency_key")


def test_a_computed_key_is_measured_too():
    """A user id that fits its field, but not into a key of 512 bytes, is refused."""
    assert_names(refused(user_id="😀" * 124), "idempotency_key")
    assert len(new_message(user_id="😀" * 123).key.encode()) == 511


@pytest.mark.parametrize("message_type", ["a", "goodbye", "week_2", "a_", "a9"])
def test_a_message_type_is_a_lower_case_word(message_type):
    """Letters, digits and underscores make a type."""
    assert new_message(message_type=message_type).message_type == message_type


@pytest.mark.parametrize(
    "bad",
    ["good:bye", "Goodbye", "gooDbye", "1goodbye", "_goodbye", "good-bye", "good bye", "adiós", "goodbye\n", "a٢"],
)
def test_a_message_type_has_one_reading(bad):
    """A colon, a capital, a foreign digit or a newline would give a key two readings."""
    assert_names(refused(message_type=bad), "message_type")


def test_texts_of_a_hosts_enums_become_plain_text():
    """A host's str enums are taken for their values, of both kinds, and nothing of the enum is kept."""

    class Modern(StrEnum):
        TYPE = "goodbye"
        TO = "individual"

    class Classic(str, Enum):  # noqa: UP042 - what hosts have that are older than StrEnum
        TYPE = "goodbye"
        TO = "individual"

    for enum in (Modern, Classic):
        message = new_message(message_type=enum.TYPE, message_key=enum.TYPE, user_id=enum.TYPE, destination=enum.TO)

        assert (type(message.message_type), type(message.message_key), type(message.user_id)) == (str, str, str)
        assert message.key.startswith("goodbye:goodbye:")
        assert message.destination is Destination.INDIVIDUAL


# Destinations


@pytest.mark.parametrize(
    ("destination", "jid"),
    [
        ("individual", "1234567@s.whatsapp.net"),
        ("individual", "123456789012345@s.whatsapp.net"),
        ("individual", "12345@lid"),
        ("individual", "12345678901234567890@lid"),
        ("individual", "BR.1502576394655843"),
        ("individual", "US.a"),
        ("individual", "US." + "aZ09" * 32),
        ("individual", "US.ENT.11815799212886844830"),
        ("individual", "US.ENT." + "9" * 128),
        ("group", "123456789012345@g.us"),
        ("group", "12345678901234567890@g.us"),
        ("group", "12345-1234567890@g.us"),
        ("group", "123456789012345-1234567890@g.us"),
    ],
)
def test_a_jid_that_fits_its_destination_is_taken(destination, jid):
    """People and groups have their forms, whose shortest and longest numbers are taken."""
    message = new_message(destination=destination, destination_jid=jid)

    assert message.destination_jid == jid
    assert message.destination is Destination(destination)


@pytest.mark.parametrize(
    ("destination", "jid"),
    [
        ("group", "5511999999999@s.whatsapp.net"),
        ("group", "12345678@lid"),
        ("individual", "123456789012345678@g.us"),
        ("individual", "12345-1234567890@g.us"),
        ("individual", "123456@s.whatsapp.net"),
        ("individual", "1234567890123456@s.whatsapp.net"),
        ("individual", "1234@lid"),
        ("individual", "123456789012345678901@lid"),
        ("group", "12345678901234@g.us"),
        ("group", "123456789012345678901@g.us"),
        ("group", "1234-1234567890@g.us"),
        ("group", "1234567890123456-1234567890@g.us"),
        ("group", "12345-123456789@g.us"),
        ("group", "12345-12345678901@g.us"),
        ("individual", "05511999999999@s.whatsapp.net"),
        ("individual", "+5511999999999@s.whatsapp.net"),
        ("individual", "5511999999999@S.WHATSAPP.NET"),
        ("individual", "5511999999999@sxwhatsapp.net"),
        ("individual", "5511999999999@s.whatsapp.net.evil"),
        ("individual", "5511999999999:2@s.whatsapp.net"),
        ("individual", " 5511999999999@s.whatsapp.net"),
        ("individual", "5511999999999@s.whatsapp.net\n"),
        ("individual", f"{ARABIC}@s.whatsapp.net"),
        ("individual", "1" + ARABIC + "@s.whatsapp.net"),
        ("group", "123456789012345678@gxus"),
        ("group", "123456789012345678@g.us\n"),
        ("individual", "5511999999999"),
        ("individual", "@s.whatsapp.net"),
        ("group", "BR.1502576394655843"),
        ("individual", "br.1502576394655843"),
        ("individual", "B.1502576394655843"),
        ("individual", "BRA.1502576394655843"),
        ("individual", "BR.1502576394655843\n"),
        ("individual", " BR.1502576394655843"),
        ("individual", "BR.1502576394655843@s.whatsapp.net"),
        ("individual", "BR1502576394655843"),
        ("individual", "BR."),
        ("individual", "BR.ENT."),
        ("individual", "BR.15025763.94655843"),
        ("individual", "BR.15025763-94655843"),
        ("individual", f"BR.{ARABIC}"),
        ("individual", "BR.é1502576394655843"),
        ("individual", "ÄÖ.1502576394655843"),
        ("individual", "BR." + "1" * 129),
        ("individual", "US.ENT." + "1" * 129),
        ("individual", "US.ENT.ENT.11815799212886844830"),
    ],
)
def test_a_jid_that_does_not_fit_its_destination_is_refused(destination, jid):
    """A private text cannot end in a group, and no number passes that only looks like one."""
    error = refused(destination=destination, destination_jid=jid)

    assert_names(error, "destination_jid")
    assert not [number for number in re.findall(r"\d{4,}", jid) if number in str(error)]


@pytest.mark.parametrize("bad", [None, "", "Individual", "everybody", "group\n", 1, ["group"], b"group"])
def test_a_destination_is_one_of_two_words(bad):
    """Anything but `individual` and `group` is refused."""
    assert_names(refused(destination=bad), "destination")


# Params


class Weekday(IntEnum):
    FRIDAY = 5


@pytest.mark.parametrize(
    ("params", "stored"),
    [
        ({}, {}),
        ({"a": [1, -1.5, True, None, {"b": []}]}, {"a": [1, -1.5, True, None, {"b": []}]}),
        (MappingProxyType({"a": 1}), {"a": 1}),
        (OrderedDict(a=OrderedDict(b=1)), {"a": {"b": 1}}),
        ({"a": (1, 2)}, {"a": [1, 2]}),
        ({"day": Weekday.FRIDAY, MessageStatus.SENT: MessageStatus.SENT}, {"day": 5, "sent": "sent"}),
        ({"": ""}, {"": ""}),
        ({"a": "\x01\x1f\x7f\u2028\u200b\ufeff😀"}, {"a": "\x01\x1f\x7f\u2028\u200b\ufeff😀"}),
        ({"a": r"\u0000", r"\\u0000": r"\\\u0000"}, {"a": r"\u0000", r"\\u0000": r"\\\u0000"}),
        ({"a": 10**4299}, {"a": 10**4299}),
    ],
)
def test_params_that_are_json_are_taken(params, stored):
    """Any JSON object is taken as it is; a text that only spells an escaped NUL is none."""
    assert json.loads(new_message(message_params=params).params_json) == stored


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(None, id="None"),
        pytest.param([SECRET], id="array"),
        pytest.param(SECRET, id="text"),
        pytest.param([(SECRET, 1)], id="pairs"),
        pytest.param({"a": float("nan")}, id="NaN"),
        pytest.param({"a": [{"b": float("inf")}]}, id="Infinity, nested"),
        pytest.param({"a": float("-inf")}, id="minus Infinity"),
        pytest.param({"a": 10**4300}, id="an integer that Python cannot read back"),
        pytest.param({"a": f"{SECRET}\x00"}, id="NUL"),
        pytest.param({f"{SECRET}\x00": 1}, id="NUL in a key"),
        pytest.param({"a": [{"b": "\\\x00"}]}, id="NUL behind a backslash, nested"),
        pytest.param({"a": "\\\\\x00"}, id="NUL behind two backslashes"),
        pytest.param({"a": f"{SECRET}\ud800"}, id="lone surrogate"),
        pytest.param({f"{SECRET}\udfff": 1}, id="lone surrogate in a key"),
        pytest.param({1: SECRET}, id="a number as key"),
        pytest.param({"a": {None: SECRET}}, id="None as key, nested"),
        pytest.param({"a": [{True: SECRET}]}, id="a truth value as key, nested"),
        pytest.param({(SECRET,): 1}, id="a tuple as key"),
        pytest.param({"a": {SECRET}}, id="set"),
        pytest.param({"a": SECRET.encode()}, id="bytes"),
        pytest.param({"a": Decimal(1)}, id="Decimal"),
        pytest.param({"a": NOON}, id="datetime"),
        pytest.param({"a": uuid.uuid4()}, id="UUID"),
        pytest.param({"a": MappingProxyType({})}, id="a mapping that is no dict, nested"),
    ],
)
def test_params_that_are_no_json_object_are_refused(bad):
    """Whatever jsonb would refuse, or JSON would silently change, is refused."""
    error = refused(message_params=bad)

    assert_names(error, "message_params")
    assert SECRET not in str(error)


@pytest.mark.parametrize("letter", ["x", "é", "😀", '"', "\n", "\x01"])
def test_params_have_at_most_64_kib(letter):
    """The limit is counted in bytes of the JSON text that is stored, and holds on both sides."""
    size = len(json.dumps(letter, ensure_ascii=False).encode()) - 2
    room = MAX_PARAMS_BYTES - len('{"a":""}')
    fits = letter * (room // size) + "x" * (room % size)

    assert len(new_message(message_params={"a": fits}).params_json.encode()) == MAX_PARAMS_BYTES
    assert_names(refused(message_params={"a": fits + "x"}), "message_params")


@pytest.mark.parametrize("nest", [lambda inner: {"a": inner}, lambda inner: [inner]], ids=["objects", "arrays"])
def test_params_have_a_greatest_depth(nest):
    """So many levels are taken and no more: neither Python's stack nor the reader's is at the mercy of a message."""
    inner = []
    for _ in range(MAX_PARAMS_DEPTH - 2):
        inner = nest(inner)

    assert new_message(message_params={"a": inner})
    assert_names(refused(message_params={"a": nest(inner)}), "message_params")


def test_params_that_hold_themselves_are_refused():
    """A circle ends as an error about depth, not in a stack overflow."""
    params = {}
    params["a"] = params

    assert_names(refused(message_params=params), "message_params")


def test_params_are_read_once():
    """What the host does to its mapping after the message was made is not seen."""
    params = {"name": "Ana"}
    message = new_message(message_params=params)

    params["name"] = float("nan")

    assert message.params_json == '{"name":"Ana"}'


# Times


@pytest.mark.parametrize("field", ["scheduled_for", "expires_at"])
@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(datetime(2030, 1, 1), id="naive"),  # noqa: DTZ001 - that is the point
        pytest.param(date(2030, 1, 1), id="date"),
        pytest.param("2030-01-01T00:00:00+00:00", id="text"),
        pytest.param(1893456000, id="number"),
        pytest.param(datetime.max.replace(tzinfo=UTC), id="year 9999"),
        pytest.param(datetime.max.replace(tzinfo=timezone(timedelta(hours=-14))), id="year 10000 in UTC"),
        pytest.param(datetime.min.replace(tzinfo=UTC), id="year 1"),
        pytest.param(datetime.min.replace(tzinfo=timezone(timedelta(hours=14))), id="year 0 in UTC"),
        pytest.param(LATEST + A_MICROSECOND, id="just too late"),
        pytest.param(EARLIEST - A_MICROSECOND, id="just too early"),
    ],
)
def test_a_moment_that_cannot_be_held_is_refused(field, bad):
    """A time without a zone, or beyond what PostgreSQL and Python both hold, is refused."""
    assert_names(refused(**{field: bad}), field)


@pytest.mark.parametrize("moment", [EARLIEST, LATEST, LATEST.astimezone(timezone(timedelta(hours=14)))])
def test_the_first_and_the_last_moment_are_taken(moment):
    """The range includes its ends, in any time zone."""
    assert new_message(scheduled_for=moment).scheduled_for == moment


def test_a_message_expires_after_it_is_due():
    """`expires_at` is later than `scheduled_for`, be it by a microsecond, also when their zones differ."""
    far = timezone(timedelta(hours=14))

    assert new_message(scheduled_for=NOON, expires_at=NOON + A_MICROSECOND)
    assert new_message(scheduled_for=NOON.astimezone(far), expires_at=NOON + A_MICROSECOND)
    assert_names(refused(scheduled_for=NOON, expires_at=NOON), "expires_at")
    assert_names(refused(scheduled_for=NOON.astimezone(far), expires_at=NOON), "expires_at")
    assert_names(refused(scheduled_for=NOON, expires_at=NOON - A_MICROSECOND), "expires_at")


def test_a_message_that_is_due_now_expires_later():
    """Without `scheduled_for`, an expiry that has passed is refused, and one to come is taken."""
    assert_names(refused(expires_at=datetime.now(UTC) - A_MICROSECOND), "expires_at")
    assert new_message(expires_at=datetime.now(UTC) + timedelta(minutes=1))


def test_the_hour_that_comes_twice_is_told_apart():
    """When the clocks are set back, `expires_at` is compared as a moment, not as what a clock on the wall shows."""
    first = datetime(2025, 11, 2, 1, 45, tzinfo=CLOCKS)
    second = datetime(2025, 11, 2, 1, 30, tzinfo=CLOCKS, fold=1)

    assert new_message(scheduled_for=first, expires_at=second)
    assert_names(refused(scheduled_for=second, expires_at=first), "expires_at")


@pytest.mark.parametrize("bad", [None, "America/Sao_Paulo", timedelta(hours=-3), -3])
def test_a_time_zone_is_a_tzinfo(bad):
    """The name of a zone is no zone."""
    error = refused(tz=bad)

    assert_names(error, "tz")


# Keys


def test_a_key_is_user_type_and_day():
    """The contract's example."""
    assert idempotency_key("user123", "goodbye", datetime(2025, 11, 21, tzinfo=UTC)) == "user123:goodbye:2025-11-21"


@pytest.mark.parametrize(
    ("moment", "tz", "day"),
    [
        (datetime(2025, 11, 22, 2, 59, 59, tzinfo=UTC), timezone(timedelta(hours=-3)), "2025-11-21"),
        (datetime(2025, 11, 22, 3, 0, tzinfo=UTC), timezone(timedelta(hours=-3)), "2025-11-22"),
        (datetime(2025, 11, 21, 9, 59, 59, tzinfo=UTC), timezone(timedelta(hours=14)), "2025-11-21"),
        (datetime(2025, 11, 21, 10, 0, tzinfo=UTC), timezone(timedelta(hours=14)), "2025-11-22"),
        (datetime(2025, 11, 22, 1, 0, tzinfo=timezone(timedelta(hours=5))), UTC, "2025-11-21"),
        (EARLIEST, timezone(timedelta(hours=-23)), "0001-01-01"),
        (LATEST, timezone(timedelta(hours=23)), "9999-12-30"),
    ],
)
def test_the_day_is_the_local_one(moment, tz, day):
    """`tz` says whose midnight parts the days, for the function and for a message alike."""
    assert idempotency_key("u", "t", moment, tz=tz) == f"u:t:{day}"
    assert new_message("u", message_type="t", scheduled_for=moment, tz=tz).key == f"u:t:{day}"


def test_the_day_of_a_message_without_a_time_is_today():
    """Without `scheduled_for` the day is today's, in `tz`."""
    for tz in (UTC, timezone(timedelta(hours=14)), timezone(timedelta(hours=-12))):
        before = datetime.now(tz).date()
        keys = {idempotency_key("u", "t", tz=tz), new_message("u", message_type="t", tz=tz).key}

        assert keys <= {f"u:t:{day}" for day in (before, datetime.now(tz).date())}


@pytest.mark.parametrize("tz", [UTC, timezone(timedelta(hours=14)), timezone(timedelta(hours=-12))])
def test_a_date_is_that_day_wherever_it_is_spent(tz):
    """A date has one reading as the day of a key; midnight of some zone would make it another one."""
    assert idempotency_key("u", "t", date(2025, 11, 21), tz=tz) == "u:t:2025-11-21"
    assert weekly_idempotency_key("u", "t", date(2025, 11, 21), tz=tz) == "u:t:2025-W47"


@pytest.mark.parametrize(
    ("moment", "tz", "week"),
    [
        (datetime(2026, 12, 31, 12, tzinfo=UTC), UTC, "2026-W53"),
        (datetime(2027, 1, 1, 12, tzinfo=UTC), UTC, "2026-W53"),
        (datetime(2027, 1, 3, 23, 59, tzinfo=UTC), UTC, "2026-W53"),
        (datetime(2027, 1, 4, tzinfo=UTC), UTC, "2027-W01"),
        (datetime(2027, 1, 4, 2, 59, tzinfo=UTC), timezone(timedelta(hours=-3)), "2026-W53"),
        (datetime(2024, 12, 30, tzinfo=UTC), UTC, "2025-W01"),
        (EARLIEST, UTC, "0001-W01"),
    ],
)
def test_a_weekly_key_has_the_year_of_its_week(moment, tz, week):
    """Around New Year a week has one key, and weeks a year apart have two; Monday begins where the person is."""
    assert weekly_idempotency_key("u", "weekly_review", moment, tz=tz) == f"u:weekly_review:{week}"


def test_this_week_is_that_of_now():
    """Without `when` the week is this one, in `tz`."""
    before = datetime.now(UTC)
    key = weekly_idempotency_key("u", "t")

    assert key in {f"u:t:{now:%G-W%V}" for now in (before, datetime.now(UTC))}


def message_of(user, **fields):
    jid = "5511999999999@s.whatsapp.net"
    given = {"message_type": "goodbye", "message_key": "goodbye", "destination": "individual", "destination_jid": jid}
    return NewMessage(user_id=user, scheduled_for=NOON, **given | fields)


def test_a_user_is_found_by_the_uuid_that_was_queued(session):
    """Whatever takes a user id takes a UUID: else a host that forgets a user would forget nobody."""
    user = uuid.UUID("0190F8A1-5C5B-7CC0-9C3A-0A1B2C3D4E5F")
    messages = EngagementMessageRepository(session)
    messages.queue_messages([message_of(user), message_of(user, message_type="review")])

    assert len(messages.get_pending_messages(user)) == len(list_messages(session, user_id=user)) == 2
    assert messages.cancel_pending_messages(user, "review") == 1
    assert (messages.forget_user(user).cancelled, messages.forget_user(user).blanked) == (1, 0)


def test_a_uuid_is_a_user_id():
    """It has one reading, that of `str`: a message and its key hold that."""
    user = uuid.UUID("0190F8A1-5C5B-7CC0-9C3A-0A1B2C3D4E5F")
    message = message_of(user)

    assert message.user_id == str(user) == "0190f8a1-5c5b-7cc0-9c3a-0a1b2c3d4e5f"
    assert message.key == idempotency_key(user, "goodbye", NOON) == idempotency_key(str(user), "goodbye", NOON)


def test_a_given_key_is_kept():
    """A host's own key replaces the daily one, whatever it looks like."""
    assert new_message(idempotency_key="invoice 7 / é").key == "invoice 7 / é"


def test_a_key_has_one_reading():
    """A colon in the user id cannot make two messages share a key."""
    assert idempotency_key("a:b", "c", NOON) != idempotency_key("a", "b_c", NOON)
    with pytest.raises(InvalidMessage, match="event_type"):
        idempotency_key("a", "b:c", NOON)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("", "goodbye", NOON), "user_id"),
        ((f"{SECRET}\x00", "goodbye", NOON), "user_id"),
        (("u", "Goodbye", NOON), "event_type"),
        (("u", "goodbye", datetime(2025, 11, 21)), "when"),  # noqa: DTZ001 - that is the point
        (("u", "goodbye", "2025-11-21"), "when"),
    ],
)
@pytest.mark.parametrize("make_key", [idempotency_key, weekly_idempotency_key])
def test_a_key_of_bad_input_is_refused(make_key, arguments, field):
    """The functions refuse what a message would refuse, and name their own parameters."""
    with pytest.raises(InvalidMessage) as caught:
        make_key(*arguments)

    assert_names(caught.value, field)
    assert SECRET not in str(caught.value)


def test_a_changed_copy_has_the_key_of_the_change():
    """`dataclasses.replace` gives the message of another user or day that one's key, and keeps a given one."""
    message = new_message("ana", scheduled_for=NOON)

    assert replace(message, user_id="bea").key == "bea:goodbye:2025-11-21"
    assert replace(message, scheduled_for=NOON + timedelta(days=1)).key == "ana:goodbye:2025-11-22"
    assert replace(new_message("ana", idempotency_key="k"), user_id="bea").key == "k"


def test_a_delivery_id_never_changes():
    """The id that providers recognise a repeat by is a function of the key alone, in every release."""
    assert delivery_id("user123:goodbye:2025-11-21") == uuid.UUID("cf934ab3-ea5f-5231-ac6a-0a185b6862ab")
    assert delivery_id("user123:goodbye:2025-11-22") != delivery_id("user123:goodbye:2025-11-21")


# Values


def test_a_message_is_an_immutable_value():
    """It cannot be changed, equals its like, can be a member of a set, and survives pickling."""
    message = new_message(scheduled_for=NOON)

    with pytest.raises(FrozenInstanceError):
        message.user_id = "somebody else"
    assert message == new_message(scheduled_for=NOON)
    assert message != new_message(scheduled_for=NOON, message_key="other")
    assert len({message, new_message(scheduled_for=NOON)}) == 1
    assert pickle.loads(pickle.dumps(message)) == message


def test_an_error_survives_the_way_between_processes():
    """`InvalidMessage` is a ValueError, and a process pool can hand it on."""
    error = refused(user_id="")
    copy = pickle.loads(pickle.dumps(error))

    assert isinstance(error, ValueError)
    assert (copy.field, copy.problem, str(copy)) == (error.field, error.problem, str(error))


def test_an_unknown_field_is_a_mistake_of_the_program():
    """A misspelt keyword is a TypeError, and so are a message and keywords at once: before the database is touched."""
    repository_without_database = EngagementMessageRepository(Session())

    with pytest.raises(TypeError):
        repository_without_database.queue_message(**_valid(), colour="red")
    with pytest.raises(TypeError):
        repository_without_database.queue_message(new_message(), user_id="x")


def test_what_is_no_message_is_refused():
    """What is passed for a message and is none is refused by both calls, before the database is touched."""
    repository_without_database = EngagementMessageRepository(Session())

    for call, argument in (
        (repository_without_database.queue_messages, [_valid()]),
        (repository_without_database.queue_messages, [_valid()] * (repository.CHUNK + 1)),
        (repository_without_database.queue_message, _valid()),
    ):
        with pytest.raises((InvalidMessage, TypeError)):
            call(argument)


def test_nothing_personal_is_in_a_repr():
    """No repr shows whom a message is for, what it says or where it goes."""
    params = {"name": SECRET}
    jid = "5511987654321@s.whatsapp.net"
    message = new_message(SECRET, message_key=f"k.{SECRET}", message_params=params, destination_jid=jid)
    stored = {
        "id": 1,
        "idempotency_key": message.key,
        "user_id": SECRET,
        "message_type": "goodbye",
        "message_key": f"k.{SECRET}",
        "message_params": params,
        "destination": Destination.INDIVIDUAL,
        "destination_jid": jid,
        "scheduled_for": NOON,
        "attempt": 1,
        "retry_count": 0,
    }
    values = [
        message,
        OutgoingMessage(**stored),
        EngagementMessage(**stored, status=MessageStatus.SENDING),
        Queued(created=True, message_id=1, idempotency_key=message.key, status=MessageStatus.PENDING),
    ]

    for value in values:
        for shown in (repr(value), str(value)):
            assert SECRET not in shown
            assert "5511987654321" not in shown
            assert type(value).__name__ in shown


# Whatever is accepted is stored; whatever is refused never reaches the database

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
PRINTABLE = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=20)
MOSTLY_PRINTABLE = st.integers(0, 9).flatmap(lambda n: PRINTABLE if n else ANY_TEXT)
TYPES = st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True)
JIDS = st.from_regex(r"[1-9][0-9]{6,14}@s\.whatsapp\.net|[1-9][0-9]{4,19}@lid", fullmatch=True)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
PARAMS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6
    ),
    max_size=4,
)
ODD_PARAMS = st.dictionaries(ANY_TEXT, st.floats() | st.lists(ANY_TEXT), max_size=3)
OFFSETS = st.builds(timezone, st.timedeltas(timedelta(hours=-23), timedelta(hours=23)))
NIGHT_OF_THE_CLOCKS = st.datetimes(datetime(2025, 11, 2), datetime(2025, 11, 2, 3), timezones=st.just(CLOCKS))  # noqa: DTZ001 - bounds are naive
MOMENTS = NIGHT_OF_THE_CLOCKS | st.datetimes(timezones=OFFSETS) | st.datetimes(timezones=OFFSETS | st.none())


@st.composite
def any_fields(draw):
    """Return the fields of a message, most of which can be queued."""
    given_fields = {
        "user_id": draw(MOSTLY_PRINTABLE),
        "message_type": draw(TYPES),
        "message_key": draw(MOSTLY_PRINTABLE),
        "message_params": draw(PARAMS | PARAMS | ODD_PARAMS),
        "destination": draw(st.sampled_from(["individual"] * 9 + ["group"])),
        "destination_jid": draw(JIDS),
    }
    optional = {"idempotency_key": MOSTLY_PRINTABLE, "tz": OFFSETS | st.just(CLOCKS), "scheduled_for": MOMENTS}
    given_fields |= {name: draw(values) for name, values in optional.items() if draw(st.booleans())}
    if draw(st.booleans()):
        given_fields["expires_at"] = draw(later_than(given_fields.get("scheduled_for")) | MOMENTS)
    return given_fields


def later_than(moment):
    """Return moments up to a day after `moment`, or after the start of the year 3000, in any zone."""
    start = moment if moment and moment.tzinfo and EARLIEST < moment < LATEST else datetime(3000, 1, 1, tzinfo=UTC)
    waits = st.timedeltas(A_MICROSECOND, timedelta(days=1))
    return st.builds(lambda wait, zone: (start.astimezone(UTC) + wait).astimezone(zone), waits, OFFSETS)


@pytest.mark.parametrize("path", ["one", "a chunk", "chunks"])
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    # Each example has a transaction of its own; what the fixture patches is the same for all.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(fields_given=any_fields())
@example(
    fields_given=_valid()
    | {
        "scheduled_for": datetime(2025, 11, 2, 1, 30, tzinfo=CLOCKS, fold=1),
        "expires_at": datetime(2025, 11, 2, 1, 45, tzinfo=CLOCKS),
    }
)
@example(fields_given=_valid() | {"scheduled_for": EARLIEST, "expires_at": LATEST})
@example(fields_given=_valid() | {"message_params": {"a": 10**4299, "b": 5e-324, "c": 1.7e308, r"\u0000": "\\"}})
def test_what_is_accepted_is_stored_unchanged(shared_engine, monkeypatch, path, fields_given):
    """A message is refused before the database is touched, or comes back from PostgreSQL as it was given."""
    message = accepted(**fields_given)
    if message is None:
        assert refused(**fields_given).field in {field.name for field in fields(NewMessage)}
        return
    monkeypatch.setattr(repository, "CHUNK", 1)
    batch = {"one": [message], "a chunk": [message], "chunks": [message, new_message(idempotency_key="another")]}[path]

    with shared_engine.connect() as connection, connection.begin() as transaction:
        queueing = EngagementMessageRepository(Session(connection))
        if path == "one":
            assert queueing.queue_message(message).created
        else:
            assert queueing.queue_messages(batch).created == len(batch)
        query = "SELECT *, message_params::text AS params FROM engagement_message_queue WHERE idempotency_key = :key"
        found = connection.execute(text(query), {"key": message.key}).one()
        transaction.rollback()

    for name in ("user_id", "message_type", "message_key", "destination", "destination_jid"):
        assert getattr(found, name) == getattr(message, name)
    assert found.expires_at == in_utc(message.expires_at)
    if message.scheduled_for is not None:
        assert found.scheduled_for == found.next_attempt_at == in_utc(message.scheduled_for)
    assert numbers_exact(found.params) == numbers_exact(message.params_json)


def in_utc(moment: datetime | None) -> datetime | None:
    """Return what can be compared: a time that comes twice equals none of another zone."""
    return moment and moment.astimezone(UTC)


def numbers_exact(document: str) -> object:
    """Read JSON with every number as the decimal that is written: jsonb turns 1e23 into an integer, which is equal."""
    limit = sys.get_int_max_str_digits()
    assert limit == 4300, "the limit that the package relies on"
    return json.loads(document, parse_float=Decimal, parse_int=Decimal)
