"""One message: its recorded life, in order.

The command and the admin page both show the results of this package, so they agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any

from engagement._operating.masking import masked
from engagement.messages.checks import checked_flag
from engagement.models import EngagementMessage, MessageStatus

NOT_KEPT = "unknown"
_OUTCOMES = frozenset({"not_sent", "in_doubt", "refused", "postponed", "withdrawn", "resolved", "undeliverable"})
_BLANKINGS = frozenset({"forgotten", "pruned"})
_EVENTS = _OUTCOMES | _BLANKINGS | {"cancelled", "expired", "not_ready", "retried", "sent_twice"}


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened to a message, or is to happen. `at` is None if nobody recorded when."""

    at: datetime | None
    what: str
    """`queued`, `scheduled`, `claimed`, `sent`, `delivered`, `read`, an event of the history, an event to come (`due`,
    `lease_ends`, `expires`), or `unknown`."""
    attempt: int | None
    detail: str | None


def timeline(message: EngagementMessage, *, reveal: bool = False) -> list[Moment]:
    """Return the recorded events of a message's life, in order; `unknown` stands in the place of a gap.

    Providers' reasons are `masked` unless `reveal`. A history holds only failures and decisions: neither the time of a
    claim nor a rescheduling is recorded.
    """
    reveal = checked_flag("reveal", reveal)
    history = [_recorded(entry, message, reveal=reveal) for entry in message.history]
    known = [
        (message.created_at, Moment(message.created_at, "queued", None, None)),
        *_lost_attempts(message, history),
        *history,
    ]
    if message.status != MessageStatus.PENDING or message.next_attempt_at != message.scheduled_for:
        known.append((message.scheduled_for, Moment(message.scheduled_for, "scheduled", None, None)))
    match message.status:
        case MessageStatus.PENDING:
            known += _still_to_come(message)
        case MessageStatus.SENDING:
            known += _in_hand(message, max(at for at, _ in history + known[:1]))
        case MessageStatus.SENT:
            known.append((_sent_at(message), _sent(message, history)))
            known += _receipts(message)
        case ended:
            if all(moment.what in _BLANKINGS for _, moment in history):
                lost = Moment(None, str(ended), message.attempt or None, "when and why is not kept")
                known.insert(1, (message.created_at, lost))
    return [moment for _, moment in sorted(known, key=itemgetter(0))]


def _recorded(entry: Any, message: EngagementMessage, *, reveal: bool) -> tuple[datetime, Moment]:
    """Return an entry of a history and its place, also if somebody wrote it by hand."""
    try:
        at, detail = datetime.fromisoformat(entry["at"]), _detail(entry)
        detail = detail if reveal or detail is None else masked(detail, message)
        # A word that is not ours may be personal.
        event = entry["event"] if entry["event"] in _EVENTS else NOT_KEPT
        return at.astimezone(UTC), Moment(at, event, int(entry["attempt"]), detail)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        return message.created_at, Moment(None, NOT_KEPT, None, "an entry of its history cannot be read")


def _detail(entry: Mapping[str, Any]) -> str | None:
    """Return decision, author and reason: `not sent, by ana: asked the provider`; None if all are missing."""
    sent, by, reason = entry.get("sent"), entry.get("by"), entry.get("reason")
    decided = "sent" if sent is True else "not sent" if sent is False else None
    decision = ", ".join(filter(None, (decided, by and f"by {by}")))
    return ": ".join(filter(None, (decision, reason and str(reason)))) or None


def _lost_attempts(
    message: EngagementMessage, history: Sequence[tuple[datetime, Moment]]
) -> Iterator[tuple[datetime, Moment]]:
    told = {moment.attempt for _, moment in history if moment.what in _OUTCOMES}
    if message.status in {MessageStatus.SENDING, MessageStatus.SENT}:
        told.add(message.attempt)
    lost = message.attempt - len(told)
    if lost > 0:
        attempts = "1 attempt" if lost == 1 else f"{lost} attempts"
        yield message.created_at, Moment(None, NOT_KEPT, None, f"what became of {attempts} is not kept")


def _still_to_come(message: EngagementMessage) -> Iterator[tuple[datetime, Moment]]:
    doubt = "an earlier attempt may have left" if message.has_doubt else None
    yield message.next_attempt_at, Moment(message.next_attempt_at, "due", message.attempt + 1, doubt)
    if message.expires_at is not None:
        yield message.expires_at, Moment(message.expires_at, "expires", None, "if not claimed by then")


def _in_hand(message: EngagementMessage, latest: datetime) -> Iterator[tuple[datetime, Moment]]:
    since = max(latest, message.next_attempt_at)
    yield since, Moment(None, "claimed", message.attempt, f"{_by(message)}, when is not recorded")
    if message.lease_expires_at is not None:
        yield message.lease_expires_at, Moment(message.lease_expires_at, "lease_ends", message.attempt, None)


def _sent(message: EngagementMessage, history: Sequence[tuple[datetime, Moment]]) -> Moment:
    is_found_out = any(moment.what == "resolved" and at > _sent_at(message) for at, moment in history)
    detail = "at the latest, as was found out later" if is_found_out else _by(message)
    return Moment(message.sent_at, "sent", message.attempt, detail)


def _receipts(message: EngagementMessage) -> Iterator[tuple[datetime, Moment]]:
    # By the provider's clock, which may be behind ours.
    for at, what in ((message.delivered_at, "delivered"), (message.read_at, "read")):
        if at is not None:
            yield max(at, _sent_at(message)), Moment(at, what, message.attempt, "as the provider says")


def _sent_at(message: EngagementMessage) -> datetime:
    assert message.sent_at is not None
    return message.sent_at


def _by(message: EngagementMessage) -> str:
    return f"by {message.claimed_by or 'an unnamed worker'}"
