"""The shadow: a dry run that leaves everything as it was."""

from datetime import UTC, datetime, timedelta

import pytest
from conftest import new_message, queue, row
from gateways import KEY, TEXT, EvolutionLike, close_clients, outgoing, say  # noqa: F401 - autouse
from loopback import serving
from sqlalchemy import text

from engagement import Postpone, Sent, process_message_queue
from engagement.transports.gateway import WhatsAppGateway
from engagement.transports.shadow import Shadow
from engagement.transports.webhook import Webhook


def gateway(server, render=say) -> WhatsAppGateway:
    return WhatsAppGateway(url=server.url, key=KEY, session="main", render=render, verify=False)


def test_a_shadow_prepares_and_does_not_send():
    """It says what would be sent, by its size only, and puts the message off."""
    with serving(EvolutionLike()) as server:
        before = datetime.now(UTC)
        outcome = Shadow(gateway(server), again_after=timedelta(minutes=10)).send(outgoing())

        assert isinstance(outcome, Postpone)
        assert timedelta(minutes=10) <= outcome.until - before < timedelta(minutes=11)
        assert outcome.reason.startswith("shadow: would be sent, ")
        assert TEXT not in outcome.reason
        assert server.received == []


def test_a_shadow_tells_what_would_be_refused(caplog):
    """A message without words is not failed by a dry run; its history tells why, and the log only what."""
    caplog.set_level("INFO", "engagement")
    with serving(EvolutionLike()) as server:
        outcome = Shadow(gateway(server, render=lambda _: {}["name"])).send(outgoing())

    assert outcome.reason == "shadow: would be Refused: the message has no words: KeyError"
    assert caplog.messages == ["engagement.shadow message_id=7 attempt=1 outcome=refused"]


def test_a_shadow_asks_what_the_transport_asks():
    """`ready` and `look_up` are real: they change nothing. A transport without them needs none."""
    with serving(EvolutionLike()) as server:
        one = Shadow(gateway(server))
        assert one.ready()
        server.behave.state = "close"
        assert not one.ready()
        server.behave.state = "open"
        gateway(server).send(outgoing())
        assert isinstance(one.look_up(outgoing()), Sent)
        webhook = Shadow(Webhook(url=server.url, idempotent=True, verify=False))
        assert webhook.look_up is None
        assert not webhook.idempotent
    assert Shadow(type("Plain", (), {"prepare": None})()).ready()


def test_a_dry_run_leaves_production_data_pending(engine):
    """Run over a queue, it calls nothing sent or failed and spends no retry; the real run sends each message once."""
    ids = queue(engine, *(new_message(f"user{number}") for number in range(3)))
    with serving(EvolutionLike()) as server:
        result = process_message_queue(engine, Shadow(gateway(server)))

        assert (result.postponed, result.succeeded, result.failed) == (3, 0, 0)
        assert server.behave.sent == []
        for message_id in ids:
            assert (row(engine, message_id).status, row(engine, message_id).retry_count) == ("pending", 0)
            assert row(engine, message_id).history[0]["reason"].startswith("shadow: would be sent")

        with engine.begin() as connection:
            connection.execute(text("UPDATE engagement_message_queue SET next_attempt_at = now()"))
        process_message_queue(engine, gateway(server))
        assert len(server.behave.sent) == 3
        assert {row(engine, message_id).status for message_id in ids} == {"sent"}


def test_a_shadow_that_never_puts_off_is_a_mistake():
    """Without a wait a run would never end."""
    with pytest.raises(ValueError, match="again_after: must be positive"):
        Shadow(Webhook(url="http://h"), again_after=timedelta(0))
