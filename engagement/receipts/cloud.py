"""Receipts of Meta's Cloud API: the `statuses` of its webhooks.

From Meta's WhatsApp Business Platform documentation: "Status messages webhook reference" (webhooks/reference/messages/
status) and "Error codes" (support/error-codes), both as of 2026-09-11; "Business-scoped user IDs"
(business-scoped-user-ids) and "Group message status webhooks" (groups/webhooks) of 2026; "Create a webhook endpoint"
(webhooks/create-webhook-endpoint) of 2025-11: a request has up to 1000 updates, and one that is not answered with 200
is repeated for 36 hours (for seven days, says 360dialog). Compared with pywa 4.4.0 (david-lev/pywa of 2026-08-12:
`pywa/types/message_status.py`, `pywa/server.py`, `tests/data/updates`), with devlooped/WhatsApp of 2025-05-16
(`src/WhatsApp/Message.cs`, `src/Tests/Content/WhatsApp`) and with chatwoot/chatwoot
(`app/services/whatsapp/incoming_message_base_service.rb`).

Webhooks come twice and in any order. `delivered` may be left out before `read` (Meta), and may come after `failed` or
before it, for a person with several devices (YCloud, "WhatsApp Message Updated"; chatwoot/chatwoot#13377).
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from engagement._logging import logger
from engagement.messages import InvalidMessage, Receipt
from engagement.messages.receipts import ReceiptEvent, read_reference
from engagement.outcomes import clean_reason
from engagement.receipts.bodies import json_object, same, whole_number
from engagement.receipts.sources import Unsigned, WrongToken

SHORTEST_SECRET = 16
"""Characters of an app secret. Meta's have 32."""
_EVENTS: Mapping[str, ReceiptEvent] = {
    "sent": "accepted",
    "delivered": "delivered",
    "read": "read",
    "played": "read",  # A voice message was played for the first time.
    "failed": "undeliverable",
}
"""All that Meta documents. It does not try a failed message again, whatever the code, so `failed` is an end."""
_PHONE_NUMBER = re.compile(r"\+?\d(?:[\s().-]{0,3}\d){6,}")


class CloudReceipts:
    """Reads the status webhooks of Meta's Cloud API. Pure and thread-safe.

    - `app_secret`: of Meta's app, by which it signs. Several make a change without a gap: give the new one beside the
      old one, change it at Meta, and then leave out the old one.
    - `verify_token`: the text that you give Meta with the URL, for `challenge`. Without one, each handshake is refused.

    A status names its message by `id`, and by the `reference` that `WhatsAppCloud` sends as `biz_opaque_callback_data`.
    Raises `ValueError`, which names the field.
    """

    name = "cloud"

    def __init__(self, app_secret: str | Sequence[str], verify_token: str | None = None) -> None:
        secrets = [app_secret] if isinstance(app_secret, str) else app_secret
        self._keys = [_key(secret) for secret in secrets or ()]
        if not self._keys:
            raise ValueError("app_secret: none is given")
        if verify_token is not None and (not isinstance(verify_token, str) or not verify_token.strip()):
            raise ValueError("verify_token: must be text, or None to refuse each handshake")
        self._verify_token = verify_token

    def read(self, body: bytes, headers: Mapping[str, str]) -> list[Receipt]:
        """Return the receipts in a request; none for other events (an incoming message, a template's new status).

        A status that cannot be read is left out, and counted in the log. An error would make Meta repeat the whole
        request for days, and then drop the others with it. Raises `Unsigned`, or `UnreadableReceipts` for a body that
        is no JSON object.
        """
        self._check_signature(body, headers.get("x-hub-signature-256", ""))
        receipts, unreadable = [], 0
        for status in _statuses(json_object(body)):
            try:
                receipt = _receipt(status)
            except InvalidMessage:
                unreadable += 1
                continue
            if receipt is not None:
                receipts.append(receipt)
        if unreadable:
            logger.warning("engagement.receipt_unreadable provider=%s count=%s", self.name, unreadable)
        return receipts

    def challenge(self, query: Mapping[str, str]) -> str:
        """Return the text to answer Meta's GET request with, as `text/plain`. It comes when the URL is set.

        Meta sends the `verify_token` (`?hub.mode=subscribe&hub.verify_token=…&hub.challenge=1158201444`). Raises
        `WrongToken`, an `Unsigned` with status 403.
        """
        challenge, token = query.get("hub.challenge"), self._verify_token
        is_ours = token is not None and same(query.get("hub.verify_token", ""), token)
        if not is_ours or not challenge or query.get("hub.mode") != "subscribe":
            raise WrongToken("the handshake lacks hub.mode, hub.challenge or the right hub.verify_token")
        return challenge

    def _check_signature(self, body: bytes, given: str) -> None:
        """Raise `Unsigned` for a wrong signature. It is of the bytes: JSON that was written anew has another one."""
        for key in self._keys:
            if same(given, f"sha256={hmac.digest(key, body, hashlib.sha256).hex()}"):
                return
        raise Unsigned("x-hub-signature-256 is missing or wrong")


def is_unreachable_for_good(code: str | int | None) -> bool:
    """Whether Meta says with an error code not to send to the recipient again, until somebody changes a choice.

    Two codes say so. 130403: the business has blocked the person; it can unblock them. 131050: the person has stopped
    marketing messages of the business; other templates still arrive, and the webhook `user_preferences` tells if they
    resume. No code says that there is no such person. 131026 does not: it is a number without WhatsApp, an old version
    or terms that are not accepted ("Error codes"), and the same number was reached by another request
    (chatwoot/chatwoot#15563). 131049 and 130472 pass with time; the others blame the sender, the message or a service.
    """
    return str(code) in {"130403", "131050"}


def _key(secret: object) -> bytes:
    if not isinstance(secret, str) or len(secret) < SHORTEST_SECRET or re.search(r"\s", secret):
        raise ValueError(f"app_secret: must be text of {SHORTEST_SECRET} characters or more without blanks")
    return secret.encode()


def _statuses(data: Mapping[str, Any]) -> Iterator[Any]:
    """Yield each status of the messages of an account; None where something else stands in the place of one."""
    if data.get("object") != "whatsapp_business_account":
        return
    for entry in _members(data, "entry"):
        for change in _members(entry, "changes"):
            if not isinstance(change, dict):
                yield None
            elif change.get("field") == "messages":  # Calls have statuses too (`RINGING`), in the field `calls`.
                yield from _members(change.get("value"), "statuses")


def _members(holder: Any, name: str) -> list[Any]:
    members = holder.get(name, []) if isinstance(holder, dict) else None
    return members if isinstance(members, list) else [None]


def _receipt(status: Any) -> Receipt | None:
    """Return the receipt in a status; None if it is none. Raises `InvalidMessage` for a status that cannot be read."""
    if not isinstance(status, dict):
        raise InvalidMessage("statuses", "must be objects")
    event = _event(status)
    if event is None:
        return None
    code, reason = _error(status) if event == "undeliverable" else (None, None)
    reference = status.get("biz_opaque_callback_data")
    return Receipt(
        event=event,
        at=_moment(status.get("timestamp")),
        provider=CloudReceipts.name,
        # A host may send messages of its own, with data of its own.
        reference=reference if isinstance(reference, str) and read_reference(reference) else None,
        provider_message_id=status.get("id"),
        reason=reason,
        code=code,
        unreachable=is_unreachable_for_good(code),
    )


def _event(status: Mapping[str, Any]) -> ReceiptEvent | None:
    word = status.get("status")
    if not isinstance(word, str):
        raise InvalidMessage("status", "must be text")
    if status.get("type", "message") != "message":
        return None  # A payment has an end of its own, which may be `failed` (WATI, "payment status").
    if word == "failed" and status.get("recipient_type") == "group":
        return None  # One of a group was not reached ("Group message status webhooks"). The others may have been.
    if word == "sent" and status.get("errors"):
        # Meta has errors "only if failure to send or deliver" (an example is in devlooped/WhatsApp, `Error.json`).
        raise InvalidMessage("errors", "contradict the status")
    return _EVENTS.get(word)


def _moment(timestamp: object) -> datetime:
    seconds = whole_number(timestamp)
    if seconds is None:
        raise InvalidMessage("timestamp", "must be Unix seconds")
    return datetime.fromtimestamp(seconds, UTC)


def _error(status: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the code and the reason of a failure (`131026`, `Message undeliverable`), as far as Meta has them.

    The reason is the title. `details` may quote the request, and with it a phone number.
    """
    errors = status.get("errors")
    error = errors[0] if isinstance(errors, list) and errors and isinstance(errors[0], dict) else {}
    code = whole_number(error.get("code"))
    title = next((text for text in (error.get("title"), error.get("message")) if isinstance(text, str) and text), "")
    return None if code is None else str(code), clean_reason(_PHONE_NUMBER.sub("…", title))
