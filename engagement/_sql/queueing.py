"""Statements that queue messages, one or many, and compare a duplicate with the message that was there."""

from __future__ import annotations

from functools import cache
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

from engagement._sql.parameters import packed, planned_anew, text_of
from engagement._sql.table import MOMENT, NOW, QUEUE, C, is_forgotten, word

_GIVEN = ("user_id", "message_type", "message_key", "message_params", "destination", "destination_jid")
# Any other conflict is an error: an id that is there, say, since the sequence was restored from a backup.
_KEY: dict[str, Any] = {"index_elements": [C.idempotency_key]}
_INSERTED = (*_GIVEN, "scheduled_for", "expires_at", "next_attempt_at", "idempotency_key", "trace_context")


def _start(scheduled_for: ColumnElement[Any], expires_at: ColumnElement[Any]) -> ColumnElement[Any]:
    # A host whose clock lags may ask for a message that has just expired: it is stored, and will expire.
    latest = expires_at - literal_column("interval '1 microsecond'")
    return func.coalesce(scheduled_for, func.least(NOW, latest))


@cache
def insert_message() -> Executable:
    """Insert one message and return its id, or nothing if its key exists."""
    # Cast, since psycopg2 writes values into the statement: what is NULL there is of no type.
    scheduled_for = cast(bindparam("scheduled_for", type_=MOMENT), MOMENT)
    expires_at = cast(bindparam("expires_at", type_=MOMENT), MOMENT)
    values = {name: text_of(name) for name in (*_GIVEN, "idempotency_key", "trace_context")} | {
        "message_params": cast(bindparam("message_params", type_=Text), JSONB),
        "scheduled_for": _start(scheduled_for, expires_at),
        "next_attempt_at": _start(scheduled_for, expires_at),
        "expires_at": expires_at,
    }
    return postgresql_insert(QUEUE).values(values).on_conflict_do_nothing(**_KEY).returning(C.id)


@cache
def find_key() -> Executable:
    """Return id and status of the message that holds a key, and whether the caller may read what `differences` reads.

    A host may be granted no more columns than queueing needs.
    """
    queue = text_of("queue")
    may_compare = and_(*(func.has_column_privilege(queue, word(name), word("SELECT")) for name in _GIVEN))
    return select(C.id, C.status, may_compare).where(C.idempotency_key == bindparam("idempotency_key"))


@cache
def differences() -> Executable:
    """Return, for each field that is given, whether the message that holds the key has another value.

    Of a message that was forgotten or pruned, what was blanked is not compared.
    """
    given = {name: text_of(f"given_{name}") for name in _GIVEN}
    given["message_params"] = cast(given["message_params"], JSONB)
    differs = {name: type_coerce(C[name], value.type) != value for name, value in given.items()}
    differs["message_params"] = and_(differs["message_params"], not_(is_forgotten))
    return select(*(func.coalesce(differs[name], false()).label(name) for name in _GIVEN)).where(
        C.idempotency_key == bindparam("idempotency_key")
    )


PACKED = (*_GIVEN, "scheduled_for", "expires_at", "idempotency_key")


@cache
def insert_packed(*, most_are_there: bool = False) -> Executable:
    """Insert packed rows whose keys are new; the row count says how many. It is faster if it knows of many repeats."""
    columns = [column(name, Text) for name in PACKED]
    unnested = func.unnest(*(packed(name) for name in PACKED)).table_valued(*columns, with_ordinality="ordinal")
    rows = unnested.render_derived(name="given").c
    start = _start(cast(rows.scheduled_for, MOMENT), cast(rows.expires_at, MOMENT))
    chosen = {name: rows[name] for name in PACKED} | {
        "message_params": cast(rows.message_params, JSONB),
        "expires_at": cast(rows.expires_at, MOMENT),
        "scheduled_for": start,
        "next_attempt_at": start,
        "trace_context": text_of("trace_context"),
    }
    # Keys are taken in the order in which they are given, or concurrent batches would deadlock: the repository sorts.
    ordered = select(*(chosen[name].label(name) for name in _INSERTED)).order_by(rows.ordinal)
    if most_are_there:
        # Without this, each would be numbered and checked before it is turned down.
        is_new = ~select(C.id).where(C.idempotency_key == rows.idempotency_key).exists()
        ordered = ordered.where(is_new, planned_anew())
    created = postgresql_insert(QUEUE).from_select(_INSERTED, ordered).on_conflict_do_nothing(**_KEY)
    return created.execution_options(preserve_rowcount=True)
