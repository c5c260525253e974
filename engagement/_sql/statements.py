"""Every SQL statement, as functions that return constructs: no session, no commit, no clock but the database's.

Statuses are literals, not parameters: PostgreSQL cannot prove that a parameter matches a partial index. Time is
`statement_timestamp()`: `now()` stands still while a transaction is open, and an index cannot be searched with
`clock_timestamp()`. Each statement is built once, and takes its values as bound parameters.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    ColumnElement,
    Connection,
    Dialect,
    Engine,
    Executable,
    Float,
    Integer,
    Interval,
    Numeric,
    Select,
    Subquery,
    Table,
    TableValuedAlias,
    Text,
    Update,
    all_,
    and_,
    any_,
    bindparam,
    case,
    cast,
    column,
    false,
    func,
    literal_column,
    not_,
    null,
    or_,
    select,
    table,
    true,
    tuple_,
    type_coerce,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.orm import Session
from sqlalchemy.types import TypeDecorator, TypeEngine

from engagement.models import FINISHED, MOST_COUNTED, EngagementMessage, checked_schema

QUEUE: Table = EngagementMessage.__table__  # type: ignore[assignment]  # declared as FromClause
C = QUEUE.c
_ctid: ColumnElement[Any] = column("ctid")
"""Where a row lies in the table: found without an index, and right as long as the row is locked."""

_MOMENT = TIMESTAMP(timezone=True)
NOW: ColumnElement[Any] = func.statement_timestamp(type_=_MOMENT)

SEPARATOR = "\x1f"
"""Joins the texts of many rows into one parameter, which the server splits: a third of what an array of texts costs
the client. No text that passed our checks holds it; a missing value is the empty text."""


def moment_text(moment: datetime | None) -> str:
    """Return a moment as one of those texts."""
    return "" if moment is None else moment.astimezone(UTC).isoformat()


class Length(TypeDecorator[timedelta]):
    """A length of time, read as a number of seconds: of intervals, psycopg reads PostgreSQL's own style only."""

    impl = Numeric
    cache_ok = True

    def process_result_value(self, value: Any, dialect: Dialect) -> timedelta | None:  # noqa: ARG002
        """Return the length."""
        return None if value is None else timedelta(seconds=float(value))


def time_since(moment: ColumnElement[Any]) -> ColumnElement[timedelta]:
    """Return how long ago a moment was, by the database's clock."""
    return type_coerce(func.extract("epoch", NOW - moment), Length)


def in_schema(schema: str | None) -> dict[str, Any]:
    """Return the execution options with which a statement finds the table there; None is the search path."""
    return {} if checked_schema(schema) is None else {"schema_translate_map": {None: schema}}


OUR_SCHEMA = "engagement_schema"
"""The execution option that says where our own transactions have found the table; None if they have not yet."""


def schema_in_force(schema: str | None, bind: Engine | Connection) -> str | None:
    """Return where a statement finds the table: in `schema`, or where the host's `bind` sends what names none."""
    options = bind.get_execution_options()
    translated = options.get("schema_translate_map") or {}
    return checked_schema(schema) or options.get(OUR_SCHEMA) or translated.get(None)


def schema_in_session(schema: str | None, session: Session) -> str | None:
    """Return where a statement in `session` finds the table; see `in_session`."""
    checked_schema(schema)  # Before anything is connected to.
    return schema_in_force(schema, session.connection(bind_arguments=_BY_THE_ENGINE_OF_UPDATES))


# A statement of tables has no mapper, by which a session with several engines chooses (`Session.binds`). Of one that
# reads from a replica, all go where an UPDATE goes: a replica may lack the row that an INSERT has just met.
_BY_THE_ENGINE_OF_UPDATES: dict[str, Any] = {"mapper": EngagementMessage.__mapper__, "clause": update(QUEUE)}


def in_session(schema: str | None) -> dict[str, Any]:
    """Return the keywords with which a session executes a statement: `in_schema`, and by the engine of our table."""
    # Whatever the host's engine says: no cursor of the server's inserts or changes what it returns.
    options = {"stream_results": False, "yield_per": None} | in_schema(schema)
    return {"execution_options": options, "bind_arguments": _BY_THE_ENGINE_OF_UPDATES}


HISTORY_ENTRIES = 100
"""How many entries of a message's history are kept: the first, and the latest. It may be postponed for years."""


def _word(word: str) -> ColumnElement[Any]:
    return literal_column(f"'{word}'", Text)


def _number(number: int) -> ColumnElement[Any]:
    return literal_column(str(number), Integer)


PENDING, SENDING, SENT = (_word(status) for status in ("pending", "sending", "sent"))
FAILED, EXPIRED, CANCELLED, IN_DOUBT = (_word(status) for status in ("failed", "expired", "cancelled", "in_doubt"))

is_due = and_(C.status == PENDING, C.next_attempt_at <= NOW)
# Word for word what the partial index says.
is_prunable = and_(C.status.in_([_word(status) for status in FINISHED]), C.destination_jid.is_not(None))
is_older = C.next_attempt_at < NOW - bindparam("older_than", type_=Interval)
_is_forgotten = C.destination_jid.is_(None)


def _unless_in_doubt(status: ColumnElement[Any], has_doubt: ColumnElement[bool]) -> ColumnElement[Any]:
    """Return `status`, but never let a message that may have left end as if it had not."""
    return case((and_(has_doubt, status.in_([FAILED, CANCELLED, EXPIRED])), IN_DOUBT), else_=status)


def _history_with(event: ColumnElement[Any], reason: ColumnElement[Any], **more: ColumnElement[Any]) -> Any:
    """Append an entry; past the limit, the oldest but the first makes room."""
    is_full = func.jsonb_array_length(C.history) >= _number(HISTORY_ENTRIES)
    kept = case((is_full, C.history.op("-")(_number(1))), else_=C.history)
    return kept.op("||")(func.jsonb_build_array(_entry(event, reason, **more)))


def _entry(event: ColumnElement[Any], reason: ColumnElement[Any], **more: ColumnElement[Any]) -> ColumnElement[Any]:
    facts = {"at": NOW, "attempt": C.attempt, "event": event, "reason": reason, **more}
    return func.jsonb_build_object(*(part for name, value in facts.items() for part in (_word(name), value)))


def _text(name: str) -> ColumnElement[Any]:
    return bindparam(name, type_=Text)


def _packed(name: str, type_: TypeEngine[Any] | None = None) -> ColumnElement[Any]:
    """Return the array that a parameter holds, packed as one text."""
    texts = _split(_text(name))
    return _unseen(texts if type_ is None else cast(texts, ARRAY(type_)))


def _split(packed: ColumnElement[Any]) -> ColumnElement[Any]:
    return func.string_to_array(packed, literal_column("E'\\x1f'"), literal_column("''"))


def _each_of(name: str, type_: TypeEngine[Any]) -> ColumnElement[Any]:
    # Without the cast, the members of ALL would be the rows of the sub-select.
    return all_(cast(_packed(name, type_), ARRAY(type_)))


def _unseen(value: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return `value`, which the planner then does not look at.

    So one plan costs the same for all values, and PostgreSQL keeps it for the connection. Else it plans anew each time
    for what seems cheaper with few rows, though that is the same plan, and planning takes longer than running.
    """
    return select(value).scalar_subquery()


def _planned_anew() -> ColumnElement[bool]:
    """Return a condition that holds, and for which PostgreSQL plans a statement each time that it is executed.

    With the value at hand nothing is left of it; a plan for any value would seem to cost a fortune, and is not kept.
    """
    dear = select(func.count()).select_from(func.generate_series(*map(_number, (1, 1_000_000_000))).alias("dear"))
    return or_(bindparam("planned_anew", value=True, type_=Boolean), dear.scalar_subquery() == _number(0))


_limit = bindparam("limit", type_=BigInteger)
# No parameter of an UPDATE is named as a column: SQLAlchemy would set it.
_id = C.id == bindparam("message_id", type_=BigInteger)

# Turns ---------------------------------------------------------------------------------------------------------------


def take_turn(name: str) -> Select[Any]:
    """Take the lock of that name until the end of the transaction, and return whether it was free."""
    return select(func.pg_try_advisory_xact_lock(func.hashtextextended(name, 0)))


def who_has_turn(name: str) -> Select[Any]:
    """Return process id and transaction of the sessions that hold the lock: any role that may connect can."""
    columns = ("pid", "virtualtransaction", "locktype", "database", "classid", "objid", "objsubid", "granted")
    lock = table("pg_locks", *map(column, columns), schema="pg_catalog").c
    database = table("pg_database", column("oid"), column("datname"), schema="pg_catalog").c
    key = cast(lock.classid, BigInteger).op("<<")(_number(32)).op("|")(cast(lock.objid, BigInteger))
    return (
        select(lock.pid, lock.virtualtransaction)
        .where(lock.locktype == _word("advisory"), lock.granted, lock.objsubid == _number(1))
        .where(lock.database == database.oid, database.datname == func.current_database())
        .where(key == func.hashtextextended(name, 0))
        .order_by(lock.pid)
    )


# Queueing ------------------------------------------------------------------------------------------------------------

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
    scheduled_for = cast(bindparam("scheduled_for", type_=_MOMENT), _MOMENT)
    expires_at = cast(bindparam("expires_at", type_=_MOMENT), _MOMENT)
    values = {name: _text(name) for name in (*_GIVEN, "idempotency_key", "trace_context")} | {
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
    queue = _text("queue")
    may_compare = and_(*(func.has_column_privilege(queue, _word(name), _word("SELECT")) for name in _GIVEN))
    return select(C.id, C.status, may_compare).where(C.idempotency_key == bindparam("idempotency_key"))


@cache
def differences() -> Executable:
    """Return, for each field that is given, whether the message that holds the key has another value.

    Of a message that was forgotten or pruned, what was blanked is not compared.
    """
    given = {name: _text(f"given_{name}") for name in _GIVEN}
    given["message_params"] = cast(given["message_params"], JSONB)
    differs = {name: type_coerce(C[name], value.type) != value for name, value in given.items()}
    differs["message_params"] = and_(differs["message_params"], not_(_is_forgotten))
    return select(*(func.coalesce(differs[name], false()).label(name) for name in _GIVEN)).where(
        C.idempotency_key == bindparam("idempotency_key")
    )


PACKED = (*_GIVEN, "scheduled_for", "expires_at", "idempotency_key")


@cache
def insert_packed(*, most_are_there: bool = False) -> Executable:
    """Insert packed rows whose keys are new; the row count says how many. It is faster if it knows of many repeats."""
    columns = [column(name, Text) for name in PACKED]
    unnested = func.unnest(*(_packed(name) for name in PACKED)).table_valued(*columns, with_ordinality="ordinal")
    rows = unnested.render_derived(name="given").c
    start = _start(cast(rows.scheduled_for, _MOMENT), cast(rows.expires_at, _MOMENT))
    chosen = {name: rows[name] for name in PACKED} | {
        "message_params": cast(rows.message_params, JSONB),
        "expires_at": cast(rows.expires_at, _MOMENT),
        "scheduled_for": start,
        "next_attempt_at": start,
        "trace_context": _text("trace_context"),
    }
    # Keys are taken in the order in which they are given, or concurrent batches would deadlock: the repository sorts.
    ordered = select(*(chosen[name].label(name) for name in _INSERTED)).order_by(rows.ordinal)
    if most_are_there:
        # Without this, each would be numbered and checked before it is turned down.
        is_new = ~select(C.id).where(C.idempotency_key == rows.idempotency_key).exists()
        ordered = ordered.where(is_new, _planned_anew())
    created = postgresql_insert(QUEUE).from_select(_INSERTED, ordered).on_conflict_do_nothing(**_KEY)
    return created.execution_options(preserve_rowcount=True)


# Delivery ------------------------------------------------------------------------------------------------------------

OUTGOING = (
    C.id,
    C.idempotency_key,
    C.user_id,
    C.message_type,
    C.message_key,
    # As text: one value that Python cannot read must not break the fetch of all the others.
    cast(C.message_params, Text).label("message_params"),
    type_coerce(C.destination, Text),
    C.destination_jid,
    C.scheduled_for,
    C.attempt,
    C.retry_count,
    C.next_attempt_at,
    type_coerce(C.status, Text),
    C.trace_context,
)
_LEASE = NOW + bindparam("lease", type_=Interval)
# As an UPDATE of no key locks: a row of the host's that only refers to the message is in nobody's way.
_LOCKED: dict[str, Any] = {"key_share": True}
_LOCKED_UNLESS_BY_OTHERS: dict[str, Any] = {**_LOCKED, "skip_locked": True}
RECOVERY = "/recovery/"
"""Comes after the name of who took a message over, and before how many workers were lost with it."""
MOST_LOST_WORKERS = 999_999
"""As far as they are counted."""
_LOST_WORKERS = f"{RECOVERY}([0-9]{{1,6}})$"
_WEAK_COMMITS = ("off", "local", "remote_write")
_MUTE = ("error", "fatal", "panic")


def _durably() -> ColumnElement[Any]:
    """Make this transaction's commit survive a server crash whatever the host's setting: a lost claim is sent again.

    And let the server warn of a commit that a standby does not have.
    """
    made_so = [
        case((func.current_setting(name).in_([_word(word) for word in unfit]), func.set_config(name, fit, true())))
        for name, unfit, fit in (
            (_word("synchronous_commit"), _WEAK_COMMITS, _word("on")),
            (_word("client_min_messages"), _MUTE, _word("warning")),
        )
    ]
    return _unseen(func.concat(*made_so)).label("durable")  # Once, and not for each row.


def _after() -> ColumnElement[bool]:
    place = tuple_(_unseen(bindparam("after_at", type_=_MOMENT)), _unseen(bindparam("after_id", type_=BigInteger)))
    return tuple_(C.next_attempt_at, C.id) > place


@cache
def claim(*, one_per_destination: bool) -> Executable:
    """Claim the oldest due messages after (`after_at`, `after_id`), `limit` at most, none to a destination in `busy`.

    Returns them with the new attempt. Those that have expired end here, and are returned too; so are those that may
    have left, unless the transport is `idempotent`: only under one delivery id with one effect may they be sent again.
    With `one_per_destination` only the first to each destination is claimed, so that one worker keeps their order.
    """
    due = _due(_ctid, C.id, C.destination_jid, C.next_attempt_at).limit(_unseen(_limit)).subquery("due")
    chosen = _first_of_each_destination(due) if one_per_destination else select(due.c.ctid)
    expired = C.expires_at <= NOW
    may_have_left = and_(C.has_doubt, ~bindparam("idempotent", type_=Boolean))
    ends = or_(expired, may_have_left)
    event = case((expired, _word("expired")), else_=IN_DOUBT)
    reason = case((C.has_doubt, _word("an earlier attempt may have left")))
    return (
        update(QUEUE)
        # An array, not a join or IN: a planner that repeats the sub-select would claim more than `limit`.
        .where(_ctid == any_(func.array(chosen.scalar_subquery())))
        .values(
            status=case((ends, _unless_in_doubt(EXPIRED, C.has_doubt)), else_=SENDING),
            attempt=C.attempt + case((ends, _number(0)), else_=_number(1)),
            lease_expires_at=case((ends, null()), else_=_LEASE),
            claimed_by=case((ends, C.claimed_by), else_=bindparam("worker", type_=Text)),
            history=case((ends, _history_with(event, reason)), else_=C.history),
        )
        .returning(*OUTGOING, _durably())
    )


def _due(*columns: ColumnElement[Any]) -> Select[Any]:
    return (
        select(*columns)
        .where(
            is_due, _after(), C.destination_jid != _each_of("busy", Text()), C.id != _each_of("broken", BigInteger())
        )
        .order_by(C.next_attempt_at, C.id)
        .with_for_update(**_LOCKED_UNLESS_BY_OTHERS)
    )


@cache
def next_due() -> Executable:
    """Return the id of what `claim` comes to first, and lock it."""
    return _due(C.id).limit(_number(1))


def _first_of_each_destination(due: Subquery) -> Select[Any]:
    place = func.row_number().over(partition_by=due.c.destination_jid, order_by=(due.c.next_attempt_at, due.c.id))
    numbered = select(due.c.ctid, place.label("place")).subquery("numbered")
    return select(numbered.c.ctid).where(numbered.c.place == _number(1))


@cache
def take_over_expired_leases() -> Executable:
    """Give the caller a lease on messages whose own ran out, `limit` at most; the attempt stays the same.

    So a late worker can still settle its attempt, and two processors do not recover the same message at once. Returns
    the name that each is held by, which ends in how many workers were lost with it.
    """
    lost = _lost().limit(_unseen(_limit))
    # Cut, so that no number of a hand-written name is too large.
    so_far = cast(func.substring(C.claimed_by, literal_column(f"'{_LOST_WORKERS}'")), Integer)
    lost_workers = func.least(func.coalesce(so_far, _number(0)), _number(MOST_LOST_WORKERS - 1)) + _number(1)
    name = func.concat(bindparam("recoverer", type_=Text), literal_column(f"'{RECOVERY}'"), lost_workers)
    return _leased(lost, name).returning(*OUTGOING, _durably(), C.claimed_by)


def _lost() -> Select[Any]:
    return (
        select(C.id)
        # What the caller holds itself is not lost, also when it could not extend its leases in time.
        .where(C.status == SENDING, C.lease_expires_at <= NOW, C.id != _each_of("held", BigInteger()))
        .order_by(C.lease_expires_at)
        .with_for_update(**_LOCKED_UNLESS_BY_OTHERS)
    )


@cache
def next_lost() -> Executable:
    """Return the id of what `take_over_expired_leases` comes to first, and lock it."""
    return _lost().limit(_number(1))


@cache
def adopt_unacknowledged() -> Executable:
    """Return what was claimed under `names`, of transactions whose commits were not acknowledged.

    Such a message was never handed to the transport. What was taken over from others has another name on it.
    """
    unacknowledged = C.claimed_by == any_(bindparam("names", type_=ARRAY(Text)))
    # Behind this, what is known waits to be committed: what somebody has locked is adopted a round later.
    mine = select(C.id).where(C.status == SENDING, unacknowledged).with_for_update(**_LOCKED_UNLESS_BY_OTHERS)
    return _leased(mine, bindparam("worker", type_=Text)).returning(*OUTGOING, _durably())


def _leased(locked: Select[Any], name: ColumnElement[str]) -> Update:
    """Give a lease under `name` to the messages whose ids `locked` selects."""
    ids = func.array(locked.correlate(None).scalar_subquery())
    return update(QUEUE).where(C.id == any_(ids)).values(lease_expires_at=_LEASE, claimed_by=name)


@cache
def extend_leases() -> Executable:
    """Extend the leases of the messages `held` under `names` that are still being sent, and return their ids.

    Fenced on the name, since who takes a message over leaves its attempt. What somebody else has locked is left out: to
    wait for it, the leases of all the others would run out.
    """
    held = func.unnest(_packed("held", BigInteger()), _packed("names"))
    given = held.table_valued(column("id", BigInteger), column("name", Text)).render_derived(name="held")
    mine = (
        select(C.id)
        .where(C.id == given.c.id, C.claimed_by == given.c.name, C.status == SENDING)
        .with_for_update(of=QUEUE, **_LOCKED_UNLESS_BY_OTHERS)
    )
    return _leased(mine, C.claimed_by).returning(C.id, _durably())


@cache
def settle_if_claimed() -> Executable:
    """Record verdicts, one for each message at most, and return (id, status) of those that were recorded.

    Fenced on the attempt and on the name of the claim: one that was lost changes nothing. `Sent` is a fact: it also
    resolves a doubt, stops the next attempt, and corrects what was called unsent. It needs no more than its attempt,
    or an earlier one, which says that the claim was lost with a commit. A message that was forgotten meanwhile keeps
    nothing, and is not tried again.
    """
    given = _verdicts().c
    has_doubt = func.coalesce(given.has_doubt, C.has_doubt)
    wanted = case((and_(given.status == PENDING, _is_forgotten), CANCELLED), else_=given.status)
    resolves = and_(given.status == SENT, or_(C.status != SENDING, C.claimed_by != given.name))
    reason = case((_is_forgotten, null()), else_=given.reason)
    is_late_but_sent = and_(given.status == SENT, C.status != SENT)
    return (
        update(QUEUE)
        .values(
            status=_unless_in_doubt(wanted, has_doubt),
            attempt=given.attempt,
            claimed_by=given.name,
            has_doubt=has_doubt,
            lease_expires_at=null(),
            sent_at=case((given.status == SENT, NOW)),
            retry_count=func.least(C.retry_count, _number(MOST_COUNTED - 1)) + given.failures,
            next_attempt_at=case((given.status == PENDING, _next_attempt(given)), else_=C.next_attempt_at),
            provider_message_id=case((_is_forgotten, null()), else_=given.provider_message_id),
            error_message=case((_is_forgotten, null()), else_=func.coalesce(reason, C.error_message)),
            history=case(
                (resolves, _history_with(_word("resolved"), reason, sent=true())),
                (given.event != SENT, _history_with(given.event, reason)),
                else_=C.history,
            ),
        )
        .where(
            C.id == given.id,
            # The fence: whoever was recovered and claimed again in the meantime has another attempt, or another name.
            or_(
                and_(C.status == SENDING, C.attempt == given.attempt, C.claimed_by == given.name),
                and_(is_late_but_sent, C.attempt <= given.attempt),
            ),
        )
        .returning(C.id, C.status)
    )


def _verdicts() -> TableValuedAlias:
    types: dict[str, TypeEngine[Any]] = {
        "id": BigInteger(),
        "attempt": Integer(),
        "failures": Integer(),
        "has_doubt": Boolean(),
        "delay": Float(),
        "until": _MOMENT,
    }
    texts = dict.fromkeys(("name", "status", "event", "reason", "provider_message_id"))
    unnested = func.unnest(*(_packed(f"given_{name}", type_) for name, type_ in (types | texts).items()))
    columns = [column(name, type_ or Text()) for name, type_ in (types | texts).items()]
    return unnested.table_valued(*columns).render_derived(name="given")


def _next_attempt(given: Any) -> ColumnElement[Any]:
    a_second: ColumnElement[Any] = literal_column("interval '1 second'")
    # A transport that postpones into the past would otherwise be asked again without end.
    soonest = NOW + a_second
    delayed = NOW + given.delay * a_second
    return case((given.until.is_not(None), func.greatest(given.until, soonest)), else_=delayed)


@cache
def attempts_of() -> Executable:
    """Return what became of messages whose verdicts were not recorded: (id, attempt, claimed_by, status, event).

    `event` is the last one in the history, if it is one of this attempt. They are locked: to find them recorded by an
    earlier commit would commit nothing, and not wait for a standby that lacks that one.
    """
    entry = C.history[-1]
    is_of_this = entry["attempt"].astext == cast(C.attempt, Text)
    columns = C.id, C.attempt, C.claimed_by, C.status, case((is_of_this, entry["event"].astext)).label("event")
    these = C.id == any_(bindparam("ids", type_=ARRAY(BigInteger)))
    return select(*columns).where(these).order_by(C.id).with_for_update(**_LOCKED)


_is_of_another_claim = and_(
    C.attempt <= bindparam("of_attempt", type_=Integer), C.claimed_by.is_distinct_from(_text("of_name"))
)


@cache
def doubt_if_not_sent() -> Executable:
    """Note that a claim that was lost may have left, unless that is known: whoever holds the message now goes on.

    It is not sent again after that, but by an idempotent transport.
    """
    ends = C.status.not_in([PENDING, SENDING])
    return (
        update(QUEUE)
        .where(_id, _is_of_another_claim, ~C.has_doubt, C.status.not_in([SENT, IN_DOUBT]))
        .values(
            status=case((ends, IN_DOUBT), else_=C.status),
            # Who is sending it settles the attempt that it has claimed.
            attempt=case((C.status == SENDING, C.attempt), else_=bindparam("of_attempt", type_=Integer)),
            has_doubt=True,
            history=_history_with(IN_DOUBT, case((_is_forgotten, null()), else_=_text("reason"))),
        )
    )


@cache
def tell_sent_twice() -> Executable:
    """Note that two claims of a message were sent, and return its id; nothing if the other one only found that out."""
    found_out = C.claimed_by.regexp_match(literal_column(f"'{_LOST_WORKERS}'"))
    return (
        update(QUEUE)
        .where(_id, C.status == SENT, _is_of_another_claim, not_(found_out))
        .values(claimed_by=_text("of_name"), history=_history_with(_word("sent_twice"), null()))
        .returning(C.id)
    )


@cache
def peek() -> Executable:
    """Return whether there is anything to do: a message is due after (`after_at`, `after_id`), or a lease ran out."""
    lost = select(C.id).where(C.status == SENDING, C.lease_expires_at <= NOW)
    return select(or_(select(C.id).where(is_due, _after()).exists(), lost.exists()))


@cache
def note_not_ready() -> Executable:
    """Write why nothing is claimed on the message that has been due for longest, unless that is what it says last."""
    oldest = _oldest_due(C.id).with_for_update(**_LOCKED_UNLESS_BY_OTHERS).scalar_subquery()
    return (
        update(QUEUE)
        .where(C.id == oldest, C.history[-1]["reason"].astext.is_distinct_from(_text("reason")))
        .values(history=_history_with(_word("not_ready"), _text("reason")))
    )


def waiting_for() -> Select[Any]:
    """Return what the message that has been due for longest waits for, if `note_not_ready` was the last to write."""
    last = C.history[-1]
    return _oldest_due(case((last["event"].astext == _word("not_ready"), last["reason"].astext)))


def _oldest_due(wanted: ColumnElement[Any]) -> Select[Any]:
    return select(wanted).where(is_due).order_by(C.next_attempt_at, C.id).limit(_number(1))


def _doubted_at() -> ColumnElement[Any]:
    """Return when the last doubt was recorded, which is never before the send; of a forgotten message, when it was."""
    is_list = func.jsonb_typeof(C.history) == _word("array")
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
    first = cast(func.concat(func.left(written, 8), _word("01"), func.substr(written, 11)), _MOMENT)
    days = cast(func.substr(written, 9, 2), Integer) - _number(1)
    moment = first + days * literal_column("interval '24 hours'", Interval)
    return case((written.op("~")(form), moment))


# What the frequency cap asks -----------------------------------------------------------------------------------------


@cache
def claim_of_message() -> Executable:
    """Return (now, status, attempt) of a message, by the database's clock."""
    return select(NOW.label("now"), C.status, C.attempt).where(C.id == bindparam("message_id", type_=BigInteger))


@cache
def count_others_of_user(*, of_types: bool) -> Executable:
    """Count the other messages of a user: `left` since a moment, or may have; being sent `ahead` of this one, `behind`.

    A doubt counts for when it was recorded, which is never before the send.
    """
    since: ColumnElement[Any] = bindparam("since", type_=_MOMENT)
    message_id: ColumnElement[Any] = bindparam("message_id", type_=BigInteger)
    # A row written by hand has no history: better one message too few.
    doubt_at = func.coalesce(_doubted_at(), literal_column("'infinity'::timestamptz"))
    left = case(
        (C.status == SENT, C.sent_at >= since),
        (C.status == SENDING, literal_column("false")),
        # Pending too: an idempotent transport is asked again after a doubt.
        else_=and_(or_(C.status == IN_DOUBT, C.has_doubt), doubt_at >= since),
    )
    wanted = [C.user_id == bindparam("of_user", type_=Text)]  # The message itself is neither ahead nor behind.
    if of_types:
        wanted.append(C.message_type == any_(bindparam("types", type_=ARRAY(Text))))
    return select(
        func.count().filter(left).label("left"),
        func.count().filter(and_(C.status == SENDING, C.id < message_id)).label("ahead"),
        func.count().filter(and_(C.status == SENDING, C.id > message_id)).label("behind"),
    ).where(*wanted)


# What a person or the host does --------------------------------------------------------------------------------------


@cache
def cancel_if_pending() -> Executable:
    """Cancel a message and return (its status before, its status if it was changed); nothing if it does not exist."""
    # Locked first, so that the answer speaks of the same moment as the change.
    found = select(C.id, C.status, C.has_doubt).where(_id).with_for_update(**_LOCKED).cte("found")
    cancelled = (
        update(QUEUE)
        .where(C.id == found.c.id, found.c.status == PENDING)
        .values(
            status=_unless_in_doubt(CANCELLED, found.c.has_doubt),
            has_doubt=found.c.has_doubt,
            # Of a pending message both are NULL. They are said again because PostgreSQL checks constraints once with
            # what the row was before we waited for it.
            lease_expires_at=null(),
            sent_at=null(),
            history=_history_with(_word("cancelled"), _text("reason"), by=_text("by")),
        )
        .returning(C.id, C.status)
        .cte("cancelled")
    )
    return select(found.c.status, cancelled.c.status).outerjoin_from(found, cancelled, found.c.id == cancelled.c.id)


@cache
def cancel_pending_of_user(*, of_one_type: bool) -> Executable:
    """Cancel a user's pending messages and return their statuses."""
    wanted = [C.user_id == bindparam("of_user"), C.status == PENDING]
    if of_one_type:
        wanted.append(C.message_type == bindparam("of_type"))
    pending = _locked(*wanted)
    return (
        update(QUEUE)
        .where(C.id == pending.c.id)
        .values(
            status=_unless_in_doubt(CANCELLED, pending.c.has_doubt),
            has_doubt=pending.c.has_doubt,
            history=_history_with(_word("cancelled"), _text("reason"), by=_text("by")),
        )
        .returning(C.status)
    )


def _locked(*wanted: ColumnElement[bool]) -> Any:
    # In one order everywhere, or two statements over the same rows would deadlock.
    columns = (C.id, C.status, C.has_doubt, C.lease_expires_at, C.sent_at)
    return select(*columns).where(*wanted).order_by(C.id).with_for_update(**_LOCKED).cte("locked")


@cache
def pending_of_user() -> Select[Any]:
    """Return a user's pending messages, next first."""
    return (
        select(EngagementMessage)
        .where(EngagementMessage.user_id == bindparam("of_user"), EngagementMessage.status == PENDING)
        .order_by(EngagementMessage.next_attempt_at, EngagementMessage.id)
    )


@cache
def message_by(column_name: str) -> Select[Any]:
    """Return the message whose `id` or `idempotency_key` is `value`."""
    wanted = C[column_name]
    return select(EngagementMessage).where(wanted == bindparam("value", type_=wanted.type))


@cache
def reschedule_if_pending() -> Executable:
    """Move a pending message to another time, unless it would have expired by then."""
    moment = bindparam("moment", type_=_MOMENT)
    return (
        update(QUEUE)
        .where(_id, C.status == PENDING, or_(C.expires_at.is_(None), C.expires_at > moment))
        .values(scheduled_for=moment, next_attempt_at=moment)
        .returning(C.id)
    )


@cache
def retry_if_ended() -> Executable:
    """Make a failed or expired message due again, with all its retries; an expiry that has passed is lifted."""
    return (
        update(QUEUE)
        .where(_id, C.status.in_([FAILED, EXPIRED]), C.destination_jid.is_not(None))
        .values(
            status=PENDING,
            retry_count=0,
            next_attempt_at=NOW,
            expires_at=case((C.expires_at > NOW, C.expires_at)),
            history=_history_with(_word("retried"), null(), by=_text("by")),
        )
        .returning(C.id)
    )


@cache
def resolve_if_in_doubt(*, sent: bool) -> Executable:
    """Say what became of a message in doubt: it was sent, or it was not and becomes due again with all its retries.

    It was sent before the doubt was recorded, and not when somebody found out.
    """
    resolved = update(QUEUE).where(_id, C.status == IN_DOUBT).returning(C.id)
    history = _history_with(_word("resolved"), _text("reason"), sent=true() if sent else false(), by=_text("by"))
    if sent:
        return resolved.values(status=SENT, has_doubt=False, sent_at=func.least(_doubted_at(), NOW), history=history)
    return resolved.where(C.destination_jid.is_not(None)).values(
        status=PENDING, has_doubt=False, retry_count=0, next_attempt_at=NOW, history=history
    )


def _blanked(event: str) -> dict[str, ColumnElement[Any]]:
    return {
        "message_params": literal_column("'{}'::jsonb"),
        "destination_jid": null(),
        "error_message": null(),
        "provider_message_id": null(),
        "trace_context": null(),
        "history": func.jsonb_build_array(_entry(_word(event), null())),
    }


@cache
def forget_user() -> Executable:
    """Cancel a user's pending messages, blank all of them, and return for each whether it was cancelled now."""
    locked = _locked(C.user_id == bindparam("of_user"), C.destination_jid.is_not(None))
    was_pending = locked.c.status == PENDING
    return (
        update(QUEUE)
        .where(C.id == locked.c.id)
        .values(
            # What the lock found, also where it stays: see cancel_if_pending.
            status=case((was_pending, _unless_in_doubt(CANCELLED, locked.c.has_doubt)), else_=locked.c.status),
            has_doubt=locked.c.has_doubt,
            lease_expires_at=locked.c.lease_expires_at,
            sent_at=locked.c.sent_at,
            **_blanked("forgotten"),
        )
        .returning(and_(was_pending, ~locked.c.has_doubt))
    )


@cache
def prune_finished() -> Executable:
    """Blank finished messages that were last due longer than `older_than` ago, `limit` at most; return their ids."""
    old = (
        select(C.id)
        .where(is_prunable, is_older)
        .order_by(C.next_attempt_at)
        .limit(_limit)
        .with_for_update(**_LOCKED_UNLESS_BY_OTHERS)
    )
    return (
        update(QUEUE).where(C.id == any_(func.array(old.scalar_subquery()))).values(_blanked("pruned")).returning(C.id)
    )


@cache
def count_by_status() -> Executable:
    """Return (status, count, how long the oldest due message has been waiting)."""
    oldest_due = select(time_since(func.min(C.next_attempt_at))).where(is_due).scalar_subquery()
    return select(C.status, func.count(), oldest_due).group_by(C.status)
