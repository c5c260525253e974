"""Decides the change that a receipt makes to the row that it speaks of. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from engagement.messages import Receipt, Recorded
from engagement.models import EngagementMessage, MessageStatus

INEXACT = timedelta(seconds=5)
"""Between a provider's clock, which may show whole seconds only, and the database's."""
UNDELIVERABLE = (MessageStatus.FAILED, MessageStatus.IN_DOUBT)
"""The statuses in which `undeliverable_at` holds. In any other, the message was tried again since."""
_ENDED_UNSENT = frozenset({MessageStatus.CANCELLED, MessageStatus.EXPIRED})
_NOT_SETTLED = frozenset({MessageStatus.PENDING, MessageStatus.SENDING})


@dataclass(frozen=True, slots=True)
class Told:
    """The columns of a row by which a receipt is weighed, and which it may change."""

    id: int
    status: MessageStatus
    attempt: int
    delivered_at: datetime | None
    read_at: datetime | None
    undeliverable_at: datetime | None
    provider_message_id: str | None
    asked_again_at: datetime | None = None
    """When the attempt before the latest one was over: from then on receipts may be of that one."""
    was_doubted: bool = False
    """Whether an earlier attempt may have left."""


def latest_receipt(row: Told | EngagementMessage) -> Literal["delivered", "read", "undeliverable"] | None:
    """Return the word of the latest receipt that holds of a message; None if there is none.

    `accepted` says no more than `sent`. `undeliverable` holds until the message is tried again.
    """
    if row.delivered_at is not None:
        return "delivered" if row.read_at is None else "read"
    return "undeliverable" if row.undeliverable_at is not None and row.status in UNDELIVERABLE else None


def weigh(row: Told, receipt: Receipt) -> tuple[Recorded, Told]:
    """Return the answer to a receipt, and the row after it: the same if nothing changes.

    The end does not depend on the order of receipts. `delivered` and `read` are facts. `undeliverable` is one unless
    the message was delivered; `accepted` says less than either.
    """
    answer, told = (_undeliverable if receipt.event == "undeliverable" else _arrived)(row, receipt)
    if answer is Recorded.RECORDED and (told.provider_message_id is None or row.status in _NOT_SETTLED):
        # Before a settlement, an id that is there is that of an earlier attempt.
        told = replace(told, provider_message_id=receipt.provider_message_id or told.provider_message_id)
    return answer, told


def _arrived(row: Told, receipt: Receipt) -> tuple[Recorded, Told]:
    given_up = row.undeliverable_at
    if receipt.event == "accepted" and given_up is not None and receipt.at <= given_up and not _is_later(row, receipt):
        return Recorded.ALREADY_KNOWN, row  # Accepted first, and undeliverable then.
    delivered_at, read_at = row.delivered_at, row.read_at
    if receipt.event != "accepted":
        delivered_at = min(receipt.at, delivered_at or receipt.at)
    if receipt.event == "read":
        read_at = min(receipt.at, read_at or receipt.at)
    told = replace(
        row,
        status=MessageStatus.SENT,
        delivered_at=delivered_at,
        read_at=read_at,
        undeliverable_at=given_up if delivered_at is None else None,
    )
    return (Recorded.ALREADY_KNOWN if told == row else Recorded.RECORDED), told


def _undeliverable(row: Told, receipt: Receipt) -> tuple[Recorded, Told]:
    if row.delivered_at is not None or row.attempt == 0:
        return Recorded.CONTRADICTS, row
    was_told = row.undeliverable_at is not None and receipt.at <= row.undeliverable_at
    if was_told or row.status in _ENDED_UNSENT or _is_earlier(row, receipt):
        return Recorded.ALREADY_KNOWN, row
    # It speaks of one attempt: the doubt about another one stays, and is a person's.
    status = MessageStatus.IN_DOUBT if row.was_doubted else MessageStatus.FAILED
    return Recorded.RECORDED, replace(row, status=status, undeliverable_at=receipt.at)


def _is_earlier(row: Told, receipt: Receipt) -> bool:
    """Whether the receipt speaks of an attempt before the latest one."""
    if row.provider_message_id is not None and receipt.provider_message_id is not None:
        is_same = row.provider_message_id == receipt.provider_message_id
        if row.status not in _NOT_SETTLED:
            return not is_same  # A settlement leaves the id of its own attempt.
        if is_same and row.asked_again_at is not None:
            return True
    return row.asked_again_at is not None and receipt.at < row.asked_again_at - INEXACT


def _is_later(row: Told, receipt: Receipt) -> bool:
    """Whether the receipt speaks of another attempt than the one that was given up, and of no earlier one."""
    ids = {row.provider_message_id, receipt.provider_message_id} - {None}
    return len(ids) > 1 and (row.asked_again_at is None or receipt.at >= row.asked_again_at - INEXACT)


def past_attempts(history: Iterable[Any], attempt: int) -> tuple[datetime | None, bool]:
    """Return when the attempt before the latest one was over, if there was one, and whether one may have left."""
    over: list[datetime] = []
    was_doubted = False
    for entry in history:
        try:
            at, event = datetime.fromisoformat(entry["at"]), entry["event"]
            is_past = int(entry["attempt"]) < attempt
            if is_past or event == "retried" or (event == "resolved" and entry.get("sent") is False):
                over.append(at)
            # A person who resolved it, or had it tried again, answers for the doubts before.
            was_doubted = (was_doubted or (is_past and event == "in_doubt")) and event not in {"resolved", "retried"}
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
            continue  # Anybody may have written it.
    return max((at for at in over if at.tzinfo is not None), default=None), was_doubted
