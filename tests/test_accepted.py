"""Whatever is accepted is stored unchanged; whatever is refused never reaches the database."""

import json
import sys
from dataclasses import fields
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from conftest import new_message
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from refusals import A_MICROSECOND, CLOCKS, _valid, refused
from sqlalchemy import text
from sqlalchemy.orm import Session

from engagement import EngagementMessageRepository, InvalidMessage, NewMessage
from engagement.models import EARLIEST, LATEST


def accepted(**given_fields) -> NewMessage | None:
    try:
        return NewMessage(**given_fields)
    except InvalidMessage:
        return None


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
    monkeypatch.setattr("engagement._queueing.batch.CHUNK", 1)
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
