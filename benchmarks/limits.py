"""Between a floor and ours: the share of SQLAlchemy and Python in the difference, and the share of the statements.

Neither sends anything, recovers, or survives a lost database: they show how near to its floor a worker can come.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from benchmarks.floors import CLAIM, SETTLE, Floor
from benchmarks.queues import Timed
from engagement import OutgoingMessage, Sent
from engagement._claim import START, Claim
from engagement._delivery.database import Holder, claim, settle
from engagement.models import Destination
from engagement.outcomes import decide


class FloorInSQLAlchemy(Floor):
    """The statements of the floor, executed by SQLAlchemy, and a message made of each row for a transport to send."""

    name = "… its statements in SQLAlchemy, and a message made of each row"

    def drain(self) -> Timed:
        """Settle a batch and claim the next in one transaction."""

        def drain() -> None:
            messages: list[OutgoingMessage] = []
            while True:
                with self._db.engine.begin() as connection:
                    if messages:
                        connection.exec_driver_sql(SETTLE, ([message.id for message in messages],))
                    rows = connection.exec_driver_sql(CLAIM, (self.batch,)).all()
                messages = [_message(row) for row in rows]
                if not messages:
                    return

        return drain


class OurStatements(Floor):
    """Our statements and values, and no transport, threads, leases or recovery."""

    name = "… our statements instead, and nothing else of a worker"

    def drain(self) -> Timed:
        """Settle a batch and claim the next in one transaction."""
        holder, many = Holder("benchmark", timedelta(minutes=5)), self.batch > 1
        engine = self._db.engine.execution_options(isolation_level="READ COMMITTED")
        sent = decide(
            Sent(), retry_count=0, max_retries=3, idempotent=False, worker_lost=False, backoff=lambda _: timedelta()
        )

        def drain() -> None:
            claims: list[Claim] = []
            position = START
            while True:
                with engine.begin() as connection:
                    if claims:
                        settle(connection, [(held, sent) for held in claims])
                    claimed = claim(
                        connection, holder, limit=self.batch, after=position, busy=(), one_per_destination=not many
                    )
                claims = claimed.claims
                position = claimed.go_on_after or position
                if not claims:
                    return

        return drain


def _message(row: Sequence[Any]) -> OutgoingMessage:
    message_id, idempotency_key, user_id, message_type, message_key, params, jid = row
    return OutgoingMessage(
        id=message_id,
        idempotency_key=idempotency_key,
        user_id=user_id,
        message_type=message_type,
        message_key=message_key,
        message_params=params,
        destination=Destination.INDIVIDUAL,
        destination_jid=jid,
        scheduled_for=_NOW,
        attempt=1,
        retry_count=0,
    )


_NOW = datetime.now(UTC)
