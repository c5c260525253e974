"""One message: how it stands now, and its next step, in a sentence.

The command and the page begin with it. Its facts are those of `timeline`, masked as they are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import takewhile

from engagement._operating.timeline import Moment
from engagement.models import EngagementMessage, MessageStatus

_TRIES = frozenset({"not_sent", "in_doubt", "refused", "postponed", "withdrawn", "undeliverable"})
_ORDINALS = ("", "first", "second", "third", "fourth", "fifth")
_TIMES = ("", "", " twice", " three times")


def standing(
    message: EngagementMessage, moments: Sequence[Moment], *, now: datetime, at: Callable[[datetime], str]
) -> str:
    """Return the sentence; `at` puts a moment in words, and `now` is the database's, which leases and due times go by.

    "Waits until 14:05 for its third try, after “HTTP 503” twice."
    """
    match message.status:
        case MessageStatus.PENDING:
            said = _pending(message, moments, now, at)
        case MessageStatus.SENDING:
            said = _sending(message, now, at)
        case MessageStatus.SENT:
            said = _sent(message, moments, at)
        case MessageStatus.FAILED:
            said = f"{_failed(message, moments, at)}; it is not tried again by itself"
        case MessageStatus.CANCELLED:
            said = _cancelled(moments, at)
        case MessageStatus.EXPIRED:
            said = f"Expired{_since(moments, 'expired', at)}, before it was sent{_after(moments)}"
        case MessageStatus.IN_DOUBT:
            said = f"May have left{_after(moments)}; it is not sent again before somebody, or a receipt, resolves it"
    blanked = "; what was personal of it is gone" if message.destination_jid is None else ""
    return f"{said}{blanked}."


def _pending(
    message: EngagementMessage, moments: Sequence[Moment], now: datetime, at: Callable[[datetime], str]
) -> str:
    due, tries = at(message.next_attempt_at), message.attempt
    if message.next_attempt_at > now:
        said = f"Waits until {due}" + (f" for its {_nth(tries + 1)} try" if tries else "") + _after(moments)
    else:
        said = f"Has been due since {due}{_after(moments)}; no worker has taken it"
        words = [moment for moment in moments if moment.what in _TRIES | {"not_ready"}]
        if words and words[-1].what == "not_ready":
            said += f", since its transport is not ready{_quoted(words[-1])}"
    if message.has_doubt:
        said += "; an earlier try may have left"
    if message.expires_at is not None:
        said += f"; it expires at {at(message.expires_at)}"
    return said


def _sending(message: EngagementMessage, now: datetime, at: Callable[[datetime], str]) -> str:
    worker, ends = message.claimed_by or "an unnamed worker", message.lease_expires_at
    if ends is None or ends > now:
        until = "" if ends is None else f", which holds it until {at(ends)}"
        return f"Is being sent, its {_nth(message.attempt)} try, by {worker}{until}"
    return f"Lost its worker, {worker}, which held it until {at(ends)}; the next worker that looks recovers it"


def _sent(message: EngagementMessage, moments: Sequence[Moment], at: Callable[[datetime], str]) -> str:
    assert message.sent_at is not None
    found_out = any(moment.what == "sent" and "found out" in (moment.detail or "") for moment in moments)
    said = f"Was sent at {at(message.sent_at)}{' at the latest' if found_out else ''}"
    said += f", on its {_nth(message.attempt)} try" if message.attempt > 1 else ""
    for word, told in (("delivered", message.delivered_at), ("read", message.read_at)):
        said += f", {word} at {at(told)}" if told is not None else ""
    return said


def _failed(message: EngagementMessage, moments: Sequence[Moment], at: Callable[[datetime], str]) -> str:
    if (given_up := _last(moments, "undeliverable")) and message.undeliverable_at is not None:
        return f"Was sent, and its provider gave it up at {at(message.undeliverable_at)}{_quoted(given_up)}"
    if refused := _last(moments, "refused"):
        return f"Was refused{_quoted(refused)}"
    tries = f"{message.retry_count} tries" if message.retry_count > 1 else "one try"
    troubles = _troubles(moments)
    return f"Failed after {tries}" + (f": {troubles}" if troubles else "")


def _cancelled(moments: Sequence[Moment], at: Callable[[datetime], str]) -> str:
    for event, words in (("withdrawn", "Was withdrawn when its time came"), ("cancelled", "Was cancelled")):
        if found := _last(moments, event):
            return f"{words}{_since(moments, event, at)}{_quoted(found)}"
    return "Was cancelled; when and why is not kept"


def _after(moments: Sequence[Moment]) -> str:
    troubles = _troubles(moments)
    return f", after {troubles}" if troubles else ""


def _troubles(moments: Sequence[Moment]) -> str | None:
    """Return the reason of the latest tries, and how often it came: `“HTTP 503” twice`."""
    tries = [moment for moment in moments if moment.what in _TRIES and moment.detail]
    if not tries:
        return None
    alike = len(list(takewhile(lambda moment: moment.detail == tries[-1].detail, reversed(tries))))
    return f"“{tries[-1].detail}”{_TIMES[alike] if alike < len(_TIMES) else f' {alike} times'}"


def _last(moments: Sequence[Moment], what: str) -> Moment | None:
    return next((moment for moment in reversed(moments) if moment.what == what), None)


def _since(moments: Sequence[Moment], what: str, at: Callable[[datetime], str]) -> str:
    found = _last(moments, what)
    return f" at {at(found.at)}" if found and found.at else ""


def _quoted(moment: Moment) -> str:
    return f": “{moment.detail}”" if moment.detail else ""


def _nth(attempt: int) -> str:
    return _ORDINALS[attempt] if attempt < len(_ORDINALS) else f"{attempt}th"
