"""What a run left behind, and what is wrong with it: the table, its history and the ledger must tell the same story."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Self

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from engagement._sql.claiming import RECOVERY
from engagement.verification import Violation, verify

from .ledger import Entry
from .orders import Point

# Written by the database itself, in the transactions that it tells of, so that it knows what a dead worker held.
RECORD_CHANGES = """
CREATE TABLE chaos_change (
    message_id bigint, attempt int, was text, became text, was_held_by text, held_by text,
    at timestamptz DEFAULT clock_timestamp()
);
CREATE FUNCTION chaos_record() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    INSERT INTO chaos_change
    VALUES (new.id, new.attempt, old.status, new.status, old.claimed_by, new.claimed_by);
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_record AFTER UPDATE ON engagement_message_queue FOR EACH ROW
WHEN (old.status <> new.status OR old.claimed_by IS DISTINCT FROM new.claimed_by)
EXECUTE FUNCTION chaos_record();
"""


@dataclass(frozen=True)
class Death:
    """A worker that was killed; `point` None: at a random moment."""

    pid: int
    point: Point | None
    concurrency: int = 1


@dataclass(frozen=True)
class Attempt:
    """One claim of one message."""

    message_id: int
    attempt: int


@dataclass
class Evidence:
    """All that is known after a run."""

    queued: set[str]
    messages: list[SimpleNamespace]
    """The rows of the table."""
    changes: list[SimpleNamespace]
    """The rows of `chaos_change`, in their order."""
    ledger: list[Entry]
    broken_promises: list[Violation]
    deaths: list[Death] = field(default_factory=list)
    told_cancelled: set[int] = field(default_factory=set)

    @classmethod
    def gather(cls, engine: Engine, **known) -> Self:
        """Read what the database knows, and add what only we do."""
        with Session(engine) as session:
            return cls(
                messages=_rows(session, "SELECT * FROM engagement_message_queue ORDER BY id"),
                changes=_rows(session, "SELECT * FROM chaos_change ORDER BY at"),
                broken_promises=verify(session),
                **known,
            )

    @cached_property
    def in_ledger(self) -> Counter[str]:
        """How many times each key was sent."""
        return Counter(entry.key for entry in self.ledger)

    @cached_property
    def sends(self) -> set[tuple[str, int]]:
        """The keys that were sent, each with the attempt that did it."""
        return {(entry.key, entry.attempt) for entry in self.ledger}

    @cached_property
    def by_id(self) -> dict:
        """The messages, by their ids."""
        return {message.id: message for message in self.messages}

    @cached_property
    def held_at_death(self) -> dict[int, set[Attempt]]:
        """What each worker claimed and did not settle itself."""
        held: dict[int, set[Attempt]] = {}
        for change in self.changes:
            attempt = Attempt(change.message_id, change.attempt)
            if change.became == "sending" and change.was == "pending":
                held.setdefault(_pid(change.held_by), set()).add(attempt)
            elif change.was == "sending" and change.became != "sending" and not _is_recoverer(change.held_by):
                held[_pid(change.held_by)].discard(attempt)
        return {pid: attempts for pid, attempts in held.items() if attempts}

    @cached_property
    def recovered_at_death(self) -> dict[int, set[Attempt]]:
        """What each worker took over from the dead and did not settle itself."""
        taken: dict[int, set[Attempt]] = {}
        for change in self.changes:
            if _is_recoverer(change.held_by or ""):
                attempts = taken.setdefault(_pid(change.held_by), set())
                attempt = Attempt(change.message_id, change.attempt)
                (attempts.add if change.became == "sending" else attempts.discard)(attempt)
        return taken

    def was_sent(self, attempt: Attempt) -> bool:
        """Whether this attempt is in the ledger."""
        return (self.by_id[attempt.message_id].idempotency_key, attempt.attempt) in self.sends

    def was_answered(self, attempt: Attempt) -> bool:
        """Whether the transport has said what became of it."""
        act = self.by_id[attempt.message_id].message_params.get("act")
        return self.was_sent(attempt) or act in {"refuse", "fail"} or (act == "fail_first" and attempt.attempt == 1)


def _rows(session: Session, sql: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(**row) for row in session.execute(text(sql)).mappings()]


def _pid(holder: str) -> int:
    return int(holder.partition("#")[0])


def _is_recoverer(holder: str) -> bool:
    return RECOVERY in holder


# What must be true after every run ------------------------------------------------------------------------------------


def wrong_in_any_run(evidence: Evidence) -> Iterator[str]:
    """Yield what is lost, invented, left over, or says of itself what is not so."""
    keys = Counter(message.idempotency_key for message in evidence.messages)
    for key in evidence.queued - keys.keys():
        yield f"lost: {key} was queued and is not in the table"
    for key in evidence.in_ledger.keys() - evidence.queued:
        yield f"invented: {key} is in the ledger and was not queued"
    for message in evidence.messages:
        if message.status in {"pending", "sending"}:
            yield f"left over: message {message.id} is {message.status}"
        if message.status == "sent" and not evidence.in_ledger[message.idempotency_key]:
            yield f"not sent: message {message.id} is sent, and not in the ledger"
    for message_id in evidence.told_cancelled:
        if evidence.by_id[message_id].status != "cancelled":
            yield f"not cancelled: message {message_id} is {evidence.by_id[message_id].status}"
    for violation in evidence.broken_promises:
        yield f"broken promise: {violation}"


# A transport that is not idempotent -----------------------------------------------------------------------------------


def wrong_if_sent_at_most_once(evidence: Evidence) -> Iterator[str]:
    """Yield what was sent twice, or although it says otherwise, and every doubt that no death explains exactly."""
    for key, sends in evidence.in_ledger.items():
        if sends > 1:
            yield f"sent twice: {key} is {sends} times in the ledger"
    for message in evidence.messages:
        if message.status in {"failed", "cancelled", "expired"} and evidence.in_ledger[message.idempotency_key]:
            yield f"sent all the same: message {message.id} is {message.status}, and in the ledger"
    yield from _wrong_doubts(evidence)
    for death in evidence.deaths:
        yield from _wrong_at_death(evidence, death)


def _wrong_doubts(evidence: Evidence) -> Iterator[str]:
    """Compare what is in doubt with what was in the hands of the dead, and with what the far side left in doubt."""
    in_doubt = {Attempt(row.id, row.attempt) for row in evidence.messages if row.status == "in_doubt"}
    killed = {death.pid for death in evidence.deaths}
    explained = {attempt for pid in killed for attempt in evidence.held_at_death.get(pid, set())}
    answered_so = {
        attempt for attempt in in_doubt if evidence.by_id[attempt.message_id].message_params.get("act") == "doubt"
    }
    for attempt in in_doubt - explained - answered_so:
        yield f"unexplained doubt: {attempt} is in doubt, and nobody died of it"
    for attempt in explained - in_doubt:
        yield f"forgotten doubt: {attempt} was held by a worker that was killed, and is not in doubt"


def _wrong_at_death(evidence: Evidence, death: Death) -> Iterator[str]:
    """Compare what the worker held with what it can have held at the point where it died."""
    held = evidence.held_at_death.get(death.pid, set())
    sent = {attempt for attempt in held if evidence.was_sent(attempt)}
    answered = {attempt for attempt in held if evidence.was_answered(attempt)}
    match death.point:
        case None:
            fits = len(held) <= death.concurrency
        case Point.BEFORE_CLAIM_COMMIT:  # which may also settle what was sent before
            fits = held == answered and len(held) <= 1
        case Point.AFTER_CLAIM_COMMIT | Point.BEFORE_SEND:
            fits = len(held) == 1 and not sent
        case Point.IN_SEND:
            fits = len(held) == 1
        case Point.AFTER_SEND:
            fits = len(held) == 1 and held == sent
        case Point.BEFORE_SETTLE_COMMIT:  # of its own send, or of what it recovered
            recovered = evidence.recovered_at_death.get(death.pid, set())
            fits = held == answered and (len(held) == 1 or (not held and len(recovered) >= 1))
        case Point.AFTER_SETTLE_COMMIT:  # which may also have claimed the next
            fits = len(held) <= 1 and not sent
    if not fits:
        yield f"wrong hand: {death} held {held}, of which {sent} were sent"


# A transport that can be asked, or asked twice ------------------------------------------------------------------------


def wrong_if_all_are_sent(evidence: Evidence, *, is_deduplicated: bool) -> Iterator[str]:
    """Yield what does not end as sent once, where the far side counts a delivery id once if `is_deduplicated`."""
    for message in evidence.messages:
        if message.status != "sent":
            yield f"not sent: message {message.id} is {message.status}"
    if not is_deduplicated:
        for key, sends in evidence.in_ledger.items():
            if sends != 1:
                yield f"sent twice: {key} is {sends} times in the ledger"
        return
    deliveries = {(entry.key, entry.delivery_id) for entry in evidence.ledger}
    if len(deliveries) != len(evidence.queued) or len({delivery_id for _, delivery_id in deliveries}) != len(
        deliveries
    ):
        yield f"sent twice: {len(deliveries)} delivery ids for {len(evidence.queued)} messages"


# With an order for each destination -----------------------------------------------------------------------------------


def wrong_if_in_order(evidence: Evidence) -> Iterator[str]:
    """Yield the claims beside a living worker's claim for the same destination, and those after a younger one's.

    A dead worker's lease runs out, and its message may come again later.
    """
    dead = {death.pid for death in evidence.deaths}
    going_on: dict[str, dict[int, int]] = {}
    last: dict[str, tuple[Any, int]] = {}
    # Of those that were queued later, an older one may have come after a younger one was claimed.
    first_batch = min(message.created_at for message in evidence.messages)
    for change in evidence.changes:
        message = evidence.by_id[change.message_id]
        here = going_on.setdefault(message.destination_jid, {})
        if change.became != "sending":
            here.pop(message.id, None)
            continue
        if change.was == "pending":
            others = {other for other, pid in here.items() if pid not in dead and other != message.id}
            if others:
                yield f"at once: message {message.id} was claimed beside {others}"
            place = (message.scheduled_for, message.id)
            if change.attempt == 1 and message.created_at == first_batch:
                youngest = last.setdefault(message.destination_jid, place)
                if place < youngest:
                    yield f"out of order: message {message.id} was claimed after a younger one"
                last[message.destination_jid] = max(place, youngest)
        if _is_recoverer(change.held_by):
            here.pop(message.id, None)  # It is asked about, since its lease ran out, and not sent.
        else:
            here[message.id] = _pid(change.held_by)
