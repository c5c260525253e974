"""Where a person is reached now, and whether they still want it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from engagement._sending.protocols import Transport
from engagement.messages import InvalidMessage, OutgoingMessage
from engagement.messages.checks import checked_destination, checked_flag, checked_jid
from engagement.models import Destination
from engagement.outcomes import NotSent, Outcome, Refused, Sent, Withdraw
from engagement.policies.gates import Gate, plain_function


class Route(Gate):
    """Sends to where the person is reached now: `where(message)` returns destination and JID, or None.

    None is `Refused`, which a person sees and can try again, and so is a JID that could not be queued. A `where` that
    raises is `NotSent`.

    Most far sides take a known delivery id at a new address for a new message (WhatsApp knows ids by chat). So a
    transport under `Route` is not idempotent, and its `look_up` is believed only when it finds the message.
    `across_addresses` says that the far side recognises a delivery id at any address (an endpoint of yours, with a
    unique index of them), and lifts both.
    See docs/decisions.md#2026-11-24--route-is-not-idempotent-and-policies-refuse-batches.
    """

    def __init__(
        self,
        transport: Transport,
        where: Callable[[OutgoingMessage], tuple[Destination | str, str] | None],
        *,
        across_addresses: bool = False,
    ) -> None:
        super().__init__(transport)
        self._where = plain_function("where", where)
        self._across_addresses = checked_flag("across_addresses", across_addresses)
        self._look_up: Callable[[OutgoingMessage], Any] | None = getattr(transport, "look_up", None)
        if self._look_up is not None:
            self.look_up = self._look_up_where_it_goes_now

    @property
    def idempotent(self) -> bool:
        """Whether the same delivery id twice has one effect, also if the address changed in between."""
        return self._across_addresses and super().idempotent

    def check(self, message: OutgoingMessage) -> OutgoingMessage | Outcome:
        """Return the message with the address of now."""
        address = self._where(message)
        if address is None:
            return Refused("the person has no address now")
        destination, jid = address
        try:
            kind = checked_destination(destination)
            return replace(message, destination=kind, destination_jid=checked_jid(jid, kind))
        except InvalidMessage as error:
            return Refused(f"the address of now is no address: {error}")

    def _look_up_where_it_goes_now(self, message: OutgoingMessage) -> Any:
        assert self._look_up is not None
        routed = self._ask(message)
        if not isinstance(routed, OutgoingMessage):
            return None
        answer = self._look_up(routed)
        return self._believed_later(answer) if inspect.isawaitable(answer) else self._believed(answer)

    async def _believed_later(self, answer: Any) -> Any:
        return self._believed(await answer)

    def _believed(self, answer: Any) -> Any:
        return answer if self._across_addresses or isinstance(answer, Sent) else None


class Consent(Gate):
    """Sends to people who want the message: `wants(message)` is asked at each send.

    False is `Withdraw`: the message is cancelled. Anything but a bool (None of a look-up that found nobody) is
    `NotSent`.
    """

    def __init__(self, transport: Transport, wants: Callable[[OutgoingMessage], bool]) -> None:
        super().__init__(transport)
        self._wants = plain_function("wants", wants)

    def check(self, message: OutgoingMessage) -> OutgoingMessage | Outcome:
        """Return the message if the person wants it."""
        wants = self._wants(message)
        if wants is True:
            return message
        if wants is False:
            return Withdraw("opted out")
        return NotSent(f"wants answered {type(wants).__name__}, not bool")
