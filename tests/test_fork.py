"""A fork: an engine that was used before it has its connections in two processes, which is told and not hung on."""

import os
import subprocess
import sys

import pytest
from conftest import PATIENCE, new_message, queue, row

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")

# The parent keeps its connection, and needs it again when the child has ended.
CHILD = """
import os, sys, threading
from datetime import timedelta
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
{imports}

engine = create_engine(sys.argv[1], **{options})
{made}
{used}
pid = os.fork()
if pid == 0:
    status = 3
    try:
        {cure}
        {work}
        status = 0
    except BaseException as error:
        print(type(error).__name__, error, flush=True)
    finally:
        os._exit(status)
_, status = os.waitpid(pid, 0)
with engine.connect() as connection:
    print("parent", connection.scalar(text("SELECT 42")), flush=True)
sys.exit(os.waitstatus_to_exitcode(status))
"""
IMPORTS = "from engagement import EngagementMessageRepository, Worker, process_message_queue"
USED = "with engine.connect() as connection: connection.execute(text('SELECT 1'))"
RUN = "assert process_message_queue(engine, lambda message: None).succeeded == 1"
WORK = """stop = threading.Event()
        Worker(engine, lambda message: stop.set(), poll_interval=timedelta(milliseconds=20)).run(stop)"""


def fork(engine, **parts):
    given = {"imports": IMPORTS, "options": {}, "made": "", "used": USED, "cure": "", "work": RUN} | parts
    url = engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-c", CHILD.format(**given), url]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.mark.parametrize("options", [{}, {"pool_pre_ping": True}, {"pool_size": 1, "max_overflow": 0}])
@pytest.mark.parametrize("work", [RUN, WORK], ids=["run", "worker"])
def test_connections_of_another_process_are_told_of_at_once(engine, work, options):
    """Nothing is claimed, the cure is named, and the parent's connection is not touched."""
    (message_id,) = queue(engine, new_message())

    ended = fork(engine, work=work, options=options)

    assert (ended.returncode, ended.stderr) == (3, "")
    told, parent = ended.stdout.splitlines()
    assert told.startswith("MadeInAnotherProcess")
    assert "engine.dispose(close=False)" in told
    assert parent == "parent 42"
    assert row(engine, message_id).status == "pending"


def test_what_was_connected_before_we_were_there_is_told_of_too(engine):
    """A host may import us after it has used its engine."""
    queue(engine, new_message())

    ended = fork(engine, imports="", used=f"{USED}\n{IMPORTS}")

    assert ended.returncode == 3
    assert ended.stdout.startswith("MadeInAnotherProcess")


@pytest.mark.parametrize("work", [RUN, WORK], ids=["run", "worker"])
def test_the_cure_works(engine, work):
    """Without the connections of its parent, the child sends, and the parent goes on."""
    (message_id,) = queue(engine, new_message())

    ended = fork(engine, cure="engine.dispose(close=False)", work=work)

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "parent 42\n", "")
    assert row(engine, message_id).status == "sent"


def test_a_fork_before_the_first_connection_needs_no_cure(engine):
    """A worker that was made before it runs after it."""
    (message_id,) = queue(engine, new_message())
    made = "stop = threading.Event(); worker = Worker(engine, lambda message: stop.set())"

    ended = fork(engine, made=made, used="", work="worker.run(stop)")

    assert (ended.returncode, ended.stderr) == (0, "")
    assert row(engine, message_id).status == "sent"
