"""The parts of a request, read with distrust: the result is a value or one error, and no other one."""

from __future__ import annotations

import hmac
import json
from typing import Any

from engagement.receipts.sources import UnreadableReceipts

MOST_DIGITS = 11
"""Digits of a number: Unix seconds up to the year 5138. A time with more is in milliseconds."""


def json_object(body: bytes | str) -> dict[str, Any]:
    """Return the JSON object in a body, or in a field of one. Raises `UnreadableReceipts`, without a word of it."""
    data = _parsed(body)
    if not isinstance(data, dict):
        raise UnreadableReceipts("the body is no JSON object in UTF-8, or it has a key twice")
    return data


def whole_number(value: object) -> int | None:
    """Return a number from zero on, which may be written as text (`"1750030073"`); None if it is anything else."""
    text = str(value) if isinstance(value, int) else value
    if not isinstance(text, str) or not text.isascii() or not text.isdecimal() or len(text) > MOST_DIGITS:
        return None
    return int(text)


def same(given: str, expected: str) -> bool:
    """Whether two texts are the same, in a time that does not tell where they differ."""
    return hmac.compare_digest(given.encode(errors="surrogatepass"), expected.encode(errors="surrogatepass"))


def _parsed(body: bytes | str) -> Any:
    """Return the JSON in a body; None if it is none. A decoder's error has the body in it, so it ends here."""
    try:
        return json.loads(
            body if isinstance(body, str) else body.decode(), object_pairs_hook=_once, parse_constant=_refused
        )
    except (ValueError, RecursionError):
        return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. One with a key twice is refused: two readers of it may see two receipts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError
    return found


def _refused(_: str) -> None:
    raise ValueError
