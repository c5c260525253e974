"""The statements of `database`, message by message: for a batch that the data of one message made fail.

Each has a savepoint of its own. One that fails is logged and left out, and harms no other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection

from engagement._claim import Claim, Position
from engagement._delivery import database
from engagement._delivery.database import Claimed, Holder, Settled
from engagement._delivery.taking import ALL_TYPES, Types
from engagement._logging import logger
from engagement._sql import claiming
from engagement._sql.errors import describe, is_of_one_message
from engagement.outcomes import Verdict, storable

T = TypeVar("T")

MOST_BROKEN = 100
"""If so many fail, and nothing else can be claimed beside them, the fault is not in their data."""


def settle(connection: Connection, verdicts: Iterable[tuple[Claim, Verdict]]) -> Settled:
    """Record verdicts. A reason that the database cannot store is replaced by one that it can."""
    settled = Settled()
    for claim, verdict in sorted(verdicts, key=lambda pair: pair[0].message.id):
        reason, provider_message_id = storable(verdict.reason), storable(verdict.provider_message_id)
        plain = replace(verdict, reason=reason, provider_message_id=provider_message_id)
        for each in (verdict, plain):
            done = _apart(connection, claim.message.id, partial(database.settle, connection, [(claim, each)]))
            if not isinstance(done, Exception):
                settled.now.extend(done.now)
                settled.before.update(done.before)
                break
    return settled


def claim(
    connection: Connection,
    holder: Holder,
    *,
    limit: int,
    after: Position,
    busy: Collection[str],
    broken: set[int],
    one_per_destination: bool,
    idempotent: bool = False,
    types: Types = ALL_TYPES,
    in_order: bool = False,
    sender: str | None = None,
) -> Claimed:
    """Claim due messages, and add those that cannot be claimed to `broken`."""
    claimed = Claimed([], {}, None)
    while len(claimed.claims) + len(claimed.ended) < limit:
        taken = {claim.message.destination_jid for claim in claimed.claims} if one_per_destination else set()
        place, not_to = claimed.go_on_after or after, taken.union(busy)
        due = database.where_due(place, not_to, broken, types, sender)
        if in_order:
            turns = database.take_turns(connection, due | {"limit": 1}, types)
            if not turns:
                break
            due |= turns
        message_id = connection.execute(claiming.next_due(which=types.which, in_order=in_order), due).scalar()
        if message_id is None:
            break
        claim_one = partial(
            database.claim,
            connection,
            holder,
            limit=1,
            after=place,
            busy=not_to,
            broken=broken,
            one_per_destination=one_per_destination,
            idempotent=idempotent,
            types=types,
            in_order=in_order,
            sender=sender,
        )
        done = _apart(connection, message_id, claim_one)
        if isinstance(done, Exception):
            _add(message_id, to=broken, error=done, others_work=bool(claimed.claims))
        elif done.go_on_after is None:
            # A trigger that returns NULL left it as it was: it would be next for ever.
            broken.add(message_id)
        else:
            claimed = Claimed(claimed.claims + done.claims, claimed.ended | done.ended, done.go_on_after)
    return claimed


def take_over(
    connection: Connection,
    holder: Holder,
    *,
    limit: int,
    held: Collection[int],
    broken: set[int],
    types: Types = ALL_TYPES,
) -> list[Claim]:
    """Take over messages whose worker was lost. Add those that fail to `broken`."""
    taken: list[Claim] = []
    while len(taken) < limit:
        not_lost = [*held, *(claim.message.id for claim in taken)]
        lost = database.where_lost(not_lost, broken, types)
        message_id = connection.execute(claiming.next_lost(which=types.which), lost).scalar()
        if message_id is None:
            break
        take_one = partial(database.take_over, connection, holder, limit=1, held=not_lost, broken=broken, types=types)
        done = _apart(connection, message_id, take_one)
        if isinstance(done, Exception):
            _add(message_id, to=broken, error=done, others_work=bool(taken))
        elif not done:
            broken.add(message_id)
        else:
            taken += done
    return taken


def extend(connection: Connection, lease: timedelta, held: Iterable[Claim]) -> dict[Claim, float]:
    """Extend the leases of the messages in hand. Raises the last error if each of them failed."""
    extended: list[dict[Claim, float]] = []
    failed: list[Exception] = []
    for claim in held:
        done = _apart(connection, claim.message.id, partial(database.extend, connection, lease, [claim]))
        if isinstance(done, Exception):
            failed.append(done)
        else:
            extended.append(done)
    if failed and not extended:
        raise failed[-1]
    return {claim: until for each in extended for claim, until in each.items()}


def _apart(connection: Connection, message_id: int, work: Callable[[], T]) -> T | Exception:
    """Return the result of `work`, or the error by which the message's data undid it."""
    try:
        with connection.begin_nested():
            return work()
    except Exception as error:
        if not is_of_one_message(error):
            raise
        logger.error("engagement.message_broken message_id=%s error=%s", message_id, describe(error))
        return error


def _add(message_id: int, *, to: set[int], error: Exception, others_work: bool) -> None:
    to.add(message_id)
    if len(to) >= MOST_BROKEN and not others_work:
        raise error
