"""Values from typed text: durations, moments, transports."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import click

from engagement._delivery.hook import OnSettled, why_no_hook
from engagement._sending.protocols import Transport
from engagement.messages.checks import InvalidMessage, checked_moment, checked_text, checked_type
from engagement.models import MOST_SENDER
from engagement.transports import TransportNotFound, load_transport, named

_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(ms|s|m|h|d)")
_UNITS = {"ms": "milliseconds", "s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_LONGEST = timedelta(days=366)
YOUNGEST_TO_PRUNE = timedelta(hours=1)


def duration(text: str) -> timedelta:
    """Read `500ms`, `30s`, `5m`, `2h` or `1d`."""
    return _duration(text, _LONGEST, "a year")


def age(text: str) -> timedelta:
    """Read an age: a duration of up to a hundred years."""
    return _duration(text, 100 * _LONGEST, "a hundred years")


def age_to_prune(text: str) -> timedelta:
    """Read an age at which messages may be blanked for good."""
    length = age(text)
    if length < YOUNGEST_TO_PRUNE:
        raise click.BadParameter("must be 1h or more: what is pruned is blanked for good.")
    return length


def _duration(text: str, longest: timedelta, longest_in_words: str) -> timedelta:
    found = _DURATION.fullmatch(text)
    length = None if found is None else timedelta(**{_UNITS[found[2]]: float(found[1])})
    if length is None or length > longest:
        raise click.BadParameter(f"must be a duration such as 500ms, 30s, 5m, 2h or 1d, of at most {longest_in_words}.")
    return length


def positive_duration(text: str) -> timedelta:
    """Read a duration that is not zero."""
    length = duration(text)
    if not length:
        raise click.BadParameter("must be more than nothing.")
    return length


def moment_ago(text: str) -> datetime:
    """Read a moment: `2026-11-24T09:00Z`, or `2h` for two hours ago."""
    return _moment(text, -1)


def moment_ahead(text: str) -> datetime:
    """Read a moment: `2026-11-24T09:00Z`, or `2h` for in two hours."""
    return _moment(text, 1)


def _moment(text: str, direction: int) -> datetime:
    if _DURATION.fullmatch(text):
        return datetime.now(UTC) + direction * age(text)
    try:
        return checked_moment("moment", datetime.fromisoformat(text))
    except ValueError:
        raise click.BadParameter("must be a moment such as 2026-11-24T09:00Z, or a duration such as 2h.") from None


def schema_named(name: str) -> str:
    """Read a schema's name. An empty one is a variable that was not set: it does not mean the search path."""
    if not name:
        raise click.BadParameter("must not be empty.")
    return name


def type_named(name: str) -> str:
    """Read a message type."""
    try:
        return checked_type("type", name)
    except InvalidMessage as error:
        raise click.BadParameter(f"{error.problem}.") from None


def sender_named(name: str) -> str:
    """Read the name of a sender."""
    try:
        return checked_text("sender", name, max_characters=MOST_SENDER)
    except InvalidMessage as error:
        raise click.BadParameter(f"{error.problem}.") from None


def transport_named(name: str) -> Transport:
    """Load a transport."""
    try:
        return load_transport(name)
    except TransportNotFound as error:
        raise click.BadParameter(f"{error}.") from None


def on_settled_named(name: str) -> OnSettled:
    """Load the function that is called for each settlement."""
    try:
        found: OnSettled = named(name)
    except TransportNotFound as error:
        raise click.BadParameter(f"{error}.") from None
    if problem := why_no_hook(found):
        raise click.BadParameter(f"{name} {problem}.")
    return found
