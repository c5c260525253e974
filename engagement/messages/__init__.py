"""The values that cross the boundary: the host's requests, our answers, and the messages for a transport.

All input is checked when a value is made, so that nothing bad ever reaches the host's open transaction.
"""

from engagement.messages.checks import InvalidMessage
from engagement.messages.keys import (
    DELIVERY_NAMESPACE,
    address_hash,
    delivery_id,
    idempotency_key,
    key_hash,
    weekly_idempotency_key,
)
from engagement.messages.receipts import Receipt, reference, whatsapp_message_id
from engagement.messages.results import (
    Cancellation,
    Forgotten,
    Pause,
    Queued,
    QueuedMany,
    ReceiptAnswer,
    Recorded,
    StatusCounts,
    Suppressed,
)
from engagement.messages.values import NewMessage, OutgoingMessage

__all__ = [
    "DELIVERY_NAMESPACE",
    "Cancellation",
    "Forgotten",
    "InvalidMessage",
    "NewMessage",
    "OutgoingMessage",
    "Pause",
    "Queued",
    "QueuedMany",
    "Receipt",
    "ReceiptAnswer",
    "Recorded",
    "StatusCounts",
    "Suppressed",
    "address_hash",
    "delivery_id",
    "idempotency_key",
    "key_hash",
    "reference",
    "weekly_idempotency_key",
    "whatsapp_message_id",
]
