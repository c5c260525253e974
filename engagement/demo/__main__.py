"""The worker that the demo kills in the middle of a send."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import NoReturn

from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError

from engagement.demo.lost_worker import LEASE
from engagement.messages import OutgoingMessage
from engagement.worker import process_message_queue


def _send_without_end(_: OutgoingMessage) -> NoReturn:
    os.write(sys.stdout.fileno(), b"sending\n")
    sys.stdin.read()  # The pipe ends with the demo, also if that was killed: no process is left behind.
    os._exit(1)


if __name__ == "__main__":
    with suppress(OperationalError):  # the demo, and its database, were ended first
        process_message_queue(create_engine(sys.argv[1]), _send_without_end, lease=LEASE)
