"""The deeds of a person on the suppression list: their words, and the list's answers in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import tzinfo

from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.exceptions import HTTPException

from engagement._sql.schemas import in_schema
from engagement._sql.suppressing import LIST
from engagement.admin.actions import Answer, moment_typed
from engagement.admin.database import Queue
from engagement.messages import InvalidMessage, Suppressed, address_hash
from engagement.messages.checks import checked_text
from engagement.models import MOST_REASON, EngagementMessage
from engagement.outcomes import clean_reason
from engagement.repository import EngagementMessageRepository
from engagement.suppression import SuppressionList

LONGEST_NAME = 100
"""Characters of the person's name that stand behind a reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deed:
    """One button: its words."""

    name: str
    label: str
    confirm: str
    explanation: str


SUPPRESS = Deed(
    name="suppress",
    label="Suppress its address",
    confirm="Suppress it",
    explanation="Nothing is sent to the address any more, whatever the message: workers that ask the list cancel each "
    "one when its time comes. One that is being sent at this moment may still arrive.",
)
UNSUPPRESS = Deed(
    name="unsuppress",
    label="Unsuppress its address",
    confirm="Unsuppress it",
    explanation="Messages may be sent to the address again. Nothing is sent by it: messages that were cancelled stay "
    "so. Whoever answered STOP must have said that they changed their mind.",
)
DEEDS: Mapping[str, Deed] = {deed.name: deed for deed in (SUPPRESS, UNSUPPRESS)}


@dataclass(frozen=True, slots=True)
class Asked:
    """The address that a link or a form is about, and its entry on the list."""

    address: str | None
    """None if its message was forgotten or pruned."""
    message: EngagementMessage | None
    """The message that goes to the address; None if somebody typed it."""
    entry: Suppressed | None

    @property
    def deeds(self) -> list[Deed]:
        """The deeds that fit now. An entry can be made to last longer, and never to end sooner."""
        return [] if self.address is None else deeds_for(self.entry)


def deeds_for(entry: Suppressed | None) -> list[Deed]:
    """Return the deeds that fit an address with this entry, or with none."""
    if entry is None:
        return [SUPPRESS]
    return [UNSUPPRESS] if entry.until is None else [UNSUPPRESS, SUPPRESS]


def find_asked(session: Session, named: int | str, schema: str | None, *, lock: bool = False) -> Asked | None:
    """Return the address of the message with a number, or one that was typed; None if there is no such message.

    With `lock`, nobody else changes its entry before the transaction ends.
    """
    message: EngagementMessage | None = None
    address: str | None
    if isinstance(named, str):
        address = named
    elif message := EngagementMessageRepository(session, schema=schema).get_message(named):
        address = message.destination_jid
    else:
        return None
    if address is None:
        return Asked(None, message, None)
    if lock:
        held = select(LIST.c.address_hash).where(LIST.c.address_hash == address_hash(address)).with_for_update()
        session.execute(held, execution_options=in_schema(schema))
    return Asked(address, message, SuppressionList(session, schema=schema).find(address))


async def look_at(queue: Queue, message: EngagementMessage) -> Asked | str:
    """Return how a message's address stands on the list, or a sentence that says why nobody can tell.

    Without the list (its grant, its policy) a message is still worth showing.
    """
    address = message.destination_jid
    if address is None:
        return Asked(None, message, None)
    try:
        entry = await queue.run(lambda session: SuppressionList(session, schema=queue.schema).find(address))
    except InvalidMessage as error:  # It was written by hand.
        return f"The address {error.problem}."
    except HTTPException as error:
        return error.detail
    return Asked(address, message, entry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The form that the person filled in, and the person."""

    form: Mapping[str, object]
    by: str
    tz: tzinfo
    seal: Callable[[Suppressed | None], str]
    """Tells two entries apart, and reveals neither: the form has that of the entry that the person saw."""


def perform(session: Session, deed: Deed, named: int | str, given: Given, schema: str | None) -> Answer:
    """Put the address onto the list or take it off, unless its entry was changed since the person looked.

    A STOP that came meanwhile is not what the person decided about. Raises `InvalidMessage`, which names the field.
    """
    asked = find_asked(session, named, schema, lock=True)
    if asked is None or asked.address is None:
        return _no(
            "not_found" if asked is None else "refused", "There is no such message, or no address of it any more."
        )
    if (no := _refusal(deed, asked, given)) is not None:
        return no
    addresses = SuppressionList(session, schema=schema)
    if deed is UNSUPPRESS:
        addresses.unsuppress(asked.address)
        return Answer("unsuppressed", "Unsuppressed. Messages may be sent to the address again.", is_done=True)
    addresses.suppress(asked.address, _reason(given), until=moment_typed("until", given.form.get("until"), given.tz))
    if addresses.find(asked.address) is None:
        raise InvalidMessage("until", "is over already")  # The entry is rolled back.
    return Answer("suppressed", "Suppressed. Nothing is sent to the address any more.", is_done=True)


def _refusal(deed: Deed, asked: Asked, given: Given) -> Answer | None:
    if not given.form.get("entry"):
        return _no("incomplete", "Nothing was done: the form did not say which entry it is about.")
    if given.form["entry"] != given.seal(asked.entry):
        return _no("changed", "Nothing was done: the suppression list was changed meanwhile.")
    if deed not in asked.deeds:
        return _no("refused", f"Nothing was changed: it is {'not' if asked.entry is None else 'already'} on the list.")
    return None


def _no(word: str, sentence: str) -> Answer:
    return Answer(word, sentence, is_done=False)


def longest_reason(by: str) -> int:
    """Return how many characters a reason may have, so that the person's name fits behind it."""
    return MOST_REASON - len(_signature(by))


def _signature(by: str) -> str:
    name = (clean_reason(by) or "")[:LONGEST_NAME]
    return f" (by {name})" if name else ""


def _reason(given: Given) -> str:
    typed = str(given.form.get("reason") or "").strip()
    return checked_text("reason", typed, max_characters=longest_reason(given.by)) + _signature(given.by)
