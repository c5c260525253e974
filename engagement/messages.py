"""The values that cross the boundary: what a host asks for, what it is told, and what a transport is given.

All input is checked here, when a value is made, so that nothing bad ever reaches the host's open transaction.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, tzinfo
from types import MappingProxyType
from typing import Any, Literal

from engagement.models import EARLIEST, LATEST, Destination, MessageStatus

MAX_TEXT = 255
"""Characters in a user id, message key or JID."""
MAX_TYPE = 64
"""Characters in a message type."""
MAX_KEY_BYTES = 512
"""An index entry of PostgreSQL holds at most 2,704 bytes; a key that long is a mistake anyway."""
MAX_PARAMS_BYTES = 64 * 1024
MAX_PARAMS_DEPTH = 32

_NO_PARAMS: Mapping[str, Any] = MappingProxyType({})
DELIVERY_NAMESPACE = uuid.UUID("6f0f6a3c-52d5-5f0e-9d8e-0f5d1b1c7a11")

_MESSAGE_TYPE = re.compile(r"[a-z][a-z0-9_]*")
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")
_ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
# Circles need no check: the nesting is bounded before.
_to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")).encode
# ASCII digits only, and always with fullmatch: `$` would let a newline pass, and `\d` the digits of other scripts.
BSUID_FORM = re.compile(r"[A-Z]{2}\.(?:ENT\.)?[A-Za-z0-9]{1,128}")
"""Meta's business-scoped user id of a person, who may show no number, and that of a parent business. No JID; but it
stands where one does, and is masked, found, forgotten and kept in order like one."""
JID_FORMS = {
    Destination.INDIVIDUAL: re.compile(
        rf"[1-9][0-9]{{6,14}}@s\.whatsapp\.net|[1-9][0-9]{{4,19}}@lid|{BSUID_FORM.pattern}"
    ),
    Destination.GROUP: re.compile(r"[1-9][0-9]{14,19}@g\.us|[1-9][0-9]{4,14}-[0-9]{10}@g\.us"),
}
DESTINATIONS = {destination.value: destination for destination in Destination}
_JID_FORM = {
    Destination.INDIVIDUAL: (
        "must be <number>@s.whatsapp.net, <number>@lid or Meta's id (BR.<letters or digits>) for an individual"
    ),
    Destination.GROUP: "must be <number>@g.us for a group",
}


class InvalidMessage(ValueError):  # noqa: N818 - the contract's name
    """A message that cannot be queued. Says which `field` and what is wrong with it (`problem`), never its content."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[type[InvalidMessage], tuple[str, str]]:
        return type(self), (self.field, self.problem)


def checked_text(name: str, value: object, *, max_characters: int = MAX_TEXT) -> str:
    """Return `value` as a plain `str` that PostgreSQL can store and index, or raise `InvalidMessage`."""
    if not isinstance(value, str):
        raise InvalidMessage(name, f"must be text, not {type(value).__name__}")
    if not value or value.isspace():
        raise InvalidMessage(name, "is empty")
    if len(value) > max_characters:
        raise InvalidMessage(name, f"has {len(value)} characters, more than {max_characters}")
    if not value.isprintable():
        if _CONTROL_CHARACTER.search(value):
            raise InvalidMessage(name, "holds a control character, which is refused (PostgreSQL cannot store NUL)")
        _utf8(name, value)
    return value if type(value) is str else str.__str__(value)


def checked_user_id(value: object) -> str:
    """Return `value` as `checked_text` does, or the text of a UUID, in lower case: that is its one reading."""
    return str(value) if isinstance(value, uuid.UUID) else checked_text("user_id", value)


def checked_moment(name: str, value: object) -> datetime:
    """Return `value` if it is an aware datetime that PostgreSQL and Python can hold, or raise `InvalidMessage`."""
    if not isinstance(value, datetime):
        raise InvalidMessage(name, f"must be a datetime, not {type(value).__name__}")
    if value.tzinfo is None or value.utcoffset() is None:
        raise InvalidMessage(name, "is naive: give it a time zone")
    if not EARLIEST <= value <= LATEST:
        raise InvalidMessage(name, f"is out of range: {EARLIEST:%Y-%m-%d} to {LATEST:%Y-%m-%d}")
    return value


def checked_flag(name: str, value: object) -> bool:
    """Return `value` if it is True or False, or raise `TypeError`: what guards something believes no other yes.

    "no" is true to Python, and so are a method that nobody called and what an `async def` returns.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: must be True or False, not {type(value).__name__}")
    return value


LONGEST_AGE = timedelta(days=36_525)


def checked_age(name: str, value: object) -> timedelta:
    """Return `value` if it is an age that a message can have, or raise `InvalidMessage`."""
    if not isinstance(value, timedelta) or not timedelta(0) <= value <= LONGEST_AGE:
        raise InvalidMessage(name, f"must be a timedelta from zero to {LONGEST_AGE.days} days")
    return value


def checked_id(value: object) -> int:
    """Return `value` if it can be the id of a message, or raise `InvalidMessage`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**63:
        raise InvalidMessage("message_id", "must be a positive integer that fits in 64 bits")
    return value


def id_typed(text: str) -> int:
    """Return the id that somebody typed, or raise `InvalidMessage`."""
    # Python refuses to read thousands of digits, and no id has twenty.
    is_number = text.isascii() and text.isdecimal() and len(text) < 20  # noqa: PLR2004
    return checked_id(int(text) if is_number else None)


def idempotency_key(user_id: str | uuid.UUID, event_type: str, when: date | None = None, *, tz: tzinfo = UTC) -> str:
    """Return `{user_id}:{event_type}:{YYYY-MM-DD}`, the date being that of `when` (default: now) in `tz`.

    >>> from datetime import UTC, datetime
    >>> idempotency_key("user123", "goodbye", datetime(2025, 11, 21, 23, 30, tzinfo=UTC))
    'user123:goodbye:2025-11-21'

    A `when` that is a date and no moment is that day. The key has one reading, also when the user id holds a colon:
    neither the type nor the date can. Raises `InvalidMessage` for what could not be a message's user id, type or time.
    """
    return _key_of_day(user_id, event_type, when, tz, date.isoformat)


def weekly_idempotency_key(
    user_id: str | uuid.UUID, event_type: str, when: date | None = None, *, tz: tzinfo = UTC
) -> str:
    """Return `{user_id}:{event_type}:{year}-W{week}`, the ISO week of `when` (default: now) in `tz`.

    >>> from datetime import UTC, datetime
    >>> weekly_idempotency_key("user123", "weekly_review", datetime(2027, 1, 1, tzinfo=UTC))
    'user123:weekly_review:2026-W53'

    The year is the week's, not the calendar's: Thursday, 2026-12-31 and Friday, 2027-01-01 have one key. Otherwise it
    is as `idempotency_key`.
    """
    return _key_of_day(user_id, event_type, when, tz, _iso_week)


def delivery_id(idempotency_key: str) -> uuid.UUID:
    """Return the UUIDv5 of the key: the same for every attempt, so that a transport can recognise a repeat."""
    return uuid.uuid5(DELIVERY_NAMESPACE, idempotency_key)


def key_hash(idempotency_key: str) -> str:
    """Return what logs and `repr` show of a key: enough to find it again, and no user id."""
    return hashlib.sha256(idempotency_key.encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, init=False)
class NewMessage:
    """A message to be queued. Made is checked: bad input raises `InvalidMessage`, which names the field.

    `message_params` must be a JSON object of at most 64 KiB; it is read once, now, and later changes to the mapping
    that was passed are not seen. `scheduled_for` None means now. The idempotency key is computed from the user, the
    type and the date of `scheduled_for` in `tz` unless it is given.
    """

    user_id: str
    message_type: str
    message_key: str
    message_params: Mapping[str, Any]
    destination: Destination | Literal["individual", "group"]
    destination_jid: str
    scheduled_for: datetime | None
    expires_at: datetime | None
    idempotency_key: str | None
    tz: tzinfo
    key: str = field(init=False)
    """The idempotency key that the message is queued under: the given one, or the computed one."""
    params_json: str = field(init=False, compare=False)

    # Written out: a generated one sets each field before its check, and once more after it, which costs a third more.
    def __init__(
        self,
        *,
        user_id: str | uuid.UUID,
        message_type: str,
        message_key: str,
        message_params: Mapping[str, Any] = _NO_PARAMS,
        destination: Destination | Literal["individual", "group"],
        destination_jid: str,
        scheduled_for: datetime | None = None,
        expires_at: datetime | None = None,
        idempotency_key: str | None = None,
        tz: tzinfo = UTC,
    ) -> None:
        kind = checked_destination(destination)
        _check_times(scheduled_for, expires_at)
        put = object.__setattr__  # The class is frozen.
        put(self, "scheduled_for", scheduled_for)
        put(self, "expires_at", expires_at)
        put(self, "tz", _checked_tz(tz))
        put(self, "user_id", checked_user_id(user_id))
        put(self, "message_type", _checked_type("message_type", message_type))
        put(self, "message_key", checked_text("message_key", message_key))
        put(self, "message_params", {} if message_params is _NO_PARAMS else message_params)
        put(self, "params_json", _checked_params(message_params))
        put(self, "destination", kind)
        put(self, "destination_jid", checked_jid(destination_jid, kind))
        put(self, "idempotency_key", idempotency_key)
        put(self, "key", _checked_key(self))

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"NewMessage(message_type={self.message_type!r}, key_hash={key_hash(self.key)!r})"


@dataclass(frozen=True, slots=True)
class Queued:
    """What became of one `queue_message`.

    `created` is False for a duplicate; `message_id` and `status` are then those of the message that was there. They
    are None if the caller cannot see that message: it is newer than the snapshot (REPEATABLE READ, SERIALIZABLE),
    row-level security hides it, such as another tenant's, or somebody has just deleted its row.
    """

    created: bool
    message_id: int | None
    idempotency_key: str = field(repr=False)
    status: MessageStatus | None
    differs_in: tuple[str, ...] | None = field(default=(), compare=False)
    """The fields of a duplicate that the message that was there has other values of, such as `("message_params",)`: of
    `user_id`, `message_type`, `message_key`, `message_params`, `destination` and `destination_jid`. What was blanked
    since is not compared. None if the caller cannot see that message, or may not read those columns."""

    @property
    def is_of_another_user(self) -> bool:
        """Whether the key is that of another user's message: then nothing was queued for this one."""
        return self.differs_in is not None and "user_id" in self.differs_in


@dataclass(frozen=True, slots=True)
class QueuedMany:
    """What became of one `queue_messages`: their sum is how many messages were given."""

    created: int
    duplicates: int


@dataclass(frozen=True, slots=True)
class Cancellation:
    """What became of one `cancel_message`.

    `too_late` means that the message is, or may have been, sent, or ended otherwise: `status` says which.
    """

    verdict: Literal["cancelled", "already_cancelled", "too_late", "not_found"]
    status: MessageStatus | None

    @property
    def is_cancelled(self) -> bool:
        """Whether it is certain that the message is not sent."""
        return self.status is MessageStatus.CANCELLED


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What became of one `forget_user`: how many pending messages were cancelled, and how many in all were blanked."""

    cancelled: int
    blanked: int


@dataclass(frozen=True, slots=True)
class StatusCounts:
    """How many messages stand where; `oldest_due` is how long the oldest due message has been waiting."""

    by_status: Mapping[MessageStatus, int]
    oldest_due: timedelta | None

    def __getitem__(self, status: MessageStatus | str) -> int:
        return self.by_status[MessageStatus(status)]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class OutgoingMessage:
    """What a transport is given. `attempt` counts from 1; `retry_count` is how many attempts failed before."""

    id: int
    idempotency_key: str
    user_id: str
    message_type: str
    message_key: str
    message_params: Mapping[str, Any]
    destination: Destination
    destination_jid: str
    scheduled_for: datetime
    attempt: int
    retry_count: int

    @property
    def delivery_id(self) -> uuid.UUID:
        """The same for every attempt: hand it to a provider that can recognise a repeat."""
        return delivery_id(self.idempotency_key)

    def __hash__(self) -> int:
        return hash((self.id, self.attempt))

    def __repr__(self) -> str:
        return f"OutgoingMessage(id={self.id}, message_type={self.message_type!r}, attempt={self.attempt})"


def _utf8(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidMessage(name, "holds a lone surrogate, which is no character") from None


def _checked_type(name: str, value: object) -> str:
    if type(value) is str and len(value) <= MAX_TYPE and _MESSAGE_TYPE.fullmatch(value):
        return value
    message_type = checked_text(name, value, max_characters=MAX_TYPE)
    if not _MESSAGE_TYPE.fullmatch(message_type):
        raise InvalidMessage(name, "must be a-z, 0-9 and _, and begin with a letter")
    return message_type


def _checked_tz(value: object) -> tzinfo:
    if not isinstance(value, tzinfo):
        raise InvalidMessage(
            "tz", f"must be a tzinfo such as ZoneInfo('America/Sao_Paulo'), not {type(value).__name__}"
        )
    return value


def checked_destination(value: object) -> Destination:
    """Return the member that `value` names, or raise `InvalidMessage`."""
    destination = DESTINATIONS.get(value) if isinstance(value, str) else None  # Also of a host's own enum of text.
    if destination is None:
        raise InvalidMessage("destination", "must be individual or group")
    return destination


def checked_jid(value: object, destination: Destination) -> str:
    """Return `value` if it is a JID that fits `destination`, or raise `InvalidMessage`."""
    if type(value) is str and JID_FORMS[destination].fullmatch(value):
        return value
    jid = checked_text("destination_jid", value)
    if not JID_FORMS[destination].fullmatch(jid):
        raise InvalidMessage("destination_jid", _JID_FORM[destination])
    return jid


def _check_times(scheduled_for: datetime | None, expires_at: datetime | None) -> None:
    if scheduled_for is not None:
        checked_moment("scheduled_for", scheduled_for)
    if expires_at is None:
        return
    checked_moment("expires_at", expires_at)
    # In UTC: two moments of one zone are compared by its wall clock, which shows an hour twice in autumn.
    if expires_at.astimezone(UTC) <= (scheduled_for or datetime.now(UTC)).astimezone(UTC):
        raise InvalidMessage("expires_at", "is not after scheduled_for (or now, if that is not given)")


def _checked_key(message: NewMessage) -> str:
    if message.idempotency_key is None:
        day = _day_of(message.scheduled_for, message.tz)
        key = f"{message.user_id}:{message.message_type}:{day.isoformat()}"
    else:
        key = checked_text("idempotency_key", message.idempotency_key, max_characters=MAX_KEY_BYTES)
    if len(key) * 4 > MAX_KEY_BYTES and len(key.encode()) > MAX_KEY_BYTES:
        raise InvalidMessage("idempotency_key", f"has {len(key.encode())} bytes, more than {MAX_KEY_BYTES}")
    return key


def _key_of_day(user_id: object, event_type: object, when: object, tz: object, named: Callable[[date], str]) -> str:
    user_id, event_type, zone = checked_user_id(user_id), _checked_type("event_type", event_type), _checked_tz(tz)
    if isinstance(when, date) and not isinstance(when, datetime):
        day = when
    else:
        day = _day_of(None if when is None else checked_moment("when", when), zone)
    return f"{user_id}:{event_type}:{named(day)}"


def _day_of(when: datetime | None, zone: tzinfo) -> date:
    return (datetime.now(zone) if when is None else when.astimezone(zone)).date()


def _iso_week(day: date) -> str:
    year, week, _ = day.isocalendar()
    return f"{year:04}-W{week:02}"


def _checked_params(params: object) -> str:
    """Return the JSON text that is stored: what was checked is what is queued."""
    if not isinstance(params, dict):
        if not isinstance(params, Mapping):
            raise InvalidMessage("message_params", f"must be a JSON object, not {type(params).__name__}")
        params = dict(params)
    _check_json(params, depth=1)
    try:
        text = _to_json(params)
    except (ValueError, TypeError):
        # Only a number can still be wrong: NaN, Infinity, or an integer beyond what Python itself would read back.
        raise InvalidMessage("message_params", "holds a number that JSON or Python cannot represent") from None
    if len(text) * 4 > MAX_PARAMS_BYTES or not text.isascii():
        size = len(_utf8("message_params", text))
        if size > MAX_PARAMS_BYTES:
            raise InvalidMessage("message_params", f"has {size} bytes as JSON, more than {MAX_PARAMS_BYTES}")
    if "\\u0000" in text and _ESCAPED_NUL.search(text):
        raise InvalidMessage("message_params", "holds a NUL character, which PostgreSQL cannot store")
    return text


_SCALARS = frozenset({str, int, float, bool, type(None)})


def _check_json(value: object, depth: int) -> None:
    """Refuse what `json.dumps` would refuse or, worse, change: keys that are not text become text there."""
    if depth > MAX_PARAMS_DEPTH:
        raise InvalidMessage("message_params", f"is nested deeper than {MAX_PARAMS_DEPTH}")
    if isinstance(value, dict):
        for key, member in value.items():
            if not isinstance(key, str):
                raise InvalidMessage("message_params", f"has a key that is not text but {type(key).__name__}")
            if type(member) not in _SCALARS:
                _check_json(member, depth + 1)
    elif isinstance(value, list | tuple):
        for member in value:
            if type(member) not in _SCALARS:
                _check_json(member, depth + 1)
    elif not isinstance(value, str | int | float | None):
        raise InvalidMessage("message_params", f"holds a {type(value).__name__}, which JSON does not have")
