"""The limits of a message: all input is checked, so that nothing bad reaches the host's open transaction."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, tzinfo

from engagement.models import EARLIEST, LATEST, Destination

MAX_TEXT = 255
"""Characters in a user id, message key or JID."""
MAX_TYPE = 64
"""Characters in a message type."""
MAX_KEY_BYTES = 512
"""An index entry of PostgreSQL holds at most 2,704 bytes; a key that long is a mistake anyway."""
MAX_PARAMS_BYTES = 64 * 1024
MAX_PARAMS_DEPTH = 32

_MESSAGE_TYPE = re.compile(r"[a-z][a-z0-9_]*")
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")
_ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
# Circles need no check: the nesting is bounded before.
_to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")).encode
# ASCII digits only, and always with fullmatch: `$` would let a newline pass, and `\d` the digits of other scripts.
BSUID_FORM = re.compile(r"[A-Z]{2}\.(?:ENT\.)?[A-Za-z0-9]{1,128}")
"""Meta's business-scoped user id of a person who may show no number, and that of a parent business. It is no JID, but
is stored, masked, found, forgotten and kept in order like one.

See docs/decisions.md#2026-11-29--a-business-scoped-user-id-stands-in-destination_jid."""
JID_FORMS = {
    Destination.INDIVIDUAL: re.compile(
        rf"[1-9][0-9]{{6,14}}@s\.whatsapp\.net|[1-9][0-9]{{4,19}}@lid|{BSUID_FORM.pattern}"
    ),
    Destination.GROUP: re.compile(r"[1-9][0-9]{14,19}@g\.us|[1-9][0-9]{4,14}-[0-9]{10}@g\.us"),
}
DESTINATIONS = {destination.value: destination for destination in Destination}
_JID_PROBLEMS = {
    Destination.INDIVIDUAL: (
        "must be <number>@s.whatsapp.net, <number>@lid or Meta's id (BR.<letters or digits>) for an individual"
    ),
    Destination.GROUP: "must be <number>@g.us for a group",
}


class InvalidMessage(ValueError):  # noqa: N818 - the contract's name
    """A message that cannot be queued. Names the `field` and its `problem`, never its content.

    Its text: `expires_at: is naive: give it a time zone`.
    """

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
    """Return `value` as `checked_text` does. A UUID becomes its text in lower case, its one reading."""
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
    """Return `value` if it is True or False, or raise `TypeError`: a guard believes no other yes.

    "no" is true to Python, and so are an uncalled method and a coroutine.
    See docs/decisions.md#2026-11-29--a-guard-believes-only-true.
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


def _utf8(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidMessage(name, "holds a lone surrogate, which is no character") from None


def checked_type(name: str, value: object) -> str:
    """Return `value` if it is a word that a type of message can be, or raise `InvalidMessage`."""
    if type(value) is str and len(value) <= MAX_TYPE and _MESSAGE_TYPE.fullmatch(value):
        return value
    message_type = checked_text(name, value, max_characters=MAX_TYPE)
    if not _MESSAGE_TYPE.fullmatch(message_type):
        raise InvalidMessage(name, "must be a-z, 0-9 and _, and begin with a letter")
    return message_type


def checked_tz(value: object) -> tzinfo:
    """Return `value` if it is a time zone, or raise `InvalidMessage`."""
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
        raise InvalidMessage("destination_jid", _JID_PROBLEMS[destination])
    return jid


def checked_address(value: object) -> str:
    """Return `value` if it is a JID of a person or a group, or raise `InvalidMessage`."""
    address = checked_text("address", value)
    if not any(form.fullmatch(address) for form in JID_FORMS.values()):
        raise InvalidMessage("address", f"{_JID_PROBLEMS[Destination.INDIVIDUAL]}, or <number>@g.us for a group")
    return address


def check_times(scheduled_for: datetime | None, expires_at: datetime | None) -> None:
    """Raise `InvalidMessage` unless both moments can be held, and the message expires after it is due."""
    if scheduled_for is not None:
        checked_moment("scheduled_for", scheduled_for)
    if expires_at is None:
        return
    checked_moment("expires_at", expires_at)
    # In UTC: two moments of one zone are compared by its wall clock, which shows an hour twice in autumn.
    if expires_at.astimezone(UTC) <= (scheduled_for or datetime.now(UTC)).astimezone(UTC):
        raise InvalidMessage("expires_at", "is not after scheduled_for (or now, if that is not given)")


def checked_params(params: object) -> str:
    """Return the JSON text that is stored, or raise `InvalidMessage`. The checked text itself is queued."""
    if not isinstance(params, dict):
        if not isinstance(params, Mapping):
            raise InvalidMessage("message_params", f"must be a JSON object, not {type(params).__name__}")
        params = dict(params)
    _check_json(params, depth=1)
    try:
        text = _to_json(params)
    except (ValueError, TypeError):
        # Only a number can still be wrong: NaN, Infinity, or an integer too long for Python to read back.
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
    """Refuse values that `json.dumps` would refuse or, worse, change: keys that are not text become text there."""
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
