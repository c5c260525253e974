"""A receipt that is quicker than its settlement is kept, and recorded once its message is known."""

import logging
import threading
from datetime import UTC, datetime, timedelta

import pytest
from conftest import execute, in_thread, new_message, queue, row, until, wait_until_blocked
from crashes.accidents import Running
from goodbyes import Hook, _host  # noqa: F401 - the fixture
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from engagement import (
    EngagementMessageRepository,
    InDoubt,
    NotSent,
    Receipt,
    Recorded,
    Sent,
    SuppressionList,
    process_message_queue,
    verify,
)
from engagement._delivery.evidence import LATELY, KeptReceipts
from engagement._operating import housekeeping
from engagement._receiving import keeping
from engagement._sql.host_sessions import HostSession
from engagement._sql.keeping import AT_ONCE
from engagement._sql.own_transactions import for_own_transactions
from engagement._watching import observers
from engagement.messages import delivery_id, reference, whatsapp_message_id

WAMID = "wamid.HBgNNTUxMQ=="
TOLD = datetime(2026, 11, 30, 12, tzinfo=UTC)


def receipt(kind: str = "delivered", **fields) -> Receipt:
    return Receipt(**{"event": kind, "at": TOLD, "provider": "waha", "provider_message_id": WAMID} | fields)


def record(engine, *receipts: Receipt) -> list[Recorded]:
    with Session(engine) as session, session.begin():
        return [each.answer for each in EngagementMessageRepository(session).record_receipts(receipts)]


def look(engine, on_settled=None, **within) -> None:
    KeptReceipts(for_own_transactions(engine, lends=on_settled is not None), on_settled).look(
        threading.Event(), **within
    )


def sent(engine, answer=WAMID, **fields) -> int:
    (message_id,) = queue(engine, new_message(**fields))
    process_message_queue(engine, lambda _: answer)
    return message_id


def kept(engine) -> int:
    return execute(engine, "SELECT count(*) FROM engagement_receipt").scalar_one()


def know(engine, message_id: int) -> None:
    """Let the provider's id of a message be known, as a settlement of a moment ago would."""
    execute(
        engine, "UPDATE engagement_message_queue SET provider_message_id = :id WHERE id = :of", id=WAMID, of=message_id
    )


# The four cases of a receipt that comes too soon


def test_before_the_send_was_settled(engine):
    """The provider delivers while its answer is still under way: the run that settles records it at its end."""
    (message_id,) = queue(engine, new_message())
    answers = []

    def send(_):
        answers.extend(record(engine, receipt("read")))
        return WAMID

    assert process_message_queue(engine, send).succeeded == 1

    assert answers == [Recorded.KEPT]
    found = row(engine, message_id)
    assert (found.status, found.delivered_at, found.read_at, kept(engine)) == ("sent", TOLD, TOLD, 0)


def test_before_the_providers_id_is_known(engine):
    """The answer was lost. Another receipt brings the id, by our reference; then the kept one counts."""
    message_id = sent(engine, InDoubt("no answer"))
    assert record(engine, receipt("delivered")) == [Recorded.KEPT]
    named = reference(message_id, delivery_id(row(engine, message_id).idempotency_key))

    look(engine)
    assert (row(engine, message_id).status, kept(engine)) == ("in_doubt", 1)

    assert record(engine, receipt("accepted", reference=named)) == [Recorded.RECORDED]
    look(engine)
    found = row(engine, message_id)
    assert (found.status, found.delivered_at, kept(engine)) == ("sent", TOLD, 0)


def test_while_the_row_is_locked(engine):
    """A message that is known is waited for. One whose settlement is not committed is not seen: the receipt is kept."""
    known = sent(engine, "known")
    unknown = sent(engine, InDoubt("no answer"), user_id="user2")
    with engine.connect() as settlement:
        settlement.execute(text("SELECT FROM engagement_message_queue WHERE id = :id FOR UPDATE"), {"id": known})
        settle = text("UPDATE engagement_message_queue SET provider_message_id = :name WHERE id = :id")
        settlement.execute(settle, {"name": WAMID, "id": unknown})
        waiting = in_thread(record, engine, receipt(provider_message_id="known"))
        wait_until_blocked(engine, 1)
        assert record(engine, receipt()) == [Recorded.KEPT]
        look(engine)
        assert kept(engine) == 1
        settlement.commit()
    assert waiting.result(20) == [Recorded.RECORDED]

    look(engine)
    assert row(engine, unknown).delivered_at == row(engine, known).delivered_at == TOLD


def test_for_an_attempt_that_was_recovered_since(engine):
    """Its worker answers at last: the late `Sent` ends the doubt, brings the id, and the kept receipt counts."""
    (message_id,) = queue(engine, new_message())

    def send(_):
        execute(engine, "UPDATE engagement_message_queue SET lease_expires_at = now() WHERE status = 'sending'")
        process_message_queue(engine, lambda _: NotSent("not this one"))
        assert row(engine, message_id).status == "in_doubt"
        assert record(engine, receipt()) == [Recorded.KEPT]
        return WAMID

    process_message_queue(engine, send)

    found = row(engine, message_id)
    assert (found.status, found.delivered_at, kept(engine)) == ("sent", TOLD, 0)
    with Session(engine) as session:
        assert verify(session) == []


def test_a_settlement_between_the_look_and_the_keeping_is_met_by_the_next_look(engine):
    """The id is committed when the receipt has found nothing and is not kept yet."""
    message_id = sent(engine, InDoubt("no answer"))

    def settle(_connection, _cursor, statement, *_):
        if statement.startswith("INSERT INTO engagement_receipt"):
            know(engine, message_id)
            look(engine)  # And one look comes too soon.

    event.listen(engine, "before_cursor_execute", settle)
    try:
        assert record(engine, receipt()) == [Recorded.KEPT]
    finally:
        event.remove(engine, "before_cursor_execute", settle)

    look(engine)
    assert (row(engine, message_id).status, row(engine, message_id).delivered_at, kept(engine)) == ("sent", TOLD, 0)


# What is kept


def test_what_a_name_of_ours_does_not_find_is_not_kept(engine):
    """Nothing is sent before its row is committed, so no later row has the reference. Nor do two equal ids differ."""
    for user in ("user1", "user2"):
        sent(engine, user_id=user)
    wrong = reference(10**6, delivery_id("user9:goodbye:2026-01-01"))

    assert record(engine, receipt(reference=wrong), receipt()) == [Recorded.UNKNOWN_MESSAGE] * 2
    assert kept(engine) == 0


def test_an_id_in_the_form_of_ours_may_be_a_gateways_own(engine):
    """Baileys makes ids of the same form, whose digits are no message's: they come with the answer as any other."""
    foreign = whatsapp_message_id(7, delivery_id("user9:goodbye:2026-01-01"))
    assert record(engine, receipt(provider_message_id=foreign)) == [Recorded.KEPT]

    message_id = sent(engine, foreign)

    assert row(engine, message_id).delivered_at == TOLD


def test_all_that_a_receipt_says_is_kept(engine):
    """The reason, the code, and that the address cannot be reached."""
    told = receipt("undeliverable", reason="not on WhatsApp", code="131026", unreachable=True)
    assert record(engine, told) == [Recorded.KEPT]

    message_id = sent(engine)

    found = row(engine, message_id)
    assert (found.status, found.error_message) == ("failed", "131026: not on WhatsApp")
    assert (found.history[-1]["event"], found.history[-1]["by"]) == ("undeliverable", "waha")
    with Session(engine) as session:
        assert SuppressionList(session).find(found.destination_jid).reason == "131026: not on WhatsApp"


def test_the_longest_receipt_is_kept(engine):
    """The table takes all that `Receipt` takes, cut as a message's history cuts it."""
    longest = receipt(
        "undeliverable", provider="é" * 255, provider_message_id="€" * 512, reason="é" * 5_000, code="é" * 5_000
    )
    assert record(engine, longest) == [Recorded.KEPT]
    assert kept(engine) == 1


def test_a_receipt_is_kept_once(engine):
    """In one call, in two, and from two sessions at once, of which the second waits for the first."""
    assert record(engine, receipt(), receipt()) == record(engine, receipt(), receipt()) == [Recorded.KEPT] * 2
    assert kept(engine) == 1

    other = receipt("read")
    with Session(engine) as first:
        EngagementMessageRepository(first).record_receipts([other])
        second = in_thread(record, engine, other)
        wait_until_blocked(engine, 1)
        first.rollback()
    assert second.result(20) == [Recorded.KEPT]
    assert kept(engine) == 2


def test_calls_that_keep_the_same_receipts_in_another_order_wait_for_each_other(engine):
    """They are kept in one order, so there is no deadlock."""
    a, b = receipt(provider_message_id="a"), receipt(provider_message_id="b")
    with Session(engine) as first:
        EngagementMessageRepository(first).record_receipts([a])
        second = in_thread(record, engine, b, a)
        wait_until_blocked(engine, 1)
        EngagementMessageRepository(first).record_receipts([b])
        first.commit()
    assert second.result(20) == [Recorded.KEPT] * 2
    assert kept(engine) == 2


# What becomes of it


def test_a_look_that_fails_loses_nothing(engine, caplog):
    """The receipt is taken out in the transaction that records it. The error is logged, and the run ends well."""
    message_id = sent(engine)
    know(engine, message_id)

    def die(connection, _message, _status):
        connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    execute(engine, "UPDATE engagement_message_queue SET provider_message_id = NULL")
    assert record(engine, receipt("undeliverable")) == [Recorded.KEPT]
    know(engine, message_id)

    assert process_message_queue(engine, lambda _: Sent(), on_settled=die).processed == 0

    assert "engagement.housekeeping_failed task=receipts" in caplog.text
    assert (row(engine, message_id).status, kept(engine)) == ("sent", 1)
    look(engine)
    assert (row(engine, message_id).status, kept(engine)) == ("failed", 0)


def test_the_hook_is_called_for_a_kept_receipt_as_for_any(host):
    """Once, for a message that has another status by it, and in the transaction that records it."""
    (message_id,) = queue(host, new_message())
    hook = Hook()

    def send(_):
        assert record(host, receipt("undeliverable"), receipt("undeliverable", at=TOLD + LATELY)) == [Recorded.KEPT] * 2
        return WAMID

    process_message_queue(host, send, on_settled=hook)

    assert row(host, message_id).status == "failed"
    assert hook.heard == [("user1", "sent"), ("user1", "failed")]


def test_two_looks_at_once_share_the_receipts(engine):
    """A look leaves alone what another one has taken, and waits for nobody."""
    message_id = sent(engine, InDoubt("no answer"))
    assert record(engine, receipt(), receipt("read")) == [Recorded.KEPT] * 2
    know(engine, message_id)
    with Session(engine) as other:
        assert len(keeping.take_matching(HostSession(other, None), LATELY)) == 2
        in_thread(look, engine).result(20)
        other.rollback()
    assert kept(engine) == 2
    look(engine)
    assert kept(engine) == 0


def test_more_than_one_transaction_matches_are_matched(engine, caplog):
    """In several transactions."""
    caplog.set_level(logging.INFO, "engagement")
    message_id = sent(engine, InDoubt("no answer"))
    record(engine, *(receipt(at=TOLD + timedelta(seconds=n)) for n in range(AT_ONCE + 1)))
    assert kept(engine) == AT_ONCE + 1
    know(engine, message_id)

    look(engine)

    assert (kept(engine), row(engine, message_id).delivered_at) == (0, TOLD)
    matched = [line for line in caplog.messages if line.startswith("engagement.receipts_matched")]
    assert [line.split()[1] for line in matched] == [f"receipts={AT_ONCE}", "receipts=1"]


def test_what_is_never_known_is_dropped_after_a_day_and_counted(engine, caplog):
    """Not a moment sooner, and not before a last look for its message, however late that comes."""
    caplog.set_level(logging.INFO, "engagement")
    message_id = sent(engine, InDoubt("no answer"))
    names = {WAMID: "2 days", "young": "23 hours 59 minutes", "old": "24 hours 1 minute", "older": "9 days"}
    for name, age in names.items():
        assert record(engine, receipt(provider_message_id=name)) == [Recorded.KEPT]
        move = (
            "UPDATE engagement_receipt SET kept_at = now() - CAST(:age AS interval) WHERE provider_message_id = :name"
        )
        execute(engine, move, age=age, name=name)
    know(engine, message_id)
    counts = []

    class Counting:
        def dropped(self, receipts):
            counts.append(receipts)

        def heard(self, *_):
            pass

    observers.observe(counting := Counting())
    try:
        look(engine, within=LATELY)
        assert (kept(engine), counts) == (4, [])
        look(engine)
    finally:
        observers.unobserve(counting)

    assert execute(engine, "SELECT provider_message_id FROM engagement_receipt").scalars().all() == ["young"]
    assert row(engine, message_id).delivered_at == TOLD
    assert counts == [2]
    assert "engagement.receipts_dropped receipts=2" in caplog.messages


def test_a_forgotten_message_takes_no_kept_receipt(engine):
    """Its provider's id is blanked, so the receipt finds nothing, and is gone after a day."""
    message_id = sent(engine, InDoubt("no answer"))
    record(engine, receipt("read", reason="5511999990001"))
    know(engine, message_id)
    with Session(engine) as session, session.begin():
        EngagementMessageRepository(session).forget_user("user1")

    look(engine)

    assert (row(engine, message_id).read_at, kept(engine)) == (None, 1)


def test_a_worker_looks_each_minute(engine, monkeypatch):
    """Without being asked to keep house."""
    monkeypatch.setattr(housekeeping, "MATCH_EVERY", timedelta(milliseconds=20))
    (message_id,) = queue(engine, new_message())

    def send(_):
        record(engine, receipt())
        return WAMID

    with Running(engine, send):
        until(lambda: row(engine, message_id).delivered_at == TOLD)
    assert kept(engine) == 0


def test_a_receipt_in_a_transaction_that_is_rolled_back_was_not_kept(engine):
    """It is the caller's transaction."""
    with Session(engine) as session:
        EngagementMessageRepository(session).record_receipts([receipt()])
        session.rollback()
    assert kept(engine) == 0


@pytest.mark.parametrize("at_its_end", [True, False])
def test_a_run_that_is_stopped_leaves_it_to_the_next_one(engine, at_its_end):
    """What stops a run stops its looks, too."""
    message_id = sent(engine, InDoubt("no answer"))
    record(engine, receipt())
    know(engine, message_id)
    stop = threading.Event()
    if not at_its_end:
        stop.set()

    process_message_queue(engine, lambda _: Sent(), stop=stop)

    assert kept(engine) == (0 if at_its_end else 1)
