"""`on_settled` of an endpoint: a host writes beside a message that a receipt settles, in the receipt's transaction."""

import logging
from functools import partial

import pytest
from conftest import execute, new_message, queue, row
from goodbyes import Hook, _host, fail, note_if_sent, noted, run_sql  # noqa: F401 - the fixture
from sqlalchemy.orm import Session

from engagement import EngagementMessageRepository, InDoubt, MessageStatus, Receipt, Sent, process_message_queue
from engagement.messages import delivery_id, reference
from receipts.served import Tiny, about, served


@pytest.fixture(name="kind", params=["asgi", "wsgi"])
def _kind(request):
    return request.param


def sent(engine, *users, outcome=None):
    ids = queue(engine, *(new_message(user) for user in users))
    process_message_queue(engine, lambda _: outcome or InDoubt("no answer"), concurrency=len(users))
    return ids


def test_each_change_of_an_end_has_one_call(kind, host):
    """A doubt ends, the rest of its life is no news, and undeliverable of another message is an end as well."""
    (doubt,) = sent(host, "user1")
    (gone,) = sent(host, "user2", outcome=Sent("id"))
    hook = Hook()

    with served(kind, host, Tiny(), on_settled=hook) as provider:
        told = [about(host, doubt, event) for event in ("accepted", "delivered", "read", "delivered")]
        assert provider.tell(*told).status == provider.tell(*told).status == 200
        assert hook.heard == [("user1", "sent")]
        lost = about(host, gone, "undeliverable")
        assert provider.tell(lost, lost).status == provider.tell(lost).status == 200

    assert hook.heard == [("user1", "sent"), ("user2", "failed")]
    assert isinstance(hook.heard[0][1], MessageStatus)
    assert noted(host) == ["user1"]


def test_it_is_the_receipts_transaction(kind, host):
    """The note and the end of the doubt bear one transaction's number."""
    (doubt,) = sent(host, "user1")
    with served(kind, host, Tiny(), on_settled=note_if_sent) as provider:
        assert provider.tell(about(host, doubt)).status == 200

    same = (
        "SELECT count(*) FROM goodbyes JOIN engagement_message_queue USING (user_id)"
        " WHERE engagement_message_queue.xmin::text::bigint = wrote::text::bigint & 4294967295"
    )
    assert execute(host, same).scalar_one() == 1


def test_what_comes_back_to_where_it_was_is_no_change(host):
    """A sent message that is called undeliverable, and delivered in the same request, was `sent` before and is so."""
    (message_id,) = sent(host, "user1", outcome=Sent("id"))
    hook = Hook()
    with served("wsgi", host, Tiny(), on_settled=hook) as provider:
        provider.tell(about(host, message_id, "undeliverable"), about(host, message_id, "delivered"))

    assert hook.heard == []
    assert row(host, message_id).status == "sent"


def test_a_receipt_before_the_answer_has_the_call_and_the_answer_has_none(host):
    """The message is settled once, though two know of it."""
    (message_id,) = queue(host, new_message())
    hook = Hook()

    with served("wsgi", host, Tiny(), on_settled=hook) as provider:

        def send(_):
            assert provider.tell(about(host, message_id)).status == 200

        process_message_queue(host, send, on_settled=hook)

    assert hook.heard == [("user1", "sent")]
    assert noted(host) == ["user1"]


@pytest.mark.parametrize(
    ("besides", "named"),
    [
        (partial(fail, LookupError("5511999999999")), "LookupError"),
        (partial(run_sql, "INSERT INTO goodbyes VALUES ('user1')"), "IntegrityError 23505"),
        (partial(run_sql, "INSERT INTO letters VALUES ('nobody')"), "ForeignKeyViolation"),
    ],
)
def test_its_error_undoes_its_own_part_only(kind, host, caplog, besides, named):
    """The receipts are recorded, the other call counts, and the log says which one failed."""
    caplog.set_level(logging.INFO)
    ids = sent(host, "user1", "user2")
    with served(kind, host, Tiny(), on_settled=Hook(besides)) as provider:
        assert provider.tell(*(about(host, each) for each in ids)).status == 200

    assert [row(host, each).status for each in ids] == ["sent", "sent"]
    assert noted(host) == ["user2"]
    assert f"engagement.on_settled_failed message_id={ids[0]} error={named}" in caplog.text
    assert "5511999999999" not in caplog.text


def test_a_transaction_that_a_call_ends_is_asked_for_again(kind, host):
    """A COMMIT of the host's is answered with 503; the repeated request finds it recorded, and has no call."""
    (message_id,) = sent(host, "user1")
    hook = Hook(partial(run_sql, "COMMIT"))
    with served(kind, host, Tiny(), on_settled=hook) as provider:
        said = about(host, message_id)
        assert [provider.tell(said).status for _ in range(2)] == [503, 200]

    assert row(host, message_id).status == "sent"
    assert hook.heard == [("user1", "sent")]


def test_a_call_that_always_loses_the_connection_is_left_out_at_last(host, caplog):
    """Otherwise its receipt would never be recorded: the provider gives up some day."""
    (message_id,) = sent(host, "user1")
    hook = Hook(partial(run_sql, "SELECT pg_terminate_backend(pg_backend_pid())"))
    with served("wsgi", host, Tiny(), on_settled=hook) as provider:
        said = about(host, message_id)
        assert [provider.tell(said).status for _ in range(6)] == [503] * 5 + [200]

    assert row(host, message_id).status == "sent"
    assert f"engagement.on_settled_skipped message_id={message_id} status=sent" in caplog.text


async def an_async_one(*_):
    return None


@pytest.mark.parametrize("wrong", [7, an_async_one, lambda connection: None])
def test_what_cannot_be_called_is_refused_at_once(kind, engine, wrong):
    """By its name."""
    with pytest.raises(ValueError, match=r"^on_settled: must "), served(kind, engine, Tiny(), on_settled=wrong):
        pass


def test_in_its_own_session_a_host_reads_it_from_the_answers(host):
    """They name the message, and the status that it has now and had before."""
    (doubt,) = sent(host, "user1")
    told = [
        Receipt(event=event, at=row(host, doubt).created_at, provider="cloud", reference=named)
        for event in ("delivered", "read")
        for named in (reference(doubt, delivery_id(row(host, doubt).idempotency_key)), reference(99, delivery_id("x")))
    ]
    with Session(host) as session, session.begin():
        answers = EngagementMessageRepository(session).record_receipts(told)

    assert [(each.message_id, each.before, each.status, each.settles) for each in answers] == [
        (doubt, "in_doubt", "sent", True),
        (None, None, None, False),
        (doubt, "sent", "sent", False),
        (None, None, None, False),
    ]
    assert isinstance(answers[0].status, MessageStatus)
