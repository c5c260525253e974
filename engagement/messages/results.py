"""The answers of a repository."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Literal

from engagement.models import MessageStatus, PauseScope


@dataclass(frozen=True, slots=True)
class Queued:
    """The result of one `queue_message`.

    `created` is False for a duplicate; `message_id` and `status` are then those of the stored message. They are None if
    the caller cannot see that message: it is newer than the snapshot (REPEATABLE READ, SERIALIZABLE), row-level
    security hides it (another tenant's), or somebody has just deleted its row.
    """

    created: bool
    message_id: int | None
    idempotency_key: str = field(repr=False)
    status: MessageStatus | None
    differs_in: tuple[str, ...] | None = field(default=(), compare=False)
    """The fields in which a duplicate differs from the stored message, such as `("message_params",)`. Compared are
    `user_id`, `message_type`, `message_key`, `message_params`, `destination` and `destination_jid`, unless they were
    blanked since. None if the caller cannot see that message, or may not read those columns.

    See docs/decisions.md#2026-11-29--the-same-key-with-other-content-is-told-and-not-refused."""

    @property
    def is_of_another_user(self) -> bool:
        """Whether the key is that of another user's message: then nothing was queued for this one."""
        return self.differs_in is not None and "user_id" in self.differs_in


@dataclass(frozen=True, slots=True)
class QueuedMany:
    """The result of one `queue_messages`.

    The sum of both is the number of messages given: a new key that stands twice among them counts once in each.
    """

    created: int
    duplicates: int


@dataclass(frozen=True, slots=True)
class Cancellation:
    """The result of one `cancel_message`.

    `too_late` means that the message was sent, may have been (`sending`: a worker has claimed it), or ended otherwise
    (`expired`): see `status`.
    """

    verdict: Literal["cancelled", "already_cancelled", "too_late", "not_found"]
    status: MessageStatus | None

    @property
    def is_cancelled(self) -> bool:
        """Whether it is certain that the message is not sent (True of `already_cancelled`, False of `too_late`)."""
        return self.status is MessageStatus.CANCELLED


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The result of one `forget_user`: how many pending messages were cancelled, and how many in all were blanked."""

    cancelled: int
    blanked: int


@dataclass(frozen=True, slots=True)
class StatusCounts:
    """The number of messages in each status (`counts["failed"]`).

    `oldest_due` is how long the oldest due message has been waiting; None if none is due.
    """

    by_status: Mapping[MessageStatus, int]
    oldest_due: timedelta | None

    def __getitem__(self, status: MessageStatus | str) -> int:
        return self.by_status[MessageStatus(status)]


class Recorded(StrEnum):
    """The fate of one receipt."""

    RECORDED = "recorded"
    """The message is as the receipt says."""
    ALREADY_KNOWN = "already_known"
    """It says no more than is known: it came twice, or speaks of an attempt that was tried again since."""
    UNKNOWN_MESSAGE = "unknown_message"
    """No message has this reference, or two have this provider's id."""
    KEPT = "kept"
    """No message has this provider's id yet: a worker records the receipt once one has, within a day."""
    CONTRADICTS = "contradicts"
    """It is `undeliverable` of a message that was delivered, or was never claimed: nothing is changed."""


@dataclass(frozen=True, slots=True)
class Suppressed:
    """Why, and since when, nothing is sent to an address. `until` is None for good.

    `reason` is None once a person of this address was forgotten.
    """

    reason: str | None
    since: datetime
    until: datetime | None


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause in force: its scope, reason, author and beginning. `until` is None if it has to be lifted."""

    scope: PauseScope
    name: str | None
    """The message type, or the sender; None of everything."""
    reason: str
    by: str | None
    since: datetime
    until: datetime | None


@dataclass(frozen=True, slots=True)
class ReceiptAnswer:
    """The answer to one receipt of `record_receipts`: its fate, and its message's."""

    answer: Recorded
    message_id: int | None = None
    before: MessageStatus | None = None
    """The status of the message before this receipt; None if the message is not known (yet), as of the others."""
    status: MessageStatus | None = None
    """The status with which this receipt leaves it."""

    @property
    def settles(self) -> bool:
        """Whether this receipt gave the message another status (`delivered` of a message in doubt: it is `sent`)."""
        return self.before != self.status
