"""Statements that queue messages, one or many, and compare a duplicate with the message that was there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from operator import attrgetter
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Executable,
    Text,
    and_,
    bindparam,
    cast,
    column,
    false,
    func,
    literal_column,
    not_,
    select,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.types import TypeEngine

from engagement._sql.parameters import SEPARATOR, moment_text, packed, planned_anew, text_of
from engagement._sql.table import MOMENT, NOW, QUEUE, C, is_forgotten, word
from engagement.messages import NewMessage

# A row on its way to SQL, as texts: each column, the attribute of a `NewMessage` that it holds, and its type.
_Row = dict[str, tuple[str, TypeEngine[Any]]]
_CONTENT: _Row = {
    "user_id": ("user_id", Text()),
    "message_type": ("message_type", Text()),
    "message_key": ("message_key", Text()),
    "message_params": ("params_json", JSONB()),
    "destination": ("destination", Text()),
    "destination_jid": ("destination_jid", Text()),
}
_TEXTS: _Row = _CONTENT | {"idempotency_key": ("key", Text())}
_ROW: _Row = _TEXTS | {"scheduled_for": ("scheduled_for", MOMENT), "expires_at": ("expires_at", MOMENT)}
_texts_of = attrgetter(*(attribute for attribute, _ in _TEXTS.values()))
_packed = SEPARATOR.join
# Any other conflict is an error: an id that is there, say, since the sequence was restored from a backup.
# docs/decisions.md#2026-11-27--only-the-key-may-conflict
_KEY: dict[str, Any] = {"index_elements": [C.idempotency_key]}


def packed_row(message: NewMessage) -> str:
    """Return a message as one text, of the texts that `_ROW` names; a moment that is missing is empty."""
    return _packed((*_texts_of(message), moment_text(message.scheduled_for), moment_text(message.expires_at)))


def packed_rows(rows: Iterable[str]) -> dict[str, str]:
    """Return the parameters of `insert_packed`, without the trace."""
    values = _packed(rows).split(SEPARATOR)
    return {name: _packed(values[place :: len(_ROW)]) for place, name in enumerate(_ROW)}


def row(message: NewMessage) -> dict[str, str | None]:
    """Return the parameters of `insert_message`, without the trace."""
    return {name: value or None for name, value in packed_rows([packed_row(message)]).items()}


def _typed(name: str, text: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return the value of a column, of its text."""
    _, type_ = _ROW[name]
    # Where psycopg2 writes NULL for a text, the server takes that for one, but not for a moment.
    return text if isinstance(type_, Text) else cast(text, type_)


def _inserted(text_in: Callable[[str], ColumnElement[Any]]) -> dict[str, ColumnElement[Any]]:
    """Return the columns of a new row, of the texts that `_ROW` names."""
    row = {name: _typed(name, text_in(name)) for name in _ROW}
    start = _start(row["scheduled_for"], row["expires_at"])
    return row | {"scheduled_for": start, "next_attempt_at": start, "trace_context": text_of("trace_context")}


def _start(scheduled_for: ColumnElement[Any], expires_at: ColumnElement[Any]) -> ColumnElement[Any]:
    # A host whose clock lags may ask for a message that has just expired: it is stored, and will expire.
    latest = expires_at - literal_column("interval '1 microsecond'")
    return func.coalesce(scheduled_for, func.least(NOW, latest))


@cache
def insert_message() -> Executable:
    """Insert one message and return its id, or nothing if its key exists."""
    return postgresql_insert(QUEUE).values(_inserted(text_of)).on_conflict_do_nothing(**_KEY).returning(C.id)


@cache
def find_key() -> Executable:
    """Return id and status of the message that holds a key, and whether the caller may read its content.

    A host may be granted no more columns than queueing needs.
    See docs/decisions.md#2026-11-29--the-grants-are-a-page-that-the-tests-read.
    """
    queue = text_of("queue")
    may_compare = and_(*(func.has_column_privilege(queue, word(name), word("SELECT")) for name in _CONTENT))
    return select(C.id, C.status, may_compare).where(C.idempotency_key == bindparam("idempotency_key"))


@cache
def differences() -> Executable:
    """Return, for each field that is given, whether the message that holds the key has another value.

    The blanked columns of a message that was forgotten or pruned are not compared.
    """
    given = {name: _typed(name, text_of(f"given_{name}")) for name in _CONTENT}
    differs = {name: type_coerce(C[name], value.type) != value for name, value in given.items()}
    differs["message_params"] = and_(differs["message_params"], not_(is_forgotten))
    return select(*(func.coalesce(differs[name], false()).label(name) for name in _CONTENT)).where(
        C.idempotency_key == bindparam("idempotency_key")
    )


@cache
def insert_packed(*, most_are_there: bool = False) -> Executable:
    """Insert packed rows whose keys are new; the row count says how many. It is faster if it knows of many repeats."""
    texts = [column(name, Text) for name in _ROW]
    unnested = func.unnest(*map(packed, _ROW)).table_valued(*texts, with_ordinality="ordinal")
    rows = unnested.render_derived(name="given").c
    columns = _inserted(rows.__getitem__)
    # Keys are taken in the order in which they are given, or two batches would deadlock: `_queueing.batch` sorts.
    ordered = select(*(value.label(name) for name, value in columns.items())).order_by(rows.ordinal)
    if most_are_there:
        # Without this, each would be numbered and checked before it is turned down.
        # docs/decisions.md#2026-11-27--a-large-batch-waits-as-it-came-and-what-is-there-is-left-out-first
        is_new = ~select(C.id).where(C.idempotency_key == rows.idempotency_key).exists()
        ordered = ordered.where(is_new, planned_anew())
    created = postgresql_insert(QUEUE).from_select(list(columns), ordered).on_conflict_do_nothing(**_KEY)
    return created.execution_options(preserve_rowcount=True)
