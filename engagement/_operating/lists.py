"""Many messages: the page, the number and the ids of those that fit some filters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack
from uuid import UUID

from sqlalchemy import ColumnElement, and_, func, select

from engagement._receiving.weighing import UNDELIVERABLE
from engagement._sql.host_sessions import HostSession, in_session
from engagement._sql.table import QUEUE, SENT, C, is_older, is_prunable, word
from engagement.messages.checks import checked_id, checked_moment, checked_text, checked_user_id
from engagement.models import EngagementMessage, MessageStatus

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


class Filters(TypedDict, total=False):
    """Which messages: all that fit every filter given. Moments are aware; `since` is included, `until` is not."""

    status: Sequence[MessageStatus | str]
    user_id: str | UUID
    message_type: str
    created_since: datetime
    created_until: datetime
    scheduled_since: datetime
    scheduled_until: datetime
    blanked: bool
    """Whether the personal data was forgotten or pruned."""
    delivered: bool
    """Whether a provider has said that it was delivered. False: it is `sent`, and none has."""
    read: bool
    """Likewise that the person has read it."""
    undeliverable: Literal[True]
    """A provider has given it up, and it was not tried again since."""


def list_messages(
    session: Session,
    *,
    before: int | None = None,
    after: int | None = None,
    limit: int = 50,
    schema: str | None = None,
    **filters: Unpack[Filters],
) -> list[EngagementMessage]:
    """Return up to `limit` messages, the newest first: the newest of all, or the next ones `before` or `after` an id.

    The next page begins `before` the last id of this one; a page that is not full is the last. A user's messages, those
    of the statuses pending, sending, failed and in_doubt, and undeliverable ones are found by an index. Otherwise the
    table is read from its newest message on until the page is full: all of it, up to a second for a million, if hardly
    any message fits (`read`, where no provider tells of that).
    """
    if not 1 <= limit <= LONGEST_PAGE:
        raise ValueError(f"limit: must be from 1 to {LONGEST_PAGE}")
    chosen = select(EngagementMessage).where(*_conditions(filters))
    if before is not None:
        chosen = chosen.where(C.id < checked_id(before))
    if after is not None:
        chosen = chosen.where(C.id > checked_id(after))
    is_upwards = after is not None and before is None
    page = chosen.order_by(C.id if is_upwards else C.id.desc()).limit(limit)
    found = HostSession(session, schema).entities(page)
    return found[::-1] if is_upwards else found


def count_messages(session: Session, *, schema: str | None = None, **filters: Unpack[Filters]) -> int:
    """Return how many messages fit. Indexed as `list_messages` is; otherwise it reads the whole table."""
    counted = select(func.count()).select_from(QUEUE).where(*_conditions(filters))
    return int(session.execute(counted, **in_session(schema)).scalar_one())


def message_ids(
    session: Session, *, after: int, up_to: int, limit: int, schema: str | None = None, **filters: Unpack[Filters]
) -> list[int]:
    """Return the ids of the next messages that fit after one and up to another, the oldest first."""
    chosen = select(C.id).where(*_conditions(filters), C.id > after, C.id <= up_to).order_by(C.id).limit(limit)
    return list(session.execute(chosen, **in_session(schema)).scalars())


def count_prunable(session: Session, older_than: timedelta, *, schema: str | None = None) -> int:
    """Return how many messages `prune_messages` would blank. Read by its index."""
    counted = select(func.count()).select_from(QUEUE).where(is_prunable, is_older)
    values = {"older_than": older_than}
    return int(session.execute(counted, values, **in_session(schema)).scalar_one())


LONGEST_PAGE = 10_000


def _conditions(filters: Filters) -> Iterator[ColumnElement[bool]]:
    if statuses := filters.get("status"):
        # Literals: PostgreSQL cannot prove that a parameter matches a partial index.
        words = [word(MessageStatus(status)) for status in statuses]
        yield words[0] == C.status if len(words) == 1 else C.status.in_(words)
    if (user_id := filters.get("user_id")) is not None:
        yield C.user_id == checked_user_id(user_id)
    if (message_type := filters.get("message_type")) is not None:
        yield C.message_type == checked_text("message_type", message_type)
    if (blanked := filters.get("blanked")) is not None:
        yield C.destination_jid.is_(None) if blanked else C.destination_jid.is_not(None)
    yield from _by_receipts(filters)
    for name, moment in (("created", C.created_at), ("scheduled", C.scheduled_for)):
        if (since := filters.get(f"{name}_since")) is not None:
            yield moment >= checked_moment(f"{name}_since", since)
        if (until := filters.get(f"{name}_until")) is not None:
            yield moment < checked_moment(f"{name}_until", until)


def _by_receipts(filters: Filters) -> Iterator[ColumnElement[bool]]:
    for told, at in ((filters.get("delivered"), C.delivered_at), (filters.get("read"), C.read_at)):
        if told is not None:
            yield at.is_not(None) if told else and_(C.status == SENT, at.is_(None))
    if filters.get("undeliverable"):
        # The statuses as literals: by them the few are found.
        yield and_(C.status.in_([word(status) for status in UNDELIVERABLE]), C.undeliverable_at.is_not(None))
