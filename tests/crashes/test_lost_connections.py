"""Connections that are cut before a commit, or after it and before its acknowledgement."""

import threading
import time
from datetime import timedelta

import pytest
from chaos.proxy import proxied
from conftest import execute, in_thread, new_message, queue, row, until
from sqlalchemy.exc import DBAPIError

from crashes.accidents import (
    LATER,
    PATIENCE_SECONDS,
    Running,
    Transport,
    an_engine,
    at_first_commit,
    events_of,
    is_claim,
    is_settlement,
    is_take_over,
    lose,
    terminate,
)
from engagement import NotSent, Sent, Withdraw, Worker, process_message_queue
from engagement._delivery import outage


def test_a_claim_whose_commit_was_not_acknowledged_is_adopted(engine, proxy, through_proxy):
    """The claim was committed and the worker was not told: it finds its own claim, and sends it once."""
    (message_id,) = queue(engine, new_message())
    at_first_commit(through_proxy, is_claim, lambda _: proxy.lose_next_commit())
    transport = Transport()

    with Running(through_proxy, transport):
        until(lambda: row(engine, message_id).status == "sent")

    assert len(transport.sends) == 1
    assert row(engine, message_id).attempt == 1


def test_what_is_adopted_has_its_destination_to_itself(engine, proxy, through_proxy):
    """Nothing else is sent to it beside what was claimed before, and not acknowledged."""
    ids = queue(engine, *(new_message("a", idempotency_key=str(number)) for number in range(3)))
    at_first_commit(through_proxy, is_claim, lambda _: proxy.lose_next_commit())
    under_way, most = [], []

    def send(message):
        under_way.append(message.id)
        most.append(len(under_way))
        time.sleep(0.05)  # So that another one could begin.
        under_way.remove(message.id)

    with Running(through_proxy, send, concurrency=4):
        until(lambda: row(engine, ids[-1]).status == "sent")

    assert most == [1, 1, 1]


def test_a_claim_that_was_not_committed_is_made_again(engine, through_proxy):
    """The connection is cut before the commit: nothing was claimed, and the next try sends it once."""
    (message_id,) = queue(engine, new_message())
    at_first_commit(through_proxy, is_claim, lambda connection: terminate(engine, connection))
    transport = Transport()

    with Running(through_proxy, transport):
        until(lambda: row(engine, message_id).status == "sent")

    assert len(transport.sends) == 1
    assert row(engine, message_id).attempt == 1


@pytest.mark.parametrize("is_committed", [True, False])
def test_a_claim_of_one_run_that_was_not_acknowledged_is_not_left_behind(engine, proxy, through_proxy, is_committed):
    """A cron job whose very first commit goes unanswered sends what it claimed, or gives it back: no doubt."""
    (message_id,) = queue(engine, new_message())
    blow = (lambda _: proxy.lose_next_commit()) if is_committed else (lambda connection: terminate(engine, connection))
    at_first_commit(through_proxy, is_claim, blow)

    try:
        process_message_queue(through_proxy, Transport())
    except DBAPIError:
        assert row(engine, message_id).status == "pending"
    else:
        assert row(engine, message_id).status == "sent"


@pytest.mark.parametrize(("outcome", "failures"), [(Sent("wamid"), 0), (NotSent("busy"), 1)])
def test_a_settlement_whose_commit_was_not_acknowledged_counts_once(engine, proxy, through_proxy, outcome, failures):
    """The outcome was committed and the worker was not told: it is not recorded twice, and nothing is sent again."""
    (message_id,) = queue(engine, new_message())
    at_first_commit(through_proxy, is_settlement, lambda _: proxy.lose_next_commit())
    transport = Transport(lambda _: outcome)

    with Running(through_proxy, transport, backoff=lambda _: LATER) as worker:
        until(lambda: transport.sends)
        queue(engine, new_message("next"))
        until(lambda: len(transport.sends) == 2)

    assert len(transport.sends) == 2
    assert (row(engine, message_id).retry_count, len(row(engine, message_id).history)) == (failures, failures)
    assert worker.result.succeeded + worker.result.retried == 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"poll_interval": timedelta(seconds=1)},
        {"min_interval": timedelta(milliseconds=1)},
        {"concurrency": 5},
        {"message_types": ["goodbye"]},
        {"excluding": ["reminder"], "poll_interval": timedelta(milliseconds=300)},
        {"in_order": True},
    ],
    ids=str,
)
def test_a_claim_that_is_committed_late_is_sent(engine, options):
    """The server gets a COMMIT after the worker has gone on: nothing else is due, and it is adopted all the same."""
    (message_id,) = queue(engine, new_message())
    transport = Transport()
    with proxied(engine.url) as proxy, an_engine(proxy.url) as through:
        at_first_commit(through, is_claim, lambda _: proxy.delay_next_commit())
        with Running(through, transport, **options):
            assert proxy.is_delayed.wait(PATIENCE_SECONDS)
            (another,) = queue(engine, new_message("another"))
            until(lambda: row(engine, another).status == "sent")
            assert row(engine, message_id).status == "pending"
            proxy.may_commit.set()
            until(lambda: row(engine, message_id).status == "sent")

    assert [(message.id, message.attempt) for message in transport.sends] == [(another, 1), (message_id, 1)]


@pytest.mark.parametrize("how", ["not ready", "stopped"])
def test_a_claim_that_was_not_acknowledged_is_given_back(engine, proxy, through_proxy, monkeypatch, how):
    """If it can no longer be sent, another worker gets it at once, and not when the lease has run out, as a doubt."""
    monkeypatch.setattr(outage, "WAIT_SECONDS", (2.0, 2.0))  # By then `ready` is asked again.
    slow, quick, late = queue(engine, *(new_message(name) for name in ("slow", "quick", "late")))
    may_end, is_lost, stop = threading.Event(), threading.Event(), threading.Event()
    transport = Transport(lambda message: may_end.wait(PATIENCE_SECONDS) and None if message.id == slow else None)
    transport.ready = lambda: how == "stopped" or not is_lost.is_set()

    def lose_it(_):
        proxy.lose_next_commit()
        is_lost.set()
        if how == "stopped":
            stop.set()

    at_first_commit(through_proxy, is_settlement, lose_it)
    run = in_thread(Worker(through_proxy, transport, concurrency=2).run, stop)
    until(lambda: events_of(engine, late) == ["postponed"])
    assert [row(engine, message_id).status for message_id in (slow, quick, late)] == ["sending", "sent", "pending"]
    stop.set()
    may_end.set()
    run.result(PATIENCE_SECONDS)

    assert [message.id for message in transport.sends] == [slow, quick]


def test_a_claim_that_was_not_acknowledged_is_given_back_though_nothing_is_known(engine, proxy, through_proxy):
    """A worker that was told to stop has a slow send in hand, and no outcome to record."""
    (slow,) = queue(engine, new_message("slow"))
    is_sending, may_end, stop = threading.Event(), threading.Event(), threading.Event()

    def send(_):
        is_sending.set()
        assert may_end.wait(PATIENCE_SECONDS)

    def lose_it(_):
        proxy.lose_next_commit()
        stop.set()

    poll = timedelta(milliseconds=20)
    run = in_thread(Worker(through_proxy, send, concurrency=2, poll_interval=poll).run, stop)
    assert is_sending.wait(PATIENCE_SECONDS)
    at_first_commit(through_proxy, is_claim, lose_it)
    (late,) = queue(engine, new_message("late"))
    until(lambda: events_of(engine, late) == ["postponed"])
    assert (row(engine, slow).status, row(engine, late).status) == ("sending", "pending")
    may_end.set()
    run.result(PATIENCE_SECONDS)


def test_a_settlement_that_was_not_committed_is_repeated(engine, through_proxy):
    """The connection is cut before the commit: the worker knows what was sent, and records it."""
    (message_id,) = queue(engine, new_message())
    at_first_commit(through_proxy, is_settlement, lambda connection: terminate(engine, connection))
    transport = Transport(lambda _: Sent("wamid"))

    with Running(through_proxy, transport):
        until(lambda: row(engine, message_id).status == "sent")

    assert len(transport.sends) == 1


@pytest.mark.parametrize("look_up", [None, lambda _: Sent("found")])
def test_a_take_over_whose_commit_was_not_acknowledged_is_not_adopted(engine, proxy, through_proxy, look_up):
    """What was taken over may have been sent by another worker: it is recovered again, never sent as one's own."""
    (message_id,) = queue(engine, new_message())
    lose(engine, message_id)
    at_first_commit(through_proxy, is_take_over, lambda _: proxy.lose_next_commit())
    transport = Transport(look_up=look_up)

    with Running(through_proxy, transport, lease=timedelta(seconds=1)):
        until(lambda: row(engine, message_id).status == ("sent" if look_up else "in_doubt"))

    assert transport.sends == []
    assert row(engine, message_id).attempt == 1


@pytest.mark.direct("it ends backends by the name of their client")
def test_a_cut_connection_leaves_no_doubt(engine):
    """All backends are terminated while a send is in hand: it is settled as sent, by the same attempt."""
    ids = queue(engine, *(new_message(f"user{number}") for number in range(5)))
    with an_engine(engine.url, connect_args={"application_name": "cut me"}) as worker_engine:

        def send(_):
            execute(
                engine,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cut me'",
            )
            return Sent()

        transport = Transport(send)
        with Running(worker_engine, transport):
            until(lambda: all(row(engine, message_id).status == "sent" for message_id in ids))

    assert [message.id for message in transport.sends] == ids
    assert {row(engine, message_id).attempt for message_id in ids} == {1}


@pytest.mark.parametrize(("outcome", "event"), [(NotSent("busy"), "not_sent"), (Withdraw("opted out"), "withdrawn")])
def test_a_settlement_in_doubt_that_was_not_acknowledged_is_recognised(engine, proxy, through_proxy, outcome, event):
    """An earlier attempt may have left, so the message is parked; that the commit went unanswered changes nothing."""
    (message_id,) = queue(engine, new_message())
    execute(engine, "UPDATE engagement_message_queue SET has_doubt = true, attempt = 2, retry_count = 2")
    at_first_commit(through_proxy, is_settlement, lambda _: proxy.lose_next_commit())

    result = process_message_queue(through_proxy, Transport(lambda _: outcome, idempotent=True))

    assert (result.processed, result.in_doubt) == (1, 1)
    assert (row(engine, message_id).status, events_of(engine, message_id)) == ("in_doubt", [event])
