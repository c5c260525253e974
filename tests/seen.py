"""Workers as the table has them, written by hand."""

from datetime import timedelta
from typing import Any

from sqlalchemy import Interval, func, insert, literal
from sqlalchemy.sql.dml import Insert

from engagement._sql.working import WORKERS

MOMENTS = ("started_at", "last_seen_at", "gone_at", "in_hand_since")


def a_worker(**given: Any) -> Insert:
    """Return the INSERT of a worker that was just seen; a `timedelta` in place of a moment is counted from now."""
    soon = timedelta(hours=1)
    row = {
        "run": "4fe1ab12",
        "name": "host:7",
        "host": "host",
        "process_id": 7,
        "version": "0.1.0",
        "transport": "myapp.whatsapp.send",
        "concurrency": 1,
        "in_hand": 0,
        "in_hand_since": None,
        "sent": 0,
        "failed": 0,
        "started_at": -soon,
        "last_seen_at": timedelta(0),
        "gone_at": soon,
        "not_ready": None,
    } | given
    moments = {name: func.now() + literal(row[name], Interval) for name in MOMENTS if isinstance(row[name], timedelta)}
    return insert(WORKERS).values(row | moments)
