"""What the tests of the admin page share: a page served for real, messages to look at, and forms filled in."""

import json
import re
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from html import unescape

import httpx
from conftest import new_message, queue
from fastapi import FastAPI
from sqlalchemy import text
from test_examples import served_by_uvicorn

from engagement.admin import anyone, create_admin

NUMBER, NAME, COMPLAINT = "5511987654321", "Anastácia", "user-ana has no such number: +55 11 98765-4321"
SECRETS = (NUMBER, NAME, "98765-4321", "user-ana", "wamid.ana")


@contextmanager
def admin_of(engine, *, at: str = "/queue", **options):
    """Serve the page in a host's app, mounted as a host would."""
    host = FastAPI()
    host.mount(at, create_admin(engine, **{"authentication": anyone} | options))
    with served_by_uvicorn(host) as client:
        client.base_url = client.base_url.copy_with(path=at)
        yield client


def change(engine, message_id: int, **values) -> None:
    """Change a row by hand."""
    assignments = ", ".join(f"{name} = :{name}" for name in values)
    with engine.begin() as connection:
        connection.execute(
            text(f"UPDATE engagement_message_queue SET {assignments} WHERE id = :id"), values | {"id": message_id}
        )


def put(engine, status: str, **values) -> int:
    """Store a message that stands somewhere, as if it had got there by itself, and return its id."""
    (message_id,) = queue(engine, new_message(f"user-{status}"))
    bring(engine, message_id, status, **values)
    return message_id


def bring(engine, message_id: int, status: str, **values) -> None:
    """Bring a message to where it stands."""
    of_status = {
        "pending": {},
        "sending": {"attempt": 1, "lease_expires_at": datetime.now(UTC) + timedelta(minutes=5)},
        "sent": {"attempt": 1, "sent_at": datetime.now(UTC)},
        "failed": {"attempt": 1},
        "in_doubt": {"attempt": 1},
        "cancelled": {},
        "expired": {},
    }
    change(engine, message_id, status=status, **of_status[status] | values)


def put_secrets(engine) -> int:
    """Store a message in doubt that is full of what is personal."""
    (message_id,) = queue(
        engine,
        new_message("user-ana", message_params={"name": NAME}, destination_jid=f"{NUMBER}@s.whatsapp.net"),
    )
    entry = {"at": "2026-01-01T00:00:00+00:00", "attempt": 1, "event": "in_doubt", "reason": COMPLAINT}
    change(
        engine,
        message_id,
        status="in_doubt",
        attempt=1,
        error_message=COMPLAINT,
        provider_message_id="wamid.ana",
        history=json.dumps([entry]),
    )
    return message_id


def fields_of(page: str) -> dict[str, str]:
    """Return what the form of a page would send, as it stands."""
    form = re.search(r'<form class="card ask".*?</form>', page, re.DOTALL)[0]
    inputs = re.findall(r"<input [^>]*>", form)
    pairs = ((re.search(r'name="([^"]*)"', it), re.search(r'value="([^"]*)"', it)) for it in inputs)
    return {name[1]: unescape(value[1]) if value else "" for name, value in pairs}


def press(client: httpx.Client, message_id: int, action: str, **filled: str) -> httpx.Response:
    """Ask for an action, fill in its form, send it, and return the page that tells what came of it."""
    asked = client.get(f"messages/{message_id}/{action}")
    assert asked.status_code == 200
    return send(client, message_id, action, **fields_of(asked.text) | filled)


def send(client: httpx.Client, message_id: int, action: str, headers=None, **fields: str) -> httpx.Response:
    """Send a form, and go where it leads."""
    return client.post(f"messages/{message_id}/{action}", data=fields, headers=headers, follow_redirects=True)


def said(page: httpx.Response) -> str:
    """Return what a page says came of the last action."""
    return unescape(re.search(r'<div class="alert alert-(?:success|warning)" role="status">(.*?)</div>', page.text)[1])


def form_of(client: httpx.Client, message_id: int, action: str) -> dict[str, str]:
    return fields_of(client.get(f"messages/{message_id}/{action}").text)


def ids_of(page: httpx.Response) -> list[int]:
    return [int(found) for found in re.findall(r'data-label="Message"><a href="[^"]*/messages/(\d+)', page.text)]
