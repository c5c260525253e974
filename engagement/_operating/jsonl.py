"""JSON Lines: one message for each line, checked as it is read, in constant memory.

A bad line is reported and skipped, and never stops the good ones. A report names line, field and reason; it repeats
nothing of the content, which is about people.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from inspect import Parameter, signature
from itertools import count
from typing import IO, Any, NoReturn
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from engagement.messages import InvalidMessage, NewMessage

MAX_LINE_BYTES = 1024 * 1024
"""Far more than a message can have. A longer line is skipped and never held in memory."""

_PARAMETERS = signature(NewMessage).parameters
FIELDS = tuple(_PARAMETERS)
REQUIRED = tuple(name for name, parameter in _PARAMETERS.items() if parameter.default is Parameter.empty)
WHOLE_LINE = ""
"""The name in place of a field, if an error concerns none."""

_FIELD_LIKE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_EXAMPLE_TIME = "2026-01-31T09:00:00-03:00"


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that was skipped: its number, counted from 1, the field if there is one to blame, and why."""

    number: int
    field: str
    reason: str

    def __str__(self) -> str:
        return ": ".join(part for part in (f"line {self.number}", self.field, self.reason) if part)


def read_messages(source: IO[bytes], report: Callable[[BadLine], object]) -> Iterator[NewMessage]:
    """Yield the message of each good line of `source`, and `report` each bad one; empty lines are skipped.

    A line is a JSON object with the fields of `NewMessage`; null is as good as leaving a field out. Times are ISO 8601
    with an offset, `tz` is an IANA name such as America/Sao_Paulo.
    """
    for number, line in _lines(source):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)  # noqa: PLW2901 - an editor's mark is no content
        if not line.strip():
            continue
        try:
            message = _message(line)
        except InvalidMessage as problem:
            report(BadLine(number, problem.field, problem.problem))
        else:
            yield message


def _lines(source: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines. One that is too long is cut just behind the limit, so that it can be reported."""
    for number in count(1):
        line = rest = source.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        while rest and not rest.endswith(b"\n"):
            rest = source.readline(MAX_LINE_BYTES)
        yield number, line


def _message(line: bytes) -> NewMessage:
    if len(line) > MAX_LINE_BYTES:
        raise InvalidMessage(WHOLE_LINE, f"has more than {MAX_LINE_BYTES} bytes")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise InvalidMessage(WHOLE_LINE, f"is not UTF-8 (byte {error.start + 1})") from None
    return NewMessage(**_converted(_json_object(text)))


def _json_object(text: str) -> dict[str, Any]:
    """Return the JSON object in `text`. NaN and repeated keys, which Python's reader lets pass, are refused."""
    repeated: list[str | None] = []  # for each object, the inner ones first: a key that it has twice

    def read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        times = Counter(name for name, _ in pairs) if len(found) < len(pairs) else {}
        repeated.append(next((name for name, count in times.items() if count > 1), None))
        return found

    try:
        value = json.loads(text, object_pairs_hook=read_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        problem = f"is no JSON: {error.msg[0].lower()}{error.msg[1:]} (column {error.colno})"
        raise InvalidMessage(WHOLE_LINE, problem) from None
    except RecursionError:
        raise InvalidMessage(WHOLE_LINE, "is nested too deep") from None
    except InvalidMessage:
        raise
    except ValueError:
        raise InvalidMessage(WHOLE_LINE, "holds a number that Python cannot read") from None
    if not isinstance(value, dict):
        raise InvalidMessage(WHOLE_LINE, "must be a JSON object")
    *inner, own = repeated
    if own is not None:
        raise InvalidMessage(_shown(own), "is there twice")
    if any(inner):
        raise InvalidMessage("message_params", "has the same key twice")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidMessage(WHOLE_LINE, f"holds {name}, which is no JSON")


def _converted(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `NewMessage`. Values without a JSON type (a time) are read from text."""
    unknown = next((name for name in given if name not in FIELDS), None)
    if unknown is not None:
        alike = get_close_matches(unknown, FIELDS, n=1)
        hint = f" (did you mean {alike[0]}?)" if alike else ""
        raise InvalidMessage(_shown(unknown), f"is no field of a message{hint}")
    there = {name: value for name, value in given.items() if value is not None}
    for name in REQUIRED:
        if name not in there:
            raise InvalidMessage(name, "is missing")
    readers: dict[str, Callable[[str, Any], Any]] = {"scheduled_for": _time, "expires_at": _time, "tz": _zone}
    return {name: readers[name](name, value) if name in readers else value for name, value in there.items()}


def _time(name: str, value: Any) -> datetime:
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise InvalidMessage(name, f"must be an ISO 8601 time with an offset, such as {_EXAMPLE_TIME}") from None
    if moment.tzinfo is None:
        raise InvalidMessage(name, f"has no offset from UTC: write it as in {_EXAMPLE_TIME}, or Z for UTC")
    return moment


def _zone(name: str, value: Any) -> ZoneInfo:
    zone = zone_named(value)
    if zone is None:
        raise InvalidMessage(name, "is no time zone that this machine knows, such as America/Sao_Paulo")
    return zone


def zone_named(name: Any) -> ZoneInfo | None:
    """Return the time zone of this name, if this machine knows one."""
    try:
        return ZoneInfo(name)
    # The package tzdata is asked for each folder of a/b/c/… in turn, one inside the other.
    except (TypeError, ValueError, OSError, ZoneInfoNotFoundError, RecursionError):
        return None


def _shown(name: str) -> str:
    # A mangled line may have anything in the place of a field's name.
    return name if _FIELD_LIKE.fullmatch(name) else "a field"
