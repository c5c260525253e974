"""Our side, through the public names and nothing else, with every check and guarantee on."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from benchmarks.floors import Floor
from benchmarks.given import Given, new_messages
from benchmarks.queues import Timed
from benchmarks.server import Database
from engagement import EngagementMessageRepository, OutgoingMessage, Sent, process_message_queue


def send(message: OutgoingMessage) -> None:
    """Send nothing."""


class SendMany:
    """Send nothing, many at a time."""

    def send_many(self, messages: Sequence[OutgoingMessage]) -> list[Sent]:
        """Say of all that they were sent."""
        return [Sent()] * len(messages)


def name(message: OutgoingMessage) -> str:
    """Send nothing, and return an id as long as one of Meta's."""
    return f"wamid.{message.delivery_id.hex * 2}"


class NameMany:
    """Send nothing, many at a time, and return such ids."""

    def send_many(self, messages: Sequence[OutgoingMessage]) -> list[Sent]:
        """Say of all that they were sent."""
        return [Sent(name(message)) for message in messages]


class Ours:
    """Our queue, with a transport of one kind and so many messages in hand. It may return ids (`names`)."""

    def __init__(
        self,
        db: Database,
        *,
        many: bool = False,
        concurrency: int = 1,
        names: bool = False,
        in_order: bool = False,
    ) -> None:
        self.name = f"ours, send_many of {concurrency:,}" if many else f"ours, a function, concurrency={concurrency}"
        self._db = db
        self._transport = (NameMany() if names else SendMany()) if many else (name if names else send)
        self._concurrency, self._in_order = concurrency, in_order
        self.empty, self.fill = Floor(db).empty, Floor(db).fill

    def queue_many(self, rows: list[Given]) -> Timed:
        """`queue_messages`: the values are made and checked in the timed part."""

        def queue() -> None:
            with Session(self._db.engine) as session, session.begin():
                EngagementMessageRepository(session).queue_messages(new_messages(rows))

        return queue

    def queue_each(self, rows: list[Given]) -> Timed:
        """`queue_message` in a session and a transaction of its own, for each row."""

        def queue() -> None:
            for message in new_messages(rows):
                with Session(self._db.engine) as session, session.begin():
                    EngagementMessageRepository(session).queue_message(message)

        return queue

    def drain(self) -> Timed:
        """`process_message_queue`."""

        def drain() -> None:
            process_message_queue(
                self._db.engine, self._transport, concurrency=self._concurrency, in_order=self._in_order
            )

        return drain
