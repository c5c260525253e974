"""The requests of the three gateways as their sources make them, and bodies that none of them would make."""

import base64
import copy
import hashlib
import hmac
import json
from datetime import UTC, datetime
from urllib.parse import urlencode

import pytest
from conftest import outgoing
from hypothesis import strategies as st

from engagement.messages import Receipt
from engagement.receipts.sources import UnreadableReceipts, Unsigned

SECRET = "4dXcQ0bYp7LwT9sKzR2vNfJmH6gEaU3i"
OLD_SECRET = "nRk8ZtV5xWqB1yGhS0cPjDfL7mAeUo4I"
STOLEN = (SECRET, OLD_SECRET)
NUMBER = "5511999999999"
OURS = outgoing(id=7).whatsapp_id
"""The id that our transport gives the gateway, and stores."""
NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def a_clock() -> datetime:
    """Return the moment of reading."""
    return NOW


def as_json(value) -> bytes:
    """Return JSON as `JSON.stringify` and Go's `json.Marshal` write it."""
    return json.dumps(value, separators=(",", ":")).encode()


def signature(body: bytes, key: str, algorithm: str) -> str:
    """Return the HMAC of a body."""
    return hmac.new(key.encode(), body, algorithm).hexdigest()


# Evolution API


def evolution(event: str, data) -> dict:
    """Return what `WebhookController.emit` posts. `date_time` is the gateway's local time, with the sign of UTC."""
    return {
        "event": event,
        "instance": "main",
        "data": data,
        "destination": "https://example.org/receipts/evolution",
        "date_time": "2026-03-01T08:59:58.123Z",
        "sender": f"{NUMBER}@s.whatsapp.net",
        "server_url": "https://gateway.example.org",
        "apikey": "B6D711FCDE4D4FD5936544120E713976",
    }


def update(status, **fields) -> dict:
    """Return the data of `messages.update` of the channel Baileys."""
    return {
        "keyId": OURS,
        "remoteJid": f"{NUMBER}@s.whatsapp.net",
        "fromMe": True,
        "status": status,
        "instanceId": "b3b2a3d5-7a1d-4a24-9d8d-0d5f0b0c7a11",
        "messageId": "cmfyoow42000hov4xwkdug3lv",
    } | fields


def sent(**fields) -> dict:
    """Return the data of `send.message`."""
    return {
        "key": {"remoteJid": f"{NUMBER}@s.whatsapp.net", "fromMe": True, "id": OURS},
        "pushName": "Você",
        "status": "PENDING",
        "message": {"conversation": "Olá, Ana"},
        "contextInfo": None,
        "messageType": "conversation",
        "messageTimestamp": 1772366390,
        "instanceId": "b3b2a3d5-7a1d-4a24-9d8d-0d5f0b0c7a11",
        "source": "web",
    } | fields


def token(key: str, **claims) -> str:
    """Return the header that `generateJwtToken` makes with a webhook's `jwt_key`."""
    issued = int(NOW.timestamp())
    said = {"iat": issued, "exp": issued + 600, "app": "evolution", "action": "webhook"} | claims
    signed = b".".join(_base64url(as_json(part)) for part in ({"alg": "HS256", "typ": "JWT"}, said))
    return f"Bearer {(signed + b'.' + _base64url(hmac.digest(key.encode(), signed, hashlib.sha256))).decode()}"


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


# WAHA


def ack(number, engine: str = "NOWEB", event: str = "message.ack", **fields) -> dict:
    """Return what `WebhookPlugin` posts of an acknowledgement."""
    return {
        "id": "evt_01jnabcdefghjkmnpqrstvwxyz",
        "timestamp": 1772366398123,
        "event": event,
        "session": "default",
        "metadata": {},
        "me": {"id": "5511888888888@c.us", "lid": "98765432101234@lid", "pushName": "Us"},
        "payload": {
            "id": f"true_{NUMBER}@c.us_{OURS}",
            "from": f"{NUMBER}@c.us",
            "to": None,
            "participant": None,
            "fromMe": True,
            "ack": number,
            "ackName": "DEVICE",
        }
        | fields,
        "engine": engine,
        "environment": {"version": "2026.3.1", "engine": engine, "tier": "CORE", "browser": None},
    }


def waha_headers(body: bytes, key: str = SECRET) -> dict:
    """Return the headers of `WebhookSender`."""
    return {
        "content-type": "application/json",
        "x-webhook-request-id": "7k2m3n",
        "x-webhook-timestamp": "1772366398123",
        "x-webhook-hmac": signature(body, key, "sha512"),
        "x-webhook-hmac-algorithm": "sha512",
    }


# wuzapi


def receipt(kind: str = "", **fields) -> dict:
    """Return what `myEventHandler` makes of whatsmeow's `events.Receipt`."""
    event = {
        "Chat": f"{NUMBER}@s.whatsapp.net",
        "Sender": f"{NUMBER}:12@s.whatsapp.net",
        "IsFromMe": False,
        "IsGroup": False,
        "AddressingMode": "",
        "SenderAlt": "",
        "RecipientAlt": "",
        "BroadcastListOwner": "",
        "BroadcastRecipients": None,
        "MessageIDs": [OURS],
        "Timestamp": "2026-03-01T08:59:58-03:00",
        "Type": kind,
        "MessageSender": "",
    }
    return {"event": event | fields, "type": "ReadReceipt", "state": "Read" if kind == "read" else "Delivered"}


def as_form(posted) -> bytes:
    """Return the form of `callHookWithHmac`, in the order of `url.Values.Encode`."""
    return urlencode({"instanceName": "main", "jsonData": as_json(posted).decode(), "userID": "1"}).encode()


def wuzapi_headers(body: bytes, key: str = SECRET) -> dict:
    """Return the headers of `callHookWithHmac`."""
    return {"x-hmac-signature": signature(body, key, "sha256")}


# What none of them would send

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**15, 10**40)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        [OURS, "true_", "\ud800", "a" * 600, "1e999", "9999-12-31T23:59:59-23:59", "0002-01-01T00:00+23:59"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
MALFORMED = [
    b"",
    b"null",
    b"[]",
    b'"text"',
    b"{",
    b"{}",
    b"\xff\xfe{}",
    b"\xef\xbb\xbf{}",
    b'{"event":"\xff"}',
    b'{"event":' + b"[" * 100_000,
    b'{"event":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    b'{"event":' + b"9" * 10_000 + b"}",
    b'{"event":NaN}',
    b'{"event":null}',
    b'{"event":7,"type":7}',
]


@st.composite
def mangled(draw, good):
    """Draw a good body in which one place holds junk, or is missing."""
    body = copy.deepcopy(good)
    places = [(body, key) for key in body]
    for inside, key in places:
        if isinstance(inside[key], dict):
            places += [(inside[key], deeper) for deeper in inside[key]]
    inside, key = draw(st.sampled_from(places))
    if draw(st.booleans()):
        del inside[key]
    else:
        inside[key] = draw(JUNK)
    return body


def check_hostile(read) -> None:
    """See that a body has receipts, or none, or is refused with the one kind of error."""
    try:
        receipts = read()
    except Unsigned:
        pytest.fail("it was signed")
    except UnreadableReceipts as error:
        refusal = str(error)
    else:
        assert all(isinstance(each, Receipt) for each in receipts)
        return
    assert NUMBER not in refusal


def check_secrets(make, field: str, shortest: int) -> None:
    """See that `make` refuses what is no secret, by the name of the field, and shows none of it."""
    for wrong in (
        "",
        "a" * (shortest - 1),
        b"a" * shortest,
        7,
        ["a"],
        [SECRET, None],
        f" {SECRET}",
        f"{SECRET}\n",
        "é" * 40,
        [],
    ):
        with pytest.raises(ValueError, match=rf"^{field}: ") as caught:
            make(wrong)
        assert SECRET not in str(caught.value)
    assert not any(secret in repr(make([SECRET, OLD_SECRET])) for secret in STOLEN)
