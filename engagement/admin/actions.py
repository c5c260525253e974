"""The actions of a person on a message: their words, and the repository's answers in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from engagement._sql.schemas import in_schema
from engagement.messages import InvalidMessage
from engagement.messages.checks import checked_id
from engagement.models import EngagementMessage, MessageStatus
from engagement.repository import EngagementMessageRepository

PENDING, FAILED = MessageStatus.PENDING, MessageStatus.FAILED
EXPIRED, IN_DOUBT = MessageStatus.EXPIRED, MessageStatus.IN_DOUBT


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to an action: one word for the log, a sentence for the person."""

    word: str
    sentence: str
    is_done: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The form that the person filled in."""

    reason: str | None
    moment: datetime | None
    by: str
    """The person's name, from `authentication`."""


Perform = Callable[[EngagementMessageRepository, int, Given], Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One button: the statuses that show it, its warning, and its action."""

    name: str
    label: str
    confirm: str
    fits: frozenset[MessageStatus]
    explanation: str
    asks_for: Literal["reason", "moment"] | None
    perform: Perform


def _cancel(repository: EngagementMessageRepository, message_id: int, given: Given) -> Answer:
    cancellation = repository.cancel_message(message_id, given.reason, by=given.by)
    status = _words(cancellation.status)
    sentences = {
        "cancelled": "Cancelled. It is not sent.",
        "already_cancelled": "It was cancelled before.",
        "too_late": f"Too late to cancel: the message is {status}.",
        "not_found": "There is no such message.",
    }
    word = cancellation.verdict
    return Answer(word, sentences[word], is_done=cancellation.is_cancelled)


def _retry(repository: EngagementMessageRepository, message_id: int, given: Given) -> Answer:
    done = repository.retry_message(message_id, by=given.by)
    return _answer(repository, message_id, "retried", "Due again, with all its retries.", done=done)


def _resolve(*, sent: bool) -> Perform:
    word = "resolved_sent" if sent else "resolved_not_sent"
    sentence = "Resolved: it was sent." if sent else "Resolved: it was not sent, and is due again."

    def perform(repository: EngagementMessageRepository, message_id: int, given: Given) -> Answer:
        done = repository.resolve_message(message_id, sent, given.reason, by=given.by)
        return _answer(repository, message_id, word, sentence, done=done)

    return perform


def _reschedule(repository: EngagementMessageRepository, message_id: int, given: Given) -> Answer:
    if given.moment is None:
        raise InvalidMessage("scheduled_for", "is empty")
    done = repository.reschedule_message(message_id, given.moment)
    return _answer(repository, message_id, "rescheduled", "Rescheduled.", done=done)


def _answer(
    repository: EngagementMessageRepository, message_id: int, word: str, sentence: str, *, done: bool
) -> Answer:
    """Return a yes, or the reason of the repository's no, as far as the message shows it."""
    if done:
        return Answer(word, sentence, is_done=True)
    message = repository.get_message(message_id)
    if message is None:
        return Answer("not_found", "There is no such message.", is_done=False)
    because = f"it is {_words(message.status)}"
    if message.destination_jid is None:
        because += ", and was forgotten or pruned"
    elif message.status == PENDING and message.expires_at is not None:
        because += ", and expires before then"
    return Answer("refused", f"Nothing was changed: {because}.", is_done=False)


def _words(status: MessageStatus | None) -> str:
    return str(status).replace("_", " ")


ACTIONS: Mapping[str, Action] = {
    action.name: action
    for action in (
        Action(
            name="resolve-sent",
            label="It was sent",
            confirm="It was sent",
            fits=frozenset({IN_DOUBT}),
            explanation="The message becomes sent, and is never sent again. Look at the provider first (its log, the "
            "chat) by the delivery id.",
            asks_for="reason",
            perform=_resolve(sent=True),
        ),
        Action(
            name="resolve-not-sent",
            label="It was not sent",
            confirm="It was not sent: send it",
            fits=frozenset({IN_DOUBT}),
            explanation="The message becomes due, and is sent. Say it only if you know: if the earlier attempt did "
            "leave, the person gets it twice.",
            asks_for="reason",
            perform=_resolve(sent=False),
        ),
        Action(
            name="retry",
            label="Retry",
            confirm="Retry it",
            fits=frozenset({FAILED, EXPIRED}),
            explanation="The message becomes due now, under the same key and with all its retries. An expiry that has "
            "passed is lifted.",
            asks_for=None,
            perform=_retry,
        ),
        Action(
            name="reschedule",
            label="Reschedule",
            confirm="Reschedule it",
            fits=frozenset({PENDING}),
            explanation="The message is sent at another time; its key stays.",
            asks_for="moment",
            perform=_reschedule,
        ),
        Action(
            name="cancel",
            label="Cancel",
            confirm="Cancel it",
            fits=frozenset({PENDING}),
            explanation="The message is not sent, and its key stays taken: the same message cannot be queued again.",
            asks_for="reason",
            perform=_cancel,
        ),
    )
}


def actions_for(message: EngagementMessage) -> list[Action]:
    """Return the actions for the message's status. The status may change: the repository has the last word."""
    return [action for action in ACTIONS.values() if message.status in action.fits]


def act(
    session: Session,
    action: Action,
    message_id: int,
    form: Mapping[str, object],
    *,
    by: str,
    tz: tzinfo,
    schema: str | None,
) -> Answer:
    """Act on the message, unless it was claimed again since the person looked: they know of that attempt only.

    docs/decisions.md#2026-11-24--an-action-on-the-page-speaks-of-the-attempt-that-was-looked-at
    """
    given = Given(
        reason=str(form.get("reason") or "") or None,
        moment=moment_typed("scheduled_for", form.get("moment"), tz),
        by=by,
    )
    attempt = select(EngagementMessage.attempt).where(EngagementMessage.id == checked_id(message_id)).with_for_update()
    now = session.execute(attempt, execution_options=in_schema(schema)).scalar_one_or_none()
    if now is not None and not form.get("attempt"):
        return Answer("incomplete", "Nothing was done: the form did not say which attempt it is about.", is_done=False)
    if now is not None and str(now) != form.get("attempt"):
        return Answer("changed", "Nothing was done: the message was tried again meanwhile.", is_done=False)
    return action.perform(EngagementMessageRepository(session, schema=schema), message_id, given)


def moment_typed(name: str, text: object, tz: tzinfo) -> datetime | None:
    """Return the moment that a person typed, in `tz` if it has no zone of its own; None if there is none."""
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        raise InvalidMessage(name, "is no date and time") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=tz)
