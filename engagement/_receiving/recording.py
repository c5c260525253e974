"""Records receipts in a host's session: finds their messages, weighs each receipt, and writes the changes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import islice
from typing import Any
from uuid import UUID

from engagement._logging import logger
from engagement._receiving.keeping import keep
from engagement._receiving.weighing import Told, latest_receipt, past_attempts, weigh
from engagement._sql import receiving, suppressing
from engagement._sql.host_sessions import HostSession
from engagement._sql.parameters import moment_text
from engagement._watching import observers
from engagement._watching.observers import Heard
from engagement.messages import (
    InvalidMessage,
    Receipt,
    ReceiptAnswer,
    Recorded,
    address_hash,
    delivery_id,
    whatsapp_message_id,
)
from engagement.messages.receipts import message_id_in, read_reference
from engagement.models import MOST_REASON, MessageStatus
from engagement.outcomes import clean_reason

AT_ONCE = 1_000
"""Messages that one statement changes."""


def record(host: HostSession, receipts: Iterable[Receipt], *, keeps: bool = True) -> list[ReceiptAnswer]:
    """Record receipts, and return the answer to each. With `keeps`, one whose message may be known later is kept."""
    if isinstance(receipts, str) or not isinstance(receipts, Iterable):
        raise InvalidMessage("receipts", f"must be an iterable of Receipt, not {type(receipts).__name__}")
    given = [_checked(receipt) for receipt in receipts]
    started_at = time.time_ns()
    # All of them at once: locked in pieces, two calls with the same messages in another order would deadlock.
    found = _Found(host, given)
    changes: list[tuple[Told, Receipt]] = []
    heard: list[Heard] = []
    answers = []
    for receipt in given:
        row = found.row_of(receipt)
        answer, after = (found.why_none(receipt, keeps=keeps), None) if row is None else weigh(row, receipt)
        if row is not None and after is not None and answer is Recorded.RECORDED:
            found.keep(after)
            heard.append(_heard(found.locked[row.id], row, after, receipt))
            changes.append((after, receipt))
        told = ReceiptAnswer(answer) if row is None else _answered(answer, row, after or row)
        logger.info("engagement.receipt message_id=%s event=%s answer=%s", told.message_id, receipt.event, answer)
        answers.append(told)
    for some in _each_row_once(changes):
        host.execute(receiving.record(), receiving.CHANGES.parameter(_change(host, *each) for each in some))
    unreachable = [(found.locked[row.id].destination_jid, receipt) for row, receipt in changes if receipt.unreachable]
    _suppress(host, {address: receipt for address, receipt in unreachable if address is not None})
    # Last: a look for kept receipts locks their messages before it takes them out.
    keep(host, [receipt for receipt, told in zip(given, answers, strict=True) if told.answer is Recorded.KEPT])
    if heard:
        observers.heard(heard, started_at)
    return answers


def _suppress(host: HostSession, unreachable: Mapping[str, Receipt]) -> None:
    """Put addresses onto the suppression list, for good."""
    if unreachable:
        given: list[suppressing.Entry] = [
            {
                "address_hash": address_hash(address),
                "reason": host.storable(_reason(receipt) or receipt.provider)[:MOST_REASON],
                "until": None,
            }
            for address, receipt in unreachable.items()
        ]
        host.execute(suppressing.suppress(), suppressing.ENTRIES.parameter(given))
        logger.info("engagement.suppressed addresses=%s", len(given))


def _answered(answer: Recorded, before: Told, after: Told) -> ReceiptAnswer:
    return ReceiptAnswer(answer, before.id, MessageStatus(before.status), MessageStatus(after.status))


def _checked(receipt: object) -> Receipt:
    if not isinstance(receipt, Receipt):
        raise InvalidMessage("receipt", f"must be a Receipt, not {type(receipt).__name__}")
    return receipt


class _Found:
    """The rows that receipts may speak of, locked, and how each receipt finds its own."""

    def __init__(self, host: HostSession, receipts: Sequence[Receipt]) -> None:
        provider_ids = {name for receipt in receipts if (name := receipt.provider_message_id) is not None}
        self._storable = frozenset(name for name in provider_ids if host.storable(name) == name)
        """None that the database cannot store is there, nor will be."""
        values = {
            "ids": sorted({id_ for receipt in receipts if (id_ := _named_id(receipt)) is not None}),
            "provider_ids": sorted(self._storable),
        }
        self._rows: dict[int, Told] = {}
        self.locked: dict[int, Any] = {}
        """By id, the rows as they were found."""
        self._deliveries: dict[int, UUID] = {}
        self._by_provider_id: dict[str, set[int]] = {}
        for row in host.rows(receiving.lock_told(), values) if receipts else ():
            self.locked[row.id] = row
            self._deliveries[row.id] = delivery_id(row.idempotency_key)
            self.keep(_told(row))

    def keep(self, row: Told) -> None:
        """Keep a row as a receipt has left it, for those that follow."""
        self._rows[row.id] = row
        if row.provider_message_id is not None:
            self._by_provider_id.setdefault(row.provider_message_id, set()).add(row.id)

    def row_of(self, receipt: Receipt) -> Told | None:
        """Return the row that a receipt speaks of. None if it may be either of two with one provider's id."""
        named = _named_id(receipt)
        if named is not None and named in self._rows and _proves(receipt, named, self._deliveries[named]):
            return self._rows[named]
        if receipt.reference is not None or receipt.provider_message_id is None:
            return None
        ids = self._by_provider_id.get(receipt.provider_message_id, set())
        return self._rows[next(iter(ids))] if len(ids) == 1 else None

    def why_none(self, receipt: Receipt, *, keeps: bool) -> Recorded:
        """Return the answer to a receipt that finds no row: whether a later settlement may bring its provider's id.

        A reference finds its row by primary key, and nothing is sent before that is committed: none comes later.
        """
        name = receipt.provider_message_id
        may_come = receipt.reference is None and name in self._storable and name not in self._by_provider_id
        return Recorded.KEPT if keeps and may_come else Recorded.UNKNOWN_MESSAGE


def _told(row: Any) -> Told:
    asked_again_at, was_doubted = past_attempts(row.history, row.attempt)
    return Told(
        id=row.id,
        status=row.status,
        attempt=row.attempt,
        delivered_at=row.delivered_at,
        read_at=row.read_at,
        undeliverable_at=row.undeliverable_at,
        provider_message_id=row.provider_message_id,
        asked_again_at=asked_again_at,
        was_doubted=was_doubted,
    )


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
    """Yield the changes in pieces, in which no row stands twice: an UPDATE would take one of them."""
    while changes:
        first: dict[int, tuple[Told, Receipt]] = {}
        later = [change for change in changes if first.setdefault(change[0].id, change) is not change]
        whole = iter(first.values())
        while piece := list(islice(whole, AT_ONCE)):
            yield piece
        changes = later


def _reason(receipt: Receipt) -> str | None:
    return clean_reason(": ".join(filter(None, (receipt.code, receipt.reason))))


def _change(host: HostSession, row: Told, receipt: Receipt) -> receiving.Change:
    reason = _reason(receipt)
    return {
        "id": row.id,
        "status": row.status,
        "at": moment_text(receipt.at),
        "delivered_at": _text(row.delivered_at),
        "read_at": _text(row.read_at),
        "undeliverable_at": _text(row.undeliverable_at),
        "provider_message_id": row.provider_message_id and host.storable(row.provider_message_id),
        "event": receipt.event,
        "reason": reason and host.storable(reason),
        "provider": host.storable(receipt.provider),
    }


def _heard(found: Any, before: Told, after: Told, receipt: Receipt) -> Heard:
    was_known = {"delivered": before.delivered_at, "read": before.read_at}
    is_known = {"delivered": after.delivered_at, "read": after.read_at}
    news = {event for event, at in is_known.items() if at is not None and was_known[event] is None}
    if latest_receipt(after) == "undeliverable" != latest_receipt(before):
        news.add("undeliverable")
    is_timed = receipt.event == "delivered" and "delivered" in news and found.sent_at is not None
    return Heard(
        receipt=receipt,
        message_id=before.id,
        message_type=found.message_type,
        trace_context=found.trace_context,
        status=after.status,
        news=frozenset(news),
        # By two clocks, of which the provider's may be behind.
        sent_to_delivered=max(receipt.at - found.sent_at, timedelta(0)) if is_timed else None,
        # A receipt ends the status in which `has_doubt` was found.
        resolves_doubt=(before.status == MessageStatus.IN_DOUBT or (found.has_doubt and before.status == found.status))
        and after.status != MessageStatus.IN_DOUBT,
    )


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment_text(moment)
