"""Transports (with everything optional, of the event loop), a question that fails, and places whose clocks change."""

import asyncio
from datetime import UTC, datetime, time
from zoneinfo import ZoneInfo

from engagement import Sent

NEW_YORK, LONDON, LORD_HOWE = ZoneInfo("America/New_York"), ZoneInfo("Europe/London"), ZoneInfo("Australia/Lord_Howe")
NIGHT = {"start": time(21), "end": time(8)}
JID = "5511999999999@s.whatsapp.net"


def fails(_message):
    raise TimeoutError("5511999999999 is not in the table")


class Far:
    """A transport with everything optional, that remembers what it was given."""

    idempotent = True

    def __init__(self, found=None):
        self.found = found
        self.sent = []
        self.looked_up = []

    def send(self, message):
        """Remember, and say sent."""
        self.sent.append(message)
        return Sent("far")

    def look_up(self, message):
        """Remember, and say what was found."""
        self.looked_up.append(message)
        return self.found

    def ready(self):
        """Never be ready."""
        return False


def awaited(transport):
    """Return a transport of the event loop that does what a plain one does."""

    async def send(message):
        await asyncio.sleep(0)
        return transport(message)

    return send


def at(tz, *wall, fold=0):
    return datetime(*wall, tzinfo=tz, fold=fold).astimezone(UTC)
