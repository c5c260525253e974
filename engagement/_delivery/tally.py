"""The work of a run: counted for its caller, logged for its operators.

Logs name ids and events, never people or what they are told.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from engagement._claim import Claim
from engagement._logging import logger
from engagement.messages import OutgoingMessage
from engagement.models import MessageStatus
from engagement.outcomes import InDoubt, NotSent, Postpone, Refused, Verdict, clean_reason


@dataclass(frozen=True, slots=True)
class ProcessResult:
    """The work of a run, in numbers.

    `processed` is how many outcomes there were (3: two `succeeded`, one `retried`); the counts from `succeeded` to
    `cancelled` add up to it, but for claims that were lost. Besides are counted, since they were not tried: `expired`
    messages, and those `in_doubt` of an attempt of an idempotent transport that this one must not repeat. `errors` are
    (message_id, reason) pairs, and not shown by `print`: a provider's words may hold an address, which the command
    masks.
    """

    processed: int = 0
    succeeded: int = 0
    failed: int = 0
    retried: int = 0
    in_doubt: int = 0
    postponed: int = 0
    cancelled: int = 0
    expired: int = 0
    errors: tuple[tuple[int, str], ...] = field(default=(), repr=False)


class Tally:
    """Counts and logs the end of each attempt."""

    def __init__(self, errors_kept: int | None) -> None:
        self._counts: Counter[str] = Counter()
        self._errors: deque[tuple[int, str]] = deque(maxlen=errors_kept)

    def add(self, claim: Claim, verdict: Verdict, status: MessageStatus | None) -> None:
        """Count a settled attempt; `status` None says that its claim was lost."""
        message = claim.message
        if claim.is_overdue and verdict.status is MessageStatus.SENT:
            logger.warning(
                "engagement.late_sent message_id=%s attempt=%s status=%s", message.id, message.attempt, status
            )
            return
        self._counts["processed"] += 1
        if verdict.event in _TROUBLE:
            self._errors.append((message.id, clean_reason(verdict.reason) or ""))
        if status is None:
            logger.warning("engagement.claim_lost message_id=%s attempt=%s", message.id, message.attempt)
            return
        self._counts["postponed" if verdict.event == Postpone.event else _COUNTED_AS[status]] += 1
        level = logging.WARNING if verdict.event in _TROUBLE else logging.INFO
        logger.log(
            level,
            "engagement.%s message_id=%s attempt=%s status=%s",
            verdict.event,
            message.id,
            message.attempt,
            status,
        )

    def end(self, ended: Mapping[OutgoingMessage, MessageStatus]) -> None:
        """Count messages that ended when they would have been claimed: expired, or in doubt of an earlier attempt."""
        for message, status in ended.items():
            if status is MessageStatus.EXPIRED:
                self._counts["expired"] += 1
                logger.info("engagement.expired message_id=%s", message.id)
            else:
                self._counts["in_doubt"] += 1
                self._errors.append((message.id, "an earlier attempt may have left"))
                logger.warning("engagement.in_doubt message_id=%s status=%s", message.id, status)

    def so_far(self, name: str) -> int:
        """Return one of the counts."""
        return self._counts[name]

    def result(self) -> ProcessResult:
        """Return the counts."""
        return ProcessResult(**self._counts, errors=tuple(self._errors))


_TROUBLE = frozenset({NotSent.event, Refused.event, InDoubt.event})
_COUNTED_AS = {
    MessageStatus.SENT: "succeeded",
    MessageStatus.FAILED: "failed",
    MessageStatus.PENDING: "retried",
    MessageStatus.IN_DOUBT: "in_doubt",
    MessageStatus.CANCELLED: "cancelled",
}
