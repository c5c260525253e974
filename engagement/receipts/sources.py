"""The form of a source of receipts, and its refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from engagement.messages import Receipt


class UnreadableReceipts(Exception):  # noqa: N818 - an event
    """A request that is refused, with the HTTP `status` for it. Its text names no person and no secret."""

    status = 400


class Unsigned(UnreadableReceipts):
    """The signature is missing or wrong, or too old."""

    status = 401


class WrongToken(Unsigned):
    """The token of a handshake is missing or wrong."""

    status = 403


class ReceiptSource(Protocol):
    """A provider whose requests can be read. Pure: bytes and headers in, receipts or an error out."""

    name: str
    """The provider, as it stands in `Receipt.provider`."""

    def read(self, body: bytes, headers: Mapping[str, str]) -> Sequence[Receipt]:
        """Return the receipts in a request; none for events that are no receipts.

        The names in `headers` are in small letters (`x-hub-signature-256`).

        Raises `Unsigned`, or `UnreadableReceipts` for a body that is not in the provider's form.
        """
        ...
