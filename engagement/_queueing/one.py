"""Queues one message, or explains the duplicate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engagement._logging import logger
from engagement._queueing.waking import note_queued
from engagement._sql import queueing
from engagement._sql.host_sessions import HostSession
from engagement.messages import InvalidMessage, NewMessage, Queued
from engagement.models import TABLE_NAME, MessageStatus


def checked(message: object) -> NewMessage:
    """Return the message. Raises `InvalidMessage` for anything else, such as a dictionary of its fields."""
    if not isinstance(message, NewMessage):
        raise InvalidMessage("message", f"must be a NewMessage, not {type(message).__name__}")
    return message


def queue(host: HostSession, message: NewMessage, trace_context: str | None) -> Queued:
    """Store the message, or find the one that holds its key."""
    values = {**queueing.row(message), "trace_context": trace_context}
    created_id = host.execute(queueing.insert_message(), values).scalar_one_or_none()
    if created_id is None:
        return _duplicate(host, message.key, values)
    note_queued(host, message.scheduled_for)
    logger.debug("engagement.queued message_id=%s", created_id)
    return Queued(True, created_id, message.key, MessageStatus.PENDING)  # noqa: FBT003 - a value's first field


def _duplicate(host: HostSession, idempotency_key: str, values: Mapping[str, Any]) -> Queued:
    key = {"idempotency_key": idempotency_key}
    found = host.execute(queueing.find_key(), key | {"queue": host.name_of(TABLE_NAME)}).one_or_none()
    message_id, status, may_compare = found or (None, None, False)
    differs_in = None
    if may_compare:
        given = {f"given_{name}": value for name, value in values.items()}
        compared = host.execute(queueing.differences(), key | given).mappings().one_or_none()
        differs_in = tuple(name for name, differs in (compared or {}).items() if differs)
    if differs_in:
        fields = ",".join(differs_in)
        logger.warning("engagement.duplicate_differs message_id=%s fields=%s", message_id, fields)
    else:
        logger.debug("engagement.duplicate message_id=%s status=%s", message_id, status)
    return Queued(False, message_id, idempotency_key, status, differs_in)  # noqa: FBT003
