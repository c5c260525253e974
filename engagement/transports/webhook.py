"""An HTTP endpoint of the host's that does the sending."""

from __future__ import annotations

import ssl
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Self

from engagement._signing import signature, signing_keys
from engagement.messages import OutgoingMessage
from engagement.messages.checks import checked_flag
from engagement.outcomes import Outcome, Sent
from engagement.transports.client import PROBE_TIMEOUT, Prepared, ProviderClient
from engagement.transports.http import Answer, Silence
from engagement.transports.rendering import Render, as_json, refusal_of, words_of
from engagement.transports.settings import Settings

LONGEST_TEXT = 1_000_000
_UNREACHED = frozenset({502, 503, 504, *range(520, 531)})
"""Answers of a proxy that cannot reach the endpoint, or of an endpoint that is down. 520 to 530 are Cloudflare's."""


class Webhook:
    """Posts each message as JSON. Thread-safe; made once for a process.

    The body holds delivery_id, reference, message_id, message_type, message_key, message_params, user_id, destination,
    destination_jid, scheduled_for and, with a `render`, text. Every attempt has the same bytes, if `render` returns the
    same text. The header `Idempotency-Key` is the delivery id; `Engagement-Attempt` counts the attempts.

    With a `secret` the request is signed as Standard Webhooks 1.0 describes it, so that the receiver can check it with
    one of that project's libraries: `webhook-signature` is `v1,` and the Base64 of the HMAC-SHA256 of
    `{webhook-id}.{webhook-timestamp}.{body}`, where the id is the delivery id. A receiver that checks the timestamp
    cannot be given an old request again. The secret is `whsec_` and 24 bytes or more in Base64. Several secrets make
    several signatures, with blanks between them, of which the receiver needs one. So a secret is changed without a gap:
    give the new one beside the old one, let the receiver take the new one, and then leave out the old one.

    Any 2xx means that the endpoint took the message: `Sent`, with `provider_message_id` if the answer is JSON that has
    one. `what_it_proves` judges all else. Set `idempotent` if the endpoint acts once on a delivery id, for good, also
    when two requests for it come at the same time: a message in doubt is then sent again.

    `authorization` is sent as the header of that name (`Bearer …`). `url` may hold a token; only its host is ever
    shown.
    """

    def __init__(
        self,
        *,
        url: str,
        render: Render[str] | None = None,
        secret: str | Sequence[str] | None = None,
        authorization: str | None = None,
        idempotent: bool = False,
        answer_within: timedelta = timedelta(seconds=30),
        connect_within: timedelta = timedelta(seconds=5),
        connections: int = 1000,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self.idempotent = checked_flag("idempotent", idempotent)
        self._render = render
        self._keys = None if secret is None else signing_keys(secret)
        self._client = ProviderClient(
            "webhook",
            url,
            headers={} if authorization is None else {"Authorization": authorization},
            answer_within=answer_within,
            connect_within=connect_within,
            connections=connections,
            verify=verify,
        )

    @classmethod
    def from_environment(cls, *, environ: Mapping[str, str] | None = None, render: Render[str] | None = None) -> Self:
        """Make one from variables: ENGAGEMENT_RENDER (may be left out), and ENGAGEMENT_WEBHOOK_ before each of these.

        URL (or URL_FILE), SECRET (or SECRET_FILE; several with blanks or line ends between them), AUTHORIZATION (or
        AUTHORIZATION_FILE), IDEMPOTENT (`no`), ANSWER_SECONDS (30), CONNECT_SECONDS (5). Raises `ValueError` that names
        the variable.
        """
        settings = Settings("ENGAGEMENT_WEBHOOK_", environ)
        secret = settings.secret("SECRET")
        return cls(
            url=settings.secret("URL") or settings.text("URL"),
            render=render or settings.render(),
            secret=None if secret is None else secret.split(),
            authorization=settings.secret("AUTHORIZATION"),
            idempotent=settings.flag("IDEMPOTENT"),
            answer_within=settings.seconds("ANSWER_SECONDS", timedelta(seconds=30)),
            connect_within=settings.seconds("CONNECT_SECONDS", timedelta(seconds=5)),
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ready(self) -> bool:
        """Whether messages may be sent: no pause, and an endpoint that answers HEAD, asked at first and after trouble.

        Nearly any answer will do. A server without HEAD says 405 or 501, a handler that breaks on it 500, and all
        of them take messages. Only the answer of a proxy that cannot reach the endpoint is a no.
        """
        if not self._client.trouble.may_try():
            return False
        return not self._client.trouble.is_suspect or self._answers()

    @property
    def why_not_ready(self) -> str | None:
        """The reason why the queue waits, if `ready` said no (`webhook: HTTP 502, asked with HEAD`)."""
        return self._client.trouble.reason

    def prepare(self, message: OutgoingMessage) -> Prepared | Outcome:
        """Return the request of `send`, or the outcome of a message that cannot be sent."""
        payload: dict[str, Any] = {
            "delivery_id": str(message.delivery_id),
            "reference": message.reference,
            "message_id": message.id,
            "message_type": message.message_type,
            "message_key": message.message_key,
            "message_params": message.message_params,
            "user_id": message.user_id,
            "destination": str(message.destination),
            "destination_jid": message.destination_jid,
            "scheduled_for": message.scheduled_for.isoformat(),
        }
        if self._render is not None:
            text = words_of(self._render, message)
            if isinstance(text, Outcome):
                return text
            refusal = refusal_of(text, most_characters=LONGEST_TEXT)
            if refusal is not None:
                return refusal
            payload["text"] = text
        body = as_json(payload)
        return Prepared("", body, self._headers(message, body))

    def send(self, message: OutgoingMessage) -> Outcome:
        """Send once."""
        prepared = self.prepare(message)
        return self._client.deliver(message, prepared, _read) if isinstance(prepared, Prepared) else prepared

    def _headers(self, message: OutgoingMessage, body: bytes) -> dict[str, str]:
        delivery_id = str(message.delivery_id)
        headers = {"Idempotency-Key": delivery_id, "Engagement-Attempt": str(message.attempt)}
        if self._keys is not None:
            timestamp = int(time.time())
            headers |= {
                "webhook-id": delivery_id,
                "webhook-timestamp": str(timestamp),
                "webhook-signature": " ".join(signature(key, delivery_id, timestamp, body) for key in self._keys),
            }
        return headers

    def _answers(self) -> bool:
        answer = self._client.request("HEAD", "", within=PROBE_TIMEOUT)
        if isinstance(answer, Silence):
            self._client.trouble.note_trouble(reason=f"webhook: {answer.error.__name__}, asked with HEAD")
        elif answer.status in _UNREACHED:
            self._client.trouble.note_trouble(reason=f"webhook: HTTP {answer.status}, asked with HEAD")
        else:
            self._client.trouble.note_answer()
        return not self._client.trouble.is_suspect


def _read(answer: Answer) -> Sent | None:
    if not answer.is_success:
        return None
    data = answer.json
    provider_id = data.get("provider_message_id") if isinstance(data, dict) else None
    return Sent(provider_id if isinstance(provider_id, str) else None)
