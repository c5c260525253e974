"""Statements by which a person or the host changes messages."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Executable,
    and_,
    any_,
    bindparam,
    case,
    false,
    func,
    literal_column,
    null,
    or_,
    select,
    true,
    update,
)

from engagement._sql.history import doubted_at, entry, history_with
from engagement._sql.parameters import limit, text_of
from engagement._sql.suppressing import forget_reasons_of_user
from engagement._sql.table import (
    CANCELLED,
    EXPIRED,
    FAILED,
    IN_DOUBT,
    LOCKED,
    LOCKED_UNLESS_BY_OTHERS,
    MOMENT,
    NOW,
    PENDING,
    QUEUE,
    SENT,
    C,
    is_older,
    is_prunable,
    is_wanted,
    unless_in_doubt,
    word,
)


@cache
def cancel_if_pending() -> Executable:
    """Cancel a message and return (its status before, its status if it was changed); nothing if it does not exist."""
    # Locked first, so that the answer speaks of the same moment as the change.
    found = select(C.id, C.status, C.has_doubt).where(is_wanted).with_for_update(**LOCKED).cte("found")
    cancelled = (
        update(QUEUE)
        .where(C.id == found.c.id, found.c.status == PENDING)
        .values(
            status=unless_in_doubt(CANCELLED, found.c.has_doubt),
            has_doubt=found.c.has_doubt,
            # Of a pending message both are NULL. They are said again because PostgreSQL checks constraints once with
            # the row as it was before we waited for it.
            # docs/decisions.md#2026-11-24--a-statement-that-locks-and-changes-says-again-what-the-constraints-look-at
            lease_expires_at=null(),
            sent_at=null(),
            history=history_with(word("cancelled"), text_of("reason"), by=text_of("by")),
        )
        .returning(C.id, C.status)
        .cte("cancelled")
    )
    return select(found.c.status, cancelled.c.status).outerjoin_from(found, cancelled, found.c.id == cancelled.c.id)


@cache
def cancel_pending_of_user(*, of_one_type: bool) -> Executable:
    """Cancel a user's pending messages and return their statuses."""
    wanted = [C.user_id == bindparam("of_user"), C.status == PENDING]
    if of_one_type:
        wanted.append(C.message_type == bindparam("of_type"))
    pending = _locked(*wanted)
    return (
        update(QUEUE)
        .where(C.id == pending.c.id)
        .values(
            status=unless_in_doubt(CANCELLED, pending.c.has_doubt),
            has_doubt=pending.c.has_doubt,
            history=history_with(word("cancelled"), text_of("reason"), by=text_of("by")),
        )
        .returning(C.status)
    )


def _locked(*wanted: ColumnElement[bool]) -> Any:
    # In one order everywhere, or two statements over the same rows would deadlock.
    columns = (C.id, C.status, C.has_doubt, C.lease_expires_at, C.sent_at)
    return select(*columns).where(*wanted).order_by(C.id).with_for_update(**LOCKED).cte("locked")


@cache
def reschedule_if_pending() -> Executable:
    """Move a pending message to another time, unless it would have expired by then."""
    moment = bindparam("moment", type_=MOMENT)
    return (
        update(QUEUE)
        .where(is_wanted, C.status == PENDING, or_(C.expires_at.is_(None), C.expires_at > moment))
        .values(scheduled_for=moment, next_attempt_at=moment)
        .returning(C.id)
    )


@cache
def retry_if_ended() -> Executable:
    """Make a failed or expired message due again, with all its retries; an expiry that has passed is lifted."""
    return (
        update(QUEUE)
        .where(is_wanted, C.status.in_([FAILED, EXPIRED]), C.destination_jid.is_not(None))
        .values(
            status=PENDING,
            retry_count=0,
            next_attempt_at=NOW,
            expires_at=case((C.expires_at > NOW, C.expires_at)),
            history=history_with(word("retried"), null(), by=text_of("by")),
        )
        .returning(C.id)
    )


@cache
def resolve_if_in_doubt(*, sent: bool) -> Executable:
    """Resolve a message in doubt: it was sent, or it was not and becomes due again with all its retries.

    It was sent before the doubt was recorded, and not when somebody found out.
    See docs/decisions.md#2026-11-24--a-resolved-doubt-was-sent-when-it-was-recorded.
    """
    resolved = update(QUEUE).where(is_wanted, C.status == IN_DOUBT).returning(C.id)
    history = history_with(word("resolved"), text_of("reason"), sent=true() if sent else false(), by=text_of("by"))
    if sent:
        return resolved.values(status=SENT, has_doubt=False, sent_at=func.least(doubted_at(), NOW), history=history)
    return resolved.where(C.destination_jid.is_not(None)).values(
        status=PENDING, has_doubt=False, retry_count=0, next_attempt_at=NOW, history=history
    )


def _blanked(event: str) -> dict[str, ColumnElement[Any]]:
    return {
        "message_params": literal_column("'{}'::jsonb"),
        "destination_jid": null(),
        "error_message": null(),
        "provider_message_id": null(),
        "trace_context": null(),
        "history": func.jsonb_build_array(entry(word(event), null())),
    }


@cache
def forget_user() -> Executable:
    """Cancel a user's pending messages, blank all of them, and return for each whether it was cancelled now.

    The reasons that the suppression list has for their addresses are blanked too.
    """
    locked = _locked(C.user_id == bindparam("of_user"), C.destination_jid.is_not(None))
    was_pending = locked.c.status == PENDING
    return (
        update(QUEUE)
        .where(C.id == locked.c.id)
        .values(
            # As the lock found it, also where it stays: see cancel_if_pending.
            status=case((was_pending, unless_in_doubt(CANCELLED, locked.c.has_doubt)), else_=locked.c.status),
            has_doubt=locked.c.has_doubt,
            lease_expires_at=locked.c.lease_expires_at,
            sent_at=locked.c.sent_at,
            **_blanked("forgotten"),
        )
        .returning(and_(was_pending, ~locked.c.has_doubt))
        .add_cte(forget_reasons_of_user().cte("reasons"))
    )


@cache
def prune_finished() -> Executable:
    """Blank finished messages that were last due longer than `older_than` ago, `limit` at most; return their ids."""
    old = (
        select(C.id)
        .where(is_prunable, is_older)
        .order_by(C.next_attempt_at)
        .limit(limit)
        .with_for_update(**LOCKED_UNLESS_BY_OTHERS)
    )
    return (
        update(QUEUE).where(C.id == any_(func.array(old.scalar_subquery()))).values(_blanked("pruned")).returning(C.id)
    )
