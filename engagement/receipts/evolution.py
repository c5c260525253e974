"""The receipts of Evolution API, a gateway to WhatsApp.

Its webhooks were read in these sources:

- Evolution API 2.2.3, 2.3.7 and 2.4.0-rc2 (evolution-foundation/evolution-api, tags; the last of 2026-05), in `src`:
  `api/integrations/event/webhook/webhook.controller.ts`, `api/services/channel.service.ts` (`sendDataWebhook`),
  `utils/renderStatus.ts`, and in `api/integrations/channel` `whatsapp/whatsapp.baileys.service.ts`
  (`messages.update`, `sendMessageWithTyping`) and `meta/whatsapp.business.service.ts` (`statuses`);
- axios 1.7.9 (axios/axios), which sends them: `lib/adapters/http.js`;
- Baileys 7.0.0-rc13 (WhiskeySockets/Baileys): `src/Socket/messages-recv.ts` (`handleReceipt`, `handleBadAck`),
  `src/Utils/generics.ts` (`getStatusFromReceiptType`).

WhatsApp refuses a message in an acknowledgement with an error, after Baileys has written it. Baileys makes it the
state ERROR, and does not send the message again by itself. But if a device asks for a message once more, Baileys sends
it under the same id, and an error about that copy looks the same: so ERROR may come after DELIVERY_ACK, and does not
deny it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from engagement.messages import Receipt
from engagement.messages.receipts import ReceiptEvent
from engagement.receipts.bodies import json_object
from engagement.receipts.payloads import moment_after_epoch, receipt_of, value_of
from engagement.receipts.proofs import Clock, checked_secrets, is_one_of, is_token, utc_now
from engagement.receipts.sources import UnreadableReceipts, Unsigned


class EvolutionReceipts:
    """Reads the events `messages.update` and `send.message` of Evolution API, 2.2 or newer. Thread-safe.

    It signs nothing, but sends the headers of an instance's webhook (`/webhook/set/{instance}`). One of these is
    required. Each takes several values, so that one can be changed without a gap:

    - `authorization`: the whole header of that name (`Bearer 5e6f…`, from `"headers": {"authorization": "Bearer
      5e6f…"}`). The global webhook has no headers of its own, but a user and a password in its URL
      (`https://engagement:5e6f…@…`, in letters and digits) arrive as `Basic` and their Base64.
    - `jwt_key`: a header of this name is not sent, but signs a token for each event (2.3 or newer). A token that was
      stolen is of no use an hour later.

    Neither covers the body: a reader of one request can forge others, so let it come through TLS. The `apikey` in the
    body is not looked at, since it would open the gateway.

    | state | receipt |
    |---|---|
    | ERROR | undeliverable. The gateway leaves out WhatsApp's number: mostly 463 or 479, but a 500 looks the same, \
after which WhatsApp may have acted. A DELIVERY_ACK that comes later corrects it |
    | PENDING | none: nobody but the gateway has it |
    | SERVER_ACK | accepted; in 2.3.7 also an update without a state (a star, a vote) of a message that WhatsApp has. \
An edit is left out: it may be the gateway's own |
    | DELIVERY_ACK | delivered |
    | READ, PLAYED | read |
    | SENT, DELIVERED, READ, FAILED | likewise: Meta's words, of an instance of type WHATSAPP-BUSINESS |

    `send.message` says the same as the answer to the send: accepted. It resolves a doubt when that answer was lost.
    The gateway leaves out the receipts of groups.

    `at` is the event's `messageTimestamp` (seconds) or the header `X-Timestamp` (2.4; milliseconds). Without them it
    is `now()`: `date_time` is the gateway's local time with the sign of UTC, three hours off in its Docker image.
    """

    name = "evolution"

    def __init__(
        self,
        *,
        authorization: str | Sequence[str] | None = None,
        jwt_key: str | Sequence[str] | None = None,
        now: Clock = utc_now,
    ) -> None:
        if authorization is None and jwt_key is None:
            raise ValueError("authorization: is missing, and jwt_key too: one of them proves the sender")
        self._authorizations = () if authorization is None else checked_secrets("authorization", authorization)
        self._keys = () if jwt_key is None else checked_secrets("jwt_key", jwt_key)
        self._now = now

    def read(self, body: bytes, headers: Mapping[str, str]) -> Sequence[Receipt]:
        """Return the receipts in a request."""
        now = self._now()
        if not self._is_proven(headers, now):
            raise Unsigned("the header authorization is missing or wrong")
        payload = json_object(body)
        event = value_of(payload, "event", str)
        if event == "messages.update":
            return _updated(value_of(payload, "data", dict), _in_header(headers) or now)
        if event == "send.message":
            return _sent(value_of(payload, "data", dict), now)
        return ()

    def _is_proven(self, headers: Mapping[str, str], now: datetime) -> bool:
        given = headers.get("authorization", "")
        return is_one_of(given, self._authorizations) or is_token(given, self._keys, now, _CLAIMS)


_CLAIMS = {"app": "evolution", "action": "webhook"}
_BAILEYS_STATES = ("ERROR", "PENDING", "SERVER_ACK", "DELIVERY_ACK", "READ", "PLAYED")
_BAILEYS_EVENTS: Mapping[str, ReceiptEvent] = {
    "ERROR": "undeliverable",
    "SERVER_ACK": "accepted",
    "DELIVERY_ACK": "delivered",
    "READ": "read",
    "PLAYED": "read",
}
_META_EVENTS: Mapping[str, ReceiptEvent] = {
    "FAILED": "undeliverable",
    "SENT": "accepted",
    "DELIVERED": "delivered",
    "READ": "read",
    "PLAYED": "read",
}


def _updated(data: Mapping[str, Any], at: datetime) -> Sequence[Receipt]:
    message_id = value_of(data, "keyId", str)
    # Meta tells a business of its own messages only, and the gateway calls them somebody else's (fromMe: false).
    is_meta_s = message_id.startswith("wamid.")
    event = (_META_EVENTS if is_meta_s else _BAILEYS_EVENTS).get(_state_in(data))
    is_ours = is_meta_s or data.get("fromMe") is True
    if event is None or not is_ours or (event == "accepted" and "message" in data):
        return ()
    refused = "Meta failed to deliver it" if is_meta_s else "WhatsApp refused it"
    reason = f"{refused}; the gateway leaves out the number of the error" if event == "undeliverable" else None
    return [
        receipt_of(event=event, at=at, provider=EvolutionReceipts.name, provider_message_id=message_id, reason=reason)
    ]


def _state_in(data: Mapping[str, Any]) -> str:
    """Return the state in words. It may be a number of Baileys, and before 2.3 an update without one leaves it out."""
    state = data.get("status", "")
    if type(state) is int:
        return _BAILEYS_STATES[state] if 0 <= state < len(_BAILEYS_STATES) else ""
    if not isinstance(state, str):
        raise UnreadableReceipts("status: must be a word or a number")
    return state


def _sent(data: Mapping[str, Any], now: datetime) -> Sequence[Receipt]:
    key = value_of(data, "key", dict)
    if key.get("fromMe") is not True or data.get("status") in ("ERROR", 0):
        return ()
    at = moment_after_epoch(seconds=value_of(data, "messageTimestamp", int)) if "messageTimestamp" in data else now
    return [
        receipt_of(
            event="accepted", at=at, provider=EvolutionReceipts.name, provider_message_id=value_of(key, "id", str)
        )
    ]


def _in_header(headers: Mapping[str, str]) -> datetime | None:
    found = re.fullmatch(r"[0-9]{13}", headers.get("x-timestamp", ""))
    return None if found is None else moment_after_epoch(milliseconds=int(found[0]))
