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
    RECEIPT_TABLE_NAME,
    SUPPRESSION_TABLE_NAME,
    TABLE_NAME,
    TABLE_NAMES,
    EngagementBase,
    checked_schema,
    qualified_name,
)
from engagement.models.receipt import MOST_RECEIPT_TEXT, EngagementReceipt, EngagementReceiptMixin
from engagement.models.suppression import MOST_REASON, EngagementSuppression, EngagementSuppressionMixin

__all__ = [
    "EARLIEST",
    "FINISHED",
    "LATEST",
    "MOST_COUNTED",
    "MOST_REASON",
    "MOST_RECEIPT_TEXT",
    "RECEIPT_TABLE_NAME",
    "SUPPRESSION_TABLE_NAME",
    "TABLE_NAME",
    "TABLE_NAMES",
    "Destination",
    "EngagementBase",
    "EngagementMessage",
    "EngagementMessageMixin",
    "EngagementReceipt",
    "EngagementReceiptMixin",
    "EngagementSuppression",
    "EngagementSuppressionMixin",
    "MessageStatus",
    "checked_schema",
    "qualified_name",
]
