"""Transports, as a worker calls them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from engagement.messages import OutgoingMessage

SendFunction = Callable[[OutgoingMessage], Any]
"""`send(message)`: returns an outcome, or `None` or a provider's message id for `Sent`; may be `async def`."""


class SendingTransport(Protocol):
    """An object that sends. `Transport` lists its optional attributes."""

    def send(self, message: OutgoingMessage, /) -> Any:
        """Send, and return an outcome, or `None` or a provider's message id for `Sent`."""


class BatchTransport(Protocol):
    """An object whose provider takes many messages in one call."""

    def send_many(self, messages: Sequence[OutgoingMessage], /) -> Any:
        """Send all, and return an outcome for each, in their order, or one for all.

        A plain function that raises has no outcomes to give: its exception counts for all messages. A generator may
        have yielded some before: if it yields two outcomes of five and raises, the first two count as they are, and
        the exception counts for the last three.
        """


Transport = SendFunction | SendingTransport | BatchTransport
"""A function that sends, or an object with `send` or `send_many`. Optional on the object, each also as `async def`:

- `ready() -> bool`: False while nothing can be sent; nothing is claimed then. Asked at most once a second.
- `why_not_ready: str | None`: the reason, read after such a no. It is logged and shown: nothing personal.
- `idempotent: bool`: the same delivery id twice has one effect.
- `look_up(message) -> Sent | NotSent | None`: the fate of this delivery id; None if that is not known. `NotSent` only
  if the far side takes nothing any more under this id: a message that it lacks may come from a worker that is frozen.
"""
