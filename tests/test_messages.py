"""Which texts, destinations, params and moments a message may have, and what kind of value it is."""

import json
import pickle
import re
import uuid
from collections import OrderedDict
from dataclasses import FrozenInstanceError
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from types import MappingProxyType

import pytest
from conftest import new_message
from refusals import A_MICROSECOND, CLOCKS, NOON, SECRET, _valid, assert_names, refused
from sqlalchemy.orm import Session

from engagement import (
    Destination,
    EngagementMessage,
    EngagementMessageRepository,
    InvalidMessage,
    OutgoingMessage,
    Queued,
)
from engagement._queueing import batch
from engagement.messages.checks import MAX_PARAMS_BYTES, MAX_PARAMS_DEPTH, MAX_TEXT, MAX_TYPE
from engagement.models import EARLIEST, LATEST, MessageStatus

TEXT_FIELDS = ["user_id", "message_type", "message_key", "destination_jid", "idempotency_key"]
ARABIC = "٥٥١١٩٩٩٩٩٩٩٩٩"


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
        (repository_without_database.queue_messages, [_valid()] * (batch.CHUNK + 1)),
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
