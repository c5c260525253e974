"""Receipts in metrics and traces: what is counted and timed, once for each message, and what is never told."""

import logging
from datetime import datetime, timedelta
from types import SimpleNamespace

from conftest import execute, new_message, queue, row
from sqlalchemy.orm import Session
from test_prometheus import scraping

from engagement import EngagementMessageRepository, InDoubt, NotSent, Recorded, process_message_queue
from engagement._watching import observers as observing
from engagement._watching.metrics import MOST_CODES
from receipts.test_recording import WAMID, named, receipt, record, sent

ROUND = timedelta(microseconds=1)


def counted(found: dict, name: str) -> dict:
    """Return the values of a metric by the values of its labels."""
    return {
        tuple(value for _, value in labels): value
        for (metric, labels), value in found.items()
        if metric == f"engagement_{name}" and value
    }


def in_trouble(engine, outcome, **fields) -> int:
    (message_id,) = queue(engine, new_message(**fields))
    process_message_queue(engine, lambda _: outcome, backoff=lambda _: timedelta(hours=1))
    return message_id


# What is counted


def test_each_message_is_delivered_and_read_once(engine):
    """By type, whatever receipts come twice, at once or in another order: `read` alone is a delivery too."""
    both, review = sent(engine, "a", user_id="a"), sent(engine, "b", user_id="b", message_type="review")
    by_name = {"reference": named(engine, both)}
    with scraping() as scrape:
        record(engine, receipt("delivered", 1, **by_name), receipt("delivered", **by_name))
        record(engine, receipt("read", 2, **by_name), receipt("read", 1, **by_name), receipt("accepted", **by_name))
        record(engine, receipt("read", reference=named(engine, review)))
        record(engine, receipt("delivered", -1, reference=named(engine, review)))
        found = scrape()

    assert counted(found, "delivered_total") == {("goodbye",): 1, ("review",): 1}
    assert counted(found, "read_total") == {("goodbye",): 1, ("review",): 1}
    assert counted(found, "undeliverable_total") == counted(found, "doubts_resolved_total") == {}


def test_the_time_to_a_delivery_begins_with_the_send(engine):
    """It ends with the first `delivered`: a later one, a `read`, and one that resolves a doubt have no such time."""
    timed, doubted, seen = sent(engine, "a", user_id="a"), sent(engine, InDoubt("?"), user_id="b"), sent(engine, "c")
    sent_at = row(engine, timed).sent_at
    with scraping() as scrape:
        first = receipt("delivered", at=sent_at + timedelta(seconds=90), reference=named(engine, timed))
        record(engine, first, receipt("delivered", at=sent_at, reference=named(engine, timed)))
        record(engine, receipt("delivered", 60, reference=named(engine, doubted)))
        record(engine, receipt("read", 60, reference=named(engine, seen)))
        found = scrape()

    assert counted(found, "sent_to_delivered_seconds_count") == {("goodbye",): 1}
    assert counted(found, "sent_to_delivered_seconds_sum") == {("goodbye",): 90}


def test_a_providers_clock_that_is_behind_gives_no_negative_time(engine):
    """A delivery before its send is none: the clocks differ."""
    message_id = sent(engine)
    with scraping() as scrape:
        at = row(engine, message_id).sent_at - timedelta(seconds=2)
        record(engine, receipt("delivered", at=at, reference=named(engine, message_id)))
        found = scrape()

    assert found["engagement_sent_to_delivered_seconds_count", (("message_type", "goodbye"),)] == 1
    assert found["engagement_sent_to_delivered_seconds_sum", (("message_type", "goodbye"),)] == 0


def test_an_undeliverable_message_counts_by_code_once(engine):
    """A later receipt of the same end is none; one of a further try, after a person's retry, is another."""
    message_id = sent(engine)
    name = {"reference": named(engine, message_id)}
    with scraping() as scrape:
        record(engine, receipt("undeliverable", code="131047", **name))
        assert record(engine, receipt("undeliverable", 1, code="131049", **name)) == [Recorded.RECORDED]
        with Session(engine) as session, session.begin():
            assert EngagementMessageRepository(session).retry_message(message_id)
        process_message_queue(engine, lambda _: "again")
        assert row(engine, message_id).undeliverable_at
        record(engine, receipt("undeliverable", 2, code="131026", **name))
        found = scrape()

    assert counted(found, "undeliverable_total") == {("131047", "goodbye"): 1, ("131026", "goodbye"): 1}


def test_a_code_of_a_provider_is_a_number_of_few(engine):
    """No text and no number of a person's becomes a label, and after so many codes the others are one."""
    texts = [None, "mailbox of Ana full", "5511999", "131026\n", "١٣١٠٢٦", ""]
    codes = [*texts, "131026", *map(str, range(MOST_CODES)), "131026"]
    with scraping() as scrape:
        for number, code in enumerate(codes):
            message_id = sent(engine, f"id-{number}", user_id=f"user{number}")
            record(engine, receipt("undeliverable", code=code, reference=named(engine, message_id)))
        found = counted(scrape(), "undeliverable_total")

    assert found.pop(("none", "goodbye")) == 1
    assert found.pop(("other", "goodbye")) == 6
    assert found.pop(("131026", "goodbye")) == 2
    assert {code for code, _ in found} == set(map(str, range(MOST_CODES - 1)))


def test_a_doubt_that_evidence_resolves_is_counted(engine):
    """Also that of a message that would be tried again; not one that stays, and no end of a message without a doubt."""
    seen, gone = (sent(engine, InDoubt("?"), user_id=user) for user in ("seen", "gone"))
    (stays,) = queue(engine, new_message("stays"))
    transport = SimpleNamespace(idempotent=True, send=lambda _: InDoubt("?"))
    process_message_queue(engine, transport, backoff=lambda _: timedelta(0))
    (again,) = queue(engine, new_message("again"))
    process_message_queue(engine, transport, backoff=lambda _: timedelta(hours=1))
    unsent, fine = in_trouble(engine, NotSent("busy"), user_id="unsent"), sent(engine, user_id="fine")
    assert (row(engine, again).status, row(engine, again).has_doubt) == ("pending", True)
    with scraping() as scrape:
        record(engine, *(receipt("accepted", reference=named(engine, each)) for each in (seen, again, unsent)))
        record(engine, receipt("delivered", reference=named(engine, seen)))
        record(engine, *(receipt("undeliverable", 1, reference=named(engine, each)) for each in (gone, fine, stays)))
        found = scrape()

    assert row(engine, stays).status == "in_doubt"
    assert row(engine, stays).undeliverable_at is not None
    assert counted(found, "doubts_resolved_total") == {("goodbye", "sent"): 2, ("goodbye", "failed"): 1}


def test_a_receipt_that_tells_nothing_new_is_told_to_nobody(engine, watched):
    """Neither is one of a message that is not known, nor one that contradicts."""
    message_id = sent(engine)
    name = {"reference": named(engine, message_id)}
    record(engine, receipt("delivered", **name))
    before = (len(watched.spans), watched.metrics()["engagement.delivered"])

    record(engine, receipt("delivered", 1, **name), receipt("undeliverable", 2, **name))
    record(engine, receipt("read", provider_message_id="of-another"))

    assert (len(watched.spans), watched.metrics()["engagement.delivered"]) == before


def test_what_is_rolled_back_was_counted(engine):
    """A receipt counts when it is recorded, as a message does when it is queued: the page says so."""
    message_id = sent(engine)
    with scraping() as scrape, Session(engine) as session:
        EngagementMessageRepository(session).record_receipts([receipt("read", reference=named(engine, message_id))])
        session.rollback()
        found = scrape()

    assert row(engine, message_id).read_at is None
    assert counted(found, "read_total") == {("goodbye",): 1}


def test_opentelemetry_measures_the_same(engine, watched):
    """Under its own names."""
    one, other = sent(engine, "a", user_id="a"), sent(engine, InDoubt("?"), user_id="b")
    at = row(engine, one).sent_at + timedelta(seconds=30)
    record(engine, receipt("delivered", at=at, reference=named(engine, one)))
    record(engine, receipt("read", 1, reference=named(engine, one)))
    record(engine, receipt("undeliverable", code="131026", reference=named(engine, other)))

    measured = watched.metrics()
    goodbye = (("message_type", "goodbye"),)
    assert measured["engagement.delivered"] == measured["engagement.read"] == {goodbye: 1}
    assert measured["engagement.undeliverable"] == {(("code", "131026"), *goodbye): 1}
    assert measured["engagement.doubts_resolved"] == {(*goodbye, ("status", "failed")): 1}
    assert measured["engagement.sent_to_delivered"] == {goodbye: (1, 30)}


# Traces


def test_a_receipt_is_linked_to_what_queued_its_message(engine, watched):
    """One call is one span, with an event for each receipt and a link to what queued each message."""
    with watched.tracer.start_as_current_span("webhook"):
        one, other = sent(engine, "a", user_id="a"), sent(engine, "b", user_id="b", message_type="review")
        record(
            engine,
            receipt("delivered", reference=named(engine, one)),
            receipt("read", 1, reference=named(engine, one)),
            receipt("undeliverable", reference=named(engine, other)),
        )

    span, (first, second) = watched.one("record_receipts"), watched.named("queue")
    assert [(link.context.span_id, link.attributes["messaging.message.id"]) for link in span.links] == [
        (first.context.span_id, str(one)),
        (second.context.span_id, str(other)),
    ]
    told = [(each.name, *each.attributes.values()) for each in span.events]
    assert told == [
        ("engagement.delivered", str(one), "goodbye", "delivered", "sent"),
        ("engagement.read", str(one), "goodbye", "read", "sent"),
        ("engagement.undeliverable", str(other), "review", "undeliverable", "failed"),
    ]
    assert span.parent is not None
    assert dict(span.attributes) == {
        "messaging.system": "engagement",
        "messaging.destination.name": "engagement_message_queue",
        "messaging.operation.name": "record_receipts",
        "messaging.batch.message_count": 3,
    }
    assert span.start_time < span.events[0].timestamp <= span.end_time


def test_a_single_receipt_is_told_in_the_span_itself(engine, watched):
    """As the one message of a settle is."""
    message_id = sent(engine)
    record(engine, receipt("read", reference=named(engine, message_id)))

    about = dict(watched.one("record_receipts").attributes)
    assert about["messaging.message.id"] == str(message_id)
    assert (about["engagement.receipt"], about["engagement.status"]) == ("read", "sent")
    assert about["engagement.message_type"] == "goodbye"


def test_nothing_personal_is_exported(engine, watched, caplog):
    """No reason, text of a code, provider's id, key or user of a receipt is in a span, a metric or a log."""
    caplog.set_level(logging.DEBUG, logger="engagement")
    message_id = sent(engine, user_id="person-1")
    told = receipt("undeliverable", reference=named(engine, message_id), code="box of person-1", reason="person-1 left")
    assert record(engine, told) == [Recorded.RECORDED]

    exported = watched.text()
    assert "engagement.undeliverable" in exported
    for private in ("person-1", WAMID, "box of", named(engine, message_id)):
        assert private not in exported + caplog.text


# No harm


def test_a_broken_observer_loses_no_receipt(engine, caplog):
    """Its error is logged by its type, and the receipt is recorded."""

    def hear(*_):
        raise RuntimeError("secret")

    broken = SimpleNamespace(heard=hear)
    message_id = sent(engine)
    observing.observe(broken)
    try:
        assert record(engine, receipt("read", reference=named(engine, message_id))) == [Recorded.RECORDED]
    finally:
        observing.unobserve(broken)

    assert row(engine, message_id).read_at is not None
    assert "engagement.observer_failed error=RuntimeError" in caplog.text
    assert "secret" not in caplog.text


def test_a_context_that_is_none_stops_nothing(engine, watched):
    """Somebody may have written anything there."""
    message_id = sent(engine)
    execute(engine, "UPDATE engagement_message_queue SET trace_context = 'nonsense'")
    record(engine, receipt("read", reference=named(engine, message_id)))

    assert watched.one("record_receipts").links == ()
    assert isinstance(row(engine, message_id).read_at, datetime)
