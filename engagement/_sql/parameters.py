"""How values reach a statement: many in one parameter, and so that one plan serves all of them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    ColumnElement,
    Text,
    all_,
    bindparam,
    cast,
    func,
    literal_column,
    or_,
    select,
)
from sqlalchemy.types import TypeEngine

from engagement._sql.table import number

SEPARATOR = "\x1f"
"""Joins the texts of many rows into one parameter, which the server splits: a third of the client's
cost for an array of texts. No text that passed our checks holds it; a missing value is the empty text.

See docs/decisions.md#2026-11-24--texts-of-a-batch-travel-joined-by-u001f."""


def moment_text(moment: datetime | None) -> str:
    """Return a moment as one of those texts."""
    return "" if moment is None else moment.astimezone(UTC).isoformat()


def text_of(name: str) -> ColumnElement[Any]:
    """Return a parameter that holds a text."""
    return bindparam(name, type_=Text)


def packed(name: str, type_: TypeEngine[Any] | None = None) -> ColumnElement[Any]:
    """Return the array that a parameter holds, packed as one text.

    See docs/decisions.md#2026-11-27--arrays-travel-packed-numbers-too.
    """
    texts = _split(text_of(name))
    return unseen(texts if type_ is None else cast(texts, ARRAY(type_)))


def _split(packed: ColumnElement[Any]) -> ColumnElement[Any]:
    return func.string_to_array(packed, literal_column("E'\\x1f'"), literal_column("''"))


def each_of(name: str, type_: TypeEngine[Any]) -> ColumnElement[Any]:
    """Return ALL members of a packed parameter, for a comparison."""
    # Without the cast, the members of ALL would be the rows of the sub-select.
    return all_(cast(packed(name, type_), ARRAY(type_)))


def unseen(value: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return `value`, which the planner then does not look at.

    So one plan costs the same for all values, and PostgreSQL keeps it for the connection. Else it plans anew each time,
    since few rows seem cheaper, though the plan is the same and planning takes longer than running.
    See docs/decisions.md#2026-11-24--a-workers-statements-are-planned-for-any-values.
    """
    return select(value).scalar_subquery()


def planned_anew() -> ColumnElement[bool]:
    """Return a condition that holds, and for which PostgreSQL plans a statement each time that it is executed.

    With the value at hand nothing is left of it; a plan for any value would seem to cost a fortune, and is not kept.
    """
    dear = select(func.count()).select_from(func.generate_series(*map(number, (1, 1_000_000_000))).alias("dear"))
    return or_(bindparam("planned_anew", value=True, type_=Boolean), dear.scalar_subquery() == number(0))


limit = bindparam("limit", type_=BigInteger)
