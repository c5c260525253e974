"""The floors: the same durable work in plain psycopg, on the same table with all its indexes and constraints.

No checks, no retries, no history, and no more of a fence than the table demands.
"""

from collections.abc import Iterator
from typing import Any

import psycopg

from benchmarks.given import Given, as_json, key
from benchmarks.queues import Timed
from benchmarks.server import Database

INSERT_ONE = """
    INSERT INTO engagement_message_queue
        (user_id, message_type, message_key, message_params, destination, destination_jid, idempotency_key)
    VALUES (%s, %s, %s, %s, %s, %s, %s)
    ON CONFLICT DO NOTHING
    RETURNING id
"""

INSERT_MANY = """
    INSERT INTO engagement_message_queue
        (user_id, message_type, message_key, message_params, destination, destination_jid, idempotency_key)
    SELECT user_id, message_type, message_key, message_params::jsonb, destination, destination_jid, idempotency_key
    FROM unnest(%b::text[], %b::text[], %b::text[], %b::text[], %b::text[], %b::text[], %b::text[])
        AS given (user_id, message_type, message_key, message_params, destination, destination_jid, idempotency_key)
    ON CONFLICT DO NOTHING
"""

CLAIM = """
    UPDATE engagement_message_queue
    SET status = 'sending', attempt = attempt + 1, lease_expires_at = now() + interval '5 minutes'
    WHERE id = ANY (ARRAY(
        SELECT id
        FROM engagement_message_queue
        WHERE status = 'pending' AND next_attempt_at <= now()
        ORDER BY next_attempt_at, id
        LIMIT %s
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING id, idempotency_key, user_id, message_type, message_key, message_params, destination_jid
"""

SETTLE = """
    UPDATE engagement_message_queue
    SET status = 'sent', sent_at = now(), lease_expires_at = NULL
    WHERE id = ANY (%b) AND status = 'sending'
"""


class Floor:
    """Plain psycopg, claiming and settling `batch` at a time."""

    name = ""

    def __init__(self, db: Database, *, batch: int = 1000) -> None:
        self.name = self.name or f"floor: psycopg, {batch if batch > 1 else 'one'} at a time"
        self._db = db
        self.batch = batch

    def empty(self) -> None:
        """Remove everything."""
        self._db.execute("TRUNCATE engagement_message_queue")

    def fill(self, rows: list[Given]) -> None:
        """Queue rows, and let the planner know them."""
        self.queue_many(rows)()
        self._db.execute("VACUUM ANALYZE engagement_message_queue")

    def queue_many(self, rows: list[Given]) -> Timed:
        """Insert all rows by one statement with binary arrays, which are ready."""
        connection = self._db.connect(autocommit=True)
        values = [list(column) for column in zip(*map(_values, rows), strict=True)] or [[]] * 7

        def insert() -> None:
            with connection, connection.transaction():
                connection.execute(INSERT_MANY, values)

        return insert

    def queue_each(self, rows: list[Given]) -> Timed:
        """Begin, insert, commit, for each row."""
        connection = self._db.connect(autocommit=True)
        values = list(map(_values, rows))

        def insert() -> None:
            with connection:
                for each in values:
                    with connection.transaction():
                        connection.execute(INSERT_ONE, each).fetchone()

        return insert

    def drain(self) -> Timed:
        """Settle a batch and claim the next in one transaction."""
        connection = self._db.connect(autocommit=True)

        def drain() -> None:
            with connection:
                for _ in claims(connection, self.batch):
                    pass

        return drain


def claims(connection: psycopg.Connection, batch: int) -> Iterator[int]:
    """Settle a batch and claim the next in one transaction, until none is left; yield how many were claimed."""
    claimed: list[Any] = []
    while True:
        with connection.transaction():
            if claimed:
                connection.execute(SETTLE, [claimed])
            claimed = [row[0] for row in connection.execute(CLAIM, [batch])]
        if not claimed:
            return
        yield len(claimed)


def _values(row: Given) -> tuple[str, ...]:
    params = as_json(row)
    return (row.user_id, "goodbye", "goodbye.14_days", params, "individual", row.destination_jid, key(row))
