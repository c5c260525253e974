"""The proofs that a request comes from a provider: a signature over its bytes, or a secret that it carries."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from engagement.receipts.sources import Unsigned

SHORTEST_SECRET = 16
"""Characters. A key that can be guessed is tried out on one signed request, without asking anybody."""
TOKEN_LASTS = timedelta(hours=1)
Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """Return the time of this machine."""
    return datetime.now(UTC)


def checked_secrets(field: str, given: str | Sequence[str], *, shortest: int = SHORTEST_SECRET) -> tuple[bytes, ...]:
    """Return the secrets, of which a request needs one. `ValueError` names the `field`, and never shows a secret."""
    secrets = tuple(given) if isinstance(given, list | tuple) else (given,)
    for secret in secrets:
        if not isinstance(secret, str) or len(secret) < shortest:
            raise ValueError(f"{field}: must be text of {shortest} characters or more")
        if not secret.isascii() or not secret.isprintable() or secret != secret.strip():
            raise ValueError(f"{field}: must be printable ASCII, without blanks at its ends")
    if not secrets:
        raise ValueError(f"{field}: none is given")
    return tuple(str(secret).encode() for secret in secrets)


def check_hmac(body: bytes, headers: Mapping[str, str], header: str, keys: Iterable[bytes], algorithm: str) -> None:
    """Raise `Unsigned` unless the header holds the HMAC of the body in hexadecimal digits, by one of the keys."""
    if header not in headers:
        raise Unsigned(f"the header {header} is missing")
    if not is_one_of(headers[header], [hmac.digest(key, body, algorithm).hex().encode() for key in keys]):
        raise Unsigned(f"the header {header} is wrong")


def is_one_of(given: str, expected: Iterable[bytes]) -> bool:
    """Whether the text is one of the `expected`. The time of a comparison tells nothing of its secret."""
    # Servers decode headers as they like: also a lone surrogate is only wrong here.
    text = given.encode("utf-8", "surrogatepass")
    return any(hmac.compare_digest(text, each) for each in expected)


def is_token(authorization: str, keys: Iterable[bytes], now: datetime, claims: Mapping[str, str]) -> bool:
    """Whether a header is a bearer token (JWT, HS256) by one of the keys, with these claims, and was issued lately.

    The algorithm is ours, whichever the token asks for. Its age is judged by `iat`, up to `TOKEN_LASTS`; `exp` is not
    read. See docs/decisions.md#2026-11-29--a-token-of-evolution-api-counts-for-an-hour
    """
    scheme, _, token = authorization.partition(" ")
    signed, _, signature = token.rpartition(".")
    text = signed.encode("utf-8", "surrogatepass")
    if scheme.lower() != "bearer" or not is_one_of(
        signature, [_base64url(hmac.digest(key, text, "sha256")) for key in keys]
    ):
        return False
    said = _claims(signed.rpartition(".")[2])
    return _is_recent(said.get("iat"), now) and all(said.get(name) == value for name, value in claims.items())


def _is_recent(issued: object, now: datetime) -> bool:
    return type(issued) is int and abs(int(now.timestamp()) - issued) <= TOKEN_LASTS.total_seconds()


def _claims(text: str) -> dict[str, Any]:
    try:
        said = json.loads(base64.urlsafe_b64decode(text + "=="))
    except (ValueError, RecursionError):
        said = None
    return said if isinstance(said, dict) else {}


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
