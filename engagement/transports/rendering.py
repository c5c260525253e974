"""The checks before a send: the words of a message, and the JSON that carries them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from engagement.messages import OutgoingMessage
from engagement.outcomes import NotSent, Outcome, Refused
from engagement.policies.gates import for_want_of_a_zone
from engagement.words import NoWords, without_controls

Words = TypeVar("Words", bound=object)
Render = Callable[[OutgoingMessage], Words]
"""Turns a message into words. A `LookupError` or `ValueError` means that it has none: `Refused`."""


def words_of(render: Render[Words], message: OutgoingMessage) -> Words | Outcome:
    """Return the words from `render` without controls, or the outcome for its error.

    The text of the error is dropped, since it may hold params.
    docs/decisions.md#2026-11-29--what-a-name-holds-besides-letters-is-left-out-and-the-message-is-sent
    """
    try:
        return without_controls(render(message))
    except NoWords as error:
        return Refused(f"no words: {error}")  # Its text never holds params.
    except BaseException as error:  # noqa: BLE001 - after any error, `SystemExit` too, nothing was sent
        # docs/decisions.md#2026-11-29--a-time-zone-that-cannot-be-found-postpones
        if (later := for_want_of_a_zone(error, message)) is not None:
            return later
        if isinstance(error, LookupError | ValueError):
            return Refused(f"the message has no words: {type(error).__name__}")
        return NotSent(f"render raised {type(error).__name__}")


def refusal_of(text: object, *, most_characters: int) -> Refused | None:
    """Return the reason why `text` cannot be sent, or None."""
    if not isinstance(text, str):
        return Refused(f"render returned {type(text).__name__}, which is no text")
    if not text.strip():
        return Refused("the text is empty")
    if len(text) > most_characters:
        return Refused(f"the text has {len(text)} characters, more than {most_characters}")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Refused("the text holds a lone surrogate, which is no character")
    return None


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def as_json(payload: Mapping[str, Any]) -> bytes:
    """Return the body of a request: the same payload, the same bytes."""
    return _JSON.encode(payload).encode()
