"""Receipts in our own form, from an endpoint of the host's that was given messages by `transports.webhook.Webhook`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from engagement._signing import signature, signing_keys
from engagement.messages import InvalidMessage, Receipt
from engagement.messages.checks import MAX_TEXT, checked_text
from engagement.messages.receipts import MOST_ID, ReceiptEvent
from engagement.outcomes import MAX_REASON
from engagement.receipts.bodies import json_object, same, whole_number
from engagement.receipts.sources import UnreadableReceipts, Unsigned


class SignedReceipts:
    """Reads receipts that an endpoint of the host's reports, signed as Standard Webhooks 1.0 describes it.

    The body is `{"receipts": [{"event": "delivered", "at": "2026-11-29T10:00:00Z", "reference": "7.5f0c…"}]}`, or one
    such object alone. `event`, `at` with an offset, and one of `reference` and `provider_message_id` are required;
    `reason` and `code` say why a message is `undeliverable`. Other fields are left alone.

    `secret` is `whsec_` and 24 bytes or more in Base64, and not the one of `Webhook`: by the specification, each
    endpoint has its own. Of several, a request needs the signature of one, so a secret is changed without a gap. A
    request whose `webhook-timestamp` is further from now than `tolerance`, before or after, is refused: it may be an
    old one that somebody sends again. Within the tolerance that does no harm, since a receipt that is known changes
    nothing. Pure and thread-safe. Raises `ValueError`, which names the field.
    """

    name = "webhook"

    def __init__(self, secret: str | Sequence[str], tolerance: timedelta = timedelta(minutes=5)) -> None:
        self._keys = signing_keys(secret)
        if not isinstance(tolerance, timedelta) or tolerance <= timedelta(0):
            raise ValueError("tolerance: must be a timedelta of more than zero")
        self._tolerance = tolerance

    def read(self, body: bytes, headers: Mapping[str, str], *, now: datetime | None = None) -> list[Receipt]:
        """Return the receipts in a request.

        Raises `Unsigned`, or `UnreadableReceipts` with the index and the field of a mistake (`receipts[3].at: is
        missing`). Then none of the request counts: a mistake is the host's own, and is to be seen.
        """
        self._check(body, headers, datetime.now(UTC) if now is None else now)
        data = json_object(body)
        if "receipts" not in data:
            return [_receipt("", data)]
        given = data["receipts"]
        if not isinstance(given, list):
            raise UnreadableReceipts("receipts: must be a list")
        return [_receipt(f"receipts[{index}].", each) for index, each in enumerate(given)]

    def _check(self, body: bytes, headers: Mapping[str, str], now: datetime) -> None:
        webhook_id, given = headers.get("webhook-id", ""), headers.get("webhook-signature", "")
        timestamp = whole_number(headers.get("webhook-timestamp"))
        if timestamp is None or not webhook_id or not webhook_id.isascii():
            raise Unsigned("webhook-id or webhook-timestamp is missing, or in a wrong form")
        expected = [signature(key, webhook_id, timestamp, body) for key in self._keys]
        if not any(same(one, each) for one in given.split(" ") for each in expected):
            raise Unsigned("webhook-signature is missing or wrong")
        if abs(now.timestamp() - timestamp) > self._tolerance.total_seconds():
            raise Unsigned("webhook-timestamp is too far from now")


def _receipt(where: str, given: Any) -> Receipt:
    if not isinstance(given, dict):
        raise UnreadableReceipts(f"{where.rstrip('.')}: must be an object")
    try:
        return Receipt(
            event=cast("ReceiptEvent", _text(given, "event")),  # It checks the word.
            at=_moment(given.get("at")),
            provider=SignedReceipts.name,
            reference=_text(given, "reference"),
            provider_message_id=_text(given, "provider_message_id", MOST_ID),
            reason=_text(given, "reason", MAX_REASON),
            code=_text(given, "code"),
        )
    except InvalidMessage as error:
        raise UnreadableReceipts(f"{where}{error}") from None


def _text(given: Mapping[str, Any], field: str, most: int = MAX_TEXT) -> str | None:
    value = given.get(field)
    return None if value is None else checked_text(field, value, max_characters=most)


def _moment(value: Any) -> datetime:
    """Return a moment; `Receipt` refuses one without an offset."""
    if value is None:
        raise InvalidMessage("at", "is missing")
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise InvalidMessage("at", "must be an ISO 8601 time with an offset, such as 2026-11-29T10:00:00Z") from None
