"""The receipts of wuzapi, a gateway to WhatsApp.

Its webhooks were read in these sources: wuzapi (asternic/wuzapi) of 2025-05 (79ee4cd), `wmiau.go`, and of 2026,
`helpers.go` (02a462c, `callHookWithHmac`), `API.md`; resty 2.11.0 (go-resty/resty), which sends them: `middleware.go`;
whatsmeow of 2026-08 (tulir/whatsmeow): `types/events/events.go` (`Receipt`), `types/presence.go`, `types/message.go`,
`receipt.go`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import parse_qs

from engagement.messages import Receipt
from engagement.messages.receipts import ReceiptEvent
from engagement.receipts.bodies import json_object
from engagement.receipts.payloads import read_each, receipt_of, value_of
from engagement.receipts.proofs import Clock, check_hmac, checked_secrets, utc_now
from engagement.receipts.sources import UnreadableReceipts


class WuzapiReceipts:
    """Reads the events `ReadReceipt` of wuzapi. Thread-safe.

    `key` is the HMAC key of the session (`/session/hmac/config`), or the global one, which signs the global webhook:
    `x-hmac-signature` is the HMAC-SHA256 of the body by it. Several keys are all taken. wuzapi wants 32 characters.
    Versions that sign nothing (2025-05) are refused. The body is a form or JSON (`WEBHOOK_FORMAT`).

    A receipt names one message or many. wuzapi passes on `Type` "" (delivered to a device of the recipient) and "read".
    Receipts of other devices of the sender's (`IsFromMe`, "read-self") are none of ours. A refusal is the answer to the
    send, so nothing is undeliverable. `at` is the event's `Timestamp` (RFC 3339), or `now()` if that is Go's zero.
    """

    name = "wuzapi"

    def __init__(self, *, key: str | Sequence[str], now: Clock = utc_now) -> None:
        self._keys = checked_secrets("key", key, shortest=32)
        self._now = now

    def read(self, body: bytes, headers: Mapping[str, str]) -> Sequence[Receipt]:
        """Return the receipts in a request."""
        check_hmac(body, headers, "x-hmac-signature", self._keys, "sha256")
        posted = _posted(body)
        if value_of(posted, "type", str) != "ReadReceipt":
            return ()
        said = value_of(posted, "event", dict)
        event = _EVENTS.get(value_of(said, "Type", str))
        if event is None or value_of(said, "IsFromMe", bool):
            return ()
        at = _rfc3339(value_of(said, "Timestamp", str)) or self._now()

        def receipt(message_id: Any) -> Receipt:
            return receipt_of(event=event, at=at, provider=self.name, provider_message_id=message_id)

        ids = [] if said.get("MessageIDs") is None else value_of(said, "MessageIDs", list)  # null is Go's empty list.
        return read_each(self.name, ids, receipt)


_EVENTS: Mapping[str, ReceiptEvent] = {"": "delivered", "read": "read", "played": "read"}


def _posted(body: bytes) -> Mapping[str, Any]:
    """Return the event. Its bytes tell the format, since the signature covers them and no header."""
    if body.startswith(b"{"):
        return json_object(body)
    try:
        fields = parse_qs(body.decode("ascii"), errors="strict", max_num_fields=20)
    except ValueError:
        fields = {}
    if len(fields.get("jsonData", ())) != 1:
        raise UnreadableReceipts("the body is no form with one jsonData")
    return json_object(fields["jsonData"][0])


def _rfc3339(text: str) -> datetime | None:
    """Return the moment; None for Go's zero, its sign of a time that is not known."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None:
        raise UnreadableReceipts("Timestamp: must be a time in the form of RFC 3339")
    return None if moment.year == 1 else moment
