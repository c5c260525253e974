"""The harness can fail: each sabotage of the delivery, and each lie in the evidence, is noticed."""

import os
import signal
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from engagement import NewMessage

from .evidence import Attempt, Death, wrong_if_sent_at_most_once, wrong_in_any_run
from .ledger import Entry
from .orders import Point
from .scene import _scene  # noqa: F401 - the fixture


def message(**params) -> NewMessage:
    return NewMessage(
        user_id="user1",
        message_type="reminder",
        message_key="reminder.text",
        message_params=params,
        destination="individual",
        destination_jid="5511900000000@s.whatsapp.net",
    )


def is_finished(scene, message_id: int) -> bool:
    return scene.status(message_id) not in {"pending", "sending"}


def kill_after_the_send(scene, **orders):
    """Let a worker die when its message is sent and not settled, and another one come after it."""
    (message_id,) = scene.queue([message()])
    victim = scene.start(lease_seconds=1, signal_at=Point.AFTER_SEND, **orders)
    scene.wait_until_dead(victim)
    survivor = scene.start(lease_seconds=1, **orders)
    scene.wait_until(lambda: is_finished(scene, message_id), "an end of the message")
    scene.stop(survivor)
    return scene.evidence(deaths=[Death(victim.pid, Point.AFTER_SEND)])


def freeze_before_a_failure(scene, **orders):
    """Let a worker freeze whose send is about to fail, and come back when another one has sent the message."""
    (message_id,) = scene.queue([message(act="fail_first")])
    frozen = scene.start(lease_seconds=1, looks_up=True, signal_at=Point.BEFORE_SEND, signal="SIGSTOP", **orders)
    scene.wait_until_stopped(frozen)
    other = scene.start(lease_seconds=1, looks_up=True, **orders)
    scene.wait_until(lambda: scene.status(message_id) == "sent", "the second attempt")
    os.kill(frozen.pid, signal.SIGCONT)
    scene.stop(frozen)
    scene.wait_until(lambda: is_finished(scene, message_id), "an end of the message")
    scene.stop(other)
    return scene.evidence()


@pytest.mark.parametrize("play", [kill_after_the_send, freeze_before_a_failure])
def test_without_sabotage_nothing_is_wrong(scene, play):
    """The same histories with the delivery as it is: the control for what follows."""
    evidence = play(scene)

    assert list(wrong_in_any_run(evidence)) == []
    assert list(wrong_if_sent_at_most_once(evidence)) == []
    assert len(evidence.ledger) == 1


@pytest.mark.parametrize(
    ("sabotage", "play"),
    [
        ("claim_after_send", kill_after_the_send),
        ("resend_doubt", kill_after_the_send),
        ("no_fence", freeze_before_a_failure),
    ],
)
def test_a_sabotage_is_noticed(scene, sabotage, play):
    """A claim committed after the send, a doubt sent again, and a settlement without its fence each send twice."""
    evidence = play(scene, sabotage=sabotage)

    (key,) = scene.queued
    assert f"sent twice: {key} is 2 times in the ledger" in list(wrong_if_sent_at_most_once(evidence))


@pytest.fixture(name="evidence")
def _evidence(scene):
    return kill_after_the_send(scene)


def wrong(evidence) -> list[str]:
    found = [*wrong_in_any_run(evidence), *wrong_if_sent_at_most_once(evidence)]
    return sorted({each.partition(":")[0] for each in found})


def test_each_lie_is_noticed(evidence):
    """Evidence that was tampered with is wrong in the way in which it was."""
    (key,) = evidence.queued
    (row,) = evidence.messages
    (death,) = evidence.deaths

    def become(status: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(**vars(row) | {"status": status})]

    assert wrong(evidence) == []
    assert wrong(replace(evidence, messages=[], deaths=[])) == ["lost"]
    assert wrong(replace(evidence, ledger=[*evidence.ledger, Entry("other", "1", 1, 1, 0.0)])) == ["invented"]
    assert wrong(replace(evidence, ledger=evidence.ledger * 2)) == ["sent twice"]
    assert wrong(replace(evidence, deaths=[])) == ["unexplained doubt"]
    assert wrong(replace(evidence, messages=become("sent"))) == ["forgotten doubt"]
    assert wrong(replace(evidence, messages=become("sent"), ledger=[], deaths=[])) == ["not sent"]
    assert wrong(replace(evidence, deaths=[replace(death, point=Point.BEFORE_SEND)])) == ["wrong hand"]
    with_nothing = Death(0, Point.BEFORE_SETTLE_COMMIT)
    assert wrong(replace(evidence, deaths=[death, with_nothing])) == ["wrong hand"]
    assert wrong(replace(evidence, told_cancelled={row.id})) == ["not cancelled"]
    assert wrong(replace(evidence, messages=become("sending"), deaths=[])) == ["left over"]
    assert wrong(replace(evidence, messages=become("cancelled"), deaths=[])) == ["sent all the same"]
    assert evidence.held_at_death == {death.pid: {Attempt(row.id, 1)}}
    assert evidence.in_ledger == Counter({key: 1})


def test_who_dies_before_it_records_a_recovery_holds_only_that(scene):
    """Another worker's message is no claim of its own, and the doubt is explained by the first death alone."""
    (message_id,) = scene.queue([message()])
    deaths = []
    for point in (Point.AFTER_SEND, Point.BEFORE_SETTLE_COMMIT):
        victim = scene.start(lease_seconds=1, signal_at=point)
        scene.wait_until_dead(victim)
        deaths.append(Death(victim.pid, point))
    survivor = scene.start(lease_seconds=1)
    scene.wait_until(lambda: is_finished(scene, message_id), "an end of the message")
    scene.stop(survivor)
    evidence = scene.evidence(deaths=deaths)

    assert wrong(evidence) == []
    assert evidence.held_at_death.keys() == {deaths[0].pid}
    assert evidence.recovered_at_death[deaths[1].pid] == {Attempt(message_id, 1)}
    assert evidence.recovered_at_death[survivor.pid] == set()


@pytest.mark.parametrize(
    ("point", "status", "sends"),
    [
        (Point.BEFORE_CLAIM_COMMIT, "pending", 0),
        (Point.AFTER_CLAIM_COMMIT, "sending", 0),
        (Point.BEFORE_SEND, "sending", 0),
        (Point.AFTER_SEND, "sending", 1),
        (Point.BEFORE_SETTLE_COMMIT, "sending", 1),
        (Point.AFTER_SETTLE_COMMIT, "sent", 1),
    ],
)
def test_a_worker_dies_where_it_is_told_to(scene, point, status, sends):
    """Each point is where its name says: what the database and the ledger know of the message shows it."""
    (message_id,) = scene.queue([message()])
    scene.wait_until_dead(scene.start(signal_at=point))

    assert scene.status(message_id) == status
    assert len(scene.ledger.entries()) == sends
