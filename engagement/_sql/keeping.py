"""Statements of the kept receipts: those that came before the provider's id of their message was known."""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import Annotated, TypedDict

from sqlalchemy import (
    Boolean,
    Executable,
    Interval,
    Table,
    Text,
    any_,
    bindparam,
    cast,
    delete,
    func,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import insert

from engagement._sql.rows import Rows
from engagement._sql.table import MOMENT, NOW, C, ctid, number
from engagement.models import EngagementReceipt

KEPT: Table = EngagementReceipt.__table__  # type: ignore[assignment]  # declared as FromClause
K = KEPT.c
KEPT_FOR = timedelta(days=1)
"""A send is settled within minutes, or, by a worker that the database was away for, within hours."""
AT_ONCE = 1_000
"""Receipts that one transaction matches."""


class Keeping(TypedDict):
    """A receipt to keep."""

    provider_message_id: Annotated[str, Text()]
    event: Annotated[str, Text()]
    at: Annotated[str, MOMENT]
    provider: Annotated[str, Text()]
    reason: Annotated[str | None, Text()]
    code: Annotated[str | None, Text()]
    unreachable: Annotated[bool, Boolean()]


KEEPING = Rows(Keeping, "kept")


@cache
def keep() -> Executable:
    """Keep receipts, each of them once."""
    given = KEEPING.given().c
    # In one order everywhere, or two statements over the same receipts would deadlock.
    rows = select(*given).order_by(given.provider_message_id, given.event, given.at)
    return insert(KEPT).from_select([column.name for column in given], rows).on_conflict_do_nothing()


@cache
def take_matching() -> Executable:
    """Take out receipts, kept `within` a time if that is given, whose provider's id a message has now; return them.

    Receipts that another session takes at this moment are left to it.
    """
    known = C.provider_message_id == K.provider_message_id
    # With EXISTS the planner may read the queue from end to end once. This it looks up, receipt by receipt.
    is_known = select(true()).where(known, C.provider_message_id.is_not(None)).limit(number(1)).correlate(KEPT)
    within = func.coalesce(K.kept_at > NOW - cast(bindparam("within", type_=Interval), Interval), true())
    found = (
        select(ctid)
        .select_from(KEPT)
        .where(within, is_known.scalar_subquery())
        .limit(number(AT_ONCE))
        .with_for_update(skip_locked=True)
        .correlate(None)
    )
    return (
        delete(KEPT)
        .where(ctid == any_(func.array(found.scalar_subquery())))
        .returning(K.provider_message_id, K.event, K.at, K.provider, K.reason, K.code, K.unreachable)
    )


@cache
def drop() -> Executable:
    """Drop the receipts that were kept for `within` and never matched, except those that another session takes."""
    is_over = K.kept_at <= NOW - bindparam("within", type_=Interval)
    found = select(ctid).select_from(KEPT).correlate(None).where(is_over).with_for_update(skip_locked=True)
    return delete(KEPT).where(ctid == any_(func.array(found.scalar_subquery())))
