"""Masking of personal data: numbers and addresses in texts of others, users, addresses of messages."""

from __future__ import annotations

import hmac
import re
import secrets

from engagement.messages.checks import BSUID_FORM
from engagement.models import EngagementMessage

HIDDEN = "***"
SHORTEST_NUMBER = 4
"""Of so short an address the last two characters would tell too much."""
_DATE = r"(?:19|20)\d\d-(?:0[1-9]|1[0-2])-[0-3]\d"
_MOMENT = rf"{_DATE}(?:[T ][0-2]\d:[0-5]\d(?::[0-6]\d(?:\.\d{{1,6}})?)?(?:Z|[+-]\d\d:?\d\d)?)?(?!\d)"
_UUID = r"\b[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}\b"
_NUMBER = r"[+(]{0,3}\d(?:[\s().+/,_\u200b\u2010-\u2015-]*\d){6,}"
# With a digit, as Meta's ids of people are: else it may be the end of a sentence and the beginning of the next one.
_BSUID = r"\b[A-Z]{2}\.(?:ENT\.)?(?=[A-Za-z]{0,127}\d)[A-Za-z0-9]{1,128}\b"
_PERSONAL = rf"(?P<kept>{_MOMENT}|{_UUID})|{_BSUID}|{_NUMBER}"
_WORD = re.compile(r"\S+")


def masked(text: str, message: EngagementMessage | None = None) -> str:
    """Return a provider's text without its addresses and telephone numbers, or any text of their form.

    With a `message`, also without that message's user, address and key. The time is in proportion to the text.
    See docs/decisions.md#2026-11-29--each-reader-of-outside-text-was-measured-at-twice-the-size.
    """
    user = None if message is None else message.user_id
    # A key or an address may hold a number; a user may be no more than a part of one.
    for word in [] if message is None else _own_words(message):
        text = re.sub(re.escape(word), HIDDEN, text, flags=re.IGNORECASE)
    users = [] if user is None else _ways_to_write(user)
    # Only of a text that names the user: to compile a pattern takes longer than to search with it.
    named = [re.escape(way) for way in users if way in text.casefold()]
    pattern = "|".join([_PERSONAL, *(f"(?i:{way})" for way in named)])
    text = re.sub(
        pattern,
        lambda found: found["kept"] if found["kept"] and found["kept"].casefold() not in users else HIDDEN,
        text,
    )
    # Word by word: a pattern that looks for the @ of an address would do so from every character of a long word.
    return _WORD.sub(_hidden_if_address, text)


def _own_words(message: EngagementMessage) -> list[str]:
    address = message.destination_jid or ""
    number = address.rpartition(".")[2]
    is_business_scoped = BSUID_FORM.fullmatch(address) and len(number) > SHORTEST_NUMBER
    # Of Meta's id a provider may leave the country out.
    return [word for word in (message.idempotency_key, address, number if is_business_scoped else "") if word]


def _ways_to_write(user_id: str) -> list[str]:
    """Return the forms of a user in a text, in small letters: a UUID also without its hyphens."""
    user = user_id.casefold()
    return [user, user.replace("-", "")] if re.fullmatch(_UUID, user) else [user]


def _hidden_if_address(word: re.Match[str]) -> str:
    return HIDDEN if "@" in word[0][1:-1] else word[0]


def mask_address(jid: str | None) -> str | None:
    """Return an address with all hidden but its kind, and the last two digits of a long number.

    `***99@s.whatsapp.net`; of Meta's id of a person `***43`.
    """
    if jid is None:
        return None
    number, at, domain = jid.rpartition("@") if "@" in jid else (jid.rpartition(".")[2], "", "")
    return f"{HIDDEN}{number[-2:] if len(number) > SHORTEST_NUMBER else ''}{at}{domain}"


_OF_THIS_PROCESS = secrets.token_bytes(32)


def pseudonym(user_id: str, key: bytes = _OF_THIS_PROCESS) -> str:
    """Return eight characters that are the same for all messages of a user, and do not reveal the user.

    They follow from `key`, a secret: a plain hash gives way to a trial of all telephone numbers. Without a key they are
    the same as long as this process runs.
    See
    docs/decisions.md#2026-11-29--a-pseudonym-is-made-with-a-secret-and-masking-of-one-message-hides-from-a-glance-only.
    """
    return hmac.digest(key, user_id.encode(), "sha256")[:4].hex()
