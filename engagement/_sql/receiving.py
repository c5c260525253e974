"""Statements that find the messages of receipts, and record the receipts."""

from __future__ import annotations

from functools import cache
from typing import Annotated, TypedDict

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Executable,
    Text,
    and_,
    any_,
    bindparam,
    case,
    func,
    null,
    or_,
    select,
    true,
    update,
)

from engagement._sql.claiming import durably
from engagement._sql.history import history_with
from engagement._sql.rows import Rows
from engagement._sql.table import IN_DOUBT, LOCKED, MOMENT, NOW, QUEUE, SENT, C, is_forgotten, word


class Change(TypedDict):
    """A row after a receipt."""

    id: Annotated[int, BigInteger()]
    status: Annotated[str, Text()]
    at: Annotated[str, MOMENT]
    delivered_at: Annotated[str | None, MOMENT]
    read_at: Annotated[str | None, MOMENT]
    undeliverable_at: Annotated[str | None, MOMENT]
    provider_message_id: Annotated[str | None, Text()]
    event: Annotated[str, Text()]
    reason: Annotated[str | None, Text()]
    provider: Annotated[str, Text()]


CHANGES = Rows(Change, "changes")


@cache
def settings() -> Executable:
    """Let each statement of this transaction take `patience` at most, and its commit survive a crash of the server.

    A provider whose request was answered with 200 does not repeat it.
    """
    return select(func.set_config(word("statement_timeout"), bindparam("patience", type_=Text), true()), durably())


@cache
def lock_told() -> Executable:
    """Lock the messages with one of the `ids`, or of the `provider_ids`, and return them."""
    ids = C.id == any_(bindparam("ids", type_=ARRAY(BigInteger)))
    provider_ids = C.provider_message_id == any_(bindparam("provider_ids", type_=ARRAY(Text)))
    moments = C.delivered_at, C.read_at, C.undeliverable_at
    # For observers, and for the suppression list.
    more = C.message_type, C.sent_at, C.has_doubt, C.trace_context, C.destination_jid
    return (
        select(C.id, C.status, C.attempt, *moments, C.provider_message_id, C.idempotency_key, C.history, *more)
        # In one order everywhere, or two statements over the same rows would deadlock.
        .where(or_(ids, and_(C.provider_message_id.is_not(None), provider_ids)))
        .order_by(C.id)
        .with_for_update(**LOCKED)
    )


@cache
def record() -> Executable:
    """Record receipts, one for each message at most. They are locked.

    A message ends with it, as sent or as failed, or in doubt of an earlier attempt. The history of a message that was
    not sent so far keeps how it was resolved, in the words of `resolve_message`.
    """
    given = CHANGES.given().c
    is_sent = given.status == SENT
    reason = case((is_forgotten, null()), else_=given.reason)
    resolved = history_with(word("resolved"), given.event, sent=true(), by=given.provider)
    return (
        update(QUEUE)
        .values(
            status=given.status,
            has_doubt=given.status == IN_DOUBT,
            lease_expires_at=null(),
            sent_at=case((is_sent, func.coalesce(C.sent_at, func.least(given.at, NOW)))),
            delivered_at=given.delivered_at,
            read_at=given.read_at,
            undeliverable_at=given.undeliverable_at,
            provider_message_id=case((is_forgotten, null()), else_=given.provider_message_id),
            error_message=case((is_sent, C.error_message), else_=func.coalesce(reason, C.error_message)),
            history=case(
                (and_(is_sent, C.status == SENT), C.history),
                (is_sent, resolved),
                else_=history_with(given.event, reason, by=given.provider),
            ),
        )
        .where(C.id == given.id)
    )
