"""The words of a wake-up: one channel for all queues of a database, and no payload.

A notification says that something may be due, nothing more. So one that is forged, or of another schema, costs a look.
"""

from __future__ import annotations

CHANNEL = "engagement_due"
WAKE = f"NOTIFY {CHANNEL}"
LISTEN = f"LISTEN {CHANNEL}"
