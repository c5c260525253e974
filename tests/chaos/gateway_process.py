"""A gateway in a process of its own, in the manner of Evolution API, that keeps the ledger.

Now and then it crashes before or after a message has left, hangs up, or answers too late.
"""

import json
import os
import random
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from .ledger import Ledger

TROUBLES = ("crash_before", "crash_after", "hang_up_before", "hang_up_after", "late")
TROUBLE_SHARE = 0.06
LATE_SECONDS = 1.0


class Handler(BaseHTTPRequestHandler):
    """Answers what `WhatsAppGateway` asks."""

    protocol_version = "HTTP/1.1"
    ledger: Ledger
    random: random.Random

    def do_GET(self) -> None:
        """Say that the session is connected."""
        self._answer(200, {"instance": {"instanceName": "default", "state": "open"}})

    def do_POST(self) -> None:
        """Send a text, or come to grief before or after it."""
        key = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
        trouble = self.random.choice(TROUBLES) if self.random.random() < TROUBLE_SHARE else ""
        if trouble.endswith("_before"):
            self._come_to_grief(trouble)
            return
        self.ledger.record(key, "-", 0)
        if trouble.endswith("_after"):
            self._come_to_grief(trouble)
            return
        if trouble == "late":
            time.sleep(LATE_SECONDS)
        self._answer(201, {"key": {"id": f"3EB0{abs(hash(key)):018X}"[:22]}, "status": "PENDING"})

    def _come_to_grief(self, trouble: str) -> None:
        if trouble.startswith("crash"):
            os._exit(1)
        self.close_connection = True

    def _answer(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """Takes over its port from the one that crashed."""

    allow_reuse_address = True
    daemon_threads = True


def main() -> None:
    """Serve on the given port until killed."""
    port, ledger, seed = sys.argv[1:]
    Handler.ledger = Ledger(Path(ledger))
    Handler.random = random.Random(int(seed))
    Server(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
