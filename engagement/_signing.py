"""Signatures of Standard Webhooks 1.0: of our requests to a host's endpoint, and of its reports.

From `spec/standard-webhooks.md` (standard-webhooks/standard-webhooks, version 1.0.0, `main` of 2026-08-17).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

SECRET_PREFIX = "whsec_"  # noqa: S105 - the form of a secret, not one
SHORTEST_KEY = 24
"""Bytes of a key, by the specification."""


def signature(key: bytes, webhook_id: str, timestamp: int, body: bytes) -> str:
    """Return the signature of a request, as it stands in `webhook-signature`."""
    digest = hmac.digest(key, f"{webhook_id}.{timestamp}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(digest).decode()}"


def signing_keys(secret: str | Sequence[str]) -> list[bytes]:
    """Return the key in a secret, or in each of several. `ValueError` if there is none, or one is short or broken."""
    keys = [signing_key(each) for each in ([secret] if isinstance(secret, str) else secret or ())]
    if not keys:
        raise ValueError("secret: none is given")
    return keys


def signing_key(secret: str) -> bytes:
    """Return the key in a secret. `ValueError` if it has no key, or a short one."""
    key = _decoded(secret) if isinstance(secret, str) and secret.startswith(SECRET_PREFIX) else b""
    if len(key) < SHORTEST_KEY:
        raise ValueError(f"secret: must be {SECRET_PREFIX} and {SHORTEST_KEY} bytes or more in Base64")
    return key


def _decoded(secret: str) -> bytes:
    try:
        return base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        return b""
