"""The receipts of WAHA, a gateway to WhatsApp.

Its webhooks were read in these sources of devlikeapro/waha: `src/structures/webhooks.dto.ts` and
`src/core/engines/noweb/session.noweb.core.ts` of 2024.10 (tag 2024.10.8); and of 2025 and 2026 in `src`
`modules/waha-webhook/WebhookPlugin.sender.ts` (193eb53), `structures/webhooks.dto.ts`, `core/utils/jids.ts`, and in
`core/engines` `noweb/restriction.ts` (cb6e7ad), `webjs/ack.webjs.ts` (1a070b9), `webjs/session.webjs.core.ts`
(`TagReceiptToMessageAck`), `gows/session.gows.core.ts` (80a08eb, `receiptToMessageAck`). The engine GOWS is whatsmeow,
read in 2026-08 (tulir/whatsmeow): `mediaretry.go` (`server-error`). NOWEB is Baileys, read at 7.0.0-rc13
(WhiskeySockets/Baileys): `src/Socket/messages-recv.ts`, `src/Utils/decode-wa-message.ts` (`SERVER_ERROR_CODES`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from engagement.messages import Receipt
from engagement.messages.receipts import ReceiptEvent, bare_whatsapp_id
from engagement.receipts.bodies import json_object
from engagement.receipts.payloads import moment_after_epoch, receipt_of, value_of
from engagement.receipts.proofs import Clock, check_hmac, checked_secrets, utc_now
from engagement.receipts.sources import Unsigned


class WahaReceipts:
    """Reads the events `message.ack` and `message.ack.group` of WAHA. Thread-safe.

    `key` is the one of the webhook (`"hmac": {"key": "5e6f…"}`, or WHATSAPP_HOOK_HMAC_KEY): `X-Webhook-Hmac` is the
    HMAC-SHA512 of the body by it. Several keys are all taken.

    | ack | receipt |
    |---|---|
    | -1 | undeliverable, by the engines NOWEB, WEBJS and WPP. GOWS says it of a device that wants a file once more. \
WhatsApp's errors 500 to 599 (`error.code`) tell nothing, but for 503: it may have acted before |
    | 0 | none |
    | 1 | accepted; NOWEB says it also of a delivery in a group |
    | 2 | delivered |
    | 3, 4 | read |

    `provider_message_id` is WhatsApp's own id, without the chat that WAHA puts around it: the one that the transport
    keeps. `at` is the event's `timestamp` (milliseconds); versions without it (2024) get `now()`.
    """

    name = "waha"

    def __init__(self, *, key: str | Sequence[str], now: Clock = utc_now) -> None:
        self._keys = checked_secrets("key", key)
        self._now = now

    def read(self, body: bytes, headers: Mapping[str, str]) -> Sequence[Receipt]:
        """Return the receipts in a request."""
        if headers.get("x-webhook-hmac-algorithm") != "sha512":
            raise Unsigned("the header x-webhook-hmac-algorithm is not sha512")
        check_hmac(body, headers, "x-webhook-hmac", self._keys, "sha512")
        said = json_object(body)
        if value_of(said, "event", str) not in ("message.ack", "message.ack.group"):
            return ()
        payload = value_of(said, "payload", dict)
        message_id = value_of(payload, "id", str)
        # WEBJS turns `fromMe` round in groups, and keeps the id right.
        event = _event_of(payload, said) if message_id.startswith("true_") else None
        if event is None:
            return ()
        at = moment_after_epoch(milliseconds=value_of(said, "timestamp", int)) if "timestamp" in said else self._now()
        fields = {"event": event, "at": at, "provider": self.name, **_reason_of(event, payload)}
        return [receipt_of(provider_message_id=bare_whatsapp_id(message_id), **fields)]


_EVENTS: Mapping[int, ReceiptEvent] = {-1: "undeliverable", 1: "accepted", 2: "delivered", 3: "read", 4: "read"}
_REFUSING_ENGINES = ("NOWEB", "WEBJS", "WPP")
_MAY_HAVE_ACTED = re.compile(r"5(?!03)[0-9]{2}")
"""docs/decisions.md#2026-11-29--what-whatsapp-returns-to-whatsmeow"""
_REFUSALS = {
    "463": "WhatsApp refused it: the sender is locked out of new chats, or lacks a token of this contact",
    "479": "WhatsApp refused it as malformed, mostly for a stale session of a device",
}


def _event_of(payload: Mapping[str, Any], said: Mapping[str, Any]) -> ReceiptEvent | None:
    """Return the event of an ack. One that the engine does not know is left out of the payload."""
    event = _EVENTS.get(value_of(payload, "ack", int)) if "ack" in payload else None
    if event == "undeliverable":
        refuses = said.get("engine") in _REFUSING_ENGINES and not _MAY_HAVE_ACTED.fullmatch(_error_code(payload) or "")
        return event if refuses else None
    return None if _is_from_own_device(payload, said) else event


def _is_from_own_device(payload: Mapping[str, Any], said: Mapping[str, Any]) -> bool:
    """Whether a device of the sender's took the message in a group: NOWEB calls that READ."""
    me, user = said.get("me"), _user_in(payload.get("participant"))
    return user is not None and isinstance(me, dict) and user in {_user_in(me.get("id")), _user_in(me.get("lid"))}


def _user_in(jid: object) -> str | None:
    return re.split("[:@]", jid)[0] if isinstance(jid, str) else None


def _reason_of(event: ReceiptEvent, payload: Mapping[str, Any]) -> Mapping[str, str | None]:
    if event != "undeliverable":
        return {}
    code = _error_code(payload)
    return {"reason": _REFUSALS.get(code or "", "WhatsApp refused it"), "code": code}


def _error_code(payload: Mapping[str, Any]) -> str | None:
    """Return WhatsApp's number, which newer versions of NOWEB add."""
    error = payload.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) and re.fullmatch(r"[0-9]{1,5}", code) else None
