"""Receipts reach their messages: in any order, twice, from many sessions at once, and before a send was settled."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from conftest import execute, new_message, queue, row, wait_until_blocked
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.orm import Session

from engagement import (
    EngagementMessageRepository,
    InDoubt,
    InvalidMessage,
    NotSent,
    Receipt,
    Recorded,
    Refused,
    Sent,
    Withdraw,
    process_message_queue,
    verify,
)
from engagement._receiving.weighing import Told, weigh
from engagement.messages import delivery_id, reference, whatsapp_message_id
from engagement.models import MessageStatus

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
WAMID = "wamid.HBgNNTUxMQ=="


def named(engine, message_id: int) -> str:
    return reference(message_id, delivery_id(row(engine, message_id).idempotency_key))


def receipt(event: str, minutes: int = 0, **fields) -> Receipt:
    at = datetime.now(UTC) + timedelta(minutes=minutes)
    return Receipt(**{"event": event, "at": at, "provider": "cloud"} | fields)


def record(engine, *receipts: Receipt) -> list[Recorded]:
    with Session(engine) as session, session.begin():
        return [each.answer for each in EngagementMessageRepository(session).record_receipts(receipts)]


def sent(engine, answer=WAMID, **fields) -> int:
    (message_id,) = queue(engine, new_message(**fields))
    process_message_queue(engine, lambda _: answer)
    return message_id


def broken(engine) -> list:
    with Session(engine) as session:
        return verify(session)


def at_once(_failures):
    return timedelta(0)


# By which name


def test_a_receipt_finds_its_message_by_each_name(engine):
    """By our reference, by a WhatsApp id of ours, and by the provider's own id."""
    first, second, third = (sent(engine, f"id-{user}", user_id=user) for user in ("user1", "user2", "user3"))
    whatsapp_id = whatsapp_message_id(second, delivery_id(row(engine, second).idempotency_key))

    answers = record(
        engine,
        receipt("delivered", reference=named(engine, first)),
        receipt("delivered", provider_message_id=whatsapp_id),
        receipt("delivered", provider_message_id="id-user3"),
    )

    assert answers == [Recorded.RECORDED] * 3
    assert all(row(engine, message_id).delivered_at for message_id in (first, second, third))


def test_a_name_without_its_proof_finds_nothing(engine):
    """After a restored backup another message has the number; and somebody else's WhatsApp ids look like ours."""
    message_id = sent(engine)
    other = delivery_id("user9:goodbye:2026-01-01")

    answers = record(
        engine,
        receipt("undeliverable", reference=reference(message_id, other)),
        receipt("undeliverable", reference=reference(10**6, delivery_id(row(engine, message_id).idempotency_key))),
        receipt("undeliverable", provider_message_id=whatsapp_message_id(message_id, other)),
        receipt("undeliverable", provider_message_id="wamid.ofAnother"),
    )

    assert answers == [Recorded.UNKNOWN_MESSAGE] * 2 + [Recorded.KEPT] * 2
    assert row(engine, message_id).status == "sent"


# What each event does


def test_a_doubt_is_resolved_by_each_sign_of_life(engine):
    """`accepted`, `delivered` and `read` are a late `Sent`, in the history's words for a doubt that is resolved."""
    for event in ("accepted", "delivered", "read"):
        message_id = sent(engine, InDoubt("no answer"), user_id=event)

        assert record(engine, receipt(event, -1, reference=named(engine, message_id))) == [Recorded.RECORDED]

        found = row(engine, message_id)
        assert (found.status, found.has_doubt) == ("sent", False)
        assert (found.delivered_at is not None, found.read_at is not None) == (event != "accepted", event == "read")
        resolved = found.history[-1]
        assert (resolved["event"], resolved["sent"], resolved["reason"], resolved["by"]) == (
            "resolved", True, event, "cloud",
        )  # fmt: skip


def test_an_undeliverable_message_has_failed_and_is_not_tried_again(engine):
    """With the provider's reason and code; a person may have it tried again, and then its old receipts are over."""
    message_id = sent(engine)
    told = receipt("undeliverable", provider_message_id=WAMID, reason="Re-engagement message", code="131047")

    assert record(engine, told, told) == [Recorded.RECORDED, Recorded.ALREADY_KNOWN]
    found = row(engine, message_id)
    assert (found.status, found.error_message) == ("failed", "131047: Re-engagement message")
    assert [(entry["event"], entry["by"]) for entry in found.history] == [("undeliverable", "cloud")]
    assert process_message_queue(engine, lambda _: Sent()).processed == 0

    with Session(engine) as session, session.begin():
        assert EngagementMessageRepository(session).retry_message(message_id)
    again = receipt("undeliverable", reference=named(engine, message_id), at=told.at)
    assert record(engine, told, again) == [Recorded.ALREADY_KNOWN] * 2
    assert process_message_queue(engine, lambda _: Sent("second")).succeeded == 1
    assert record(engine, again) == [Recorded.ALREADY_KNOWN]
    assert row(engine, message_id).status == "sent"


def test_what_an_idempotent_transport_would_send_again_is_not(engine):
    """A receipt of the attempt in doubt stops the next one."""

    class Idempotent:
        idempotent = True

        def send(self, _message):
            return InDoubt("no answer")

    (message_id,) = queue(engine, new_message())
    process_message_queue(engine, Idempotent(), limit=1, backoff=at_once)
    assert row(engine, message_id).status == "pending"

    assert record(engine, receipt("accepted", reference=named(engine, message_id))) == [Recorded.RECORDED]

    assert process_message_queue(engine, Idempotent()).processed == 0
    assert (row(engine, message_id).status, broken(engine)) == ("sent", [])


def test_what_was_called_unsent_is_corrected(engine):
    """Three failures, and then the person has read it."""
    (message_id,) = queue(engine, new_message())
    for _ in range(3):
        process_message_queue(engine, lambda _: NotSent("down"), limit=1, backoff=at_once)

    assert record(engine, receipt("read", reference=named(engine, message_id))) == [Recorded.RECORDED]

    assert row(engine, message_id).status == "sent"


def test_a_receipt_of_a_message_that_was_never_claimed_contradicts(engine):
    """Nothing is changed by what cannot be."""
    (message_id,) = queue(engine, new_message())

    assert record(engine, receipt("undeliverable", reference=named(engine, message_id))) == [Recorded.CONTRADICTS]
    assert row(engine, message_id).status == "pending"


# Which attempt


def tried_again(engine, message_id: int, method: str = "retry_message", **given) -> None:
    with Session(engine) as session, session.begin():
        assert getattr(EngagementMessageRepository(session), method)(message_id, **given)


def test_a_message_that_arrived_after_all_is_not_tried_again(engine):
    """Given up, tried again by a person, and then delivered, as the provider's own id says."""
    message_id = sent(engine)
    record(engine, receipt("undeliverable", provider_message_id=WAMID))
    tried_again(engine, message_id)

    assert record(engine, receipt("delivered", provider_message_id=WAMID)) == [Recorded.RECORDED]

    assert process_message_queue(engine, lambda _: Sent()).processed == 0
    assert (row(engine, message_id).status, row(engine, message_id).undeliverable_at) == ("sent", None)


def test_a_late_failure_of_an_earlier_attempt_does_not_undo_the_latest(engine):
    """The first one was called unsent, and its failure comes while the second is on its way, whose answer counts."""
    message_id = sent(engine, InDoubt("no answer"))
    tried_again(engine, message_id, "resolve_message", sent=False)

    def send(message):
        late = receipt("undeliverable", 1, reference=message.reference, provider_message_id="first")
        assert record(engine, late) == [Recorded.RECORDED]
        return "second"

    process_message_queue(engine, send)

    found = row(engine, message_id)
    assert (found.status, found.provider_message_id) == ("sent", "second")


def test_accepted_counts_of_an_attempt_that_was_not_given_up(engine):
    """It came before the failure of the other one, by the provider's clock, and has another id."""
    message_id = sent(engine, InDoubt("no answer"))
    tried_again(engine, message_id, "resolve_message", sent=False)
    process_message_queue(engine, lambda _: InDoubt("no answer"))
    name = named(engine, message_id)

    answers = record(
        engine,
        receipt("undeliverable", 2, reference=name, provider_message_id="first"),
        receipt("accepted", 1, reference=name, provider_message_id="first"),
        receipt("accepted", 1, reference=name, provider_message_id="second"),
    )

    assert answers == [Recorded.RECORDED, Recorded.ALREADY_KNOWN, Recorded.RECORDED]
    assert row(engine, message_id).status == "sent"


def test_a_settled_message_keeps_to_the_receipts_of_its_own_attempt(engine):
    """The first attempt was resolved as unsent, and the second one's id is known: only that one can be given up."""
    message_id = sent(engine, InDoubt("no answer"))
    tried_again(engine, message_id, "resolve_message", sent=False)
    process_message_queue(engine, lambda _: "second")
    name = named(engine, message_id)

    first = receipt("undeliverable", 1, reference=name, provider_message_id="first")
    assert record(engine, first) == [Recorded.ALREADY_KNOWN]
    assert row(engine, message_id).status == "sent"
    second = receipt("undeliverable", 1, reference=name, provider_message_id="second")
    assert record(engine, second) == [Recorded.RECORDED]
    assert row(engine, message_id).status == "failed"
    early = receipt("accepted", -9, reference=name, provider_message_id="first")
    assert record(engine, early) == [Recorded.ALREADY_KNOWN]
    assert row(engine, message_id).status == "failed"


def test_a_failure_that_is_told_again_does_not_undo_a_retry(engine):
    """With another moment, but of the attempt that is over: the row has its id until the next settlement."""
    message_id = sent(engine)
    record(engine, receipt("undeliverable", provider_message_id=WAMID))
    tried_again(engine, message_id)

    assert record(engine, receipt("undeliverable", 1, provider_message_id=WAMID)) == [Recorded.ALREADY_KNOWN]
    assert row(engine, message_id).status == "pending"


def test_a_quick_receipt_brings_the_id_of_its_own_attempt(engine):
    """In the place of that of the one before."""
    message_id = sent(engine)
    record(engine, receipt("undeliverable", provider_message_id=WAMID))
    tried_again(engine, message_id)

    def send(message):
        record(engine, receipt("accepted", 1, reference=message.reference, provider_message_id="second"))
        return InDoubt("no answer")

    process_message_queue(engine, send)

    assert row(engine, message_id).provider_message_id == "second"


def test_a_failure_from_before_a_decision_is_known(engine):
    """A person has said that it was not sent, and it is tried again."""
    message_id = sent(engine, InDoubt("no answer"))
    tried_again(engine, message_id, "resolve_message", sent=False)

    answers = record(engine, receipt("undeliverable", -1, reference=named(engine, message_id)))

    assert (answers, row(engine, message_id).status) == ([Recorded.ALREADY_KNOWN], "pending")


def test_a_doubt_is_ended_by_a_failure_from_before_it_was_noted(engine):
    """The provider gave up first, and the worker's time-out came after."""
    message_id = sent(engine, InDoubt("no answer"))

    answers = record(engine, receipt("undeliverable", -1, reference=named(engine, message_id)))

    assert (answers, row(engine, message_id).status) == ([Recorded.RECORDED], "failed")


@pytest.mark.parametrize("minutes", [-9, 9])
def test_a_failure_from_before_a_retry_is_known(engine, minutes):
    """By the reference alone, the moment of the receipt says which attempt it speaks of."""
    (message_id,) = queue(engine, new_message())
    process_message_queue(engine, lambda _: Refused("no"))
    tried_again(engine, message_id)

    answers = record(engine, receipt("undeliverable", minutes, reference=named(engine, message_id)))

    assert answers == [Recorded.ALREADY_KNOWN if minutes < 0 else Recorded.RECORDED]
    assert row(engine, message_id).status == ("pending" if minutes < 0 else "failed")


def test_a_few_seconds_between_the_clocks_are_no_other_attempt(engine):
    """A provider that shows whole seconds seems to have given up before it was asked."""
    (message_id,) = queue(engine, new_message())
    process_message_queue(engine, lambda _: NotSent("down"), limit=1, backoff=at_once)
    process_message_queue(engine, lambda _: WAMID)
    at = datetime.now(UTC) - timedelta(seconds=3)

    of_the_first = receipt("undeliverable", -9, reference=named(engine, message_id))
    assert record(engine, of_the_first) == [Recorded.ALREADY_KNOWN]
    assert record(engine, receipt("undeliverable", at=at, reference=named(engine, message_id))) == [Recorded.RECORDED]


def test_the_failure_of_one_attempt_does_not_end_the_doubt_about_another(engine):
    """A person decides about the first one, whose worker was lost."""

    class Idempotent:
        idempotent = True

        def send(self, message):
            return InDoubt("no answer") if message.attempt == 1 else NotSent("down")

    (message_id,) = queue(engine, new_message())
    for _ in range(2):
        process_message_queue(engine, Idempotent(), limit=1, backoff=at_once)

    assert record(engine, receipt("undeliverable", 1, reference=named(engine, message_id))) == [Recorded.RECORDED]

    found = row(engine, message_id)
    assert (found.status, found.has_doubt) == ("in_doubt", True)


@pytest.mark.parametrize("event", ["refused", "undeliverable"])
def test_a_late_sent_counts_though_another_attempt_was_given_up(engine, event):
    """The row has the mark of an earlier one for good; only the last entry says why it failed, and at which attempt."""
    message_id = sent(engine)
    record(engine, receipt("undeliverable", provider_message_id=WAMID))
    tried_again(engine, message_id)

    def send(_message):
        # As recovery does, and a later attempt that is refused.
        execute(
            engine,
            "UPDATE engagement_message_queue SET status = 'failed', attempt = 3, lease_expires_at = NULL,"
            " history = history || jsonb_build_object('at', now(), 'attempt', 3, 'event', CAST(:event AS text))",
            event=event,
        )

    process_message_queue(engine, send)

    assert row(engine, message_id).status == "sent"


def test_a_cancelled_message_stays_so(engine):
    """It is unsent, and a receipt that says the same adds nothing."""
    (message_id,) = queue(engine, new_message())
    process_message_queue(engine, lambda _: Withdraw("opted out"))

    answers = record(engine, receipt("undeliverable", 1, reference=named(engine, message_id)))

    assert (answers, row(engine, message_id).status) == ([Recorded.ALREADY_KNOWN], "cancelled")


def test_a_history_that_somebody_wrote_is_passed_over(engine):
    """What cannot be read says nothing of attempts."""
    sent(engine)
    entries = [7, {"at": "x", "attempt": 0, "event": "retried"}, {"at": "2026-01-01", "attempt": 0, "event": "retried"}]
    aware = {"at": "2026-01-01T00:00:00Z", "attempt": 0, "event": "not_sent"}
    update = "UPDATE engagement_message_queue SET history = CAST(:history AS jsonb)"
    execute(engine, update, history=json.dumps([*entries, aware]))

    told = receipt("undeliverable", provider_message_id=WAMID)

    assert record(engine, told) == [Recorded.RECORDED]


# Several in one call


def test_a_receipt_is_found_by_the_id_that_one_before_it_brought(engine):
    """In one call as in two."""
    message_id = sent(engine, InDoubt("no answer"))
    first = receipt("accepted", reference=named(engine, message_id), provider_message_id=WAMID)

    assert record(engine, first, receipt("delivered", provider_message_id=WAMID)) == [Recorded.RECORDED] * 2

    found = row(engine, message_id)
    assert found.provider_message_id == WAMID
    assert found.delivered_at is not None
    assert [entry["reason"] for entry in found.history] == ["no answer", "accepted"]


def test_an_id_of_two_messages_names_neither(engine):
    """A gateway that gives one id twice is no reason to change the wrong message."""
    ids = [sent(engine, user_id=user) for user in ("user1", "user2")]

    assert record(engine, receipt("undeliverable", provider_message_id=WAMID)) == [Recorded.UNKNOWN_MESSAGE]
    assert {row(engine, message_id).status for message_id in ids} == {"sent"}


def test_a_wrong_reference_is_not_mended_by_an_id(engine):
    """Of both, the reference is the one that has a proof."""
    message_id = sent(engine)
    wrong = reference(message_id, delivery_id("user9:goodbye:2026-01-01"))

    answers = record(engine, receipt("read", reference=wrong, provider_message_id=WAMID))

    assert answers == [Recorded.UNKNOWN_MESSAGE]


def test_calls_with_the_same_messages_in_another_order_wait_for_each_other(engine):
    """All are locked at once, by their ids, so there is no deadlock."""
    ids = [sent(engine, f"id-{number}", user_id=f"user{number}") for number in range(2)]
    first, second = (receipt("read", reference=named(engine, message_id)) for message_id in ids)
    locked = "SELECT FROM engagement_message_queue WHERE id = :id FOR UPDATE"
    with ThreadPoolExecutor(2) as pool, Session(engine) as session:
        session.execute(text(locked), {"id": ids[0]})
        both = [pool.submit(record, engine, *told) for told in ((second, first), (first, second))]
        wait_until_blocked(engine, 2)
        # Neither holds the second row: it comes after the first, which both wait for.
        session.execute(text(f"{locked} NOWAIT"), {"id": ids[1]})
        session.commit()

        answers = sorted(done.result(60) for done in both)
    assert answers == [[Recorded.ALREADY_KNOWN] * 2, [Recorded.RECORDED] * 2]


def test_a_moment_in_the_future_is_not_when_it_was_sent(engine):
    """The provider's clock is ahead: the database's counts, and `verify` finds no send that is to come."""
    message_id = sent(engine, InDoubt("no answer"))

    record(engine, receipt("accepted", 60, reference=named(engine, message_id)))

    assert broken(engine) == []


def test_an_id_is_cut_to_the_length_that_a_receipt_may_have(engine):
    """And that an index entry may have, whatever its characters."""
    message_id = sent(engine, "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 900)

    assert len(row(engine, message_id).provider_message_id) == 512


# Races


@pytest.mark.parametrize("answer", [Sent(WAMID), NotSent("down"), InDoubt("no answer")])
@pytest.mark.parametrize("event", ["accepted", "delivered", "read", "undeliverable"])
def test_a_receipt_may_be_quicker_than_the_answer(engine, event, answer):
    """The provider's word stands, whatever the worker hears after it, and nothing is sent again."""
    queue(engine, new_message())

    def send(message):
        assert record(engine, receipt(event, reference=message.reference)) == [Recorded.RECORDED]
        return answer

    result = process_message_queue(engine, send, backoff=at_once)

    assert (result.succeeded, result.failed) == ((0, 1) if event == "undeliverable" else (1, 0))
    assert row(engine, 1).status == ("failed" if event == "undeliverable" else "sent")
    assert row(engine, 1).attempt == 1
    assert broken(engine) == []


def test_two_sessions_record_the_same(engine):
    """The second one waits for the first, and finds it known."""
    message_id = sent(engine)
    told = receipt("read", reference=named(engine, message_id))
    with ThreadPoolExecutor(1) as pool, Session(engine) as session:
        [told_so] = EngagementMessageRepository(session).record_receipts([told])
        assert told_so.answer is Recorded.RECORDED
        second = pool.submit(record, engine, told)
        wait_until_blocked(engine, 1)
        session.commit()

        assert second.result(60) == [Recorded.ALREADY_KNOWN]


def test_a_forgotten_message_keeps_nothing_personal(engine):
    """The receipt counts, and neither its reason nor the provider's id is stored."""
    message_id = sent(engine)
    name = named(engine, message_id)
    with Session(engine) as session, session.begin():
        EngagementMessageRepository(session).forget_user("user1")

    told = receipt(
        "undeliverable", reference=name, provider_message_id=WAMID, reason="5511999999999 is not on WhatsApp"
    )
    assert record(engine, told) == [Recorded.RECORDED]

    found = row(engine, message_id)
    assert found.status == "failed"
    assert (found.provider_message_id, found.error_message) == (None, None)
    assert "5511999999999" not in str(found)


def test_a_rolled_back_receipt_is_none(engine):
    """It is the host's transaction."""
    message_id = sent(engine)
    with Session(engine) as session:
        EngagementMessageRepository(session).record_receipts([receipt("read", reference=named(engine, message_id))])
        session.rollback()

    assert row(engine, message_id).read_at is None


def test_many_are_recorded_by_few_statements(engine):
    """As many as 2,500, each of them twice."""
    execute(
        engine,
        "INSERT INTO engagement_message_queue (user_id, message_type, message_key, destination, destination_jid,"
        " idempotency_key, status, sent_at, attempt, provider_message_id)"
        " SELECT 'user' || n, 'goodbye', 'goodbye', 'individual', '5511999999999@s.whatsapp.net', 'key' || n, 'sent',"
        " now(), 1, 'id' || n FROM generate_series(1, 2500) AS n",
    )
    told = [receipt("delivered", provider_message_id=f"id{n}") for n in range(1, 2501)]

    answers = record(engine, *told, *told)

    assert answers == [Recorded.RECORDED] * 2500 + [Recorded.ALREADY_KNOWN] * 2500
    assert execute(engine, "SELECT count(delivered_at) FROM engagement_message_queue").scalar() == 2500


# Bad input


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"event": "opened"}, "event"),
        ({"event": []}, "event"),
        ({"reference": 7}, "reference"),
        ({"at": datetime(2026, 1, 1)}, "at"),  # noqa: DTZ001
        ({"reference": None}, "reference"),
        ({"reference": "7"}, "reference"),
        ({"reference": f"99{'9' * 17}.{delivery_id('a:b:2026-01-01')}"}, "reference"),
        ({"provider_message_id": "x" * 513}, "provider_message_id"),
        ({"code": 131026}, "code"),
        ({"reason": b"no"}, "reason"),
        ({"provider": ""}, "provider"),
    ],
)
def test_a_bad_receipt_is_refused(fields, field):
    """It names the field, before the database is touched."""
    with pytest.raises(InvalidMessage, match=f"^{field}: "):
        receipt(**{"event": "read", "reference": reference(1, delivery_id("a:b:2026-01-01"))} | fields)


def test_a_dictionary_is_no_receipt(repository):
    """Nothing of the batch is recorded."""
    with pytest.raises(InvalidMessage, match=r"^receipt: must be a Receipt"):
        repository.record_receipts([{"event": "read"}])


# The order


TOLD = st.builds(
    lambda event, minute: Receipt(
        event=event, at=NOW + timedelta(minutes=minute), provider="p", provider_message_id="a"
    ),
    st.sampled_from(["accepted", "delivered", "read", "undeliverable"]),
    st.integers(0, 9),
)


@given(st.lists(TOLD, max_size=4), st.sampled_from([MessageStatus.SENT, MessageStatus.IN_DOUBT, MessageStatus.SENDING]))
def test_the_end_does_not_depend_on_the_order(receipts, status):
    """Neither on that, nor on how often each is heard; and what evidence calls accepted is never due again."""
    # A provider gives up after it accepted.
    gave_up = [told.at for told in receipts if told.event == "undeliverable"]
    receipts = [told for told in receipts if told.event != "accepted" or all(told.at <= at for at in gave_up)]
    begun = Told(1, status, 1, None, None, None, None)
    ends = set()
    for order in itertools.permutations(receipts):
        after = begun
        for told in (*order, *order):
            _, after = weigh(after, told)
        ends.add((after.status, after.delivered_at, after.read_at))

    assert len(ends) == 1
    if receipts:
        assert after.status in {MessageStatus.SENT, MessageStatus.FAILED}
