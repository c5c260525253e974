"""One person: all that was queued for them, their next message, and whether their addresses are suppressed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import ColumnElement, Text, bindparam, func, select

from engagement._operating.lists import list_messages
from engagement._sql import looking
from engagement._sql.host_sessions import HostSession
from engagement._sql.table import C
from engagement.messages import InvalidMessage, Suppressed
from engagement.messages.checks import checked_address, checked_text, id_typed
from engagement.models import EngagementMessage, MessageStatus
from engagement.suppression import SuppressionList

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

MOST_PEOPLE = 10
MOST_ADDRESSES = 10
_TYPED_NUMBER = re.compile(r"\+?[0-9][0-9 ().-]{5,24}[0-9]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """A user of the host's, as the queue knows them."""

    user_id: str
    counts: Mapping[MessageStatus, int]
    upcoming: EngagementMessage | None
    """The pending message that is due first."""
    latest: Sequence[EngagementMessage]
    """The messages that were queued last, the newest first."""
    suppressed: Mapping[str, Suppressed]
    """Of the addresses that the latest messages go to, those that nothing is sent to."""
    now: datetime
    """When this was read, by the database's clock."""


def find_people(session: Session, sought: str, *, limit: int = 50, schema: str | None = None) -> list[Person]:
    """Return the people that `sought` names exactly: a user id, the number or the key of a message, or else an address.

    An address is that of any message which was not forgotten or pruned, and a telephone number stands for that of
    WhatsApp (`+55 11 99999-9999`). It has no index, and several people may share it: the table is read, up to a
    second for a million messages, and ten people are returned at most. Each has `limit` messages at most.
    """
    host = HostSession(session, schema)
    text = checked_text("sought", sought.strip())
    users = list(dict.fromkeys(_named(host, text))) or list(_at_address(host, text))
    return [_person(session, host, user_id, limit, schema) for user_id in users]


def time_in(session: Session, *, schema: str | None = None) -> datetime:
    """Return the time by the database's clock."""
    ((now,),) = HostSession(session, schema).rows(looking.clock(), {})
    moment: datetime = now
    return moment


def _named(host: HostSession, text: str) -> Iterator[str]:
    yield from _users(host, C.user_id == _given, text, 1)
    with suppress(InvalidMessage):
        yield from _users(host, C.id == id_typed(text), text, 1)
    yield from _users(host, C.idempotency_key == _given, text.removeprefix(KEY), 1)


def _at_address(host: HostSession, text: str) -> Iterator[str]:
    if _TYPED_NUMBER.fullmatch(text):
        text = re.sub(r"[^0-9]", "", text) + "@s.whatsapp.net"
    with suppress(InvalidMessage):
        yield from _users(host, C.destination_jid == _given, checked_address(text), MOST_PEOPLE)


def _users(host: HostSession, condition: ColumnElement[bool], given: str, limit: int) -> Sequence[str]:
    found: Sequence[str] = (
        host.execute(select(C.user_id).where(condition).distinct().limit(limit), {"given": given}).scalars().all()
    )
    return found


def _person(session: Session, host: HostSession, user_id: str, limit: int, schema: str | None) -> Person:
    of_user = {"of_user": user_id}
    counted = select(C.status, func.count()).where(C.user_id == bindparam("of_user")).group_by(C.status)
    latest = list_messages(session, user_id=user_id, limit=limit, schema=schema)
    upcoming = host.entities(looking.pending_of_user().limit(1), of_user)
    addresses = dict.fromkeys(message.destination_jid for message in latest if message.destination_jid)
    listed = _suppressed(SuppressionList(session, schema=schema).find, list(addresses)[:MOST_ADDRESSES])
    return Person(
        user_id=user_id,
        counts=dict(host.execute(counted, of_user).all()),
        upcoming=next(iter(upcoming), None),
        latest=latest,
        suppressed=dict(listed),
        now=time_in(session, schema=schema),
    )


def _suppressed(find: Callable[[str], Suppressed | None], addresses: Sequence[str]) -> Iterator[tuple[str, Suppressed]]:
    for address in addresses:
        with suppress(InvalidMessage):  # A row that was written by hand may hold any text.
            if found := find(address):
                yield address, found


_given: ColumnElement[str] = bindparam("given", type_=Text)
KEY = "key:"
"""Before a key that is a number, or begins with this."""
