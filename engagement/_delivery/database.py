"""The database's side of a delivery: claim, take over, extend and settle, each on a connection that is passed in.

Nothing here commits, waits or knows the transport.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection, Executable

from engagement._claim import Claim, Position, clock
from engagement._delivery.taking import ALL_TYPES, Types
from engagement._logging import logger
from engagement._sql import claiming, parameters, settling
from engagement.messages import OutgoingMessage
from engagement.messages.checks import DESTINATIONS
from engagement.messages.receipts import MOST_ID
from engagement.models import MessageStatus
from engagement.outcomes import Outcome, Refused, Verdict, clean_reason


@dataclass(frozen=True, slots=True)
class Holder:
    """The name and the length of a lease. A name is used in one transaction only; `claimed_by` carries it."""

    name: str
    lease: timedelta


@dataclass(frozen=True, slots=True)
class Claimed:
    """The result of one claim: messages to send, and others that ended. The next one starts at `go_on_after`."""

    claims: list[Claim]
    ended: dict[OutgoingMessage, MessageStatus]
    go_on_after: Position | None


@dataclass(frozen=True, slots=True)
class Settled:
    """The verdicts that are recorded, in their order: `now`, or `before` by a call that seemed to fail."""

    now: list[tuple[Claim, MessageStatus]] = field(default_factory=list)
    before: dict[Claim, MessageStatus] = field(default_factory=dict)

    @property
    def recorded(self) -> dict[Claim, MessageStatus]:
        """The status of each claim whose verdict is recorded."""
        return self.before | dict(self.now)


def claim(
    connection: Connection,
    holder: Holder,
    *,
    limit: int,
    after: Position,
    busy: Collection[str],
    one_per_destination: bool,
    broken: Collection[int] = (),
    idempotent: bool = False,
    types: Types = ALL_TYPES,
    in_order: bool = False,
    sender: str | None = None,
) -> Claimed:
    """Claim up to `limit` due messages of `types` behind `after`, oldest first, none in `broken` or to a `busy` one.

    None that a pause holds back, be it one of `sender`. A message that may have left is claimed for an `idempotent`
    transport only; else it is parked in doubt. With `in_order` none to a destination that any worker sends to.
    """
    until = _held_until(holder.lease)
    values = {
        **where_due(after, busy, broken, types, sender),
        "limit": limit,
        "lease": holder.lease,
        "worker": holder.name,
        "idempotent": idempotent,
    }
    statement = claiming.claim(one_per_destination=one_per_destination, which=types.which, in_order=in_order)
    rows = _in_turn(connection, statement, values, types) if in_order else connection.execute(statement, values).all()
    taken = sorted(rows, key=_place)
    ended = [row for row in taken if row[_STATUS] != MessageStatus.SENDING]
    # A destination whose first message ended has others, which were skipped and lie behind it.
    last = ended[:1] if one_per_destination and ended else taken[-1:]
    return Claimed(
        claims=[_claim(row, holder.name, until) for row in taken if row[_STATUS] == MessageStatus.SENDING],
        ended={_claim(row, holder.name, until).message: MessageStatus(row[_STATUS]) for row in ended},
        go_on_after=_place(last[0]) if last else None,
    )


def _in_turn(
    connection: Connection, claim_due: Executable, values: dict[str, Any], types: Types
) -> Sequence[Sequence[Any]]:
    """Claim for destinations that nobody sends to. Returns nothing only if no due message has one."""
    while turns := take_turns(connection, values, types):
        if rows := connection.execute(claim_due, values | turns).all():
            return rows
        # Between the two statements another worker claimed for all of these, or the host changed the messages.
        values = values | {"busy": _pack(filter(None, (values["busy"], turns["turns"])))}
    return []


def take_turns(connection: Connection, values: dict[str, Any], types: Types) -> dict[str, Any]:
    """Lock the destinations of the next due messages. Return the parameters of a claim for them; empty if none is free.

    A statement of its own, so that the claim's snapshot is younger than the locks.
    """
    free = connection.execute(claiming.take_turns(which=types.which), values).all()
    if not free:
        return {}
    _, until_at, until_id = free[-1]
    destinations = dict.fromkeys(row.destination_jid for row in free)
    return {"turns": _pack(destinations), "until_at": until_at, "until_id": until_id}


def where_due(
    after: Position,
    busy: Collection[str],
    broken: Collection[int],
    types: Types = ALL_TYPES,
    sender: str | None = None,
) -> dict[str, Any]:
    """Return the parameters that select due messages."""
    return {
        "after_at": after[0],
        "after_id": after[1],
        # A message that was forgotten while it was being sent goes nowhere.
        "busy": _pack(jid for jid in busy if jid),
        "broken": _pack(map(str, broken)),
        "of_sender": sender,
        **types.values,
    }


def take_over(
    connection: Connection,
    holder: Holder,
    *,
    limit: int,
    held: Collection[int],
    broken: Collection[int] = (),
    types: Types = ALL_TYPES,
) -> list[Claim]:
    """Take over up to `limit` messages of lost workers, under names that `adopt` does not know."""
    until = _held_until(holder.lease)
    values = {**where_lost(held, broken, types), "limit": limit, "lease": holder.lease, "recoverer": holder.name}
    rows = connection.execute(claiming.take_over_expired_leases(which=types.which), values)
    return [
        _claim(row, claimed_by, until, lost_workers=int(claimed_by.rpartition(claiming.RECOVERY)[2]))
        for *row, claimed_by in rows
    ]


def where_lost(held: Collection[int], broken: Collection[int], types: Types = ALL_TYPES) -> dict[str, Any]:
    """Return the parameters that leave out messages whose leases ran out."""
    return {"held": _pack(map(str, {*held, *broken})), **types.values}


def adopt(connection: Connection, holder: Holder, *, names: Collection[str]) -> list[Claim]:
    """Return the messages claimed under `names`, whose commits were not acknowledged: none was sent."""
    until = _held_until(holder.lease)
    values = {"names": list(names), "lease": holder.lease, "worker": holder.name}
    rows = connection.execute(claiming.adopt_unacknowledged(), values)
    return [_claim(row, holder.name, until) for row in rows]


def note_not_ready(connection: Connection, *, reason: str, types: Types = ALL_TYPES) -> None:
    """Write on the message that has been due for longest why it is not claimed, unless it says so already."""
    connection.execute(claiming.note_not_ready(which=types.which), {"reason": reason, **types.values})


def extend(connection: Connection, lease: timedelta, held: Iterable[Claim]) -> dict[Claim, float]:
    """Extend the leases of the messages in hand. Return until when each is held if this is committed.

    A claim that the answer lacks was lost, or is locked by somebody else.
    """
    until = _held_until(lease)
    by_id = {claim.message.id: claim for claim in held}
    names = [claim.claimed_by for claim in by_id.values()]
    values = {"held": _pack(map(str, by_id)), "names": _pack(names), "lease": lease}
    return {by_id[message_id]: until for message_id in connection.scalars(claiming.extend_leases(), values).all()}


def settle(connection: Connection, verdicts: Iterable[tuple[Claim, Verdict]]) -> Settled:
    """Record verdicts. Return those that are recorded, now or by an earlier call that seemed to fail.

    What is missing in the answer was lost: the message has been recovered since, or the claim with a commit. Then a
    doubt is noted all the same, and that a message was sent twice is told.
    """
    settled = Settled()
    # In one order everywhere, or two statements over the same rows would deadlock.
    left = sorted(verdicts, key=lambda pair: pair[0].message.id)
    while left:
        # An UPDATE takes one of two verdicts of a message, whichever it comes to.
        given = {pair[0].message.id: pair for pair in reversed(left)}
        left = [pair for pair in left if pair is not given[pair[0].message.id]]
        values = settling.SETTLEMENTS.parameter(_settlement(*pair) for pair in reversed(given.values()))
        rows = connection.execute(settling.settle_if_claimed(), values)
        settled.now.extend((given.pop(message_id)[0], status) for message_id, status in rows.all())
        if given:
            settled.before.update(_not_recorded(connection, given))
    return settled


def _not_recorded(
    connection: Connection, given: dict[int, tuple[Claim, Verdict]]
) -> Iterator[tuple[Claim, MessageStatus]]:
    """Return the verdicts that an earlier call recorded. Of claims that were lost, note a doubt or a second send."""
    for row in connection.execute(settling.attempts_of(), {"ids": sorted(given)}).all():
        claim, verdict = given[row.id]
        attempt, name = claim.message.attempt, claim.claimed_by
        lost = {"message_id": row.id, "of_attempt": attempt, "of_name": name}
        if (row.attempt, row.claimed_by) == (attempt, name):
            # A forgotten message, or one with a doubt, ends otherwise than its verdict says; its history tells of it.
            # So does one whose receipt was quicker than the answer.
            if row.status in {verdict.status, MessageStatus.SENT} or row.event in {verdict.event, "undeliverable"}:
                yield claim, row.status
        elif verdict.status is MessageStatus.SENT:
            # A worker that took a message over did not send it: it found out that somebody had.
            if not claim.lost_workers and connection.execute(settling.tell_sent_twice(), lost).first():
                logger.error("engagement.sent_twice message_id=%s attempt=%s", row.id, attempt)
            if row.status == MessageStatus.SENT and (row.attempt == attempt or row.claimed_by == name):
                yield claim, row.status
        elif verdict.has_doubt and not claim.lost_workers:
            connection.execute(settling.doubt_if_not_sent(), lost | {"reason": clean_reason(verdict.reason)})


def look_ahead(
    connection: Connection, after: Position, types: Types = ALL_TYPES, sender: str | None = None
) -> tuple[float, list[str]]:
    """Return in how many seconds there is work, and the pauses that hold back a worker of `types` and `sender`.

    Work is a message behind `after` that is due, a lease that runs out, or a pause that ends; 0 if it is there now.
    """
    values = {"after_at": after[0], "after_id": after[1], "of_sender": sender, **types.values}
    waits, paused = connection.execute(claiming.peek(which=types.which), values).one()
    return waits.total_seconds(), paused


def pauses(connection: Connection, types: Types, sender: str | None) -> list[str]:
    """Return the pauses that hold back a worker of `types` and `sender`."""
    values = {"of_sender": sender, **types.values}
    paused: list[str] = connection.execute(claiming.pauses(which=types.which), values).scalar_one()
    return paused


def _held_until(lease: timedelta) -> float:
    # Taken before the statement runs, so that we believe in our lease no longer than the database does.
    return clock() + lease.total_seconds()


# The database puts no white space around it, so none is searched for.
_decode = json.JSONDecoder().raw_decode


# Places in a row of `claiming.OUTGOING`: names cost as much as all the rest.
_ID, _NEXT_ATTEMPT_AT, _STATUS = 0, 11, 12
_place: Callable[[Sequence[Any]], Position] = itemgetter(_NEXT_ATTEMPT_AT, _ID)


def _claim(row: Sequence[Any], claimed_by: str, held_until: float, *, lost_workers: int = 0) -> Claim:
    """Return what a row of `claiming.OUTGOING` says."""
    message_id, idempotency_key, user_id, message_type, message_key, params_json, *rest = row
    destination, destination_jid, scheduled_for, attempt, retry_count, next_attempt_at, _, trace_context, _ = rest
    known: Outcome | None = None
    try:
        params = _decode(params_json)[0]
    except (ValueError, RecursionError):
        params, known = {}, Refused("message_params cannot be read by Python")
    message = OutgoingMessage(
        id=message_id,
        idempotency_key=idempotency_key,
        user_id=user_id,
        message_type=message_type,
        message_key=message_key,
        message_params=params,
        destination=DESTINATIONS[destination],
        destination_jid=destination_jid or "",  # It may have been forgotten while it was being sent.
        scheduled_for=scheduled_for,
        attempt=attempt,
        retry_count=retry_count,
    )
    return Claim(
        message,
        (next_attempt_at, message_id),
        claimed_by,
        held_until,
        lost_workers=lost_workers,
        trace_context=trace_context,
        known=None if lost_workers else known,
    )


def messages(connection: Connection, ids: Sequence[int]) -> list[OutgoingMessage]:
    """Return messages as a worker has them in hand. Their transaction has locked them."""
    return [_claim(row, "", 0.0).message for row in connection.execute(claiming.outgoing(), {"ids": ids})]


def _settlement(claim: Claim, verdict: Verdict) -> settling.Settlement:
    provider_id = clean_reason(verdict.provider_message_id)
    return {
        "id": claim.message.id,
        "attempt": claim.message.attempt,
        "name": claim.claimed_by,
        "status": verdict.status,
        "event": verdict.event,
        "failures": int(verdict.counts_as_failure),
        "has_doubt": verdict.has_doubt,
        "delay": None if verdict.delay is None else verdict.delay.total_seconds(),
        "until": None if verdict.until is None else parameters.moment_text(verdict.until),
        "reason": clean_reason(verdict.reason),
        "provider_message_id": provider_id and provider_id[:MOST_ID],
    }


_pack = parameters.SEPARATOR.join
