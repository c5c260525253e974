"""The repository: a host's door to the queue, within the host's own transaction.

It executes statements and shapes their answers. It never commits, rolls back or leaves a setting behind.
See docs/decisions.md#2026-11-29--the-repository-is-a-page-of-promises-and-_queueing-keeps-two-of-them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar
from uuid import UUID

from sqlalchemy import Executable

from engagement._logging import logger
from engagement._queueing import batch, one
from engagement._receiving import recording
from engagement._sql import changing, looking
from engagement._sql.host_sessions import HostSession
from engagement._watching import observers as observing
from engagement.messages import (
    Cancellation,
    Forgotten,
    InvalidMessage,
    NewMessage,
    Queued,
    QueuedMany,
    Receipt,
    ReceiptAnswer,
    StatusCounts,
)
from engagement.messages.checks import (
    MAX_KEY_BYTES,
    checked_age,
    checked_id,
    checked_moment,
    checked_text,
    checked_user_id,
)
from engagement.models import EngagementMessage, MessageStatus, checked_schema
from engagement.outcomes import clean_reason

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

P = ParamSpec("P")
R = TypeVar("R")

LARGEST_LIMIT = 1_000_000


class EngagementMessageRepository:
    """Queue, look up and change messages in `session`'s transaction or savepoint. Commits nothing.

    All input is checked before the database is touched and raises `InvalidMessage` (a `ValueError`), so that bad
    input never poisons the transaction. Errors of the database pass through, without the values of the statement.

    Changes keep `reason` and `by` in the message's history: why, and the name of who decided it (`by="ana"`).

    `schema` names the schema of the table if it is not on the connection's search path. A session with several engines
    sends these statements where it sends an UPDATE of `EngagementMessage`, and `get_…` where it sends a SELECT of it.
    """

    def __init__(self, session: Session, *, schema: str | None = None) -> None:
        self._host = HostSession(session, schema)

    def queue_message(self, message: NewMessage | None = None, /, **fields: Any) -> Queued:
        """Store a message as pending, or find that its key exists: `created` tells. Takes the fields as keywords too.

        A duplicate is no error, and the message that was there stays untouched. That it has other content, or is
        another user's, is a mistake in the key (two offers on one day under `user123:offer:2026-11-24`): `differs_in`
        and a warning in the log name the fields. If another transaction has queued the same key and is still open, this
        waits for its end. Under REPEATABLE READ and SERIALIZABLE, a duplicate that was committed after the snapshot
        raises the database's serialization error.
        """
        if message is None:
            message = NewMessage(**fields)
        elif fields:
            raise TypeError("queue_message takes a NewMessage or its fields, not both")
        else:
            one.checked(message)
        return observing.queueing(message.message_type, partial(one.queue, self._host, message))

    def queue_messages(self, messages: Iterable[NewMessage]) -> QueuedMany:
        """Store all messages whose keys are new, in any number and in constant memory, and count the duplicates.

        Of messages with the same key the first is stored. Concurrent batches never deadlock each other: each takes
        its keys in one order. So nothing is stored before all messages are known: more than 5,000 wait in a temporary
        file of this process. An error of `messages` passes through, and nothing of the batch is stored then.
        """
        queued = observing.queueing(None, partial(batch.queue, self._host, messages))
        logger.debug("engagement.queued_many created=%s duplicates=%s", queued.created, queued.duplicates)
        return queued

    # Looking

    def get_message(self, message_id: int) -> EngagementMessage | None:
        """Return the message as it is in the database now (`sent`, where the session had `pending`), or None."""
        return self._found("id", checked_id(message_id))

    def get_message_by_key(self, idempotency_key: str) -> EngagementMessage | None:
        """Return the message that holds the key, or None."""
        return self._found("idempotency_key", _checked_key(idempotency_key))

    def get_pending_messages(self, user_id: str | UUID) -> list[EngagementMessage]:
        """Return the user's pending messages, next first."""
        return self._host.entities(looking.pending_of_user(), {"of_user": checked_user_id(user_id)})

    def count_by_status(self) -> StatusCounts:
        """Count the messages in each status, zeros included, and tell how long the oldest due one has been waiting."""
        rows = self._host.execute(looking.count_by_status()).all()
        counts = dict.fromkeys(MessageStatus, 0) | {status: count for status, count, _ in rows}
        return StatusCounts(counts, rows[0][2] if rows else None)

    # Changing

    def cancel_message(self, message_id: int, reason: str | None = None, *, by: str | None = None) -> Cancellation:
        """Cancel a pending message. Never says cancelled of a message that is or may have been sent.

        A pending message that an idempotent transport may have sent before becomes in doubt, and is not sent again.
        """
        values = {"message_id": checked_id(message_id), **_decision(by, reason)}
        found = self._host.execute(changing.cancel_if_pending(), values).one_or_none()
        if found is None:
            return Cancellation("not_found", None)
        before, now = found
        if now == MessageStatus.CANCELLED:
            return Cancellation("cancelled", now)
        return Cancellation("already_cancelled" if before == MessageStatus.CANCELLED else "too_late", now or before)

    def cancel_pending_messages(
        self, user_id: str | UUID, message_type: str | None = None, reason: str | None = None, *, by: str | None = None
    ) -> int:
        """Cancel the user's pending messages, of one type or of all; return how many. A doubtful one does not count."""
        statement = changing.cancel_pending_of_user(of_one_type=message_type is not None)
        values = {"of_user": checked_user_id(user_id), **_decision(by, reason)}
        if message_type is not None:
            values["of_type"] = checked_text("message_type", message_type)
        return sum(status == MessageStatus.CANCELLED for status in self._host.execute(statement, values).scalars())

    def reschedule_message(self, message_id: int, scheduled_for: datetime) -> bool:
        """Move a pending message to another time. False if it is not pending or expires before then.

        Its key stays (`user123:goodbye:2025-11-21` for a goodbye that is moved to the 22nd).
        """
        moment = checked_moment("scheduled_for", scheduled_for)
        return self._changed(changing.reschedule_if_pending(), {"message_id": checked_id(message_id), "moment": moment})

    def retry_message(self, message_id: int, *, by: str | None = None) -> bool:
        """Make a failed or expired message due again, under the same key and with all its retries.

        An expiry that has passed is lifted. False if it is neither, or was forgotten or pruned.
        """
        return self._changed(changing.retry_if_ended(), {"message_id": checked_id(message_id), "by": clean_reason(by)})

    def resolve_message(self, message_id: int, sent: bool, reason: str | None = None, *, by: str | None = None) -> bool:
        """Resolve a message in doubt: `sent`, or not, and then it is due again. False if not in doubt.

        `sent=False` sends the message again. If the first send had left after all, the person gets it twice. Anything
        but True and False is refused. `sent_at` becomes the moment at which the doubt was recorded: the send was not
        later.
        """
        if not isinstance(sent, bool):
            raise InvalidMessage("sent", f"must be True or False, not {type(sent).__name__}")
        values = {"message_id": checked_id(message_id), **_decision(by, reason)}
        return self._changed(changing.resolve_if_in_doubt(sent=sent), values)

    def record_receipts(self, receipts: Iterable[Receipt]) -> list[ReceiptAnswer]:
        """Record the later words of providers, in any order, also twice. Answer each. Nothing is sent for it.

        `accepted`, `delivered` and `read` are a late `Sent`: the message is `sent`, also if it was in doubt, or was
        called unsent. `undeliverable` makes it `failed`, unless it was delivered. An answer that `settles` names the
        message and its new status, so that the host can write beside it.
        """
        return recording.record(self._host, receipts)

    def forget_user(self, user_id: str | UUID) -> Forgotten:
        """Cancel the user's pending messages, and blank params, destination, errors and provider ids everywhere.

        The user id stays, and so do the keys, which still block (`user123:goodbye:2025-11-21`). A message that is being
        sent at this moment is blanked too, and not tried again. Of an address on the suppression list the hash stays.
        """
        forgotten = self._host.execute(changing.forget_user(), {"of_user": checked_user_id(user_id)}).scalars().all()
        return Forgotten(cancelled=sum(forgotten), blanked=len(forgotten))

    def prune_messages(self, older_than: timedelta, limit: int = 10_000) -> int:
        """Blank finished messages that were last due longer than `older_than` ago; return how many, at most `limit`.

        Keys stay, and still block. Messages in doubt are not finished. Call it until it returns less than `limit`
        (`while queue.prune_messages(age) == 10_000: session.commit()`).
        """
        older_than = checked_age("older_than", older_than)
        if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= LARGEST_LIMIT:
            raise InvalidMessage("limit", f"must be an integer from 1 to {LARGEST_LIMIT}")
        return len(self._host.execute(changing.prune_finished(), {"older_than": older_than, "limit": limit}).all())

    def _changed(self, statement: Executable, values: Mapping[str, Any]) -> bool:
        return self._host.execute(statement, values).scalar_one_or_none() is not None

    def _found(self, column: str, value: int | str) -> EngagementMessage | None:
        return next(iter(self._host.entities(looking.message_by(column), {"value": value})), None)


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
        """Cancel the user's pending messages, and return their number."""
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
        """Resolve a message in doubt."""
        return await self._run(EngagementMessageRepository.resolve_message, message_id, sent, reason, by=by)

    async def record_receipts(self, receipts: Iterable[Receipt]) -> list[ReceiptAnswer]:
        """Record what providers say later of messages, and return the answer to each."""
        return await self._run(EngagementMessageRepository.record_receipts, receipts)

    async def forget_user(self, user_id: str | UUID) -> Forgotten:
        """Cancel the user's pending messages, and blank personal columns everywhere."""
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


def _decision(by: str | None, reason: str | None) -> dict[str, str | None]:
    return {"by": clean_reason(by), "reason": clean_reason(reason)}


def _checked_key(key: str) -> str:
    return checked_text("idempotency_key", key, max_characters=MAX_KEY_BYTES)
