"""Statements of the suppression list: the hashes of addresses that are not to be sent to."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any, TypedDict

from sqlalchemy import (
    Executable,
    Table,
    Text,
    Update,
    any_,
    bindparam,
    case,
    delete,
    false,
    func,
    null,
    or_,
    select,
    true,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import insert

from engagement._sql.hiding import ListIsHidden, is_hidden
from engagement._sql.rows import Rows
from engagement._sql.table import MOMENT, NOW, C, word
from engagement.messages import Suppressed
from engagement.models import EngagementSuppression

LIST: Table = EngagementSuppression.__table__  # type: ignore[assignment]  # declared as FromClause
L = LIST.c
is_in_force = or_(L.until.is_(None), L.until > NOW)
_is_of_address = L.address_hash == bindparam("of_address", type_=Text)


class Entry(TypedDict):
    """One address for the list. `until` is a text of a moment, or None for good."""

    address_hash: Annotated[str, Text()]
    reason: Annotated[str, Text()]
    until: Annotated[str | None, MOMENT]


ENTRIES = Rows(Entry, "suppressions")


@cache
def suppress() -> Executable:
    """Put addresses on the list, each of them once.

    One that is on it in force stays there since then, until the later of both moments.
    """
    given = ENTRIES.given().c
    # In one order everywhere, or two statements over the same addresses would deadlock.
    rows = select(given.address_hash, given.reason, NOW, given.until).order_by(given.address_hash)
    added = insert(LIST).from_select(["address_hash", "reason", "since", "until"], rows)
    return added.on_conflict_do_update(
        index_elements=[L.address_hash],
        set_={
            "reason": added.excluded.reason,
            "since": case((is_in_force, L.since), else_=added.excluded.since),
            "until": case(
                (or_(L.until.is_(None), added.excluded.until.is_(None)), null()),
                else_=func.greatest(L.until, added.excluded.until),
            ),
        },
    )


@cache
def unsuppress() -> Executable:
    """Take an address off the list; return whether it was on it in force."""
    return delete(LIST).where(_is_of_address).returning(is_in_force)


@cache
def find() -> Executable:
    """Return the rows for `found`: of an address that is on the list in force, and of a list that is hidden.

    `list` is the name of the table.
    """
    # In the statement that finds, since a policy may be dropped between two.
    entry = select(L.reason, L.since, L.until, false()).where(_is_of_address, is_in_force)
    hidden = select(null().cast(Text), null().cast(MOMENT), null().cast(MOMENT), true()).where(is_hidden("list"))
    return union_all(entry, hidden)


def found(rows: Iterable[Any]) -> Suppressed | None:
    """Return the entry that `find` found. Raises `ListIsHidden` if it could not see one."""
    for reason, since, until, hides in rows:
        if hides:
            raise ListIsHidden
        return Suppressed(reason, since, until)
    return None


@cache
def whether_hidden() -> Executable:
    """Return whether the table named `list` looks empty because it is hidden."""
    return select(is_hidden("list"))


@cache
def forget_reasons_of_user() -> Update:
    """Blank the reasons of a user's addresses, as far as their messages still have them."""
    hashes = select(func.encode(func.sha256(func.convert_to(C.destination_jid, word("UTF8"))), word("hex"))).where(
        C.user_id == bindparam("of_user"), C.destination_jid.is_not(None)
    )
    return update(LIST).where(L.address_hash == any_(func.array(hashes.scalar_subquery()))).values(reason=null())
