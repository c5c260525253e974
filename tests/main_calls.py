"""The main calls, in one go: what the host does in its sessions, and what workers and the command do in their own."""

from contextlib import contextmanager
from datetime import UTC, datetime, time, timedelta

from conftest import new_message
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from engagement import (
    EngagementMessageRepository,
    InDoubt,
    NotSent,
    Pauses,
    Postpone,
    Receipt,
    Recorded,
    Refused,
    Sent,
    SuppressionList,
    process_message_queue,
)
from engagement._claim import START
from engagement._delivery import database as claims
from engagement._delivery.database import Holder
from engagement._delivery.options import Options
from engagement._operating.housekeeping import Housekeeping
from engagement._operating.lists import count_messages, list_messages
from engagement._operating.overview import activity, overview
from engagement._queueing import batch
from engagement._sql.own_transactions import for_own_transactions
from engagement._watching.metrics import QueueReader
from engagement.messages import delivery_id, reference
from engagement.policies import FrequencyCap, Suppression
from engagement.verification import verify

LONG_AGO = datetime(2020, 2, 29, 23, 30, 15, 123456, UTC)
LATER = datetime(2100, 11, 12, 1, 2, 3, tzinfo=UTC)
ANSWERS = {
    "sent": Sent("provider-id"),
    "not_sent": NotSent("É a rede: 'no\\route'", timedelta(hours=1)),
    "refused": Refused("no such number"),
    "in_doubt": InDoubt("no answer"),
    "postponed": Postpone(LATER, "quiet hours"),
}
TEXT = "Olá 'Zoë' \\ \"₿\" 🎉 NULL"


def of(user: str, **fields):
    return new_message(user, message_params={"name": TEXT}, **fields)


def host_calls(session: Session, schema: str | None = None) -> None:
    """Queue, look and change in the host's own session; nothing is committed here."""
    queue = EngagementMessageRepository(session, schema=schema)
    before = _settings(session)
    now = queue.queue_message(of("now"))
    late = queue.queue_message(of("late", scheduled_for=LONG_AGO, expires_at=LATER, idempotency_key="late"))
    soon = queue.queue_message(of("soon", expires_at=LATER))
    assert (now.created, late.created, soon.created) == (True, True, True)
    again = queue.queue_message(of("again", idempotency_key="late"))
    assert (again.message_id, again.is_of_another_user) == (late.message_id, True)
    assert queue.queue_messages([of("late", idempotency_key="late"), of("many", scheduled_for=LATER)]).created == 1
    chunk, batch.CHUNK = batch.CHUNK, 2
    try:
        several = [of(f"batch{number % 5}", scheduled_for=LATER, idempotency_key=f"b{number}") for number in range(7)]
        assert [queue.queue_messages(several).created for _ in range(2)] == [7, 0]
    finally:
        batch.CHUNK = chunk

    found = queue.get_message(late.message_id)
    assert (found.scheduled_for, found.expires_at, found.message_params) == (LONG_AGO, LATER, {"name": TEXT})
    assert queue.get_message_by_key("late").id == late.message_id
    assert [each.id for each in queue.get_pending_messages("late")] == [late.message_id]
    counts = queue.count_by_status()
    assert counts["pending"] == 11
    assert abs(counts.oldest_due - (datetime.now(UTC) - LONG_AGO)) < timedelta(hours=1)
    assert queue.reschedule_message(now.message_id, LATER)
    assert queue.get_message(now.message_id).next_attempt_at == LATER
    assert queue.cancel_message(now.message_id, TEXT, by="ana").verdict == "cancelled"
    assert queue.cancel_pending_messages("soon", "goodbye") == 1
    assert queue.forget_user("late").blanked == 1
    assert queue.get_message(late.message_id).destination_jid is None

    page = list_messages(session, limit=3, schema=schema, created_since=LONG_AGO, user_id="batch0")
    assert [each.scheduled_for for each in page] == [LATER, LATER]
    assert count_messages(session, schema=schema, scheduled_until=LATER) == 2
    facts = overview(session, schema=schema)
    assert (facts.by_status["pending"], facts.by_status["cancelled"], facts.due) == (8, 3, 0)
    assert overview(session, schema=schema, count_up_to=1).by_status["pending"] >= 1
    hour = timedelta(hours=1)
    assert len(activity(session, datetime.now(UTC) - 2 * hour, hour, schema=schema)) == 3
    assert verify(session, schema=schema) == []
    read = Receipt(event="read", at=LONG_AGO, provider=TEXT, reference=_reference(page[0]), reason=TEXT)
    assert [each.answer for each in queue.record_receipts([read, read])] == [Recorded.RECORDED, Recorded.ALREADY_KNOWN]
    assert queue.get_message(page[0].id).read_at == LONG_AGO
    early = Receipt(event="read", at=LONG_AGO, provider=TEXT, provider_message_id="early", reason=TEXT)
    assert [each.answer for each in queue.record_receipts([early, early])] == [Recorded.KEPT] * 2
    _suppress(SuppressionList(session, schema=schema))
    _pause_and_resume(Pauses(session, schema=schema))
    assert _settings(session) == before


def _suppress(suppressed: SuppressionList) -> None:
    address = new_message("late").destination_jid
    for until in (LATER, None, LATER):
        suppressed.suppress(address, TEXT, until=until)
    entry = suppressed.find(address)
    assert (entry.reason, entry.until, suppressed.unsuppress(address)) == (TEXT, None, True)
    assert suppressed.find(address) is None


def _pause_and_resume(pauses: Pauses) -> None:
    for until in (LATER, None):
        pauses.pause(TEXT, message_type="campaign", until=until, by=TEXT)
    assert [(each.reason, each.by, each.until) for each in pauses.in_force()] == [(TEXT, TEXT, None)]
    assert pauses.resume(message_type="campaign")


def _reference(message) -> str:
    return reference(message.id, delivery_id(message.idempotency_key))


def _settings(session: Session) -> dict[str, str]:
    """Return what a host could find changed: our calls leave no setting behind."""
    return dict(session.execute(text("SELECT name, setting FROM pg_settings")).all())


def worker_calls(engine: Engine, host: Engine, schema: str | None = None, *, host_schema: str | None = None) -> None:
    """Claim, send, settle, take over, decide, prune, count: each outcome, on an empty queue; the host has an engine."""
    with _changing(host, host_schema or schema) as queue:
        ids = {name: queue.queue_message(of(name, scheduled_for=LONG_AGO)).message_id for name in (*ANSWERS, "lost")}
        ids["expired"] = queue.queue_message(of("expired", scheduled_for=LONG_AGO, expires_at=LATER)).message_id
        ids["capped"] = queue.queue_message(of("capped", scheduled_for=LONG_AGO)).message_id
    table = "engagement_message_queue" if schema is None else f'"{schema}".engagement_message_queue'
    with engine.begin() as connection:
        _lose(connection, table, ids["lost"])
        connection.exec_driver_sql(
            f"UPDATE {table} SET expires_at = scheduled_for + interval '1 s' WHERE id = {ids['expired']}"
        )
    _hold(for_own_transactions(engine, schema))
    given = []

    def send(message):
        given.append(message)
        assert message.message_params == {"name": TEXT}
        return ANSWERS.get(message.user_id) or Sent()

    capped = FrequencyCap(send, engine, lambda _: UTC, limit=1, per="day", resume_at=time(9), schema=schema)
    told = []
    result = process_message_queue(
        engine,
        Suppression(capped, engine, schema=schema),
        schema=schema,
        concurrency=3,
        on_settled=lambda *given: told.append(given[1:]),
    )

    statuses = _statuses(host, host_schema or schema, ids)
    assert statuses == {
        "sent": "sent",
        "not_sent": "pending",
        "refused": "failed",
        "in_doubt": "in_doubt",
        "postponed": "pending",
        "lost": "in_doubt",
        "expired": "expired",
        "capped": "sent",
    }
    assert {message.user_id: status for message, status in told} == statuses
    assert (result.processed, result.expired) == (7, 1)
    assert {message.scheduled_for for message in given} == {LONG_AGO}

    with _changing(host, host_schema or schema) as queue:
        assert queue.get_message(ids["postponed"]).next_attempt_at == LATER
        again = queue.get_message(ids["not_sent"])
        assert again.error_message == "É a rede: 'no\\route'"
        assert timedelta(minutes=59) < again.next_attempt_at - datetime.now(UTC) < timedelta(minutes=61)
        assert queue.get_message(ids["sent"]).provider_message_id == "provider-id"
        assert queue.resolve_message(ids["in_doubt"], sent=True, by="ana")
        assert datetime.now(UTC) - queue.get_message(ids["in_doubt"]).sent_at < timedelta(minutes=5)
        assert queue.resolve_message(ids["lost"], sent=False)
        assert queue.retry_message(ids["refused"])
        assert queue.retry_message(ids["expired"])
        assert queue.prune_messages(timedelta(days=365), limit=1) == 1

    class LookingUp:
        def send(self, message):
            return Sent()

        def look_up(self, message):
            return Sent("looked up")

    # Again, now by a worker: what was given back is sent, and what is lost once more is found.
    with engine.begin() as connection:
        _lose(connection, table, ids["lost"])
    assert process_message_queue(engine, LookingUp(), schema=schema).succeeded == 3
    assert set(
        _statuses(host, host_schema or schema, {name: ids[name] for name in ("refused", "expired", "lost")}).values()
    ) == {"sent"}
    ours = for_own_transactions(engine, schema)
    keeping = Housekeeping(ours, Options(schema=schema))
    assert abs(keeping._now() - datetime.now(UTC).timestamp()) < 3_600  # noqa: SLF001 - it comes once an hour
    keeping._prune(timedelta(days=365))  # noqa: SLF001
    keeping._verify(timedelta(hours=1))  # noqa: SLF001
    with Session(ours) as session:
        assert count_messages(session, schema=schema, blanked=True) == 3
        assert verify(session, schema=schema) == []
    samples = {
        (metric.name, *labels.values()): value for metric, labels, value in QueueReader(engine, schema=schema).read()
    }
    assert samples["engagement.up",] == 1
    assert samples["engagement.scheduled",] == 2


@contextmanager
def _changing(engine, schema):
    with Session(engine) as session, session.begin():
        yield EngagementMessageRepository(session, schema=schema)


def _hold(ours: Engine) -> None:
    """Claim, extend the leases, and adopt what was claimed; and leave it all as it was."""
    holder = Holder("holder/1", timedelta(minutes=1))
    with ours.connect() as connection, connection.begin() as transaction:
        claimed = claims.claim(connection, holder, limit=9, after=START, busy=[], one_per_destination=True)
        assert len(claimed.claims) == 6
        assert len(claims.extend(connection, holder.lease, claimed.claims)) == 6
        assert len(claims.adopt(connection, holder, names=["holder/1"])) == 6
        transaction.rollback()


def _lose(connection, table: str, message_id: int) -> None:
    """Make it a message whose worker was lost."""
    connection.exec_driver_sql(
        f"UPDATE {table} SET status = 'sending', attempt = attempt + 1, claimed_by = 'lost', lease_expires_at = now()"
        f" WHERE id = {message_id}"
    )


def _statuses(host, schema, ids) -> dict[str, str]:
    with _changing(host, schema) as queue:
        return {name: str(queue.get_message(message_id).status) for name, message_id in ids.items()}
