"""Servers that behave like the providers, written from their sources and documentation (see the transports)."""

# ruff: noqa: D102 - the names say what a server does

import threading
import uuid
from datetime import timedelta
from time import monotonic

import conftest
import pytest
from loopback import Received, Reply

from engagement import OutgoingMessage
from engagement.messages import whatsapp_message_id
from engagement.transports.client import ProviderClient
from engagement.transports.dialects import EVOLUTION
from engagement.transports.gateway import WhatsAppGateway

KEY = "s3cr3t-key-5b1c"
TEXT = "Olá Ana, sentimos sua falta 💛"
NUMBER = "5511987654321"


@pytest.fixture(autouse=True)
def close_clients(monkeypatch):
    """Close every client that a test makes. Import it into a test's module; a second conftest would hide the first."""
    made = []
    make = ProviderClient.__init__

    def make_and_remember(self, *arguments, **options):
        make(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(ProviderClient, "__init__", make_and_remember)
    yield
    for client in made:
        client.close()


def outgoing(**fields) -> OutgoingMessage:
    """Return a message as a worker hands it to a transport, to our own number."""
    given = {
        "id": 7,
        "idempotency_key": "user7:goodbye:2026-11-24",
        "user_id": "user7",
        "destination_jid": f"{NUMBER}@s.whatsapp.net",
    }
    return conftest.outgoing(**given | fields)


def say(_: OutgoingMessage) -> str:
    """Render every message as the same text."""
    return TEXT


def later(**by):
    """Return a clock that is ahead of the client's."""
    return lambda: monotonic() + timedelta(**by).total_seconds()


class Ledger:
    """What really went out. `fault(request)` may return what is to happen instead of an answer, after the send."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, str]] = []  # (message id, to, text)
        self.fault = lambda request: None
        self.override: Reply | None = None
        self._lock = threading.Lock()

    def send(self, message_id: str | None, to: str, text: str) -> str:
        with self._lock:
            message_id = message_id or "3EB0" + uuid.uuid4().hex[:18].upper()
            self.sent.append((message_id, to, text))
        return message_id


class EvolutionLike(Ledger):
    """Evolution API: `version` decides whether it takes message ids."""

    def __init__(self, version: str = "2.4.0", instance: str = "main") -> None:
        super().__init__()
        self.version = version
        self.instance = instance
        self.state = "open"
        self.not_on_whatsapp: set[str] = set()
        self.keeps_messages = True

    def __call__(self, request: Received):
        if request.path == "/":
            return Reply(200, {"status": 200, "message": "Welcome to the Evolution API", "version": self.version})
        if request.headers.get("apikey") != KEY:
            return self.error(401, "Unauthorized", "Unauthorized")
        if not request.path.endswith(f"/{self.instance}"):
            return self.error(404, "Not Found", ['The "x" instance does not exist'])
        if request.path.startswith("/instance/connectionState/"):
            return Reply(200, {"instance": {"instanceName": self.instance, "state": self.state}})
        if request.path.startswith("/chat/findMessages/"):
            return self.find(request.json["where"]["key"])
        assert request.path.startswith("/message/sendText/")
        return self.override or self.send_text(request)

    def send_text(self, request: Received):
        number, text = request.json["number"], request.json["text"]
        if not text.strip():
            return self.error(400, "Bad Request", ["Text is required"])
        if number in self.not_on_whatsapp:
            return self.error(400, "Bad Request", [{"jid": number, "exists": False, "number": number}])
        if self.state != "open":
            return self.error(400, "Bad Request", ["Error: Connection Closed"])
        takes_ids = tuple(map(int, self.version.split(".")[:2])) >= (2, 4)
        message_id = self.send(request.json.get("messageId") if takes_ids else None, number, text)
        key = {"remoteJid": number, "fromMe": True, "id": message_id}
        return self.fault(request) or Reply(201, {"key": key, "status": "PENDING", "message": {"conversation": text}})

    def find(self, key):
        found = [sent for sent in self.sent if sent[0] == key["id"] and self.keeps_messages]
        records = [
            {"key": {"id": message_id, "fromMe": True, "remoteJid": to}, "MessageUpdate": []}
            for message_id, to, _ in found
        ]
        return Reply(200, {"messages": {"total": len(records), "pages": 1, "currentPage": 1, "records": records}})

    def error(self, status: int, error: str, message) -> Reply:
        return Reply(status, {"status": status, "error": error, "response": {"message": message}})


class WahaLike(Ledger):
    """WAHA with its NOWEB engine."""

    def __init__(self) -> None:
        super().__init__()
        self.status = "WORKING"

    def __call__(self, request: Received):
        if request.headers.get("x-api-key") != KEY:
            return Reply(401, {"message": "Unauthorized", "statusCode": 401})
        if request.path.startswith("/api/sessions/"):
            if request.path != "/api/sessions/default":
                return Reply(404, {"message": "Session not found", "error": "Not Found", "statusCode": 404})
            return Reply(200, {"name": "default", "status": self.status, "me": {"id": "5511@c.us"}})
        assert request.path == "/api/sendText"
        return self.override or self.send_text(request)

    def send_text(self, request: Received):
        if self.status != "WORKING":
            error = "Session status is not as expected. Try again later or restart the session"
            return Reply(422, {"error": error, "session": "default", "status": self.status, "expected": ["WORKING"]})
        message_id = self.send(None, request.json["chatId"], request.json["text"])
        return self.fault(request) or Reply(201, {"key": {"id": message_id, "fromMe": True}, "status": "PENDING"})

    def failure(self, request: Received, message: str) -> Reply:
        """Return what AllExceptionsFilter makes of an error: it repeats the request, with all that is personal."""
        exception = {"message": message, "name": "Error", "stack": "Error: …"}
        asked = {"path": request.path, "method": "POST", "body": request.json, "query": {}}
        return Reply(500, {"statusCode": 500, "exception": exception, "request": asked})


class WuzapiLike(Ledger):
    """wuzapi: waits for WhatsApp's acknowledgement, and takes a message id."""

    def __init__(self) -> None:
        super().__init__()
        self.connected = self.logged_in = True

    def __call__(self, request: Received):
        if request.headers.get("token") != KEY:
            return self.error(401, "Unauthorized")
        if request.path == "/session/status":
            data = {"Connected": self.connected, "LoggedIn": self.logged_in}
            return Reply(200, {"code": 200, "data": data, "success": True})
        assert request.path == "/chat/send/text"
        return self.override or self.send_text(request)

    def send_text(self, request: Received):
        if not self.connected:
            return self.error(500, "No session")
        message_id = self.send(request.json["Id"], request.json["Phone"], request.json["Body"])
        data = {"Details": "Sent", "Id": message_id, "Timestamp": "2026-11-24T12:49:08-03:00"}
        return self.fault(request) or Reply(200, {"code": 200, "data": data, "success": True})

    def error(self, status: int, message: str) -> Reply:
        return Reply(status, {"code": status, "error": message, "success": False})


class CloudLike(Ledger):
    """Meta's Cloud API. `fails_with` is the error code of every send, with its HTTP status."""

    def __init__(self) -> None:
        super().__init__()
        self.fails_with: tuple[int, int] | None = None
        self.headers: dict[str, str] = {}
        self.health = "AVAILABLE"

    def __call__(self, request: Received):
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return self.error(190, 401)
        if request.method == "GET":
            entities = [
                {"entity_type": "PHONE_NUMBER", "id": "106540352242922", "can_send_message": "AVAILABLE"},
                {"entity_type": "WABA", "id": "102290129340398", "can_send_message": self.health},
            ]
            # The overall status also counts what only calls need.
            health = {"can_send_message": "BLOCKED", "entities": entities}
            return Reply(200, {"health_status": health, "id": "106540352242922"})
        if self.override or self.fails_with:
            return self.override or self.error(*self.fails_with)
        asked = request.json
        # What `to` is given is taken for a number, whatever it is.
        to = asked["to"] if "to" in asked else asked["recipient"]
        message_id = "wamid." + self.send(None, to, str(asked.get("text") or asked.get("template")))
        answer = {
            "messaging_product": "whatsapp",
            "contacts": [{"input": to, "wa_id": to}],
            "messages": [{"id": message_id, "message_status": "accepted"}],
        }
        return self.fault(request) or Reply(200, answer)

    def error(self, code: int, status: int, **more) -> Reply:
        error = {
            "message": f"(#{code}) Title",
            "type": "OAuthException",
            "code": code,
            "error_data": {"messaging_product": "whatsapp", "details": f"to {NUMBER}"},
            "fbtrace_id": "Az8or2yhqkZfEZ-_4Qn_Bam",
        }
        return Reply(status, {"error": error | more}, self.headers)


LIKES = {"evolution": EvolutionLike, "waha": WahaLike, "wuzapi": WuzapiLike}
MESSAGE_ID = whatsapp_message_id(outgoing().id, outgoing().delivery_id)


def gateway(server, dialect=EVOLUTION, **options) -> WhatsAppGateway:
    session = "main" if dialect is EVOLUTION else "default"
    given = {"url": server.url, "key": KEY, "session": session, "render": say, "answer_within": timedelta(seconds=5)}
    return WhatsAppGateway(dialect=dialect, verify=False, **given | options)
