"""What the tests of the command line share: messages in each state, lines of a file, transports in a module."""

import json
import sys
import textwrap
from pathlib import Path

from by_hand import update
from conftest import new_message, queue
from sqlalchemy import text

CONSOLE = "engagement.transports.console:Console"
SQL = {
    "pending": "status = 'pending'",
    "sending": "status = 'sending', attempt = 1, lease_expires_at = now() + interval '1 hour'",
    "sent": "status = 'sent', attempt = 1, sent_at = now()",
    "failed": "status = 'failed', attempt = 1, retry_count = 1",
    "expired": "status = 'expired'",
    "cancelled": "status = 'cancelled'",
    "in_doubt": "status = 'in_doubt', attempt = 1",
    "pruned": "status = 'failed', attempt = 1, destination_jid = NULL",
    "pruned in doubt": "status = 'in_doubt', attempt = 1, destination_jid = NULL",
    "expires soon": "expires_at = now() + interval '1 hour'",
}


def scalar(engine, sql):
    with engine.connect() as connection:
        return connection.scalar(text(sql))


def statuses(engine):
    with engine.connect() as connection:
        return list(connection.scalars(text("SELECT status FROM engagement_message_queue ORDER BY id")))


def line(user_id="ana", **fields) -> str:
    given = {
        "user_id": user_id,
        "message_type": "goodbye",
        "message_key": "goodbye.14_days",
        "destination": "individual",
        "destination_jid": "447700900101@s.whatsapp.net",
    }
    return json.dumps(given | fields) + "\n"


def transport(source: str, name="transports") -> str:
    """Write a module with `send` into the current directory, and return the option that names it."""
    Path(f"{name}.py").write_text(textwrap.dedent(source))
    sys.modules.pop(name, None)
    return f"--transport={name}:send"


def messages(engine, *states, **fields):
    """Queue a message in each state, and return their ids."""
    ids = queue(engine, *(new_message(f"user{number}", **fields) for number, _ in enumerate(states)))
    for message_id, state in zip(ids, states, strict=True):
        update(engine, SQL[state], f"id = {message_id}")
    return ids


def facts(out):
    """Return what `name=value` lines say."""
    return dict(line.split("=", 1) for line in out.splitlines())
