"""WhatsApp through an HTTP gateway that the host runs. The differences between gateways are in `dialects`."""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, Self
from urllib.parse import quote

from engagement._logging import logger
from engagement.messages import OutgoingMessage
from engagement.messages.checks import BSUID_FORM, checked_flag
from engagement.outcomes import Outcome, Refused, Sent
from engagement.transports.client import PROBE_TIMEOUT, Finding, Prepared, ProviderClient
from engagement.transports.cloud_codes import finding_of
from engagement.transports.dialects import DIALECTS, EVOLUTION, Dialect, has_failed
from engagement.transports.http import Answer, value_at
from engagement.transports.rendering import Render, as_json, refusal_of, words_of
from engagement.transports.settings import Settings, required

LONGEST_TEXT = 65_536
"""Characters that WhatsApp takes in one text message."""


class _MessageIds:
    """Whether a gateway takes message ids, if they matter."""

    def __init__(self, dialect: Dialect, *, matter: bool) -> None:
        self._dialect = dialect
        self._matter = matter
        self._are_taken = not matter or dialect.first_with_message_id is None
        self.are_ignored = threading.Event()

    def are_taken(self, version: Callable[[], Any]) -> bool:
        """Whether it is known to, by the `version` that it tells. A yes is not asked for again."""
        if not self._are_taken:
            said, first = version(), self._dialect.first_with_message_id
            numbers = re.match(r"([0-9]{1,4})\.([0-9]{1,4})\.", said) if isinstance(said, str) else None
            self._are_taken = bool(numbers and first and (int(numbers[1]), int(numbers[2])) >= first)
            if numbers and not self._are_taken:
                self._tell()
        return self._are_taken

    def check(self, message: OutgoingMessage, outcome: Sent) -> None:
        """Stop for good if the gateway made an id of its own: the next attempt would be a second message."""
        if self._matter and outcome.provider_message_id not in {
            None,
            message.whatsapp_id,
        }:
            self.are_ignored.set()
            self._tell()

    def _tell(self) -> None:
        logger.error("engagement.gateway_ignores_message_ids transport=%s", self._dialect.name)


class WhatsAppGateway:
    """Sends text messages through a gateway. Thread-safe; made once for a process.

    - `url`, `key`, `session`: where the gateway is, its key, and the name of its session (wuzapi knows it by the key).
    - `render`: turns a message into its text. A message without words, or with an empty text, is `Refused`.
    - `dialect`: `EVOLUTION`, `WAHA`, `WUZAPI`, or one of the host's own.
    - `answer_within`: the longest wait for an answer. A send that takes longer is in doubt, so leave it long: Baileys
      waits 60 s and whatsmeow 75 s for WhatsApp.

    **The message id.** Evolution API from 2.4 on and wuzapi are given the WhatsApp message id, the same for every
    attempt. That a repeated id is shown once is *practice*: WhatsApp's apps have kept one message per chat, sender and
    id, and whatsmeow counts on it when it writes the same frame again after a reconnect. It is *guaranteed* by nobody:
    not by WhatsApp, whose protocol is not published, nor by a gateway. `idempotent=True` is the host's decision to rely
    on it: a message in doubt is then sent again with its id, and parked at the end of its retries. It is refused for a
    dialect without message ids; an Evolution API that is too old for them, or answers with an id of its own, is never
    `ready()`.

    `look_up` asks Evolution API for the message by that id. A message that is found was sent. One that is not found may
    have been sent too: the gateway stores a message after the send, and only if it is configured to.
    """

    def __init__(
        self,
        *,
        url: str,
        key: str,
        render: Render[str],
        session: str = "default",
        dialect: Dialect = EVOLUTION,
        idempotent: bool = False,
        answer_within: timedelta = timedelta(seconds=90),
        connect_within: timedelta = timedelta(seconds=5),
        connections: int = 1000,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self.idempotent = checked_flag("idempotent", idempotent)
        if idempotent and not dialect.takes_message_id:
            raise ValueError(f"idempotent: {dialect.name} takes no message id, so nothing could tell a repeat")
        self._dialect = dialect
        self._render = render
        self._session = session
        self._ids = _MessageIds(dialect, matter=idempotent)
        self.why_not_ready: str | None = None
        """The reason why the queue waits, if `ready` said no (`WAHA: the session is not connected`)."""
        self._client = ProviderClient(
            dialect.name,
            url,
            headers={dialect.key_header: key},
            answer_within=answer_within,
            connect_within=connect_within,
            connections=connections,
            verify=verify,
        )

    @classmethod
    def from_environment(cls, *, environ: Mapping[str, str] | None = None, render: Render[str] | None = None) -> Self:
        """Make one from variables: ENGAGEMENT_RENDER, and ENGAGEMENT_GATEWAY_ before each of these.

        URL, KEY (or KEY_FILE), SESSION (`default`), DIALECT (`evolution`, `waha` or `wuzapi`; default `evolution`),
        IDEMPOTENT (`no`), ANSWER_SECONDS (90), CONNECT_SECONDS (5). Raises `ValueError` that names the variable.
        """
        settings = Settings("ENGAGEMENT_GATEWAY_", environ)
        name = settings.text("DIALECT", "evolution").lower()
        if name not in DIALECTS:
            raise ValueError(f"ENGAGEMENT_GATEWAY_DIALECT: must be one of {', '.join(DIALECTS)}")
        return cls(
            url=settings.text("URL"),
            key=settings.secret("KEY") or settings.text("KEY"),
            render=required(render or settings.render()),
            session=settings.text("SESSION", "default"),
            dialect=DIALECTS[name],
            idempotent=settings.flag("IDEMPOTENT"),
            answer_within=settings.seconds("ANSWER_SECONDS", timedelta(seconds=90)),
            connect_within=settings.seconds("CONNECT_SECONDS", timedelta(seconds=5)),
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ready(self) -> bool:
        """Ask the gateway whether its session is connected. No answer is a no. `why_not_ready` has the reason."""
        self.why_not_ready = self._in_the_way()
        return self.why_not_ready is None

    def _in_the_way(self) -> str | None:
        name = self._dialect.name
        if self._ids.are_ignored.is_set():
            return f"{name}: it ignores message ids"
        if not self._client.trouble.may_try():
            return self._client.trouble.reason or f"{name}: paused after trouble"
        answer = self._client.request("GET", self._path(self._dialect.state_path), within=PROBE_TIMEOUT)
        if not isinstance(answer, Answer):
            return f"{name}: {answer.error.__name__}, asked for the session's state"
        if not answer.is_success:
            return f"{name}: HTTP {answer.status}, asked for the session's state"
        if not self._dialect.is_connected(answer.json):
            return f"{name}: the session is not connected"
        return None if self._ids.are_taken(self._version) else f"{name}: it is not known to take message ids"

    def prepare(self, message: OutgoingMessage) -> Prepared | Outcome:
        """Return the request of `send`, or the outcome of a message that cannot be sent."""
        if BSUID_FORM.fullmatch(message.destination_jid):
            return Refused(f"{self._dialect.name} sends to numbers and groups, not to a business-scoped user id")
        text = words_of(self._render, message)
        if isinstance(text, Outcome):
            return text
        refusal = refusal_of(text, most_characters=LONGEST_TEXT)
        if refusal is not None:
            return refusal
        payload = self._dialect.payload(self._session, message, text, message.whatsapp_id)
        return Prepared(self._path(self._dialect.send_path), as_json(payload))

    def send(self, message: OutgoingMessage) -> Outcome:
        """Send once."""
        prepared = self.prepare(message)
        if not isinstance(prepared, Prepared):
            return prepared
        outcome = self._client.deliver(
            message, prepared, partial(_read, self._dialect), statuses=self._dialect.statuses
        )
        if isinstance(outcome, Sent):
            self._ids.check(message, outcome)
        return outcome

    @property
    def look_up(self) -> Callable[[OutgoingMessage], Sent | None] | None:
        """Looks a message up: `Sent` if the gateway stored it; None proves nothing. Some dialects have no look-up."""
        find_path = self._dialect.find_path
        return None if find_path is None else partial(self._find, find_path)

    def _find(self, find_path: str, message: OutgoingMessage) -> Sent | None:
        message_id = message.whatsapp_id
        found = self._ask("POST", find_path, {"where": {"key": {"id": message_id, "fromMe": True}}})
        return Sent(message_id) if _is_stored(message_id, found) else None

    def _version(self) -> Any:
        return value_at(self._ask("GET", "/"), "version")

    def _ask(self, method: str, path: str, payload: Mapping[str, Any] | None = None) -> Any:
        body = None if payload is None else as_json(payload)
        answer = self._client.request(method, self._path(path), body, within=PROBE_TIMEOUT)
        return answer.json if isinstance(answer, Answer) and answer.is_success else None

    def _path(self, path: str) -> str:
        return path.format(session=quote(self._session, safe=""))


def _read(dialect: Dialect, answer: Answer) -> Sent | Finding | None:
    """Return the finding of an answer, as far as the dialect knows its words."""
    data = answer.json
    if answer.is_success:
        provider_id = dialect.provider_id(data)
        if provider_id:
            return Sent(provider_id)
        return finding_of(dialect.name, dialect.meta_error(data), answer)
    said = dialect.error_text(data)
    for words in dialect.words:
        if words.match(answer.status, said):
            reason = f"{dialect.name}: {words.because} (HTTP {answer.status})"
            return Finding(words.proof, reason, words.wait)
    return None


def _is_stored(message_id: str, found: Any) -> bool:
    """Whether an answer of Evolution API holds the message, and no state of the message is a failure."""
    records = value_at(found, "messages", "records")
    for record in records if isinstance(records, list) else []:
        updates = value_at(record, "MessageUpdate")
        states = [record, *(updates if isinstance(updates, list) else [])]
        if value_at(record, "key", "id") == message_id and not any(map(has_failed, states)):
            return True
    return False
