"""A message on its way in, from a host, and on its way out, to a transport."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from types import MappingProxyType
from typing import Any, Literal

from engagement.messages.checks import (
    check_times,
    checked_destination,
    checked_jid,
    checked_params,
    checked_text,
    checked_type,
    checked_tz,
    checked_user_id,
)
from engagement.messages.keys import checked_key, delivery_id, key_hash
from engagement.messages.receipts import reference, whatsapp_message_id
from engagement.models import Destination

_NO_PARAMS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, init=False)
class NewMessage:
    """A message to be queued. It is checked when it is made: bad input raises `InvalidMessage`, which names the field.

    `message_params` must be a JSON object of at most 64 KiB. It is read at once: later changes to the mapping are not
    seen. `scheduled_for` None means now. The idempotency key is computed from the user, the type and the date of
    `scheduled_for` in `tz` unless it is given (two goodbyes to a user on one day have one key,
    `user123:goodbye:2025-11-21`: the second is a duplicate).
    """

    user_id: str
    message_type: str
    message_key: str
    message_params: Mapping[str, Any]
    destination: Destination | Literal["individual", "group"]
    destination_jid: str
    scheduled_for: datetime | None
    expires_at: datetime | None
    idempotency_key: str | None
    tz: tzinfo
    key: str = field(init=False)
    """The idempotency key that the message is queued under: the given one, or the computed one."""
    params_json: str = field(init=False, compare=False)

    # Written out: a generated one sets each field before its check, and once more after it, which costs a third more.
    def __init__(
        self,
        *,
        user_id: str | uuid.UUID,
        message_type: str,
        message_key: str,
        message_params: Mapping[str, Any] = _NO_PARAMS,
        destination: Destination | Literal["individual", "group"],
        destination_jid: str,
        scheduled_for: datetime | None = None,
        expires_at: datetime | None = None,
        idempotency_key: str | None = None,
        tz: tzinfo = UTC,
    ) -> None:
        kind = checked_destination(destination)
        check_times(scheduled_for, expires_at)
        put = object.__setattr__  # The class is frozen.
        put(self, "scheduled_for", scheduled_for)
        put(self, "expires_at", expires_at)
        put(self, "tz", checked_tz(tz))
        put(self, "user_id", checked_user_id(user_id))
        put(self, "message_type", checked_type("message_type", message_type))
        put(self, "message_key", checked_text("message_key", message_key))
        put(self, "message_params", {} if message_params is _NO_PARAMS else message_params)
        put(self, "params_json", checked_params(message_params))
        put(self, "destination", kind)
        put(self, "destination_jid", checked_jid(destination_jid, kind))
        put(self, "idempotency_key", idempotency_key)
        key = checked_key(
            idempotency_key,
            user_id=self.user_id,
            message_type=self.message_type,
            scheduled_for=scheduled_for,
            tz=tz,
        )
        put(self, "key", key)

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"NewMessage(message_type={self.message_type!r}, key_hash={key_hash(self.key)!r})"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class OutgoingMessage:
    """A message for a transport.

    `attempt` counts from 1; `retry_count` is how many attempts failed before (at `attempt` 3 it is 1, if the first one
    failed and the second one was postponed).
    """

    id: int
    idempotency_key: str
    user_id: str
    message_type: str
    message_key: str
    message_params: Mapping[str, Any]
    destination: Destination
    destination_jid: str
    scheduled_for: datetime
    attempt: int
    retry_count: int

    @property
    def delivery_id(self) -> uuid.UUID:
        """The same for every attempt: hand it to a provider that can recognise a repeat (by an `Idempotency-Key`)."""
        return delivery_id(self.idempotency_key)

    @property
    def reference(self) -> str:
        """Names this message in a provider's receipts, if it can be told a text that they give back: see `Receipt`."""
        return reference(self.id, self.delivery_id)

    @property
    def whatsapp_id(self) -> str:
        """The same, in the form of a WhatsApp message id, for a gateway that lets its client choose that."""
        return whatsapp_message_id(self.id, self.delivery_id)

    def __hash__(self) -> int:
        return hash((self.id, self.attempt))

    def __repr__(self) -> str:
        return f"OutgoingMessage(id={self.id}, message_type={self.message_type!r}, attempt={self.attempt})"
