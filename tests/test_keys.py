"""The idempotency key: computed from user, type and day or week, or given, and what it means."""

import uuid
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone

import pytest
from conftest import new_message
from refusals import NOON, SECRET, assert_names, refused

from engagement import EngagementMessageRepository, InvalidMessage, NewMessage, idempotency_key, weekly_idempotency_key
from engagement._operating.lists import list_messages
from engagement.messages import delivery_id
from engagement.models import EARLIEST, LATEST

# Texts


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
