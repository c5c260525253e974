"""A worker that is told to stop finishes what it has in hand, and gives back what it has not begun."""

import errno
import os
import signal
import threading
from datetime import timedelta

from conftest import new_message, queue, row, until

from crashes.accidents import PATIENCE_SECONDS, Running, Transport, at_first_commit, is_claim, is_settlement, terminate


def is_released(pipe) -> bool:
    """Open and close the pipe that a send waits at, if it does."""
    try:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False  # Nobody reads it yet.
    return True


def test_a_stop_signal_lets_the_send_in_hand_finish(scene, tmp_path):
    """After SIGTERM nothing is claimed, the send in hand is finished and settled, and the exit status is 0."""
    release = tmp_path / "release"
    os.mkfifo(release)
    params = {"act": "wait", "release": str(release)}
    in_hand, waiting = scene.queue([new_message(message_params=params), new_message("waiting")])
    worker = scene.start()
    scene.wait_until(lambda: "waiting" in scene.notes_of(worker.pid), "a send in hand")

    worker.send_signal(signal.SIGTERM)
    until(lambda: is_released(release))
    assert worker.wait(PATIENCE_SECONDS) == 0

    assert (scene.status(in_hand), scene.status(waiting)) == ("sent", "pending")
    assert len(scene.ledger.entries()) == 1


def test_a_stop_in_the_middle_of_an_unanswered_claim_gives_it_back(engine, proxy, through_proxy):
    """A worker that is stopped before it knows of its claim leaves the message pending, not in doubt."""
    (message_id,) = queue(engine, new_message())
    transport = Transport()
    worker = Running(through_proxy, transport)

    def lose_and_stop(_):
        proxy.lose_next_commit()
        worker.stop.set()

    at_first_commit(through_proxy, is_claim, lose_and_stop)
    with worker:
        worker.run.result(PATIENCE_SECONDS)

    assert (row(engine, message_id).status, transport.sends) == ("pending", [])


def test_a_stop_while_the_database_is_away_claims_nothing_more(engine, through_proxy):
    """A worker that is stopped while it repeats a settlement records it, and takes nothing new."""
    in_hand, waiting = queue(engine, new_message("in_hand"), new_message("waiting"))
    worker = Running(through_proxy, Transport())

    def terminate_and_stop(connection):
        terminate(engine, connection)
        worker.stop.set()

    at_first_commit(through_proxy, is_settlement, terminate_and_stop)
    with worker:
        worker.run.result(PATIENCE_SECONDS)

    assert row(engine, in_hand).status == "sent"
    assert (row(engine, waiting).status, row(engine, waiting).attempt) == ("pending", 0)


def test_a_stop_is_heard_while_a_send_that_was_given_up_goes_on(engine):
    """Nothing is in hand then, and the run ends long before the next poll."""
    (message_id,) = queue(engine, new_message())
    may_end = threading.Event()
    options = {"send_timeout": timedelta(seconds=0.1), "poll_interval": timedelta(minutes=5)}

    with Running(engine, lambda _: may_end.wait(60), **options):
        until(lambda: row(engine, message_id).status == "in_doubt")
    may_end.set()
