"""Records receipts in a host's session: finds their messages, weighs each receipt, and writes the changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from datetime import datetime
from itertools import islice
from uuid import UUID

from engagement._logging import logger
from engagement._receiving.weighing import Told, weigh
from engagement._sql import receiving
from engagement._sql.host_sessions import HostSession
from engagement._sql.parameters import moment_text
from engagement.messages import InvalidMessage, Receipt, Recorded, delivery_id, whatsapp_message_id
from engagement.messages.receipts import message_id_in, read_reference
from engagement.models import EARLIEST
from engagement.outcomes import clean_reason

AT_ONCE = 1_000
"""Receipts that are recorded by one pair of statements."""


def record(host: HostSession, receipts: Iterable[Receipt]) -> list[Recorded]:
    """Record receipts, and return the answer to each."""
    if isinstance(receipts, str) or not isinstance(receipts, Iterable):
        raise InvalidMessage("receipts", f"must be an iterable of Receipt, not {type(receipts).__name__}")
    given = [_checked(receipt) for receipt in receipts]
    answers: list[Recorded] = []
    left = iter(given)
    while some := list(islice(left, AT_ONCE)):
        answers += _record_some(host, some)
    return answers


def _checked(receipt: object) -> Receipt:
    if not isinstance(receipt, Receipt):
        raise InvalidMessage("receipt", f"must be a Receipt, not {type(receipt).__name__}")
    return receipt


def _record_some(host: HostSession, receipts: Sequence[Receipt]) -> list[Recorded]:
    found = _Found(host, receipts)
    answers = []
    changes: list[tuple[Told, Receipt]] = []
    for receipt in receipts:
        row = found.row_of(receipt)
        answer = Recorded.UNKNOWN_MESSAGE
        if row is not None:
            answer, after = weigh(row, receipt, found.now)
            if answer is Recorded.RECORDED:
                found.rows[row.id] = after
                changes.append((after, receipt))
        message_id = None if row is None else row.id
        logger.info("engagement.receipt message_id=%s event=%s answer=%s", message_id, receipt.event, answer)
        answers.append(answer)
    for some in _each_row_once(changes):
        host.execute(receiving.record(), receiving.CHANGES.parameter(_change(host, *each) for each in some))
    return answers


class _Found:
    """The rows that receipts may speak of, locked, and how each receipt finds its own."""

    def __init__(self, host: HostSession, receipts: Sequence[Receipt]) -> None:
        provider_ids = {receipt.provider_message_id for receipt in receipts} - {None}
        values = {
            "ids": sorted({id_ for receipt in receipts if (id_ := _named_id(receipt)) is not None}),
            # None that the database cannot store is there.
            "provider_ids": sorted(name for name in provider_ids if name is not None and host.storable(name) == name),
        }
        locked = host.rows(receiving.lock_told(), values)
        self.now: datetime = locked[0].now if locked else EARLIEST
        self.rows = {row.id: Told(*row[: len(_COLUMNS)]) for row in locked}
        self._deliveries = {row.id: delivery_id(row.idempotency_key) for row in locked}
        self._by_provider_id = {row.provider_message_id: row.id for row in locked}

    def row_of(self, receipt: Receipt) -> Told | None:
        """Return the row that a receipt speaks of, as the receipts before have left it."""
        named = _named_id(receipt)
        if named is not None and named in self.rows and _proves(receipt, named, self._deliveries[named]):
            return self.rows[named]
        found = None if receipt.reference else self._by_provider_id.get(receipt.provider_message_id)
        return None if found is None else self.rows[found]


_COLUMNS = fields(Told)


def _named_id(receipt: Receipt) -> int | None:
    """Return the message's id that the receipt names, which is still to be proven."""
    if receipt.reference is not None:
        reference = read_reference(receipt.reference)
        return None if reference is None else reference[0]
    return None if receipt.provider_message_id is None else message_id_in(receipt.provider_message_id)


def _proves(receipt: Receipt, message_id: int, delivery: UUID) -> bool:
    if receipt.reference is not None:
        return read_reference(receipt.reference) == (message_id, delivery)
    return receipt.provider_message_id == whatsapp_message_id(message_id, delivery)


def _each_row_once(changes: list[tuple[Told, Receipt]]) -> Iterator[list[tuple[Told, Receipt]]]:
    """Yield the changes in groups, in which no row stands twice: an UPDATE would take one of them."""
    while changes:
        first: dict[int, tuple[Told, Receipt]] = {}
        later = [change for change in changes if first.setdefault(change[0].id, change) is not change]
        yield list(first.values())
        changes = later


def _change(host: HostSession, row: Told, receipt: Receipt) -> receiving.Change:
    reason = clean_reason(": ".join(filter(None, (receipt.code, receipt.reason))))
    return {
        "id": row.id,
        "status": row.status,
        "sent_at": _text(row.sent_at),
        "delivered_at": _text(row.delivered_at),
        "read_at": _text(row.read_at),
        "undeliverable_at": _text(row.undeliverable_at),
        "provider_message_id": row.provider_message_id and host.storable(row.provider_message_id),
        "event": receipt.event,
        "reason": reason and host.storable(reason),
        "provider": host.storable(receipt.provider),
    }


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment_text(moment)
