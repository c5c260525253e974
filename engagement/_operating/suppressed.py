"""The suppression list as people look at it: a page of its entries, the newest first, and their number."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import func, select

from engagement._operating.lists import LONGEST_PAGE
from engagement._sql.hiding import ListIsHidden
from engagement._sql.host_sessions import HostSession
from engagement._sql.suppressing import LIST, is_in_force, whether_hidden
from engagement.models import SUPPRESSION_TABLE_NAME

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

L = LIST.c


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the suppression list. Its address is known by a hash only."""

    address_hash: str
    reason: str | None
    since: datetime
    until: datetime | None


@dataclass(frozen=True, slots=True)
class Entries:
    """A page of the suppression list, and the number of entries on all pages."""

    entries: list[Entry]
    count: int


def list_suppressed(session: Session, *, skip: int = 0, limit: int = 50, schema: str | None = None) -> Entries:
    """Return up to `limit` entries in force, the newest first, after `skip` newer ones.

    The list is read whole, since it is counted: an index by age would save nothing. Raises `ListIsHidden`.
    """
    if not 1 <= limit <= LONGEST_PAGE:
        raise ValueError(f"limit: must be from 1 to {LONGEST_PAGE}")
    if not 0 <= skip < 2**63:
        raise ValueError("skip: must be from 0 to 9223372036854775807")
    host = HostSession(session, schema)
    page = (
        select(L.address_hash, L.reason, L.since, L.until)
        .where(is_in_force)
        .order_by(L.since.desc(), L.address_hash)
        .limit(limit)
        .offset(skip)
    )
    entries = [Entry(*row) for row in host.rows(page, {})]
    counted = select(func.count()).select_from(LIST).where(is_in_force)
    count = int(host.execute(counted).scalar_one())
    if not count and host.execute(whether_hidden(), {"list": host.name_of(SUPPRESSION_TABLE_NAME)}).scalar_one():
        raise ListIsHidden
    return Entries(entries, count)
