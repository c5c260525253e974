"""The benchmarks, very small: their numbers mean nothing here, but each has to run and to show floor and target."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import new_message, queue
from sqlalchemy import text

ROOT = Path(__file__).parent.parent
TOLD = {
    "queue-many": ["floor: unnest", "queue_messages, 90 % there", "≥ 0.8", "peak memory, 2,000 messages"],
    "queue-one": ["floor: BEGIN, INSERT, COMMIT", "queue_message, 8 threads", "≥ 0.5"],
    "drain": [
        "1000 at a time",
        "send_many of 1,000",
        "concurrency=100",
        "our statements instead",
        "one at a time",
        "two processes",
    ],
    "crowd": ["5,000 finished", "1,000 scheduled for later", "LockRows", "engagement_message_queue_due"],
    "old-snapshot": ["plain claims of 100", "send_many of 1,000", "≥ 5", "after the vacuum"],
    "idle": ["statements for each poll", "from due to sent, median", "burst of"],
    "vacuum": ["PostgreSQL's defaults", "vacuum at 2 %", "pages for 100 due", "HOT"],
    "send": ["aiohttp alone", "WhatsAppGateway", "WhatsAppCloud", "Webhook", "500 at once", "≥ 0.95", "≥ 0.8"],
    "deliver": [
        "aiohttp alone",
        "ours, WhatsAppGateway",
        "ours, async def send",
        "µs a message",
        "two processes",
        "peak memory",
    ],
    "provider-index": ["with the index", "without it", "send_many", "≥ 0.97"],
    "in-order": ["without it", "in_order", "send_many", "concurrency=100"],
}


@pytest.fixture(name="benchmarks")
def _benchmarks(postgres_server, tmp_path):
    server = postgres_server
    url = f"postgresql://{server.user}:{server.password or ''}@/{server.maintenance_dbname}"
    environment = os.environ | {
        "ENGAGEMENT_BENCH_DATABASE_URL": f"{url}?host={server.host}&port={server.port}",
        "PYTHONPATH": str(ROOT),
    }

    def run(*arguments):
        command = [sys.executable, "-m", "benchmarks", "--small", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_all_works_run_and_show_floor_and_target(benchmarks):
    """`python -m benchmarks` runs every work, and prints it beside its floor and its target."""
    before, *works = benchmarks().split("\n## ")
    assert "SMALL" in before
    printed = {work.splitlines()[0]: work for work in works}
    assert list(printed) == list(TOLD)
    assert [(name, words) for name, told in TOLD.items() for words in told if words not in printed[name]] == []


def test_one_work_touches_nothing_but_a_database_of_its_own(benchmarks, engine):
    """On a server that is given, a database is made and dropped; what was there stays, and nothing is left behind."""
    queue(engine, new_message())
    printed = benchmarks("queue-one")
    assert printed.count("\n## ") == 1
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM engagement_message_queue")).scalar_one() == 1
        left = connection.execute(text("SELECT datname FROM pg_database WHERE datname LIKE 'engagement_benchmark%'"))
        assert left.scalars().all() == []
