"""The provider of the demo, which tells later what became of a message: signed requests to an endpoint of ours."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from time import time
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from sqlalchemy import Engine

from engagement.messages import delivery_id, reference
from engagement.models import EngagementMessage
from engagement.receipts import ReceiptsWSGI
from engagement.receipts.cloud import CloudReceipts

HOST = "127.0.0.1"
UNDELIVERABLE = {"code": 131026, "title": "Message undeliverable"}
PATIENCE = 10
"""Seconds."""


class Provider:
    """Posts statuses in the form of Meta's Cloud API to an endpoint on this machine, signed with its app secret."""

    def __init__(self, port: int, app_secret: str) -> None:
        self._port = port
        self._app_secret = app_secret.encode()

    def report(self, message: EngagementMessage, status: str, *errors: dict[str, Any]) -> int:
        """Report the status of a message, and return the answer's status."""
        body = json.dumps(_webhook(message, status, errors)).encode()
        signature = hmac.digest(self._app_secret, body, hashlib.sha256).hex()
        connection = HTTPConnection(HOST, self._port, timeout=PATIENCE)
        try:
            connection.request("POST", "/", body, {"X-Hub-Signature-256": f"sha256={signature}"})
            return connection.getresponse().status
        finally:
            connection.close()


@contextmanager
def reporting_to(engine: Engine) -> Iterator[Provider]:
    """Serve an endpoint for receipts on a free port of this machine, and hand out the provider that knows it."""
    app_secret = secrets.token_hex(16)
    endpoint = ReceiptsWSGI(engine, CloudReceipts(app_secret))
    with make_server(HOST, 0, endpoint, handler_class=_Silent) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield Provider(server.server_port, app_secret)
        finally:
            server.shutdown()
            thread.join()


class _Silent(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Print nothing: the demo tells of each request."""


def _webhook(message: EngagementMessage, status: str, errors: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    told: dict[str, Any] = {
        "id": message.provider_message_id or f"wamid.{message.id}",
        "status": status,
        "timestamp": str(int(time())),
        "biz_opaque_callback_data": reference(message.id, delivery_id(message.idempotency_key)),
    }
    if errors:
        told["errors"] = list(errors)
    change = {"field": "messages", "value": {"messaging_product": "whatsapp", "statuses": [told]}}
    return {"object": "whatsapp_business_account", "entry": [{"id": "1", "changes": [change]}]}
