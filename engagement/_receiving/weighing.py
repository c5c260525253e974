"""Decides the change that a receipt makes to the row that it speaks of. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from engagement.messages import Receipt, Recorded
from engagement.models import MessageStatus

INEXACT = timedelta(seconds=5)
"""Between a provider's clock, which may show whole seconds only, and the database's."""
_ENDED_UNSENT = frozenset({MessageStatus.CANCELLED, MessageStatus.EXPIRED})


@dataclass(frozen=True, slots=True)
class Told:
    """The columns of a row by which a receipt is weighed, and which it may change."""

    id: int
    status: MessageStatus
    attempt: int
    next_attempt_at: datetime
    sent_at: datetime | None
    delivered_at: datetime | None
    read_at: datetime | None
    undeliverable_at: datetime | None
    provider_message_id: str | None


def weigh(row: Told, receipt: Receipt, now: datetime) -> tuple[Recorded, Told]:
    """Return the answer to a receipt, and the row after it: the same if nothing changes.

    The end does not depend on the order of receipts. `delivered` and `read` are facts. `undeliverable` is one unless
    the message was delivered; `accepted` says less than either.
    """
    is_undeliverable = receipt.event == "undeliverable"
    answer, told = _undeliverable(row, receipt) if is_undeliverable else _arrived(row, receipt, now)
    if answer is Recorded.RECORDED and told.provider_message_id is None:
        told = replace(told, provider_message_id=receipt.provider_message_id)
    return answer, told


def _arrived(row: Told, receipt: Receipt, now: datetime) -> tuple[Recorded, Told]:
    if receipt.event == "accepted" and row.undeliverable_at is not None and receipt.at <= row.undeliverable_at:
        return Recorded.ALREADY_KNOWN, row  # Accepted first, and undeliverable then.
    delivered_at, read_at = row.delivered_at, row.read_at
    if receipt.event != "accepted":
        delivered_at = min(receipt.at, delivered_at or receipt.at)
    if receipt.event == "read":
        read_at = min(receipt.at, read_at or receipt.at)
    told = replace(
        row,
        status=MessageStatus.SENT,
        sent_at=row.sent_at or min(receipt.at, now),
        delivered_at=delivered_at,
        read_at=read_at,
        undeliverable_at=row.undeliverable_at if delivered_at is None else None,
    )
    return (Recorded.ALREADY_KNOWN if told == row else Recorded.RECORDED), told


def _undeliverable(row: Told, receipt: Receipt) -> tuple[Recorded, Told]:
    if row.delivered_at is not None or row.attempt == 0:
        return Recorded.CONTRADICTS, row
    was_told = row.undeliverable_at is not None and receipt.at <= row.undeliverable_at
    if was_told or row.status in _ENDED_UNSENT or _is_of_earlier_attempt(row, receipt):
        return Recorded.ALREADY_KNOWN, row
    return Recorded.RECORDED, replace(row, status=MessageStatus.FAILED, sent_at=None, undeliverable_at=receipt.at)


def _is_of_earlier_attempt(row: Told, receipt: Receipt) -> bool:
    """Whether a person has had the message tried again since: `retry_message` forgets the provider's id."""
    if row.provider_message_id is not None and receipt.provider_message_id is not None:
        return row.provider_message_id != receipt.provider_message_id
    return row.attempt > 1 and receipt.at < row.next_attempt_at - INEXACT
