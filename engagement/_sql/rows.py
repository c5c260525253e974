"""Rows of values that cross to SQL in one parameter: each kind of row is described once, by a `TypedDict`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from json import JSONEncoder
from operator import itemgetter
from typing import Any, get_type_hints

from sqlalchemy import BigInteger, Subquery, Text, cast, column, func, null, select
from sqlalchemy.dialects.postgresql import JSONB

from engagement._sql.parameters import text_of, unseen
from engagement._sql.table import number

# Without escapes, which the server would have to turn into its encoding, and cannot where it has none (SQL_ASCII).
_in_json = JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":")).encode


class Rows:
    """The rows of a kind, whose members are `Annotated` with the type of their column; `name` is the parameter's.

    They cross as a JSON array of arrays, of which names would be the larger part.
    See docs/decisions.md#2026-11-29--a-row-that-crosses-to-sql-is-described-once.
    """

    def __init__(self, kind: type, name: str) -> None:
        hints = get_type_hints(kind, include_extras=True)
        self._columns = {member: hint.__metadata__[0] for member, hint in hints.items()}
        self._values: Callable[[Mapping[str, Any]], tuple[Any, ...]] = itemgetter(*self._columns)
        self._name = name

    def parameter(self, given: Iterable[Mapping[str, Any]]) -> dict[str, str]:
        """Return the parameter that holds the rows."""
        return {self._name: _in_json([*map(self._values, given)])}

    def given(self) -> Subquery:
        """Return the rows, as a table named `given`."""
        json = unseen(cast(text_of(self._name), JSONB))
        row = func.jsonb_array_elements(json).table_valued(column("value", JSONB), name="rows").c.value
        columns = [
            cast(row.op("->>", return_type=Text())(number(place)), type_).label(member)
            for place, (member, type_) in enumerate(self._columns.items())
        ]
        # The planner expects a hundred rows of a function. For so many it reads a table of a few thousand from end to
        # end, also if there is one row. Behind a limit that it cannot see, it expects ten.
        return select(*columns).limit(unseen(cast(null(), BigInteger))).subquery("given")
