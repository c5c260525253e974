"""The tables, a file for each. A host with a `Base` of its own maps the mixins."""

from engagement.models.message import (
    FINISHED,
    MOST_COUNTED,
    Destination,
    EngagementMessage,
    EngagementMessageMixin,
    MessageStatus,
)
from engagement.models.parts import (
    EARLIEST,
    LATEST,
    PAUSE_TABLE_NAME,
    RECEIPT_TABLE_NAME,
    SUPPRESSION_TABLE_NAME,
    TABLE_NAME,
    TABLE_NAMES,
    WORKER_TABLE_NAME,
    EngagementBase,
    checked_schema,
    qualified_name,
)
from engagement.models.pause import MOST_BY, MOST_SENDER, EngagementPause, EngagementPauseMixin, PauseScope
from engagement.models.receipt import MOST_RECEIPT_TEXT, EngagementReceipt, EngagementReceiptMixin
from engagement.models.suppression import MOST_REASON, EngagementSuppression, EngagementSuppressionMixin
from engagement.models.worker import MOST_TEXT, EngagementWorker, EngagementWorkerMixin

__all__ = [
    "EARLIEST",
    "FINISHED",
    "LATEST",
    "MOST_BY",
    "MOST_COUNTED",
    "MOST_REASON",
    "MOST_RECEIPT_TEXT",
    "MOST_SENDER",
    "MOST_TEXT",
    "PAUSE_TABLE_NAME",
    "RECEIPT_TABLE_NAME",
    "SUPPRESSION_TABLE_NAME",
    "TABLE_NAME",
    "TABLE_NAMES",
    "WORKER_TABLE_NAME",
    "Destination",
    "EngagementBase",
    "EngagementMessage",
    "EngagementMessageMixin",
    "EngagementPause",
    "EngagementPauseMixin",
    "EngagementReceipt",
    "EngagementReceiptMixin",
    "EngagementSuppression",
    "EngagementSuppressionMixin",
    "EngagementWorker",
    "EngagementWorkerMixin",
    "MessageStatus",
    "PauseScope",
    "checked_schema",
    "qualified_name",
]
