"""The dialects of the gateways to WhatsApp: Evolution API, WAHA and wuzapi.

Requests and answers were read in their sources, at these versions:

- Evolution API 2.3.7 and 2.4.0-rc2 (evolution-foundation/evolution-api, `main` and `develop` of 2026-05): in `src`,
  `api/routes/sendMessage.router.ts`, `api/dto/sendMessage.dto.ts`, `main.ts`, `licensing/runtime.ts`, and in
  `api/integrations/channel` `whatsapp/whatsapp.baileys.service.ts` and `meta/whatsapp.business.service.ts`;
- WAHA 2024.10 (devlikeapro/waha): `src/api/chatting.controller.ts`, `src/core/abc/manager.abc.ts`,
  `src/nestjs/AllExceptionsFilter.ts`; and `src/structures/chatting.dto.ts` of 2025, which still takes no message id;
- wuzapi of 2025-05 (asternic/wuzapi): `handlers.go`, `API.md`; whatsmeow of 2026-08 (tulir/whatsmeow): `send.go`,
  `request.go`;
- Baileys 7.0.0-rc13 (WhiskeySockets/Baileys): `src/Socket/socket.ts`, `src/Socket/messages-send.ts`,
  `src/Utils/generics.ts`.

Baileys refuses nothing while it is asked: when the gateway answers, the message is written to WhatsApp's socket. A
refusal of WhatsApp's comes later, to the gateway's own webhooks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from engagement.messages import OutgoingMessage
from engagement.messages.receipts import bare_whatsapp_id
from engagement.transports.http import Proof, value_at


@dataclass(frozen=True, slots=True)
class Words:
    """Words of a gateway that say more than its status. `text` is compared whole, or as a beginning if it ends in ….

    Small letters and capitals are the same, since wuzapi's differ by version. The first words that fit count.
    """

    status: int
    text: str
    proof: Proof
    because: str
    wait: timedelta | None = None
    """The wait, if the answer names none."""

    def match(self, status: int, text: str) -> bool:
        """Whether an answer has these words."""
        text, known = text.casefold(), self.text.casefold()
        begins = known.endswith("…") and text.startswith(known[:-1])
        return status == self.status and (begins or text == known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """The requests and answers of one kind of gateway. Paths may hold `{session}`."""

    name: str
    key_header: str
    send_path: str
    payload: Callable[[str, OutgoingMessage, str, str], Mapping[str, Any]]
    """From session, message, text and message id to the JSON of the request."""
    provider_id: Callable[[Any], str | None]
    """From the JSON of a success to WhatsApp's message id. Without one the result is None and the message in doubt: the
    status alone may be a proxy's, or stand above an error.
    docs/decisions.md#2026-11-29--a-success-is-believed-with-its-body-and-temporary-is-no-denial"""
    error_text: Callable[[Any], str]
    """From the JSON of a failure to the words about its cause."""
    words: tuple[Words, ...]
    statuses: Mapping[int, Proof]
    """Statuses whose proof differs from `what_it_proves`."""
    state_path: str
    is_connected: Callable[[Any], bool]
    """From the JSON of the session's state to whether it can send."""
    takes_message_id: bool
    first_with_message_id: tuple[int, int] | None = None
    """The first version that takes a message id, if some do not. The gateway's root tells its version."""
    find_path: str | None = None
    """Path of the look-up by message id, if the gateway has one."""
    meta_error: Callable[[Any], Any] = lambda _: None
    """From the JSON of a success to Meta's error object in it, for a gateway that passes errors on with a 2xx."""


def _first_text(*candidates: Any) -> str | None:
    return next((text for text in candidates if isinstance(text, str) and text), None)


# WhatsApp's own ids (WAHA's engines may put "true", the chat and the author around them), and those of Meta and of
# Evolution API's own channel.
_MESSAGE_ID = re.compile(
    r"(?:true_[^_\s]{1,80}_)?[0-9A-F]{4,64}(?:_\S{1,80})?"
    r"|wamid\.[A-Za-z0-9+/=_-]{1,250}"
    r"|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
)


def has_failed(data: Any) -> bool:
    """Whether the state of a message is an error: 0 or ERROR of Baileys, -1 of whatsapp-web.js."""
    return value_at(data, "status") in ("ERROR", 0) or value_at(data, "ack") == -1


def _id_in(data: Any, *candidates: Any) -> str | None:
    """Return the first candidate that is a message id, unless the answer holds an error beside it."""
    if value_at(data, "error") is not None or value_at(data, "exception") is not None:
        return None
    if has_failed(data):
        return None
    return next((text for text in candidates if isinstance(text, str) and _MESSAGE_ID.fullmatch(text)), None)


def _waha_id(data: Any) -> str | None:
    """Return the id without the chat around it, as its receipts name it too: NOWEB answers it so, the others do not."""
    found = _id_in(data, value_at(data, "id"), value_at(data, "id", "_serialized"), value_at(data, "key", "id"))
    return None if found is None else bare_whatsapp_id(found)


def _evolution_error(data: Any) -> str:
    said = value_at(data, "response", "message")
    while isinstance(said, list) and said:
        said = said[0]
    if isinstance(said, dict) and said.get("exists") is False:
        return "exists: false"
    return _first_text(value_at(data, "code"), said) or ""


# The errors of whatsmeow's SendMessage before it writes its frame, by the beginnings of their texts (send.go). Errors
# after the frame: "failed to send message node" with another cause, "websocket not connected" alone, every time-out.
_BEFORE_THE_FRAME = (
    "failed to get user info for",
    "no LID found for",
    "failed to get LID for PN",
    "failed to fetch LID mappings",
    "failed to get device list",
    "failed to get group members",
    "failed to get broadcast list members",
    "failed to prefetch sessions",
    "failed to save cached sessions",
    "failed to create sender key distribution message",
    "failed to marshal",
    "failed to encrypt group message",
    "can't encrypt message for device",
    "can't send message to unknown server",
    "message recipient must be a user JID with no device part",
)


def _whatsmeow(before: str) -> tuple[Words, ...]:
    """Return the words of a gateway about whatsmeow's errors. `before` is the gateway's prefix to whatsmeow's text.

    docs/decisions.md#2026-11-29--what-whatsapp-returns-to-whatsmeow
    """

    def said(text: str, proof: Proof, because: str, wait: timedelta | None = None) -> Words:
        return Words(500, before + text, proof, because, wait)

    locked = "WhatsApp has locked the sender out of new chats; each further try prolongs that (whatsmeow#1074, #1197)"
    unknown = "WhatsApp's number is known of messages and of senders alike (400, 403, 405, 420, 479)"
    return (
        said("server returned error 463", Proof.STOPPED, locked, timedelta(hours=1)),
        said("server returned error 429", Proof.STOPPED, "WhatsApp's rate limit", timedelta(minutes=15)),
        said("server returned error 503", Proof.STOPPED, "WhatsApp took nothing: a service is unavailable"),
        said("server returned error 5…", Proof.IN_DOUBT, "WhatsApp may have failed after it had acted"),
        said("server returned error…", Proof.LATER, unknown),
        said("the store doesn't contain a device JID…", Proof.STOPPED, "not logged in; checked before the send"),
        said("client is nil", Proof.STOPPED, "the session is not started; checked before the send"),
        said("failed to send message node: websocket not connected", Proof.STOPPED, "there was nothing to write to"),
        *(said(f"{text}…", Proof.NOT_SENT, "before whatsmeow's frame was written") for text in _BEFORE_THE_FRAME),
    )


# In 2.3.7 and 2.4.0 every error after the check of the number is a 400, also if the message has left and only its
# record could not be stored (sendMessageWithTyping). So the status 400 proves nothing here; some of its words do.
EVOLUTION = Dialect(
    name="Evolution API",
    key_header="apikey",
    send_path="/message/sendText/{session}",
    # Versions before 2.4 ignore messageId.
    payload=lambda _, message, text, message_id: {
        "number": message.destination_jid,
        "text": text,
        "messageId": message_id,
    },
    provider_id=lambda data: _id_in(data, value_at(data, "key", "id")) if value_at(data, "code") is None else None,
    error_text=_evolution_error,
    words=(
        Words(400, "exists: false", Proof.REFUSED, "the number is not on WhatsApp; checked before the send"),
        Words(400, "Text is required", Proof.REFUSED, "checked before the send"),
        Words(400, "Error: Connection Closed", Proof.WAIT, "Baileys' socket was closed before it was written to"),
        Words(500, "Connection Closed", Proof.WAIT, "likewise, while the number was checked"),
        Words(503, "LICENSE_REQUIRED", Proof.STOPPED, "the gateway is not activated; said before any route"),
    ),
    statuses={400: Proof.IN_DOUBT},
    state_path="/instance/connectionState/{session}",
    is_connected=lambda data: value_at(data, "instance", "state") == "open",
    takes_message_id=True,
    first_with_message_id=(2, 4),
    find_path="/chat/findMessages/{session}",
    # An instance of type WHATSAPP-BUSINESS answers 201 with Meta's error (meta/whatsapp.business.service.ts, post). If
    # the answer names a message too, nobody knows which of the two is true: in doubt.
    meta_error=lambda data: (value_at(data, "error") or data) if value_at(data, "key") is None else None,
)

WAHA = Dialect(
    name="WAHA",
    key_header="X-Api-Key",
    send_path="/api/sendText",
    payload=lambda session, message, text, _: {
        "session": session,
        # WAHA's engines know users as @c.us.
        "chatId": re.sub(r"@s\.whatsapp\.net\Z", "@c.us", message.destination_jid),
        "text": text,
    },
    provider_id=_waha_id,
    error_text=lambda data: _first_text(value_at(data, "error"), value_at(data, "exception", "message")) or "",
    words=(
        Words(
            422,
            "Session status is not as expected…",
            Proof.STOPPED,
            "the session is not WORKING; checked before the send",
        ),
        Words(500, "Connection Closed", Proof.WAIT, "Baileys' socket was closed before it was written to"),
        # The GOWS engine is whatsmeow behind gRPC: waha#1904, #1714, #2093.
        *_whatsmeow("2 UNKNOWN: "),
    ),
    # WAHA's own 422 all blame the session or the edition (UnprocessableEntityException).
    statuses={422: Proof.STOPPED},
    state_path="/api/sessions/{session}",
    is_connected=lambda data: value_at(data, "status") == "WORKING",
    takes_message_id=False,
)

WUZAPI = Dialect(
    name="wuzapi",
    key_header="token",
    send_path="/chat/send/text",
    payload=lambda _, message, text, message_id: {"Phone": message.destination_jid, "Body": text, "Id": message_id},
    provider_id=lambda data: _id_in(data, value_at(data, "data", "Id")) if value_at(data, "success") is True else None,
    error_text=lambda data: _first_text(value_at(data, "error")) or "",
    words=(
        Words(500, "No session", Proof.STOPPED, "the session is not started; checked before the send"),
        *_whatsmeow("Error sending message: "),
    ),
    statuses={},
    state_path="/session/status",
    is_connected=lambda data: (
        value_at(data, "data", "Connected") is True and value_at(data, "data", "LoggedIn") is True
    ),
    takes_message_id=True,
)

DIALECTS: Mapping[str, Dialect] = {"evolution": EVOLUTION, "waha": WAHA, "wuzapi": WUZAPI}
