"""Where a run takes place: a migrated database that records its changes, a ledger, and worker processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from engagement import EngagementMessageRepository, NewMessage, migrations

from .evidence import RECORD_CHANGES, Evidence
from .ledger import AppendOnlyFile, Ledger
from .orders import Orders

TESTS = Path(__file__).parents[1]
PATIENCE_SECONDS = 30.0


class Scene:
    """Owns what a run needs, and at its end kills every process that is left."""

    def __init__(self, url: str, directory: Path, *, prepares: bool = True) -> None:
        # Without a pool: a connection of ours must not outlive a restart of the server.
        self.engine = create_engine(url, poolclass=NullPool)
        self.ledger = Ledger(directory / "ledger")
        self.notes = AppendOnlyFile(directory / "notes")
        self.log = directory / "workers.log"
        self.orders = Orders(
            url=url, prepares=prepares, ledger=str(directory / "ledger"), notes=str(directory / "notes")
        )
        self.queued: set[str] = set()
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        migrations.upgrade(self.engine)
        with self.engine.begin() as connection:
            connection.execute(text(RECORD_CHANGES))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            process.stdin.close()

    def queue(self, messages: Iterable[NewMessage]) -> list[int]:
        """Queue and commit, remember the keys, and return the ids."""
        messages = list(messages)
        with Session(self.engine) as session, session.begin():
            repository = EngagementMessageRepository(session)
            ids = [repository.queue_message(message).message_id for message in messages]
        self.queued |= {message.key for message in messages}
        return ids

    def queue_many(self, messages: Iterable[NewMessage]) -> None:
        """Queue many at once."""
        messages = list(messages)
        with Session(self.engine) as session, session.begin():
            EngagementMessageRepository(session).queue_messages(messages)
        self.queued |= {message.key for message in messages}

    def start(self, **orders) -> subprocess.Popen:
        """Start a worker. It ends when we do, also if we are killed: it reads what we never write."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "chaos.worker_process", replace(self.orders, **orders).dumps()],
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path), str(Path.cwd())])},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
        self._processes.append(process)
        return process

    def stop(self, process: subprocess.Popen) -> None:
        """Ask a worker to finish what it has in hand, and see that it does."""
        process.send_signal(signal.SIGTERM)
        status = process.wait(PATIENCE_SECONDS)
        assert status == 0, f"a worker ended with status {status}:\n{self.end_of_log()}"

    def ones(self, sql: str, **values) -> list:
        """Return the first column of what a query finds."""
        with self.engine.connect() as connection:
            return list(connection.execute(text(sql), values).scalars())

    def status(self, message_id: int) -> str:
        """Return the status of a message now."""
        (status,) = self.ones("SELECT status FROM engagement_message_queue WHERE id = :id", id=message_id)
        return status

    def notes_of(self, pid: int) -> list[str]:
        """Return what a worker has noted so far."""
        return [note for noted_pid, note in self.notes.lines() if int(noted_pid) == pid]

    def wait_until(self, condition: Callable[[], bool], what: str, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """Ask again until it is so."""
        deadline = time.monotonic() + patience_seconds
        while not condition():
            assert time.monotonic() < deadline, f"never came: {what}\n{self.end_of_log()}"
            time.sleep(0.02)

    def wait_until_stopped(self, process: subprocess.Popen) -> None:
        """Return when the worker is frozen by the SIGSTOP that it sends itself."""
        self.wait_until(lambda: is_stopped(process), "a frozen worker")

    def wait_until_dead(self, process: subprocess.Popen) -> None:
        """Return when the worker has killed itself."""
        assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL, self.end_of_log()

    def evidence(self, **known) -> Evidence:
        """Gather what the run left behind."""
        return Evidence.gather(self.engine, queued=self.queued, ledger=self.ledger.entries(), **known)

    def end_of_log(self) -> str:
        """Return what the workers said last."""
        with suppress(FileNotFoundError):
            return "\n".join(self.log.read_text().splitlines()[-30:])
        return ""


def is_stopped(process: subprocess.Popen) -> bool:
    """Whether a child of ours is frozen. Tells nothing to those who wait for its end."""
    return os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None


@pytest.fixture(name="scene")
def _scene(request, empty_engine, tmp_path):
    url, prepares = empty_engine.url.render_as_string(hide_password=False), not request.config.getoption("--pgbouncer")
    with Scene(url, tmp_path, prepares=prepares) as scene:
        yield scene
