"""A message's history: how a statement appends to it, and the one question that is asked of it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Integer, Interval, case, cast, column, func, literal_column, select
from sqlalchemy.dialects.postgresql import JSONB

from engagement._sql.table import MOMENT, NOW, C, number, word

HISTORY_ENTRIES = 100
"""How many entries of a message's history are kept: the first, and the latest. It may be postponed for years."""


def history_with(event: ColumnElement[Any], reason: ColumnElement[Any], **more: ColumnElement[Any]) -> Any:
    """Append an entry; past the limit, the oldest but the first makes room."""
    is_full = func.jsonb_array_length(C.history) >= number(HISTORY_ENTRIES)
    kept = case((is_full, C.history.op("-")(number(1))), else_=C.history)
    return kept.op("||")(func.jsonb_build_array(entry(event, reason, **more)))


def entry(event: ColumnElement[Any], reason: ColumnElement[Any], **more: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return an entry: its facts are those of the attempt that the row has now."""
    facts = {"at": NOW, "attempt": C.attempt, "event": event, "reason": reason, **more}
    return func.jsonb_build_object(*(part for name, value in facts.items() for part in (word(name), value)))


def doubted_at() -> ColumnElement[Any]:
    """Return when the last doubt was recorded, which is never before the send; of a forgotten message, when it was."""
    is_list = func.jsonb_typeof(C.history) == word("array")
    history = case((is_list, C.history), else_=literal_column("'[]'::jsonb", JSONB))
    entries = func.jsonb_array_elements(history).table_valued(column("entry", JSONB), name="entries").render_derived()
    event, at = entries.c.entry.op("->>")("event"), _moment_in(entries.c.entry.op("->>")("at"))
    latest = func.coalesce(func.max(at).filter(event == "in_doubt"), func.max(at))
    return select(latest).select_from(entries).scalar_subquery()


def _moment_in(written: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return the moment that an entry of a history names; NULL if it names none, since anybody may have written it."""
    date, time = r"[1-9]\d{3}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?"
    zone = r"(Z|[+-](0\d|1[0-5])(:[0-5]\d){0,2})"
    form: ColumnElement[Any] = literal_column(rf"'^{date}[T ]{time}{zone}?$'")
    # Reckoned from the first of its month, which has that day in any case: the 31st of June would be an error.
    first = cast(func.concat(func.left(written, 8), word("01"), func.substr(written, 11)), MOMENT)
    days = cast(func.substr(written, 9, 2), Integer) - number(1)
    moment = first + days * literal_column("interval '24 hours'", Interval)
    return case((written.op("~")(form), moment))
