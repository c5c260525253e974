"""WhatsApp through Meta's Cloud API.

From Meta's WhatsApp Business Platform documentation, as of 2026-09: "Messages API" (reference/
whatsapp-business-phone-number/message-api), "Messaging and Calling Health Status" (support/health-status), "Throughput"
(throughput), "Business-scoped user IDs" (business-scoped-user-ids, 2026-11-05); from its Graph API documentation:
"Rate Limits" (overview/rate-limiting).
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self

from engagement.messages import OutgoingMessage
from engagement.messages.checks import BSUID_FORM
from engagement.outcomes import Outcome, Refused, Sent
from engagement.transports.client import PROBE_TIMEOUT, Finding, Prepared, ProviderClient
from engagement.transports.cloud_codes import finding_of
from engagement.transports.http import Answer, value_at, wait_of
from engagement.transports.rendering import Render, as_json, refusal_of, words_of
from engagement.transports.settings import Settings, required
from engagement.words import without_controls

LONGEST_TEXT = 4096
"""Characters of a text message ("Messages API")."""
BASE_URL = "https://graph.facebook.com"
VERSION = "v25.0"


@dataclass(frozen=True, slots=True, repr=False)
class Template:
    """An approved template, returned by `render` instead of text: people outside Meta's 24-hour window get no text.

    `components` have Meta's form: `{"type": "body", "parameters": [{"type": "text", "text": "Ana"}]}`. Give
    `category="authentication"` to a template of that category: Meta sends it to phone numbers only.
    """

    name: str
    language: str
    components: Sequence[Mapping[str, Any]] = field(default=())
    category: str | None = None


_BLOCKED = timedelta(minutes=1)
"""How often the health of a blocked account is asked for."""


class WhatsAppCloud:
    """Sends text and template messages. Thread-safe; made once for a process.

    - `phone_number_id`, `token`: the sender's, from Meta's app dashboard.
    - `render`: turns a message into its text, or into a `Template`. A message without words is `Refused`.

    Messages go to phone numbers, and to Meta's business-scoped ids (`BR.1502576394655843`) of people without a visible
    number. A `@lid` or a group is `Refused`, and so is an authentication template to a business-scoped id.

    `biz_opaque_callback_data` is the message's `reference`, by which Meta's status webhooks name it. It is no
    idempotency key, and the Cloud API has none. Sending again may be a second message, so this transport is never
    `idempotent`.

    `Sent` means that Meta took the message, also if its answer says `held_for_quality_assessment`. Meta tells later
    failures (131026, 131049, a paused template) to the host's status webhook.
    """

    idempotent = False

    def __init__(
        self,
        *,
        phone_number_id: str,
        token: str,
        render: Render[str | Template],
        version: str = VERSION,
        base_url: str = BASE_URL,
        answer_within: timedelta = timedelta(seconds=30),
        connect_within: timedelta = timedelta(seconds=5),
        connections: int = 1000,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        if not re.fullmatch(r"[0-9]{1,32}", phone_number_id):
            raise ValueError("phone_number_id: must be digits; it is not the phone number")
        if not re.fullmatch(r"v[0-9]{1,3}\.[0-9]{1,2}", version):
            raise ValueError("version: must be written as v25.0")
        self._render = render
        self._node = f"/{version}/{phone_number_id}"
        self._client = ProviderClient(
            "Cloud API",
            base_url,
            headers={"Authorization": f"Bearer {token}"},
            answer_within=answer_within,
            connect_within=connect_within,
            connections=connections,
            verify=verify,
        )

    @classmethod
    def from_environment(
        cls, *, environ: Mapping[str, str] | None = None, render: Render[str | Template] | None = None
    ) -> Self:
        """Make one from variables: ENGAGEMENT_RENDER, and ENGAGEMENT_CLOUD_ before each of these.

        PHONE_NUMBER_ID, TOKEN (or TOKEN_FILE), VERSION, BASE_URL, ANSWER_SECONDS (30), CONNECT_SECONDS (5). Raises
        `ValueError` that names the variable.
        """
        settings = Settings("ENGAGEMENT_CLOUD_", environ)
        return cls(
            phone_number_id=settings.text("PHONE_NUMBER_ID"),
            token=settings.secret("TOKEN") or settings.text("TOKEN"),
            render=required(render or settings.render()),
            version=settings.text("VERSION", VERSION),
            base_url=settings.text("BASE_URL", BASE_URL),
            answer_within=settings.seconds("ANSWER_SECONDS", timedelta(seconds=30)),
            connect_within=settings.seconds("CONNECT_SECONDS", timedelta(seconds=5)),
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ready(self) -> bool:
        """Whether messages may be sent: no pause, and a healthy sender.

        Meta is asked for the sender's health at first and after trouble. While all is well it is not: each question
        counts against the rate limit.
        """
        if not self._client.trouble.may_try():
            return False
        return not self._client.trouble.is_suspect or self._is_healthy()

    @property
    def why_not_ready(self) -> str | None:
        """The reason why the queue waits, if `ready` said no (`Cloud API: its health status is BLOCKED`)."""
        return self._client.trouble.reason

    def prepare(self, message: OutgoingMessage) -> Prepared | Outcome:
        """Return the request of `send`, or the outcome of a message that cannot be sent."""
        receiver = _receiver(message.destination_jid)
        if receiver is None:
            return Refused(
                "the Cloud API sends to phone numbers and business-scoped user ids, not to a @lid or a group"
            )
        words = words_of(self._render, message)
        if isinstance(words, Outcome):
            return words
        if isinstance(words, Template) and "to" not in receiver and str(words.category).lower() == "authentication":
            return Refused("an authentication template needs a phone number, not a business-scoped user id")
        content = _content(words)
        if isinstance(content, Refused):
            return content
        payload = {
            "messaging_product": "whatsapp",
            "recipient_type": "individual",
            **receiver,
            **content,
            "biz_opaque_callback_data": message.reference,
        }
        try:
            body = as_json(payload)
        except (TypeError, ValueError) as error:
            return Refused(f"the template's components are no JSON: {type(error).__name__}")
        return Prepared(f"{self._node}/messages", body)

    def send(self, message: OutgoingMessage) -> Outcome:
        """Send once."""
        prepared = self.prepare(message)
        return self._client.deliver(message, prepared, _read) if isinstance(prepared, Prepared) else prepared

    def _is_healthy(self) -> bool:
        answer = self._client.request("GET", f"{self._node}?fields=health_status", within=PROBE_TIMEOUT)
        finding = _read(answer) if isinstance(answer, Answer) and not answer.is_success else None
        if not isinstance(answer, Answer):
            self._client.trouble.note_trouble(reason=f"Cloud API: {answer.error.__name__}, asked for the health status")
        elif isinstance(finding, Finding) and not _may_still_send(answer):
            self._client.trouble.note_trouble(finding.wait, reason=finding.reason)
        elif not answer.is_success and finding is None:
            self._client.trouble.note_trouble(reason=f"Cloud API: HTTP {answer.status}, asked for the health status")
        elif answer.is_success and _is_blocked(answer.json):
            self._client.trouble.note_trouble(_BLOCKED, reason="Cloud API: its health status is BLOCKED")
        else:
            self._client.trouble.note_answer()
        return not self._client.trouble.is_suspect


def _receiver(jid: str) -> dict[str, str] | None:
    """Return the field that names the receiver. With an id in `to` Meta says yes and drops the message.

    docs/decisions.md#2026-11-29--a-business-scoped-user-id-stands-in-destination_jid
    """
    if BSUID_FORM.fullmatch(jid):
        return {"recipient": jid}
    number = re.fullmatch(r"([1-9][0-9]{6,14})@s\.whatsapp\.net", jid)
    return None if number is None else {"to": number[1]}


def _content(words: object) -> dict[str, Any] | Refused:
    if isinstance(words, Template):
        template: dict[str, Any] = {"name": words.name, "language": {"code": words.language}}
        if words.components:
            template["components"] = without_controls(list(words.components))
        return {"type": "template", "template": template}
    refusal = refusal_of(words, most_characters=LONGEST_TEXT)
    return refusal or {"type": "text", "text": {"body": words}}


_TAKEN = (None, "accepted", "held_for_quality_assessment", "paused")
"""Every `message_status` that Meta documents for a message that it took ("Messages API")."""


def _read(answer: Answer) -> Sent | Finding | None:
    data = answer.json
    error = value_at(data, "error")
    provider_id = value_at(data, "messages", 0, "id")
    if not answer.is_success or provider_id is None:
        return finding_of("Cloud API", error, answer, _time_to_regain_access(answer))
    is_contradicted = (
        error is not None
        or value_at(data, "errors") is not None
        or value_at(data, "messages", 0, "message_status") not in _TAKEN
    )
    is_id = isinstance(provider_id, str) and re.fullmatch(r"wamid\.\S{1,250}", provider_id)
    return Sent(provider_id) if is_id and not is_contradicted else None


def _time_to_regain_access(answer: Answer) -> timedelta | None:
    """Return the estimate in X-Business-Use-Case-Usage, which is in minutes (Graph API, "Rate Limits")."""
    usage = answer.headers.get("x-business-use-case-usage", "")
    minutes = re.findall(r'"estimated_time_to_regain_access"\s*:\s*([0-9]+)\b', usage)
    return max((wait_of(given, timedelta(minutes=1)) for given in minutes), default=None) or None


def _may_still_send(answer: Answer) -> bool:
    """Whether Meta refused only the question: a token that may not read the health status may still send.

    A message is the better question then. It is postponed if the token may not send either.
    """
    code = value_at(answer.json, "error", "code")
    return code in {3, 10, 100} or (isinstance(code, int) and code in range(200, 300))


def _is_blocked(data: Any) -> bool:
    """Whether a node that a message needs is blocked. The overall status is no answer: it counts nodes of calls too."""
    try:
        return any(entity["can_send_message"] == "BLOCKED" for entity in data["health_status"]["entities"])
    except (LookupError, TypeError):
        return False
