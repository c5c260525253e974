"""The later words of a provider about a message that it was given."""

from __future__ import annotations

import hashlib
import re
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, get_args

from engagement.messages.checks import InvalidMessage, checked_flag, checked_moment, checked_text

ReceiptEvent = Literal["accepted", "delivered", "read", "undeliverable"]
RECEIPT_EVENTS: frozenset[str] = frozenset(get_args(ReceiptEvent))
MOST_ID = 512
"""Characters in a provider's message id."""
_REFERENCE = re.compile(r"([1-9][0-9]{0,18})\.([0-9a-f]{8}-[0-9a-f]{4}-5[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12})")

_OUR_WHATSAPP_ID = re.compile(r"3EB0([0-9A-F]{12})[0-9A-F]{6}")
_ID_IN_A_CHAT = re.compile(r"(?:true|false)_[^_\s]{1,80}_([^_\s]{1,80})(?:_\S{1,80})?")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Receipt:
    """A provider's word about a message, some time after it was sent. It is checked when it is made.

    `event` is `accepted` (the provider has it), `delivered` (it reached a device of the person), `read`, or
    `undeliverable` (it will never arrive). `at` is when that happened, by the provider's clock. The message is named by
    the `reference` that the transport gave the provider (`OutgoingMessage.reference`), by the provider's own
    `provider_message_id`, or by both. `reason` is why it is undeliverable, `code` the provider's own for that
    (`131026`). `unreachable` says that no other message should be sent to the address either: it comes onto the
    suppression list. Raises `InvalidMessage`, which names the field.
    """

    event: ReceiptEvent
    at: datetime
    provider: str
    """The name of the provider, such as `cloud`: it stands in the history."""
    reference: str | None = None
    provider_message_id: str | None = None
    reason: str | None = None
    code: str | None = None
    unreachable: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.event, str) or self.event not in RECEIPT_EVENTS:
            raise InvalidMessage("event", f"must be one of {', '.join(get_args(ReceiptEvent))}")
        object.__setattr__(self, "at", checked_moment("at", self.at).astimezone(UTC))
        checked_text("provider", self.provider)
        if self.reference is None and self.provider_message_id is None:
            raise InvalidMessage("reference", "is missing, and provider_message_id too: one of them names the message")
        if self.reference is not None and read_reference(checked_text("reference", self.reference)) is None:
            raise InvalidMessage("reference", "is no OutgoingMessage.reference")
        for name in ("reason", "code"):
            if not isinstance(getattr(self, name), str | None):
                raise InvalidMessage(name, f"must be text, not {type(getattr(self, name)).__name__}")
        if checked_flag("unreachable", self.unreachable) and self.event != "undeliverable":
            raise InvalidMessage("unreachable", "is for undeliverable only")
        if self.provider_message_id is not None:
            checked_text("provider_message_id", self.provider_message_id, max_characters=MOST_ID)

    def __repr__(self) -> str:
        return f"Receipt(event={self.event!r}, provider={self.provider!r})"


def reference(message_id: int, delivery_id: uuid.UUID) -> str:
    """Return the text by which a provider's receipts name a message (`7.5f0c…`): `OutgoingMessage.reference`.

    The id finds its row. The delivery id proves that the row is of this message: a table that was restored from a
    backup gives the same numbers to other messages.
    """
    return f"{message_id}.{delivery_id}"


def read_reference(text: str) -> tuple[int, uuid.UUID] | None:
    """Return the message id and the delivery id of a reference; None if the text is none."""
    found = _REFERENCE.fullmatch(text)
    return (int(found[1]), uuid.UUID(found[2])) if found is not None and int(found[1]) < 2**63 else None


def whatsapp_message_id(message_id: int, delivery_id: uuid.UUID) -> str:
    """Return the WhatsApp id of every attempt of a delivery, in the form of Baileys' own ids (generics.ts).

    It is a reference too: 12 digits are the message's id, and six are of a hash of the delivery id, as its proof.
    """
    return f"3EB0{message_id % 16**12:012X}{_proof(delivery_id)}"


def bare_whatsapp_id(provider_message_id: str) -> str:
    """Return WhatsApp's own id in one of WAHA's (`3EB0…` of `true_5511…@c.us_3EB0…`), and any other as it is.

    The chat and the author around it are a number in one place and a `@lid` in another, for the same message.
    """
    found = _ID_IN_A_CHAT.fullmatch(provider_message_id)
    return provider_message_id if found is None else found[1]


def message_id_in(whatsapp_id: str) -> int | None:
    """Return the message's id in a WhatsApp id, which may be somebody else's: its proof is still to be compared."""
    found = _OUR_WHATSAPP_ID.fullmatch(whatsapp_id)
    return None if found is None else int(found[1], 16)


def _proof(delivery_id: uuid.UUID) -> str:
    return hashlib.sha256(str(delivery_id).encode()).hexdigest()[:6].upper()
