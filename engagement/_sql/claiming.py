"""Statements that give a worker its leases: claim, take over, adopt and extend; and those that look for work."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    ColumnElement,
    Executable,
    Integer,
    Interval,
    Select,
    Subquery,
    Text,
    Update,
    and_,
    any_,
    bindparam,
    case,
    cast,
    column,
    func,
    literal_column,
    null,
    or_,
    select,
    true,
    tuple_,
    type_coerce,
    update,
)

from engagement._sql import pausing
from engagement._sql.history import history_with
from engagement._sql.in_order import is_its_turn, take_turn_if_free
from engagement._sql.parameters import each_of, limit, packed, text_of, unseen
from engagement._sql.table import (
    EXPIRED,
    IN_DOUBT,
    LOCKED_UNLESS_BY_OTHERS,
    MOMENT,
    NOW,
    PENDING,
    QUEUE,
    SENDING,
    C,
    ctid,
    is_due,
    is_lost,
    number,
    time_until,
    unless_in_doubt,
    word,
)

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


RECOVERY = "/recovery/"
"""Stands between the name of the worker that took a message over and the number of those lost with it (`…/recovery/2`).

See docs/decisions.md#2026-11-27--claimed_by-counts-the-workers-that-were-lost."""
MOST_LOST_WORKERS = 999_999
"""As far as they are counted."""
LOST_WORKERS = f"{RECOVERY}([0-9]{{1,6}})$"
WhichTypes = Literal["all", "only", "but"]
"""Whether the parameter `types` names the only message types that are looked at, or those that are not."""
_WEAK_COMMITS = ("off", "local", "remote_write")
_MUTE = ("error", "fatal", "panic")


def durably() -> ColumnElement[Any]:
    """Make this transaction's commit survive a server crash under any setting of the host: a lost claim is sent again.

    And let the server warn of a commit that a standby does not have.
    """
    made_so = [
        case((func.current_setting(name).in_([word(value) for value in unfit]), func.set_config(name, fit, true())))
        for name, unfit, fit in (
            (word("synchronous_commit"), _WEAK_COMMITS, word("on")),
            (word("client_min_messages"), _MUTE, word("warning")),
        )
    ]
    return unseen(func.concat(*made_so)).label("durable")  # Once, and not for each row.


def _after() -> ColumnElement[bool]:
    place = tuple_(unseen(bindparam("after_at", type_=MOMENT)), unseen(bindparam("after_id", type_=BigInteger)))
    return tuple_(C.next_attempt_at, C.id) > place


def _of_types(which: WhichTypes, message_type: ColumnElement[str] = C.message_type) -> list[ColumnElement[bool]]:
    """Return the conditions by which the types in the parameter `types` are the only ones, or are left out."""
    match which:
        case "all":
            return []
        case "only":
            return [message_type == any_(cast(packed("types"), ARRAY(Text)))]
        case "but":
            return [message_type != each_of("types", Text())]


@cache
def take_turns(*, which: WhichTypes = "all") -> Executable:
    """Lock the destinations of the oldest due messages that nobody sends to, for the claim that follows.

    Returns destination and place of `limit` messages at most. A destination that another claim has locked is passed
    over. Until the end of the transaction nobody else claims for these.
    """
    return (
        select(C.destination_jid, C.next_attempt_at, C.id)
        .where(*_is_wanted(which), pausing.worker_goes_on(), take_turn_if_free(pausing.type_goes_on()))
        .order_by(C.next_attempt_at, C.id)
        # A message that the host has locked is passed over here already, or it would be claimed in vain each time.
        .with_for_update(**LOCKED_UNLESS_BY_OTHERS)
        .limit(unseen(limit))
    )


@cache
def claim(*, one_per_destination: bool, which: WhichTypes = "all", in_order: bool = False) -> Executable:
    """Claim the oldest due messages after (`after_at`, `after_id`), `limit` at most, none to a destination in `busy`.

    None that is paused for the worker of the sender `of_sender`; one that expires meanwhile ends after the pause.
    Returns them with the new attempt. Those that have expired end here, and are returned too; so are those that may
    have left, unless the transport is `idempotent`: only under one delivery id with one effect may they be sent again.
    With `one_per_destination` only the first to each destination is claimed, so that one worker keeps their order. With
    `in_order` all workers do: only destinations in `turns` are claimed for, and none that is being sent to.
    See docs/decisions.md#2026-11-24--a-claim-takes-one-message-for-each-destination.
    """
    columns = (ctid, C.id, C.destination_jid, C.next_attempt_at)
    due = _due(which, *columns, in_order=in_order).limit(unseen(limit)).subquery("due")
    chosen = _first_of_each_destination(due) if one_per_destination else select(due.c.ctid)
    expired = C.expires_at <= NOW
    may_have_left = and_(C.has_doubt, ~bindparam("idempotent", type_=Boolean))
    ends = or_(expired, may_have_left)
    event = case((expired, word("expired")), else_=IN_DOUBT)
    reason = case((C.has_doubt, word("an earlier attempt may have left")))
    return (
        update(QUEUE)
        # An array, not a join or IN: a planner that repeats the sub-select would claim more than `limit`.
        .where(ctid == any_(func.array(chosen.scalar_subquery())))
        .values(
            status=case((ends, unless_in_doubt(EXPIRED, C.has_doubt)), else_=SENDING),
            attempt=C.attempt + case((ends, number(0)), else_=number(1)),
            lease_expires_at=case((ends, null()), else_=_LEASE),
            claimed_by=case((ends, C.claimed_by), else_=text_of("worker")),
            history=case((ends, history_with(event, reason)), else_=C.history),
        )
        .returning(*OUTGOING, durably())
    )


def _due(which: WhichTypes, *columns: ColumnElement[Any], in_order: bool) -> Select[Any]:
    return (
        select(*columns)
        .where(*_is_wanted(which), *pausing.unless_paused(), *(is_its_turn() if in_order else ()))
        .order_by(C.next_attempt_at, C.id)
        .with_for_update(**LOCKED_UNLESS_BY_OTHERS)
    )


def _is_wanted(which: WhichTypes) -> list[ColumnElement[bool]]:
    not_in_hand = [C.destination_jid != each_of("busy", Text()), C.id != each_of("broken", BigInteger())]
    return [is_due, _after(), *_of_types(which), *not_in_hand]


@cache
def next_due(*, which: WhichTypes = "all", in_order: bool = False) -> Executable:
    """Return the id of the message that `claim` comes to first, and lock it."""
    return _due(which, C.id, in_order=in_order).limit(number(1))


def _first_of_each_destination(due: Subquery) -> Select[Any]:
    place = func.row_number().over(partition_by=due.c.destination_jid, order_by=(due.c.next_attempt_at, due.c.id))
    numbered = select(due.c.ctid, place.label("place")).subquery("numbered")
    return select(numbered.c.ctid).where(numbered.c.place == number(1))


@cache
def take_over_expired_leases(*, which: WhichTypes = "all") -> Executable:
    """Give the caller a lease on messages whose own ran out, `limit` at most; the attempt stays the same.

    Of the types that the caller takes: its transport knows nothing of the others, and its `look_up` might deny a send.
    So a late worker can still settle its attempt, and two processors do not recover the same message at once. Returns
    the name that each is held by, which ends in how many workers were lost with it.
    See docs/decisions.md#2026-11-24--recovery-takes-over-then-decides-like-everything-else.
    """
    lost = _lost(which).limit(unseen(limit))
    # Cut, so that no number of a hand-written name is too large.
    so_far = cast(func.substring(C.claimed_by, word(LOST_WORKERS)), Integer)
    lost_workers = func.least(func.coalesce(so_far, number(0)), number(MOST_LOST_WORKERS - 1)) + number(1)
    name = func.concat(text_of("recoverer"), word(RECOVERY), lost_workers)
    return _leased(lost, name).returning(*OUTGOING, durably(), C.claimed_by)


def _lost(which: WhichTypes) -> Select[Any]:
    return (
        select(C.id)
        # A message that the caller holds is not lost, also if the lease could not be extended in time.
        .where(is_lost, *_of_types(which), C.id != each_of("held", BigInteger()))
        .order_by(C.lease_expires_at)
        .with_for_update(**LOCKED_UNLESS_BY_OTHERS)
    )


@cache
def next_lost(*, which: WhichTypes = "all") -> Executable:
    """Return the id of the message that `take_over_expired_leases` comes to first, and lock it."""
    return _lost(which).limit(number(1))


@cache
def adopt_unacknowledged() -> Executable:
    """Return the messages claimed under `names`, of transactions whose commits were not acknowledged.

    Such a message was never handed to the transport. A message that was taken over from others has another name on it.
    """
    unacknowledged = C.claimed_by == any_(bindparam("names", type_=ARRAY(Text)))
    # Known verdicts wait behind this to be committed. So a message that somebody has locked is adopted a round later.
    mine = select(C.id).where(C.status == SENDING, unacknowledged).with_for_update(**LOCKED_UNLESS_BY_OTHERS)
    return _leased(mine, text_of("worker")).returning(*OUTGOING, durably())


def _leased(locked: Select[Any], name: ColumnElement[str]) -> Update:
    """Give a lease under `name` to the messages whose ids `locked` selects."""
    ids = func.array(locked.correlate(None).scalar_subquery())
    return update(QUEUE).where(C.id == any_(ids)).values(lease_expires_at=_LEASE, claimed_by=name)


@cache
def outgoing() -> Executable:
    """Return the messages with `ids`, as those that are claimed."""
    return select(*OUTGOING, durably()).where(C.id == any_(bindparam("ids", type_=ARRAY(BigInteger))))


@cache
def extend_leases() -> Executable:
    """Extend the leases of the messages `held` under `names` that are still being sent, and return their ids.

    Fenced on the name, since a take-over leaves the attempt. A message that somebody else has locked is left out: while
    we waited for it, the leases of all the others would run out.
    See
    docs/decisions.md#2026-11-27--a-lease-is-extended-under-the-name-that-it-is-held-by-and-believed-once-that-is-committed.
    """
    held = func.unnest(packed("held", BigInteger()), packed("names"))
    given = held.table_valued(column("id", BigInteger), column("name", Text)).render_derived(name="held")
    mine = (
        select(C.id)
        .where(C.id == given.c.id, C.claimed_by == given.c.name, C.status == SENDING)
        .with_for_update(of=QUEUE, **LOCKED_UNLESS_BY_OTHERS)
    )
    return _leased(mine, C.claimed_by).returning(C.id, durably())


@cache
def peek(*, which: WhichTypes = "all") -> Executable:
    """Return how long until there is anything to do, and the worker's pauses.

    A message is due after (`after_at`, `after_id`) that no pause holds back, a pause ends by itself, or a lease has run
    out. Zero is now, and an hour is later than anybody waits. So no moment is subtracted that a hand made infinite.
    """
    latest = NOW + literal_column("interval '1 hour'")
    paused = pausing.of_the_worker(*_of_types(which, pausing.P.name))
    due = select(C.next_attempt_at).where(C.status == PENDING, C.next_attempt_at <= latest, _after(), *_of_types(which))
    due = due.where(*pausing.unless_paused())
    lease = select(C.lease_expires_at).where(C.status == SENDING, C.lease_expires_at <= latest, *_of_types(which))
    first_due = due.order_by(C.next_attempt_at, C.id).limit(number(1)).scalar_subquery()
    first_lease = lease.order_by(C.lease_expires_at).limit(number(1)).scalar_subquery()
    first = func.least(first_due, first_lease, pausing.first_end(paused, latest), latest)
    return select(time_until(func.greatest(NOW, first)), pausing.named(paused))


@cache
def pauses(*, which: WhichTypes = "all") -> Executable:
    """Return the pauses that hold back the worker of the sender `of_sender`."""
    return select(pausing.named(pausing.of_the_worker(*_of_types(which, pausing.P.name))))


@cache
def note_not_ready(*, which: WhichTypes = "all") -> Executable:
    """Write why nothing is claimed on the message that has been due for longest, unless its last entry says so."""
    oldest = _oldest_due(C.id, which).with_for_update(**LOCKED_UNLESS_BY_OTHERS).scalar_subquery()
    return (
        update(QUEUE)
        .where(C.id == oldest, C.history[-1]["reason"].astext.is_distinct_from(text_of("reason")))
        .values(history=history_with(word("not_ready"), text_of("reason")))
    )


def waiting_for() -> Select[Any]:
    """Return why the message that has been due for longest waits, if `note_not_ready` was the last to write."""
    last = C.history[-1]
    return _oldest_due(case((last["event"].astext == word("not_ready"), last["reason"].astext)))


def _oldest_due(wanted: ColumnElement[Any], which: WhichTypes = "all") -> Select[Any]:
    return select(wanted).where(is_due, *_of_types(which)).order_by(C.next_attempt_at, C.id).limit(number(1))
