"""The alternatives, each used as in its own documentation: procrastinate and PgQueuer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any

import psycopg

from benchmarks.given import Given, as_json, key
from benchmarks.queues import Queue, Timed
from benchmarks.server import conninfo, database
from benchmarks.setup import Setup


@contextmanager
def peers(setup: Setup) -> Iterator[list[Queue]]:
    """Yield the peers, in a database of their own; none unless they are asked for."""
    if not setup.peers:
        yield []
        return
    with database(setup.url) as db, closing(PgQueuer(conninfo(db.url))) as pgqueuer:
        yield [Procrastinate(conninfo(db.url)), pgqueuer]


class Procrastinate:
    """Jobs with a queueing lock, which is unique while a job waits."""

    name = "procrastinate"

    def __init__(self, url: str) -> None:
        import procrastinate

        self._url = url
        self._app = procrastinate.App(connector=procrastinate.SyncPsycopgConnector(conninfo=url))
        self._already_there = procrastinate.exceptions.AlreadyEnqueued
        self._worker = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url))
        self._tasks = []
        for app in (self._app, self._worker):

            @app.task(name="goodbye")
            async def goodbye(user_id: str, params: dict[str, Any], jid: str) -> None:
                """Send nothing."""

            self._tasks.append(goodbye)
        self._app.open()
        self._app.schema_manager.apply_schema()

    def empty(self) -> None:
        """Remove everything."""
        with psycopg.connect(self._url) as connection:
            connection.execute("TRUNCATE procrastinate_jobs, procrastinate_events, procrastinate_workers CASCADE")

    def fill(self, rows: list[Given]) -> None:
        """Queue rows in batches."""
        jobs = [self._deferrer(row).make_new_job(**_arguments(row)) for row in rows]
        if jobs:
            self._app.job_manager.batch_defer_jobs(jobs)

    def queue_many(self, rows: list[Given]) -> Timed:
        """Defer one by one: a batch has one lock for all its jobs, and fails if one is there."""
        return self.queue_each(rows)

    def queue_each(self, rows: list[Given]) -> Timed:
        """Defer each with its own lock."""

        def defer() -> None:
            for row in rows:
                with suppress(self._already_there):
                    self._deferrer(row).defer(**_arguments(row))

        return defer

    def drain(self) -> Timed:
        """Run a worker until it has caught up."""

        async def work() -> None:
            async with self._worker.open_async():
                await self._worker.run_worker_async(wait=False, concurrency=100, install_signal_handlers=False)

        return lambda: asyncio.run(work())

    def _deferrer(self, row: Given) -> Any:
        return self._tasks[0].configure(queueing_lock=key(row))


class PgQueuer:
    """Jobs with a dedupe key, which is unique while a job waits."""

    name = "PgQueuer"

    def __init__(self, url: str) -> None:
        from pgqueuer.db import PsycopgDriver
        from pgqueuer.queries import Queries

        self._url = url
        self._leaving = ExitStack()

        async def install() -> None:
            async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
                await Queries(PsycopgDriver(connection)).install()

        asyncio.run(install())

    def empty(self) -> None:
        """Remove everything."""
        self.close()
        with psycopg.connect(self._url) as connection:
            connection.execute("TRUNCATE pgqueuer, pgqueuer_log, pgqueuer_statistics CASCADE")

    def fill(self, rows: list[Given]) -> None:
        """Queue rows at once."""
        if rows:
            self.queue_many(rows)()

    def queue_many(self, rows: list[Given]) -> Timed:
        """Enqueue a list, and skip the jobs that are there."""
        from pgqueuer.db import SyncPsycopgDriver
        from pgqueuer.queries import SyncQueries

        connection = psycopg.connect(self._url, autocommit=True)

        def enqueue() -> None:
            with connection:
                SyncQueries(SyncPsycopgDriver(connection)).enqueue(
                    ["goodbye"] * len(rows),
                    [_payload(row) for row in rows],
                    [0] * len(rows),
                    dedupe_key=[key(row) for row in rows],
                    on_conflict="skip",
                )

        return enqueue

    def queue_each(self, rows: list[Given]) -> Timed:
        """Enqueue each."""
        from pgqueuer.db import SyncPsycopgDriver
        from pgqueuer.queries import SyncQueries

        connection = psycopg.connect(self._url, autocommit=True)

        def enqueue() -> None:
            with connection:
                queries = SyncQueries(SyncPsycopgDriver(connection))
                for row in rows:
                    queries.enqueue("goodbye", _payload(row), dedupe_key=key(row), on_conflict="skip")

        return enqueue

    def drain(self) -> Timed:
        """Run a queue manager until all is settled. `close` leaves its loop, which takes seconds that are not timed."""
        from pgqueuer.db import PsycopgDriver
        from pgqueuer.qm import QueueManager
        from pgqueuer.queries import Queries
        from pgqueuer.types import QueueExecutionMode

        async def until_settled() -> None:
            connection = await psycopg.AsyncConnection.connect(self._url, autocommit=True)
            manager = QueueManager(Queries(PsycopgDriver(connection)))

            @manager.entrypoint("goodbye")
            async def goodbye(job: Any) -> None:
                """Send nothing."""

            async def run() -> None:
                async with connection:
                    await manager.run(batch_size=1000, mode=QueueExecutionMode.drain)

            # It shuts down when its table is empty.
            running, waiting = asyncio.create_task(run()), asyncio.create_task(manager.shutdown.wait())
            await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                await running

        runner = self._leaving.enter_context(asyncio.Runner())
        return lambda: runner.run(until_settled())

    def close(self) -> None:
        """Leave the loops of the drains."""
        self._leaving.close()


def _arguments(row: Given) -> dict[str, Any]:
    return {"user_id": row.user_id, "params": row.message_params, "jid": row.destination_jid}


def _payload(row: Given) -> bytes:
    return f'{{"user_id":"{row.user_id}","jid":"{row.destination_jid}","params":{as_json(row)}}}'.encode()
