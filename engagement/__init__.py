"""Queue proactive engagement messages once, inside your own transactions, and never send one twice."""

from engagement._delivery.hook import OnSettled
from engagement._delivery.tally import ProcessResult
from engagement._queueing.waking import wake_workers
from engagement.messages import (
    Cancellation,
    Forgotten,
    InvalidMessage,
    NewMessage,
    OutgoingMessage,
    Pause,
    Queued,
    QueuedMany,
    Receipt,
    ReceiptAnswer,
    Recorded,
    StatusCounts,
    Suppressed,
    idempotency_key,
    weekly_idempotency_key,
)
from engagement.models import (
    Destination,
    EngagementMessage,
    EngagementMessageMixin,
    EngagementPause,
    EngagementPauseMixin,
    EngagementReceipt,
    EngagementReceiptMixin,
    EngagementSuppression,
    EngagementSuppressionMixin,
    EngagementWorker,
    EngagementWorkerMixin,
    MessageStatus,
    PauseScope,
)
from engagement.outcomes import InDoubt, NotSent, Outcome, Postpone, Refused, Sent, Withdraw, exponential_backoff
from engagement.pausing import AsyncPauses, Pauses
from engagement.repository import AsyncEngagementMessageRepository, EngagementMessageRepository
from engagement.suppression import AsyncSuppressionList, SuppressionList
from engagement.verification import Violation, verify
from engagement.worker import Worker, process_message_queue

# Packages whose names begin with an underscore are no doors for a host (`engagement._sql`).
# docs/decisions.md#2026-11-29--private-packages-begin-with-an-underscore
__all__ = [
    "AsyncEngagementMessageRepository",
    "AsyncPauses",
    "AsyncSuppressionList",
    "Cancellation",
    "Destination",
    "EngagementMessage",
    "EngagementMessageMixin",
    "EngagementMessageRepository",
    "EngagementPause",
    "EngagementPauseMixin",
    "EngagementReceipt",
    "EngagementReceiptMixin",
    "EngagementSuppression",
    "EngagementSuppressionMixin",
    "EngagementWorker",
    "EngagementWorkerMixin",
    "Forgotten",
    "InDoubt",
    "InvalidMessage",
    "MessageStatus",
    "NewMessage",
    "NotSent",
    "OnSettled",
    "Outcome",
    "OutgoingMessage",
    "Pause",
    "PauseScope",
    "Pauses",
    "Postpone",
    "ProcessResult",
    "Queued",
    "QueuedMany",
    "Receipt",
    "ReceiptAnswer",
    "Recorded",
    "Refused",
    "Sent",
    "StatusCounts",
    "Suppressed",
    "SuppressionList",
    "Violation",
    "Withdraw",
    "Worker",
    "exponential_backoff",
    "idempotency_key",
    "process_message_queue",
    "verify",
    "wake_workers",
    "weekly_idempotency_key",
]
