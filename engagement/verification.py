"""Looks for broken promises with SQL that only reads: one condition for each promise, and the catalog for the guards.

Most promises are guarded by a CHECK of the table, and are looked for all the same: a constraint may have been dropped,
weakened, or added again as NOT VALID.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    ARRAY,
    CheckConstraint,
    ColumnElement,
    Executable,
    Interval,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    exists,
    func,
    literal_column,
    not_,
    or_,
    select,
    union_all,
)

from engagement._sql import pausing
from engagement._sql.hiding import is_hidden
from engagement._sql.host_sessions import in_session, schema_in_session
from engagement._sql.parameters import text_of
from engagement._sql.table import NOW, PENDING, QUEUE, SENDING, C, catalog, word
from engagement.messages.checks import JID_FORMS
from engagement.models import EARLIEST, LATEST, TABLE_NAME, TABLE_NAMES, EngagementBase, MessageStatus, qualified_name

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise: its name, the message that breaks it (None: the table does), and the fault.

    Holds nothing personal. A promise that a CHECK guards is named as the constraint is, without the table's name
    (`sent_iff_sent_at`).
    """

    promise: str
    message_id: int | None
    problem: str
    more: bool = False
    """Whether it is the last one named of its promise, and more messages break that."""


def verify(
    session: Session,
    *,
    schema: str | None = None,
    overdue: timedelta = timedelta(hours=1),
    limit: int = 100,
) -> list[Violation]:
    """Return the broken promises in the queue: none if it is healthy, also while it is busy.

    Names up to `limit` messages for each promise; `more` of the last one says whether there are others. A message that
    has been due for longer than `overdue`, or a lease that ended as long ago, is a broken promise too: nobody delivers.
    Not if its type, or everything, is paused. A table that row-level security hides from the session's role is one as
    well, since it would look healthy. It only reads, in the session's transaction. It reads the whole table, so run it
    nightly, not every minute. See
    docs/decisions.md#2026-11-29--more-of-the-last-violation-says-that-verify-stopped.

    Any key of the host's own is fine, unless it reads as the daily key of another user's message of this type
    (`user7:goodbye:2025-11-21` on a goodbye to user8), or of this user's message of another type: it would block that
    message. The key's date is not compared: the message may have been rescheduled.
    """
    if overdue < timedelta(0):
        raise ValueError("overdue: must not be negative")
    if limit < 1:
        raise ValueError("limit: must be at least 1")
    found = [*_missing_guards(session, schema), *_hidden_tables(session, schema)]
    for promise in _promises():
        ids = (
            session.execute(
                promise.messages_that_break_it(),
                {"overdue": overdue, "at_most": limit + 1, "of_sender": None},
                **in_session(schema),
            )
            .scalars()
            .all()
        )
        found += [
            Violation(promise.name, message_id, promise.problem, more=number == limit < len(ids))
            for number, message_id in enumerate(ids[:limit], 1)
        ]
    return found


# Rows ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Promise:
    name: str
    problem: str
    is_broken: ColumnElement[bool]

    def messages_that_break_it(self) -> Select[Any]:
        # Unordered: to find nothing in the order of ids, a planner may read the whole table by its primary key.
        return select(C.id).where(self.is_broken).limit(bindparam("at_most"))


@cache
def _promises() -> tuple[_Promise, ...]:
    return (*(_guarded_by(constraint) for constraint in _checks()), *_unguarded())


def _checks() -> list[CheckConstraint]:
    checks = [constraint for constraint in QUEUE.constraints if isinstance(constraint, CheckConstraint)]
    return sorted(checks, key=lambda constraint: str(constraint.name))


def _guarded_by(constraint: CheckConstraint) -> _Promise:
    sql = str(constraint.sqltext)
    is_kept: ColumnElement[bool] = literal_column(f"({sql})")
    return _Promise(str(constraint.name).removeprefix(f"{TABLE_NAME}_"), f"is not so: {sql}", not_(is_kept))


def _unguarded() -> tuple[_Promise, ...]:
    claimed = MessageStatus.SENDING, MessageStatus.SENT, MessageStatus.FAILED, MessageStatus.IN_DOUBT
    long_ago = NOW - bindparam("overdue", type_=Interval)
    return (
        _Promise(
            "values_given",
            "lacks a value that every message has",
            or_(*(value.is_(None) for value in C if not value.nullable)),
        ),
        _Promise("key_unique", "has the key of an earlier message", _has_key_of_an_earlier_message()),
        _Promise("key_fits", "has a key that reads as the daily key of another message", _key_reads_as_anothers()),
        _Promise("jid_form", "has a JID that is none", not_(_is_jid())),
        _Promise("moments_readable", "has a moment that Python cannot hold", _has_unreadable_moment()),
        _Promise(
            "due_is_claimed",
            "has been due for too long",
            and_(C.status == PENDING, C.next_attempt_at < long_ago, *pausing.unless_paused()),
        ),
        _Promise(
            "lease_is_recovered",
            "has a lease that ran out too long ago",
            and_(C.status == SENDING, C.lease_expires_at < long_ago),
        ),
        # The clock as it is at this row: a worker may have settled since the statement began.
        _Promise("sent_in_the_past", "was sent in the future", C.sent_at > func.clock_timestamp()),
        _Promise(
            "claim_counts",
            "was claimed, but has no attempt",
            and_(C.status.in_([word(status) for status in claimed]), C.attempt < 1),
        ),
        _Promise("failure_is_attempt", "failed more often than it was claimed", C.retry_count > C.attempt),
        _Promise(
            "attempt_only_grows", "has a later attempt in its history", _history_has("$[*].attempt ? (@ > $attempt)")
        ),
        _Promise(
            "history_entries", "has a history with an entry that lacks at, attempt or event", _history_has(_BAD_ENTRY)
        ),
    )


_BAD_ENTRY = '$[*] ? (!(@.at.type() == "string" && @.attempt.type() == "number" && @.event.type() == "string"))'


def _history_has(path: str) -> ColumnElement[bool]:
    # A JSON path raises no error in the caller's transaction, even over a hand-written history.
    attempt = func.jsonb_build_object(word("attempt"), C.attempt)
    has: ColumnElement[bool] = func.jsonb_path_exists(C.history, word(path), attempt)
    return and_(func.jsonb_typeof(C.history) == word("array"), has)


def _has_key_of_an_earlier_message() -> ColumnElement[bool]:
    earlier = QUEUE.alias("earlier")
    return exists().where(earlier.c.idempotency_key == C.idempotency_key, earlier.c.id < C.id)


def _key_reads_as_anothers() -> ColumnElement[bool]:
    """Whether the key has the daily form, and one of its user and type is the message's own, but not the other.

    If neither is, it is more likely a key of the host's own that happens to have three parts and end in a date.
    """
    form = word(r"^(.+):([a-z][a-z0-9_]*):[0-9]{4}-[0-9]{2}-[0-9]{2}$")
    reading: ColumnElement[Any] = func.regexp_match(C.idempotency_key, form, type_=ARRAY(Text))
    one_fits = (reading[1] == C.user_id) != (reading[2] == C.message_type)
    # Compared first, since the expression is a hundred times slower and most keys are the message's own.
    own = C.user_id + word(":") + C.message_type
    return and_(func.left(C.idempotency_key, -len(":YYYY-MM-DD")) != own, one_fits)


def _is_jid() -> ColumnElement[bool]:
    forms = "|".join(form.pattern for form in JID_FORMS.values())
    return C.destination_jid.regexp_match(f"^({forms})$")


def _has_unreadable_moment() -> ColumnElement[bool]:
    unguarded = C.created_at, C.lease_expires_at, C.sent_at
    return or_(*(not_(moment.between(EARLIEST, LATEST)) for moment in unguarded))


# The catalog ---------------------------------------------------------------------------------------------------------


def _missing_guards(session: Session, schema: str | None) -> Iterator[Violation]:
    where = schema_in_session(schema, session)
    for name in TABLE_NAMES:
        table = EngagementBase.metadata.tables[name]
        found = session.execute(_guards_in_force(), {"table": qualified_name(where, name)}, **in_session(schema))
        in_force = {(kind, guard) for kind, guard in found}
        for kind, guard in _guards(table):
            if (kind, guard) not in in_force:
                of = f"of {name}.{guard}" if kind == _NOT_NULL else guard
                yield Violation("guards_in_force", None, f"the {kind} {of} is missing or not valid")


def _hidden_tables(session: Session, schema: str | None) -> Iterator[Violation]:
    where = schema_in_session(schema, session)
    for name in TABLE_NAMES:
        hides = select(is_hidden("table"))
        if session.execute(hides, {"table": qualified_name(where, name)}, **in_session(schema)).scalar_one():
            problem = f"row-level security hides {name} from this role, which needs a policy: to it, the table is empty"
            yield Violation("rows_visible", None, problem)


_CONSTRAINT, _INDEX, _NOT_NULL = "constraint", "index", "NOT NULL"


def _guards(table: Table) -> list[tuple[str, str]]:
    constraints = [(_CONSTRAINT, str(constraint.name)) for constraint in table.constraints]
    indexes = [(_INDEX, str(index.name)) for index in table.indexes]
    return sorted(constraints + indexes) + [(_NOT_NULL, value.name) for value in table.c if not value.nullable]


@cache
def _guards_in_force() -> Executable:
    """Return (kind, name) of the constraints and indexes that hold, and of the columns that are NOT NULL."""
    table = func.to_regclass(text_of("table"))
    constraints = catalog("pg_constraint", "conname", "conrelid", "conindid", "convalidated")
    indexes = catalog("pg_index", "indexrelid", "indrelid", "indisvalid")
    relations = catalog("pg_class", "oid", "relname")
    columns = catalog("pg_attribute", "attname", "attrelid", "attnotnull")
    return union_all(
        select(word(_CONSTRAINT), constraints.c.conname)
        .outerjoin_from(constraints, indexes, indexes.c.indexrelid == constraints.c.conindid)
        .where(constraints.c.conrelid == table, constraints.c.convalidated, func.coalesce(indexes.c.indisvalid, True)),
        select(word(_INDEX), relations.c.relname)
        .join_from(relations, indexes, indexes.c.indexrelid == relations.c.oid)
        .where(indexes.c.indrelid == table, indexes.c.indisvalid),
        select(word(_NOT_NULL), columns.c.attname).where(columns.c.attrelid == table, columns.c.attnotnull),
    )
