"""The whole way: a queue in PostgreSQL, a worker, a transport, and a server that behaves like the provider."""

import json
import logging
import threading
from datetime import timedelta

import loopback
import pytest
from conftest import new_message, queue, row
from gateways import (  # noqa: F401 - close_clients is autouse
    KEY,
    TEXT,
    CloudLike,
    EvolutionLike,
    WuzapiLike,
    close_clients,
    later,
    say,
)
from loopback import Reply, serving
from sqlalchemy import text

from engagement import process_message_queue
from engagement.messages import delivery_id, whatsapp_message_id
from engagement.transports.cloud import WhatsAppCloud
from engagement.transports.dialects import EVOLUTION, WUZAPI
from engagement.transports.gateway import WhatsAppGateway
from engagement.transports.webhook import Webhook


def gateway(server, dialect=EVOLUTION, **options) -> WhatsAppGateway:
    given = {"url": server.url, "key": KEY, "session": "main", "render": say, "answer_within": timedelta(seconds=2)}
    return WhatsAppGateway(dialect=dialect, verify=False, **given | options)


def claimed_by_a_worker_that_died(engine, message_id: int) -> None:
    with engine.begin() as connection:
        connection.execute(
            text(
                "UPDATE engagement_message_queue SET status = 'sending', attempt = 1, claimed_by = 'gone',"
                " lease_expires_at = now() - interval '1 second' WHERE id = :id"
            ),
            {"id": message_id},
        )


def test_each_message_ends_where_the_gateway_s_answer_puts_it(engine, caplog):
    """Sent, refused, doubtful and unspeakable messages of one run end as they should, and each left at most once."""
    caplog.set_level(logging.INFO)
    sent, refused, doubtful, unspeakable = queue(
        engine,
        new_message("sent", scheduled_for=None),
        new_message("refused"),
        new_message("doubtful"),
        new_message("unspeakable", message_params={}),
    )
    like = EvolutionLike()
    like.not_on_whatsapp.add(row(engine, refused).destination_jid)
    doubted = row(engine, doubtful).destination_jid
    like.fault = lambda request: loopback.reset if request.json["number"] == doubted else None
    with serving(like) as server:
        one = gateway(server, render=lambda message: f"{TEXT} {message.message_params['name']}")
        result = process_message_queue(engine, one)

    assert (result.succeeded, result.failed, result.in_doubt) == (1, 2, 1)
    assert row(engine, sent).status == "sent"
    assert row(engine, sent).provider_message_id == whatsapp_message_id(
        sent, delivery_id(row(engine, sent).idempotency_key)
    )
    assert (row(engine, refused).status, row(engine, unspeakable).status) == ("failed", "failed")
    assert row(engine, unspeakable).error_message == "the message has no words: KeyError"
    assert (row(engine, doubtful).status, row(engine, doubtful).error_message) == (
        "in_doubt",
        "Evolution API: ReadError",
    )
    assert sorted(to for _, to, _ in like.sent) == sorted(
        row(engine, each).destination_jid for each in (sent, doubtful)
    )
    histories = json.dumps([row(engine, each).history for each in (sent, refused, doubtful, unspeakable)])
    for private in (KEY, "Ana", TEXT, doubted, row(engine, refused).destination_jid):
        assert private not in caplog.text + histories


def test_while_the_gateway_is_disconnected_nothing_is_claimed(engine):
    """A session that is not open costs no message an attempt; when it is back they are sent."""
    ids = queue(engine, *(new_message(f"user{number}") for number in range(5)))
    with serving(EvolutionLike()) as server:
        server.behave.state = "close"
        assert process_message_queue(engine, gateway(server)).processed == 0
        assert {row(engine, each).attempt for each in ids} == {0}

        server.behave.state = "open"
        assert process_message_queue(engine, gateway(server)).succeeded == 5


def test_an_hour_without_a_gateway_burns_no_retries(engine):
    """A gateway that is gone: run after run claims nothing."""
    ids = queue(engine, *(new_message(f"user{number}") for number in range(5)))
    with loopback.refusing() as url:
        one = gateway(type("Nobody", (), {"url": url}))
        for _ in range(10):
            process_message_queue(engine, one)

    assert {(row(engine, each).status, row(engine, each).attempt) for each in ids} == {("pending", 0)}


@pytest.mark.parametrize("number", [463, 429, 503])
def test_a_lock_on_the_sender_is_met_once_and_burns_no_retries(engine, number):
    """Eight messages, of which each try would prolong the lock: one is posted, and none pays for it."""
    ids = queue(engine, *(new_message(f"user{each}") for each in range(8)))
    like = WuzapiLike()
    like.override = like.error(500, f"Error sending message: server returned error {number}")
    with serving(like) as server:
        one = gateway(server, WUZAPI)
        for _ in range(3):
            process_message_queue(engine, one, concurrency=1)

        assert [request.method for request in server.received].count("POST") == 1
    assert {(row(engine, each).status, row(engine, each).retry_count) for each in ids} == {("pending", 0)}


@pytest.mark.parametrize("code", [190, 368, 131031, 131042, 131048, 4, 17, 32, 102, 341, 613, 80008])
def test_a_code_that_stops_the_sender_burns_no_retries(engine, code):
    """One message finds out for all, over several runs: none pays for it with a retry, and none is sent meanwhile."""
    ids = queue(engine, *(new_message(f"user{number}") for number in range(5)))
    with serving(CloudLike()) as server:
        server.behave.fails_with = (code, 401)
        one = WhatsAppCloud(phone_number_id="1065", token=KEY, render=say, base_url=server.url, verify=False)
        for _ in range(5):
            process_message_queue(engine, one)

        assert [request.method for request in server.received] == ["GET", "POST"]
    rows = [row(engine, each) for each in ids]
    assert {(each.status, each.retry_count) for each in rows} == {("pending", 0)}
    assert all(each.next_attempt_at - each.scheduled_for > timedelta(seconds=59) for each in rows if each.attempt)
    assert f"Cloud API: {code}, " in rows[0].history[0]["reason"]


def test_an_endpoint_that_only_fails_does_not_put_the_whole_queue_in_doubt(engine, monkeypatch):
    """Every failure is a doubt here, but each makes the rest wait twice as long: a run ends after a few."""
    monkeypatch.setattr("engagement.transports.trouble.FIRST_PAUSE", timedelta(seconds=0.05))
    monkeypatch.setattr("engagement.transports.trouble.PATIENCE_SECONDS", 0.2)
    ids = queue(engine, *(new_message(f"user{number}") for number in range(30)))
    with serving(lambda request: Reply(405 if request.method == "HEAD" else 500)) as server:
        result = process_message_queue(engine, Webhook(url=server.url, verify=False))

        assert 0 < result.in_doubt < 8
        assert result.in_doubt == len([request for request in server.received if request.method == "POST"])
    assert {row(engine, each).retry_count for each in ids} == {0}


def test_a_message_whose_worker_died_is_looked_up_and_not_sent_again(engine):
    """What the gateway stored under our id was sent: recorded, and no second message."""
    found, not_found = queue(engine, new_message("found"), new_message("lost"))
    claimed_by_a_worker_that_died(engine, found)
    claimed_by_a_worker_that_died(engine, not_found)
    message_id = whatsapp_message_id(found, delivery_id(row(engine, found).idempotency_key))
    with serving(EvolutionLike()) as server:
        server.behave.send(message_id, row(engine, found).destination_jid, TEXT)
        process_message_queue(engine, gateway(server))

        assert (row(engine, found).status, row(engine, found).provider_message_id) == ("sent", message_id)
        assert row(engine, not_found).status == "in_doubt"
        assert len(server.behave.sent) == 1


def test_an_idempotent_gateway_gets_a_doubtful_message_again_with_its_id(engine, monkeypatch):
    """The host's switch: what is in doubt is sent again, under the id by which WhatsApp drops the second."""
    (message_id,) = queue(engine, new_message())
    like = WuzapiLike()
    like.fault = lambda _: loopback.reset if len(like.sent) == 1 else None
    with serving(like) as server:
        one = gateway(server, WUZAPI, idempotent=True)
        options = {"backoff": lambda _: timedelta(milliseconds=1)}
        process_message_queue(engine, one, **options)
        monkeypatch.setattr("engagement.transports.trouble.monotonic", later(hours=1))
        process_message_queue(engine, one, **options)

    assert row(engine, message_id).status == "sent"
    assert len(like.sent) == 2
    assert len({sent[0] for sent in like.sent}) == 1


def test_many_workers_and_threads_send_each_message_once(engine):
    """Three workers of ten threads share a gateway that is sometimes slow or resets: no message leaves twice."""
    ids = queue(engine, *(new_message(f"user{number}") for number in range(90)))
    like = EvolutionLike()
    like.fault = lambda request: loopback.reset if request.json["number"].endswith(("3@s.whatsapp.net",)) else None
    with serving(like) as server:
        workers = [
            threading.Thread(target=process_message_queue, args=(engine, gateway(server)), kwargs={"concurrency": 10})
            for _ in range(3)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(30)

    destinations = [to for _, to, _ in like.sent]
    statuses = [row(engine, each).status for each in ids]
    assert len(destinations) == len(set(destinations))
    assert len(like.sent) == statuses.count("sent") + statuses.count("in_doubt")
    assert statuses.count("in_doubt") > 0
