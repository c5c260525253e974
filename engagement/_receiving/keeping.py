"""Keeps receipts that come before their message's provider id is known, and finds their messages later.

See docs/decisions.md#2026-11-30--a-receipt-that-is-quicker-than-its-settlement-is-kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from engagement._sql import keeping
from engagement._sql.host_sessions import HostSession
from engagement._sql.parameters import moment_text
from engagement.messages import Receipt
from engagement.models import MOST_RECEIPT_TEXT
from engagement.outcomes import clean_reason

MOST_PROVIDER = 255


def keep(host: HostSession, receipts: Sequence[Receipt]) -> None:
    """Keep receipts, each of them once."""
    if receipts:
        host.execute(keeping.keep(), keeping.KEEPING.parameter(_kept(host, receipt) for receipt in receipts))


def take_matching(host: HostSession, within: timedelta | None) -> list[Receipt]:
    """Take out receipts, kept `within` a time, whose messages are known now: so many as one transaction matches."""
    return [_receipt(row) for row in host.rows(keeping.take_matching(), {"within": within})]


def drop_older(host: HostSession, than: timedelta) -> int:
    """Drop the receipts that were kept for longer; return their number."""
    dropped: int = host.execute(keeping.drop(), {"within": than}).rowcount
    return dropped


def _kept(host: HostSession, receipt: Receipt) -> keeping.Keeping:
    assert receipt.provider_message_id is not None

    def text(given: str | None) -> str | None:
        cleaned = clean_reason(given)
        return cleaned and host.storable(cleaned)[:MOST_RECEIPT_TEXT]

    return {
        "provider_message_id": receipt.provider_message_id,
        "event": receipt.event,
        "at": moment_text(receipt.at),
        "provider": host.storable(receipt.provider)[:MOST_PROVIDER],
        "reason": text(receipt.reason),
        "code": text(receipt.code),
        "unreachable": receipt.unreachable,
    }


def _receipt(row: Any) -> Receipt:
    return Receipt(**row._mapping)  # noqa: SLF001 - its public name
