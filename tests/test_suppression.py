"""The suppression list: an address on it gets nothing, whatever the key, until it is taken off."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from conftest import PATIENCE, execute, in_thread, new_message, queue, row, wait_until_blocked
from sqlalchemy import create_engine, select, text
from sqlalchemy.exc import IntegrityError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from engagement import (
    AsyncSuppressionList,
    EngagementMessageRepository,
    EngagementSuppression,
    InDoubt,
    InvalidMessage,
    Receipt,
    Recorded,
    SuppressionList,
    process_message_queue,
)
from engagement.messages import address_hash, delivery_id, reference
from engagement.policies import Route, Suppression

ANA, BOB = "5511999990001@s.whatsapp.net", "5511999990002@s.whatsapp.net"
LATER = datetime(2100, 1, 1, tzinfo=UTC)


def suppress(engine, address: str, reason: str = "answered STOP", **fields) -> None:
    with Session(engine) as session, session.begin():
        SuppressionList(session).suppress(address, reason, **fields)


def unsuppress(engine, address: str) -> bool:
    with Session(engine) as session, session.begin():
        return SuppressionList(session).unsuppress(address)


def found(engine, address: str):
    with Session(engine) as session:
        return SuppressionList(session).find(address)


def to(address: str, user_id: str = "user1", **fields):
    return new_message(user_id, destination_jid=address, **fields)


class Far:
    """A transport that notes the addresses that it sent to."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def send(self, message) -> None:
        """Send."""
        self.sent.append(message.destination_jid)


# The list


def test_an_address_on_the_list_gets_nothing_under_any_key(engine):
    """It is asked at each send, so also of messages that were queued before; the others are sent."""
    far = Far()
    early, _ = queue(engine, to(ANA), to(BOB, "user2"))
    suppress(engine, ANA)
    (late,) = queue(engine, to(ANA, message_type="reminder"))

    process_message_queue(engine, Suppression(far, engine))

    assert far.sent == [BOB]
    for message_id in (early, late):
        ended = row(engine, message_id)
        assert (ended.status, ended.retry_count) == ("cancelled", 0)
        assert ended.history[-1]["reason"] == "suppressed: answered STOP"


def test_an_address_that_is_taken_off_is_sent_to_again(engine):
    """`unsuppress` tells whether it was on the list, and sends nothing by itself."""
    far = Far()
    suppress(engine, ANA)
    (cancelled,) = queue(engine, to(ANA))
    process_message_queue(engine, Suppression(far, engine))

    assert (unsuppress(engine, ANA), unsuppress(engine, ANA), found(engine, ANA)) == (True, False, None)
    process_message_queue(engine, Suppression(far, engine))
    assert (far.sent, row(engine, cancelled).status) == ([], "cancelled")

    queue(engine, to(ANA, message_type="reminder"))
    process_message_queue(engine, Suppression(far, engine))
    assert far.sent == [ANA]


def test_a_suppression_ends_at_its_moment(engine):
    """From `until` on the address is as good as any, also for `find` and `unsuppress`."""
    far = Far()
    suppress(engine, ANA, until=LATER)
    assert (found(engine, ANA).until, found(engine, ANA).reason) == (LATER, "answered STOP")
    execute(engine, "UPDATE engagement_suppression SET until = now() - interval '1 second'")
    queue(engine, to(ANA))

    assert found(engine, ANA) is None
    process_message_queue(engine, Suppression(far, engine))
    assert far.sent == [ANA]
    assert unsuppress(engine, ANA) is False


@pytest.mark.parametrize(
    ("before", "again", "then"),
    [
        (None, LATER, None),
        (LATER, None, None),
        (LATER, LATER - timedelta(days=1), LATER),
        (LATER - timedelta(days=1), LATER, LATER),
    ],
)
def test_suppressing_again_never_shortens(engine, before, again, then):
    """The later moment counts, for good is the latest; `since` stays, and the reason is the newest."""
    suppress(engine, ANA, until=before)
    since = found(engine, ANA).since
    suppress(engine, ANA, "moved away", until=again)

    after = found(engine, ANA)
    assert (after.since, after.until, after.reason) == (since, then, "moved away")


def test_a_suppression_that_was_over_begins_anew(engine):
    """`since` is when the one in force began."""
    suppress(engine, ANA, until=LATER)
    execute(engine, "UPDATE engagement_suppression SET since = '2020-01-01', until = '2020-02-01'")

    suppress(engine, ANA, until=LATER)

    assert found(engine, ANA).since.year >= 2026


def test_only_a_hash_of_the_address_is_kept(engine):
    """No column holds the number."""
    suppress(engine, ANA, "answered STOP", until=LATER)
    with Session(engine) as session:
        (kept,) = session.scalars(select(EngagementSuppression)).all()

    assert (len(kept.address_hash), kept.reason, kept.until) == (64, "answered STOP", LATER)
    assert "5511999990001" not in str(execute(engine, "SELECT * FROM engagement_suppression").one())


@pytest.mark.parametrize(
    ("column", "value", "constraint"),
    [
        ("address_hash", ANA, "address_hash_form"),
        ("address_hash", "A" * 64, "address_hash_form"),
        ("reason", "x" * 501, "reason_length"),
        ("since", "infinity", "times_readable"),
        ("until", "-infinity", "times_readable"),
    ],
)
def test_the_table_refuses_what_nobody_could_read(engine, column, value, constraint):
    """Also in a statement by hand."""
    suppress(engine, ANA)
    with pytest.raises(IntegrityError, match=f"engagement_suppression_{constraint}"):
        execute(engine, f"UPDATE engagement_suppression SET {column} = :value", value=value)


def test_it_is_the_hosts_transaction(engine):
    """Nothing is committed: with a rollback, the address was never on the list."""
    with Session(engine) as session:
        SuppressionList(session).suppress(ANA, "answered STOP")
        assert SuppressionList(session).find(ANA) is not None
        session.rollback()
    assert found(engine, ANA) is None


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("address", lambda entries: entries.suppress("+55 11 99999-0001", "STOP")),
        ("address", lambda entries: entries.suppress(None, "STOP")),
        ("address", lambda entries: entries.unsuppress("")),
        ("address", lambda entries: entries.find(7)),
        ("reason", lambda entries: entries.suppress(ANA, "")),
        ("reason", lambda entries: entries.suppress(ANA, None)),
        ("reason", lambda entries: entries.suppress(ANA, "x" * 501)),
        ("until", lambda entries: entries.suppress(ANA, "STOP", until=datetime(2100, 1, 1))),  # noqa: DTZ001
        ("until", lambda entries: entries.suppress(ANA, "STOP", until="tomorrow")),
    ],
)
def test_bad_input_names_the_field_and_touches_nothing(field, call):
    """It is refused before anything is connected to."""
    nowhere = create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none", poolclass=NullPool)
    with Session(nowhere) as session, pytest.raises(InvalidMessage) as raised:
        call(SuppressionList(session))
    assert raised.value.field == field
    assert "99999" not in str(raised.value)


def test_the_awaited_list_is_the_same(engine):
    """On an `AsyncSession`, with the same answers."""

    async def play():
        async_engine = create_async_engine(engine.url, poolclass=NullPool)
        async with AsyncSession(async_engine) as session, session.begin():
            entries = AsyncSuppressionList(session)
            await entries.suppress(ANA, "answered STOP", until=LATER)
            seen = await entries.find(ANA)
            return seen.reason, seen.until, await entries.unsuppress(ANA), await entries.find(ANA)

    assert asyncio.run(play()) == ("answered STOP", LATER, True, None)


# The policy


def test_without_an_answer_nothing_is_sent(engine, empty_engine):
    """The policy fails closed: a table that is missing is `NotSent`, a database that is away postpones."""
    far = Far()
    without_table, away = queue(engine, to(ANA), to(BOB, "user2"))
    process_message_queue(engine, Suppression(far, empty_engine), limit=1)
    nowhere = create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none", poolclass=NullPool)
    process_message_queue(engine, Suppression(far, nowhere), limit=1)

    assert far.sent == []
    first, second = row(engine, without_table), row(engine, away)
    assert (first.status, first.retry_count) == ("pending", 1)
    assert first.error_message == f"Suppression raised {ProgrammingError.__name__}"
    assert (second.status, second.retry_count) == ("pending", 0)
    assert second.history[-1]["event"] == "postponed"


def test_the_address_of_now_is_asked_about(engine):
    """Inside `Route`, a person who has moved to a suppressed address gets nothing there."""
    far = Far()
    suppress(engine, BOB)
    (message_id,) = queue(engine, to(ANA))

    process_message_queue(engine, Route(Suppression(far, engine), lambda _: ("individual", BOB)))

    assert (far.sent, row(engine, message_id).status) == ([], "cancelled")


def test_a_message_in_doubt_stays_in_doubt(engine):
    """A suppression says nothing of an earlier attempt that may have left."""
    (message_id,) = queue(engine, to(ANA))

    class MayHaveLeft:
        idempotent = True

        def send(self, message):
            return InDoubt("no answer")

    process_message_queue(engine, MayHaveLeft(), limit=1)
    suppress(engine, ANA)
    execute(engine, "UPDATE engagement_message_queue SET next_attempt_at = now()")
    process_message_queue(engine, Suppression(MayHaveLeft(), engine))

    assert row(engine, message_id).status == "in_doubt"


# Fed by receipts


def unreachable(engine, message_id: int, **fields) -> Receipt:
    name = reference(message_id, delivery_id(row(engine, message_id).idempotency_key))
    given = {"event": "undeliverable", "at": datetime.now(UTC), "provider": "cloud", "reference": name}
    return Receipt(**given | {"code": "131050", "reason": "stopped marketing", "unreachable": True} | fields)


def record(engine, *receipts: Receipt) -> list[Recorded]:
    with Session(engine) as session, session.begin():
        return [each.answer for each in EngagementMessageRepository(session).record_receipts(receipts)]


def test_a_receipt_that_says_so_suppresses_the_address(engine):
    """Tomorrow's message has a new key, and is not sent either. One that is merely undeliverable suppresses nothing."""
    first, second = queue(engine, to(ANA), to(BOB, "user2"))
    process_message_queue(engine, lambda _: "wamid")

    answers = record(engine, unreachable(engine, first), unreachable(engine, second, unreachable=False))

    assert answers == [Recorded.RECORDED, Recorded.RECORDED]
    assert found(engine, ANA).reason == "131050: stopped marketing"
    assert (found(engine, ANA).until, found(engine, BOB)) == (None, None)


def test_a_receipt_that_changes_nothing_suppresses_nothing(engine):
    """A webhook that is repeated after a person took the address off the list does not put it back."""
    (message_id,) = queue(engine, to(ANA))
    process_message_queue(engine, lambda _: "wamid")
    receipt = unreachable(engine, message_id)
    record(engine, receipt)
    unsuppress(engine, ANA)

    assert record(engine, receipt) == [Recorded.ALREADY_KNOWN]
    assert found(engine, ANA) is None


def test_a_receipt_of_a_forgotten_message_suppresses_nothing(engine):
    """Its address is not known any more."""
    (message_id,) = queue(engine, to(ANA))
    process_message_queue(engine, lambda _: "wamid")
    receipt = unreachable(engine, message_id)
    with Session(engine) as session, session.begin():
        EngagementMessageRepository(session).forget_user("user1")

    assert record(engine, receipt) == [Recorded.RECORDED]
    assert execute(engine, "SELECT count(*) FROM engagement_suppression").scalar_one() == 0


def test_unreachable_is_said_of_undeliverable_only():
    """A message that was read is no reason to stop."""
    with pytest.raises(InvalidMessage, match=r"^unreachable: "):
        Receipt(event="read", at=LATER, provider="cloud", provider_message_id="wamid", unreachable=True)


def test_addresses_are_taken_in_one_order(engine):
    """Else two requests with the same addresses in another order would deadlock: the second one waits for the first."""
    first, last = sorted([ANA, BOB], key=address_hash)
    ids = queue(engine, to(last), to(first, "user2"))
    process_message_queue(engine, lambda _: "wamid")
    receipts = [unreachable(engine, message_id) for message_id in ids]
    suppress(engine, last)

    with Session(engine) as session, session.begin():
        SuppressionList(session).suppress(first, "answered STOP")
        waiting = in_thread(record, engine, *receipts)
        wait_until_blocked(engine, 1)
        with Session(engine) as other, other.begin():
            other.execute(text("SET LOCAL lock_timeout = '5s'"))
            SuppressionList(other).suppress(last, "answered STOP")  # It holds nothing of it while it waits.
    assert waiting.result(PATIENCE) == [Recorded.RECORDED, Recorded.RECORDED]


# Forgetting


def test_a_forgotten_person_stays_suppressed_without_a_reason(engine):
    """The wish not to be written to outlives the data: of it, the hash is left. The reasons of others stay."""
    queue(engine, to(ANA), to(BOB, "user2"))
    suppress(engine, ANA, "Ana wrote: stop")
    suppress(engine, BOB)

    with Session(engine) as session, session.begin():
        EngagementMessageRepository(session).forget_user("user1")

    assert found(engine, ANA).reason is None
    assert found(engine, BOB).reason == "answered STOP"
    (message_id,) = queue(engine, to(ANA, message_type="reminder"))
    process_message_queue(engine, Suppression(Far(), engine))
    assert row(engine, message_id).history[-1]["reason"] == "suppressed: no reason is kept"
