"""Reads bodies that may hold anything. Its one error is `UnreadableReceipts`, which repeats none of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from engagement._logging import logger
from engagement.messages import InvalidMessage, Receipt
from engagement.receipts.sources import UnreadableReceipts

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def value_of(data: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    """Return the value of a field, which must be of this very type: True is no number."""
    value = data.get(name)
    if type(value) is not kind:
        raise UnreadableReceipts(f"{name}: must be of type {kind.__name__}")
    return value


def moment_after_epoch(**since: int) -> datetime:
    """Return the moment so many `seconds` or `milliseconds` after 1970."""
    try:
        return _EPOCH + timedelta(**since)
    except OverflowError:
        raise UnreadableReceipts("a time is out of range") from None


def receipt_of(**fields: Any) -> Receipt:
    """Return the receipt; `UnreadableReceipts` if it cannot be one."""
    try:
        return Receipt(**fields)
    except InvalidMessage as error:
        raise UnreadableReceipts(str(error)) from None


def read_each(provider: str, elements: Sequence[Any], read: Callable[[Any], Receipt]) -> list[Receipt]:
    """Return the receipts of the elements; those that cannot be read are left out, with one line in the log for all.

    If none can, the request is refused as it would be for a single one.
    """
    receipts = []
    for element in elements:
        with suppress(UnreadableReceipts):
            receipts.append(read(element))
    if elements and not receipts:
        raise UnreadableReceipts("no receipt in it can be read")
    if len(receipts) < len(elements):
        logger.warning("engagement.receipt_unreadable provider=%s", provider)
    return receipts
