"""The repository: a host's door to the queue, within the host's own transaction.

It executes statements and shapes their answers. It never commits, rolls back or leaves a setting behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from datetime import datetime, timedelta
from functools import partial
from itertools import chain, islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar
from uuid import UUID

from sqlalchemy import Executable, Select
from sqlalchemy.exc import StatementError

from engagement._logging import logger
from engagement._sql import changing, host_sessions, looking, queueing
from engagement._sql.encodings import with_storable_texts
from engagement._sql.host_sessions import readable
from engagement._sql.sorting import SortedTexts
from engagement._watching import observers as observing
from engagement.messages import Cancellation, Forgotten, InvalidMessage, NewMessage, Queued, QueuedMany, StatusCounts
from engagement.messages.checks import (
    MAX_KEY_BYTES,
    checked_age,
    checked_id,
    checked_moment,
    checked_text,
    checked_user_id,
)
from engagement.models import EngagementMessage, MessageStatus, checked_schema, qualified_name
from engagement.outcomes import clean_reason

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

P = ParamSpec("P")
R = TypeVar("R")

CHUNK = 5_000
"""Messages that are held in memory and sent to the server at once."""
LARGEST_LIMIT = 1_000_000


class EngagementMessageRepository:
    """Queue, look up and change messages in `session`'s transaction or savepoint. Commits nothing.

    All input is checked before the database is touched and raises `InvalidMessage` (a `ValueError`), so that bad
    input never poisons the transaction. Errors of the database pass through, without the values of the statement.

    Changes keep `reason` and `by` in the message's history: why, and the name of who decided it (`by="ana"`).

    `schema` names the schema of the table if it is not on the connection's search path. A session with several engines
    sends what is said here where it sends an UPDATE of `EngagementMessage`, and `get_…` where it sends a SELECT of it.
    """

    def __init__(self, session: Session, *, schema: str | None = None) -> None:
        self._session = session
        self._schema = schema
        self._keywords = host_sessions.in_session(schema)

    # Queueing

    def queue_message(self, message: NewMessage | None = None, /, **fields: Any) -> Queued:
        """Store a message as pending, or find that its key exists: `created` tells. Takes the fields as keywords too.

        A duplicate is no error, and the message that was there stays untouched. That it has other content, or is
        another user's, is a mistake in the key: `differs_in` and a warning in the log name the fields. If another
        transaction has queued the same key and is still open, this waits for its end. Under REPEATABLE READ and
        SERIALIZABLE, a duplicate that was committed after the snapshot raises the database's serialization error.
        """
        if message is None:
            message = NewMessage(**fields)
        elif fields:
            raise TypeError("queue_message takes a NewMessage or its fields, not both")
        else:
            _check_message(message)
        return observing.queueing(message.message_type, partial(self._queue, message))

    def _queue(self, message: NewMessage, trace_context: str | None) -> Queued:
        values = {**queueing.row(message), "trace_context": trace_context}
        created_id = self._execute(queueing.insert_message(), values).scalar_one_or_none()
        if created_id is None:
            return self._duplicate(message, values)
        logger.debug("engagement.queued message_id=%s", created_id)
        return Queued(True, created_id, message.key, MessageStatus.PENDING)  # noqa: FBT003 - a value's first field

    def _duplicate(self, message: NewMessage, values: Mapping[str, Any]) -> Queued:
        key = {"idempotency_key": message.key}
        queue = {"queue": qualified_name(host_sessions.schema_in_session(self._schema, self._session))}
        found = self._execute(queueing.find_key(), key | queue).one_or_none()
        message_id, status, may_compare = found or (None, None, False)
        differs_in = None
        if may_compare:
            given = {f"given_{name}": value for name, value in values.items()}
            compared = self._execute(queueing.differences(), key | given).mappings().one_or_none()
            differs_in = tuple(name for name, differs in (compared or {}).items() if differs)
        if differs_in:
            fields = ",".join(differs_in)
            logger.warning("engagement.duplicate_differs message_id=%s fields=%s", message_id, fields)
        else:
            logger.debug("engagement.duplicate message_id=%s status=%s", message_id, status)
        return Queued(False, message_id, message.key, status, differs_in)  # noqa: FBT003

    def queue_messages(self, messages: Iterable[NewMessage]) -> QueuedMany:
        """Store all messages whose keys are new, in any number and in constant memory, and count the duplicates.

        Of messages with the same key the first is stored. Concurrent batches never deadlock each other: each takes
        its keys in one order. So nothing is stored before all messages are known: more than 5,000 wait in a temporary
        file of this process. What `messages` raises passes through, and nothing of the batch is stored then.
        """
        queued = observing.queueing(None, partial(self._queue_many, messages))
        logger.debug("engagement.queued_many created=%s duplicates=%s", queued.created, queued.duplicates)
        return queued

    def _queue_many(self, messages: Iterable[NewMessage], trace_context: str | None) -> QueuedMany:
        chunks = _chunks(messages)
        first, second = next(chunks, []), next(chunks, [])
        if not second:
            # As `SortedTexts` does it, and not the server, whose order depends on the encoding of the database.
            rows = [row for _, row in sorted(first, key=itemgetter(0))]
            created = self._insert(rows, trace_context) if rows else 0
            return QueuedMany(created, len(first) - created)
        given = created = 0
        with closing(SortedTexts()) as waiting:
            for chunk in chain((first, second), chunks):
                waiting.add(chunk)
                given += len(chunk)
                chunk.clear()  # Or the first two would be held to the end.
            most_are_there = False
            for rows in waiting.pieces(CHUNK):
                new = self._insert(rows, trace_context, most_are_there=most_are_there)
                created += new
                most_are_there = 2 * new < len(rows)  # Mostly, the next piece is like this one.
        return QueuedMany(created, given - created)

    def _insert(self, rows: list[str], trace_context: str | None, *, most_are_there: bool = False) -> int:
        """Insert rows whose keys are new, and return how many those were."""
        values = {**queueing.packed_rows(rows), "trace_context": trace_context}
        created: int = self._execute(queueing.insert_packed(most_are_there=most_are_there), values).rowcount
        return created

    # Looking

    def get_message(self, message_id: int) -> EngagementMessage | None:
        """Return the message as it is in the database now, or None."""
        return self._entity(looking.message_by("id"), {"value": checked_id(message_id)})

    def get_message_by_key(self, idempotency_key: str) -> EngagementMessage | None:
        """Return the message that holds the key, or None."""
        return self._entity(looking.message_by("idempotency_key"), {"value": _checked_key(idempotency_key)})

    def get_pending_messages(self, user_id: str | UUID) -> list[EngagementMessage]:
        """Return the user's pending messages, next first."""
        return self._entities(looking.pending_of_user(), {"of_user": checked_user_id(user_id)})

    def count_by_status(self) -> StatusCounts:
        """Count the messages in each status, zeros included, and tell how long the oldest due one has been waiting."""
        rows = self._execute(looking.count_by_status()).all()
        counts = dict.fromkeys(MessageStatus, 0) | {status: count for status, count, _ in rows}
        return StatusCounts(counts, rows[0][2] if rows else None)

    # Changing

    def cancel_message(self, message_id: int, reason: str | None = None, *, by: str | None = None) -> Cancellation:
        """Cancel a pending message. Never says cancelled of a message that is or may have been sent.

        A pending message that an idempotent transport may have sent before becomes in doubt, and is not sent again.
        """
        values = {"message_id": checked_id(message_id), **_decision(by, reason)}
        found = self._execute(changing.cancel_if_pending(), values).one_or_none()
        if found is None:
            return Cancellation("not_found", None)
        before, now = found
        if now == MessageStatus.CANCELLED:
            return Cancellation("cancelled", now)
        return Cancellation("already_cancelled" if before == MessageStatus.CANCELLED else "too_late", now or before)

    def cancel_pending_messages(
        self, user_id: str | UUID, message_type: str | None = None, reason: str | None = None, *, by: str | None = None
    ) -> int:
        """Cancel what is pending for the user, of one type or of all, and return how many messages that were."""
        statement = changing.cancel_pending_of_user(of_one_type=message_type is not None)
        values = {"of_user": checked_user_id(user_id), **_decision(by, reason)}
        if message_type is not None:
            values["of_type"] = checked_text("message_type", message_type)
        return sum(status == MessageStatus.CANCELLED for status in self._execute(statement, values).scalars())

    def reschedule_message(self, message_id: int, scheduled_for: datetime) -> bool:
        """Move a pending message to another time; its key stays. False if it is not pending or expires before then."""
        values = {"message_id": checked_id(message_id), "moment": checked_moment("scheduled_for", scheduled_for)}
        return self._changed(changing.reschedule_if_pending(), values)

    def retry_message(self, message_id: int, *, by: str | None = None) -> bool:
        """Make a failed or expired message due again, under the same key and with all its retries.

        An expiry that has passed is lifted. False if it is neither, or was forgotten or pruned.
        """
        return self._changed(changing.retry_if_ended(), {"message_id": checked_id(message_id), "by": clean_reason(by)})

    def resolve_message(self, message_id: int, sent: bool, reason: str | None = None, *, by: str | None = None) -> bool:
        """Say what became of a message in doubt: `sent`, or not, and then it is due again. False if not in doubt.

        Say `sent=False` only if you know it: it sends the message. Anything but True and False is refused. `sent_at`
        becomes when the doubt was recorded: the send was not later.
        """
        if not isinstance(sent, bool):
            raise InvalidMessage("sent", f"must be True or False, not {type(sent).__name__}")
        values = {"message_id": checked_id(message_id), **_decision(by, reason)}
        return self._changed(changing.resolve_if_in_doubt(sent=sent), values)

    def forget_user(self, user_id: str | UUID) -> Forgotten:
        """Cancel what is pending for the user, and blank params, destination, errors and provider ids everywhere.

        Keys stay, and still block. A message that is being sent at this moment is blanked too, and not tried again.
        """
        were_cancelled = self._execute(changing.forget_user(), {"of_user": checked_user_id(user_id)}).scalars().all()
        return Forgotten(cancelled=sum(were_cancelled), blanked=len(were_cancelled))

    def prune_messages(self, older_than: timedelta, limit: int = 10_000) -> int:
        """Blank finished messages that were last due longer than `older_than` ago; return how many, at most `limit`.

        Keys stay, and still block. Messages in doubt are not finished. Call it until it returns less than `limit`.
        """
        older_than = checked_age("older_than", older_than)
        if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= LARGEST_LIMIT:
            raise InvalidMessage("limit", f"must be an integer from 1 to {LARGEST_LIMIT}")
        return len(self._execute(changing.prune_finished(), {"older_than": older_than, "limit": limit}).all())

    # Executing

    # `Any`: SQLAlchemy 2.0 and 2.1 give the rows of a result different types.
    def _execute(self, statement: Executable, values: Mapping[str, Any] | None = None) -> Any:
        values = with_storable_texts(values or {}, self._session, self._keywords["bind_arguments"])
        try:
            return self._session.execute(statement, values, **self._keywords)
        except StatementError as error:
            _hide_values(error)
            raise

    def _changed(self, statement: Executable, values: Mapping[str, Any]) -> bool:
        return self._execute(statement, values).scalar_one_or_none() is not None

    def _entities(self, statement: Select[Any], values: Mapping[str, Any]) -> list[EngagementMessage]:
        # What the session loaded earlier may have been changed by a worker since.
        statement = statement.execution_options(populate_existing=True)
        with readable(self._session, {"mapper": EngagementMessage, "clause": statement}):
            found: list[EngagementMessage] = self._execute(statement, values).scalars().all()
        return found

    def _entity(self, statement: Select[Any], values: Mapping[str, Any]) -> EngagementMessage | None:
        return next(iter(self._entities(statement, values)), None)


class AsyncEngagementMessageRepository:
    """`EngagementMessageRepository`, awaited: the same methods, promises and errors, on an `AsyncSession`."""

    def __init__(self, session: AsyncSession, *, schema: str | None = None) -> None:
        self._session = session
        self._schema = checked_schema(schema)

    async def queue_message(self, message: NewMessage | None = None, /, **fields: Any) -> Queued:
        """Store a message as pending, or find that its key exists: `created` tells."""
        return await self._run(EngagementMessageRepository.queue_message, message, **fields)

    async def queue_messages(self, messages: Iterable[NewMessage]) -> QueuedMany:
        """Store all messages whose keys are new, and count the duplicates."""
        return await self._run(EngagementMessageRepository.queue_messages, messages)

    async def get_message(self, message_id: int) -> EngagementMessage | None:
        """Return the message as it is in the database now, or None."""
        return await self._run(EngagementMessageRepository.get_message, message_id)

    async def get_message_by_key(self, idempotency_key: str) -> EngagementMessage | None:
        """Return the message that holds the key, or None."""
        return await self._run(EngagementMessageRepository.get_message_by_key, idempotency_key)

    async def get_pending_messages(self, user_id: str | UUID) -> list[EngagementMessage]:
        """Return the user's pending messages, next first."""
        return await self._run(EngagementMessageRepository.get_pending_messages, user_id)

    async def count_by_status(self) -> StatusCounts:
        """Count the messages in each status, and tell how long the oldest due one has been waiting."""
        return await self._run(EngagementMessageRepository.count_by_status)

    async def cancel_message(
        self, message_id: int, reason: str | None = None, *, by: str | None = None
    ) -> Cancellation:
        """Cancel a pending message."""
        return await self._run(EngagementMessageRepository.cancel_message, message_id, reason, by=by)

    async def cancel_pending_messages(
        self, user_id: str | UUID, message_type: str | None = None, reason: str | None = None, *, by: str | None = None
    ) -> int:
        """Cancel what is pending for the user, and return how many messages that were."""
        return await self._run(
            EngagementMessageRepository.cancel_pending_messages, user_id, message_type, reason, by=by
        )

    async def reschedule_message(self, message_id: int, scheduled_for: datetime) -> bool:
        """Move a pending message to another time."""
        return await self._run(EngagementMessageRepository.reschedule_message, message_id, scheduled_for)

    async def retry_message(self, message_id: int, *, by: str | None = None) -> bool:
        """Make a failed or expired message due again."""
        return await self._run(EngagementMessageRepository.retry_message, message_id, by=by)

    async def resolve_message(
        self, message_id: int, sent: bool, reason: str | None = None, *, by: str | None = None
    ) -> bool:
        """Say what became of a message in doubt."""
        return await self._run(EngagementMessageRepository.resolve_message, message_id, sent, reason, by=by)

    async def forget_user(self, user_id: str | UUID) -> Forgotten:
        """Cancel what is pending for the user, and blank what is personal everywhere."""
        return await self._run(EngagementMessageRepository.forget_user, user_id)

    async def prune_messages(self, older_than: timedelta, limit: int = 10_000) -> int:
        """Blank finished messages that were last due longer than `older_than` ago."""
        return await self._run(EngagementMessageRepository.prune_messages, older_than, limit)

    async def _run(
        self, method: Callable[Concatenate[EngagementMessageRepository, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        def call(session: Session) -> R:
            return method(EngagementMessageRepository(session, schema=self._schema), *args, **kwargs)

        return await self._session.run_sync(call)


def _chunks(messages: Iterable[NewMessage]) -> Iterator[list[tuple[str, str]]]:
    """Yield (key, row) of the messages, so many at a time."""
    remaining = iter(messages)
    while chunk := list(islice(remaining, CHUNK)):
        for message in chunk:
            _check_message(message)
        yield [(message.key, queueing.packed_row(message)) for message in chunk]


def _check_message(message: object) -> None:
    if not isinstance(message, NewMessage):
        raise InvalidMessage("message", f"must be a NewMessage, not {type(message).__name__}")


def _hide_values(error: StatementError) -> None:
    """Keep people's data out of what the host will log: the parameters, and a DETAIL that shows the row."""
    error.hide_parameters = True
    for shown in (error, error.orig):
        if shown is not None and shown.args:
            shown.args = (str(shown.args[0]).partition("\n")[0], *shown.args[1:])


def _decision(by: str | None, reason: str | None) -> dict[str, str | None]:
    return {"by": clean_reason(by), "reason": clean_reason(reason)}


def _checked_key(key: str) -> str:
    return checked_text("idempotency_key", key, max_characters=MAX_KEY_BYTES)
