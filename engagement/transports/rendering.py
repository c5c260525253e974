"""What is checked before anything is sent: the words of a message, and the JSON that carries them."""

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
"""Turns a message into what is said. A `LookupError` or `ValueError` means that it cannot be said: `Refused`."""


def words_of(render: Render[Words], message: OutgoingMessage) -> Words | Outcome:
    """Return what `render` says, `without_controls`, or the outcome that its error means.

    The text of the error may be params: it is dropped.
    """
    try:
        return without_controls(render(message))
    except NoWords as error:
        return Refused(f"no words: {error}")  # Its text never holds params.
    except BaseException as error:  # noqa: BLE001 - whatever it was, `SystemExit` too, nothing was sent
        if (later := for_want_of_a_zone(error, message)) is not None:
            return later
        if isinstance(error, LookupError | ValueError):
            return Refused(f"the message has no words: {type(error).__name__}")
        return NotSent(f"render raised {type(error).__name__}")


def refusal_of(text: object, *, most_characters: int) -> Refused | None:
    """Return why `text` cannot be sent, or None."""
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
