"""Whose turn it is among all workers: a lock on a destination for the time of a claim, its lease for that of a send.

See docs/decisions.md#2026-11-30--in-order-across-workers-is-a-lock-for-the-claim-and-a-lease-for-the-send.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    and_,
    bindparam,
    case,
    cast,
    column,
    false,
    func,
    select,
    true,
    tuple_,
)

from engagement._sql.parameters import packed, unseen
from engagement._sql.table import MOMENT, NOW, QUEUE, SENDING, C, number

BUCKETS = 1024
"""The locks that all destinations of a queue share. The server's table has room for 6,400 by default, and they are the
host's. While one destination of two with the same lock is being claimed for, the other is passed over."""


def take_turn_if_free(wanted: ColumnElement[bool]) -> ColumnElement[bool]:
    """Lock the destination of a message that is `wanted` until the end of the transaction.

    False if it is held, or another claim has it.

    The table is a part of the lock's name, so that two queues of one database do not meet.
    """
    bucket = func.hashtext(C.destination_jid).op("&")(number(BUCKETS - 1))
    lock = func.pg_try_advisory_xact_lock(cast(column("tableoid"), Integer), bucket)
    # By AND, the cheaper one would be called first: it would lock destinations that are not to be had.
    return case((and_(wanted, _is_free()), lock), else_=false())


def is_its_turn() -> list[ColumnElement[bool]]:
    """Return the conditions of a message to one of the locked destinations `turns`, up to a last place.

    Before the lock was taken, another claim may have been committed. This statement's snapshot has it.
    """
    last = tuple_(unseen(bindparam("until_at", type_=MOMENT)), unseen(bindparam("until_id", type_=BigInteger)))
    # Of an array, each row would be compared with each member; of a sub-select, the server makes a table of hashes.
    # It stands in a CASE, or the planner would join the two, and sort.
    turns = select(func.unnest(packed("turns")).label("turn"))
    locked = case((C.destination_jid.in_(turns), true()), else_=false())
    return [locked, _is_free(), tuple_(C.next_attempt_at, C.id) <= last]


def _is_free() -> ColumnElement[bool]:
    """Whether no lease holds the destination. One that ran out holds nothing, nor does a forgotten message."""
    leases = QUEUE.alias("leases")
    held = select(leases.c.destination_jid).where(
        leases.c.status == SENDING, leases.c.lease_expires_at > NOW, leases.c.destination_jid.is_not(None)
    )
    return C.destination_jid.not_in(held)
