"""The same proof through a real HTTP transport, whose gateway crashes, hangs up and answers late."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager

import pytest
from conftest import new_message

from engagement._operating.temporary_postgres import temporary_postgres

from .evidence import wrong_in_any_run
from .orders import Point
from .scene import TESTS, Scene

MESSAGES = 300
KILLS = (Point.AFTER_CLAIM_COMMIT, Point.BEFORE_SEND, Point.IN_SEND, Point.AFTER_SEND, Point.BEFORE_SETTLE_COMMIT)


@contextmanager
def crashing_gateway(ledger, seed):
    """Run a gateway, and start it again whenever it has crashed; yield its URL and how often that was."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    draw, crashes, is_over = random.Random(seed), Counter(), threading.Event()
    running = []

    def keep_it_running():
        while not is_over.is_set():
            command = [sys.executable, "-m", "chaos.gateway_process", str(port), str(ledger), str(draw.getrandbits(32))]
            running[:] = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(TESTS)})]
            running[0].wait()
            crashes["crashes"] += 1

    keeper = threading.Thread(target=keep_it_running)
    keeper.start()
    try:
        yield f"http://127.0.0.1:{port}", crashes
    finally:
        is_over.set()
        while keeper.is_alive():
            running[0].kill()
            keeper.join(0.1)


@pytest.mark.chaos
def test_nothing_is_sent_twice_through_a_gateway_that_crashes_and_answers_late(seed, tmp_path):
    """Whatever befalls gateway and workers, nobody gets a message twice, and what is told as unsent was not sent."""
    with (
        temporary_postgres() as server,
        Scene(server.url, tmp_path) as scene,
        crashing_gateway(tmp_path / "ledger", seed) as (url, crashes),
    ):
        scene.queue_many(new_message(f"u{number}") for number in range(MESSAGES))
        mortals = [
            scene.start(gateway=url, signal_at=point, countdown=5 + place, lease_seconds=3, seed=seed)
            for place, point in enumerate(KILLS)
        ]
        for mortal in mortals:
            assert mortal.wait(120) == -signal.SIGKILL, scene.end_of_log()
        workers = [scene.start(gateway=url, concurrency=4, lease_seconds=3, max_retries=50) for _ in range(2)]
        unfinished = "SELECT count(*) FROM engagement_message_queue WHERE status IN ('pending', 'sending')"
        scene.wait_until(lambda: scene.ones(unfinished) == [0], "the end", patience_seconds=180)
        for worker in workers:
            scene.stop(worker)
        evidence = scene.evidence()

    assert list(wrong_in_any_run(evidence)) == []
    assert [key for key, sends in evidence.in_ledger.items() if sends > 1] == []
    by_status = Counter(message.status for message in evidence.messages)
    ended_unsent = [message for message in evidence.messages if message.status in {"failed", "cancelled", "expired"}]
    assert [message.id for message in ended_unsent if evidence.in_ledger[message.idempotency_key]] == []
    # It was no idle run: the gateway crashed, and some of what is in doubt had left, and some had not.
    assert crashes["crashes"] >= 1
    assert by_status["sent"] > MESSAGES / 2
    in_doubt = [message for message in evidence.messages if message.status == "in_doubt"]
    assert len({bool(evidence.in_ledger[message.idempotency_key]) for message in in_doubt}) == 2
