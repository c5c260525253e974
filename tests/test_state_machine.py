"""Random histories of everything that can happen to messages, on a real database, against a dictionary."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from conftest import new_message
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from engagement import (
    EngagementMessageRepository,
    Forgotten,
    InDoubt,
    MessageStatus,
    NewMessage,
    NotSent,
    Postpone,
    QueuedMany,
    Refused,
    Sent,
    Withdraw,
    process_message_queue,
)
from engagement._claim import START, Claim
from engagement._delivery import database as claims
from engagement.outcomes import decide

PAST, LONG_AGO, FUTURE = (
    datetime(2020, 6, 1, tzinfo=UTC),
    datetime(2020, 1, 1, tzinfo=UTC),
    datetime(2100, 1, 1, tzinfo=UTC),
)
AFTER_ALL_PAST = datetime(2021, 1, 1, tzinfo=UTC)
MAX_RETRIES = 3
HOLDER = claims.Holder("slow", timedelta(hours=1))

USERS = st.sampled_from(["ana", "bea"])
TYPES = st.sampled_from(["goodbye", "weekly_review"])
TIMES = st.sampled_from([PAST, PAST, PAST + timedelta(minutes=1), FUTURE])
ENDED_BADLY = (MessageStatus.FAILED, MessageStatus.EXPIRED)
FINISHED = (MessageStatus.SENT, MessageStatus.FAILED, MessageStatus.CANCELLED, MessageStatus.EXPIRED)
FINAL = [Sent("wamid"), Refused("no"), InDoubt("?"), Postpone(FUTURE, "night"), Withdraw("out")]
OUTCOMES = st.sampled_from([*FINAL, Sent("wamid"), InDoubt("?"), *[NotSent("down")] * 4])
ANSWERS = st.sampled_from(["cannot look up", "cannot look up", None, Sent("wamid"), NotSent("never arrived")])
DELAYS = st.sampled_from([timedelta(0), timedelta(0), timedelta(hours=1)])


PLAIN = {
    Sent: ("sent", "sent"),
    Refused: ("failed", "refused"),
    Postpone: ("pending", "postponed"),
    Withdraw: ("cancelled", "withdrawn"),
}


def as_told(outcome, retry_count: int, *, idempotent: bool, lost: bool) -> tuple[str, str, int]:
    """Return status, event and retry_count after an outcome, as the contract's table says."""
    if type(outcome) in PLAIN:
        return *PLAIN[type(outcome)], retry_count
    if isinstance(outcome, InDoubt) and not idempotent:
        return "in_doubt", "in_doubt", retry_count
    event, last = ("not_sent", "failed") if isinstance(outcome, NotSent) else ("in_doubt", "in_doubt")
    failures = retry_count + 1
    if failures < MAX_RETRIES:
        return "pending", event, failures
    return "in_doubt" if lost else last, event, failures


@dataclass
class Message:
    """What the dictionary knows of a message."""

    id: int
    key: str
    user_id: str
    message_type: str
    next_attempt_at: datetime | None
    """None stands for a moment in the future that only the database knows."""
    expires_at: datetime | None
    status: MessageStatus = MessageStatus.PENDING
    attempt: int = 0
    retry_count: int = 0
    has_doubt: bool = False
    is_blanked: bool = False
    is_lost: bool = False
    holder: Claim | None = None
    """The claim that it is held by, or was; None if it was taken over, or claimed by a worker that settled at once."""
    events: list[str] = field(default_factory=list)
    maybe_sent: set[int] = field(default_factory=set)
    """The attempts that may have had an effect: nobody has said that they had none."""

    @property
    def is_due(self) -> bool:
        """Whether a worker may take it now."""
        return self.status == "pending" and self.next_attempt_at is not None and self.next_attempt_at < FUTURE

    @property
    def has_expired(self) -> bool:
        """Whether it is no longer to be sent."""
        return self.expires_at is not None and self.expires_at < FUTURE

    def blank(self, event: str) -> None:
        """Lose what is personal."""
        self.is_blanked = True
        self.events = [event]

    def ends_instead_of_a_claim(self, *, idempotent: bool) -> bool:
        """End if it has expired, or if it may have left and the transport could send it twice."""
        if self.has_expired:
            self.end("expired", "expired")
        elif self.has_doubt and not idempotent:
            self.end("in_doubt", "in_doubt")
        return self.status != "pending"

    def hand_over(self, *, idempotent: bool) -> None:
        """Be claimed, to be sent."""
        assert idempotent or not self.maybe_sent, "a second attempt, though the first one may have had an effect"
        self.status = MessageStatus.SENDING
        self.is_lost = False
        self.holder = None
        self.attempt += 1
        self.maybe_sent.add(self.attempt)

    def settle(self, outcome, attempt: int, now: datetime, delay: timedelta, *, idempotent=False, lost=False) -> None:
        """Take an outcome of the current attempt, as the table of outcomes says."""
        status, event, self.retry_count = as_told(outcome, self.retry_count, idempotent=idempotent, lost=lost)
        if event == "sent" and self.status != "sending":
            event = "resolved"
        if isinstance(outcome, Sent) or (lost and isinstance(outcome, NotSent)):
            self.maybe_sent.clear()  # a look-up speaks of all attempts
            self.has_doubt = False
        elif isinstance(outcome, InDoubt):
            self.has_doubt = True
        else:
            self.maybe_sent.discard(attempt)
        self.is_lost = False
        self.events += [event] if event != "sent" else []
        if status == "pending" and not self.is_blanked:
            self.status = MessageStatus.PENDING
            self.next_attempt_at = None if delay or isinstance(outcome, Postpone) else now
        else:
            self.end("cancelled" if status == "pending" else status)

    def may_have_left(self, attempt: int) -> None:
        """Learn that a claim which was lost is in doubt."""
        self.has_doubt = True
        self.maybe_sent.add(attempt)
        self.events.append("in_doubt")
        if self.status not in ("pending", "sending"):
            self.status = MessageStatus.IN_DOUBT

    def end(self, status: str, event: str | None = None) -> None:
        """Come to an end, which is a doubt if an attempt may have had an effect."""
        is_unsent = status in ("failed", "cancelled", "expired")
        self.status = MessageStatus.IN_DOUBT if is_unsent and self.has_doubt else MessageStatus(status)
        self.events += [event] if event else []

    def again(self, event: str, now: datetime) -> None:
        """Become due with all retries."""
        self.status = MessageStatus.PENDING
        self.retry_count = 0
        self.next_attempt_at = now
        self.events.append(event)


WHICH = st.integers(0, 3)
HAPPENINGS = {
    "queue_message": (2, {"user": USERS, "type_": TYPES, "at": TIMES, "expires": st.booleans()}),
    "queue_messages": (1, {"given": st.lists(st.tuples(USERS, TYPES, TIMES), min_size=1, max_size=5)}),
    "cancel_message": (3, {"which": WHICH}),
    "cancel_pending_messages": (1, {"user": USERS, "type_": st.none() | TYPES}),
    "reschedule_message": (2, {"which": WHICH, "at": TIMES}),
    "retry_message": (4, {"which": WHICH}),
    "resolve_message": (4, {"which": WHICH, "sent": st.sampled_from([False, False, True])}),
    "forget_user": (1, {"user": USERS}),
    "prune_messages": (1, {"older_than": st.sampled_from([timedelta(0), timedelta(days=36_525)])}),
    "get_pending_messages": (1, {"user": USERS}),
    "future_comes": (2, {}),
    "expiry_passes": (1, {"which": WHICH}),
    "leases_run_out": (3, {}),
    "claim_and_freeze": (6, {}),
    "settle_early_or_late": (5, {"which": WHICH, "outcome": OUTCOMES, "delay": DELAYS}),
    "process_one": (
        6,
        {"outcome": OUTCOMES, "answer": ANSWERS, "idempotent": st.sampled_from([True, True, False]), "delay": DELAYS},
    ),
}
"""What can happen, how often in comparison, and with what."""
STEPS = st.sampled_from([name for name, (weight, _) in HAPPENINGS.items() for _ in range(weight)]).flatmap(
    lambda name: st.tuples(st.just(name), st.fixed_dictionaries(HAPPENINGS[name][1]))
)


class Histories(RuleBasedStateMachine):
    """Plays calls of a host, of workers that live, crash or are late, and of people; then compares the whole table."""

    engine: Engine

    def __init__(self):
        super().__init__()
        self.model: dict[str, Message] = {}
        self.claims: list[Claim] = []
        self.seconds = 0
        self.execute("DELETE FROM engagement_message_queue")

    def execute(self, sql: str, **values):
        """Run one statement and commit."""
        with self.engine.begin() as connection:
            return connection.execute(text(sql), values)

    def call(self, method: str, *args, **kwargs):
        """Call one method of a repository and commit."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            return getattr(EngagementMessageRepository(session), method)(*args, **kwargs)

    def now(self) -> datetime:
        """Return a moment that stands for the database's clock: later than all before it, and due."""
        self.seconds += 1
        return AFTER_ALL_PAST + timedelta(seconds=self.seconds)

    def those(self, **wanted) -> list[Message]:
        """Return the messages that have these attributes."""
        found = self.model.values()
        return [message for message in found if all(getattr(message, name) == value for name, value in wanted.items())]

    def pick(self, which: int) -> Message:
        """Return one of the messages that are there."""
        return list(self.model.values())[which % len(self.model)]

    # One rule for all that can happen: of many rules, each history would be played with a few only.
    @rule(step=STEPS)
    def happens(self, step):
        """Something happens."""
        name, arguments = step
        getattr(self, name)(**arguments)

    # A host

    def new(self, user_id: str, message_type: str, scheduled_for: datetime, *, expires: bool) -> NewMessage:
        """Make a message; two of one user and type share a key."""
        return new_message(
            user_id,
            message_type=message_type,
            scheduled_for=scheduled_for,
            expires_at=FUTURE + timedelta(days=1) if expires else None,
            idempotency_key=f"{user_id}:{message_type}",
        )

    def note(self, message: NewMessage, message_id: int) -> None:
        """Write a message that was queued into the dictionary."""
        self.model[message.key] = Message(
            message_id, message.key, message.user_id, message.message_type, message.scheduled_for, message.expires_at
        )

    @initialize()
    def a_message_is_there(self):
        """Most of what can happen needs a message."""
        self.queue_message("ana", "goodbye", PAST, expires=False)

    def queue_message(self, user, type_, at, expires):
        """A key that is not there is created; one that is names its row."""
        message = self.new(user, type_, at, expires=expires)
        queued = self.call("queue_message", message)
        there = self.model.get(message.key)
        assert queued.created == (there is None)
        if there is None:
            self.note(message, queued.message_id)
        else:
            assert (queued.message_id, queued.status) == (there.id, there.status)

    def queue_messages(self, given):
        """Of a batch, what is new is counted once, and everything else is a duplicate."""
        batch = [self.new(*fields, expires=False) for fields in given]
        first_of_each = {message.key: message for message in reversed(batch)}
        new = [message for key, message in first_of_each.items() if key not in self.model]
        assert self.call("queue_messages", iter(batch)) == QueuedMany(len(new), len(batch) - len(new))
        for message in new:
            self.note(message, self.call("get_message_by_key", message.key).id)

    def cancel_message(self, which):
        """What is pending is cancelled; anything else is told."""
        message = self.pick(which)
        answer = self.call("cancel_message", message.id)
        verdict = "already_cancelled" if message.status == "cancelled" else "too_late"
        if message.status == "pending":
            message.end("cancelled", "cancelled")
            verdict = "cancelled" if message.status == "cancelled" else "too_late"
        assert (answer.verdict, answer.status) == (verdict, message.status)

    def cancel_pending_messages(self, user, type_):
        """Exactly what is pending for the user is cancelled."""
        wanted = {"user_id": user, "status": "pending"} | ({} if type_ is None else {"message_type": type_})
        pending = self.those(**wanted)
        for message in pending:
            message.end("cancelled", "cancelled")
        cancelled = [message for message in pending if message.status == "cancelled"]
        assert self.call("cancel_pending_messages", user, type_) == len(cancelled)

    def reschedule_message(self, which, at):
        """What is pending and does not expire before then is moved."""
        message = self.pick(which)
        can_be = message.status == "pending" and (message.expires_at is None or message.expires_at > at)
        assert self.call("reschedule_message", message.id, at) == can_be
        if can_be:
            message.next_attempt_at = at

    def retry_message(self, which):
        """What ended badly becomes due."""
        message = self.pick(which)
        can_be = message.status in ENDED_BADLY and not message.is_blanked
        assert self.call("retry_message", message.id) == can_be
        if can_be:
            message.again("retried", self.now())
            message.expires_at = None if message.has_expired else message.expires_at

    def resolve_message(self, which, *, sent):
        """What is in doubt becomes sent or due."""
        message = self.pick(which)
        can_be = message.status == "in_doubt" and (sent or not message.is_blanked)
        assert self.call("resolve_message", message.id, sent) == can_be
        if can_be:
            message.has_doubt = False
            message.maybe_sent.clear()
        if can_be and sent:
            message.end("sent", "resolved")
        elif can_be:
            message.again("resolved", self.now())

    def forget_user(self, user):
        """All that is known of a user is blanked, and what is pending cancelled."""
        known = self.those(user_id=user, is_blanked=False)
        pending = [message for message in known if message.status == "pending"]
        for message in pending:
            message.end("cancelled")
        cancelled = [message for message in pending if message.status == "cancelled"]
        assert self.call("forget_user", user) == Forgotten(len(cancelled), len(known))
        for message in known:
            message.blank("forgotten")

    def prune_messages(self, older_than):
        """What is finished and old enough is blanked."""
        finished = [
            message
            for message in self.those(is_blanked=False)
            if message.status in FINISHED and not older_than and message.next_attempt_at not in (None, FUTURE)
        ]
        assert self.call("prune_messages", older_than) == len(finished)
        for message in finished:
            message.blank("pruned")

    def get_pending_messages(self, user):
        """All that is pending for the user is shown."""
        found = [message.id for message in self.call("get_pending_messages", user)]
        assert sorted(found) == sorted(message.id for message in self.those(user_id=user, status="pending"))

    # Time

    def future_comes(self):
        """All that was to be sent later is due."""
        self.execute(
            "UPDATE engagement_message_queue SET next_attempt_at = :past WHERE next_attempt_at > now()", past=LONG_AGO
        )
        for message in self.model.values():
            if message.next_attempt_at in (None, FUTURE):
                message.next_attempt_at = LONG_AGO

    def expiry_passes(self, which):
        """A message is not wanted any more."""
        message = self.pick(which)
        self.execute(
            "UPDATE engagement_message_queue SET scheduled_for = :long_ago, expires_at = :past"
            " WHERE idempotency_key = :key",
            long_ago=LONG_AGO,
            past=PAST + timedelta(seconds=30),
            key=message.key,
        )
        message.expires_at = PAST + timedelta(seconds=30)

    def leases_run_out(self):
        """Whoever holds a message is taken for dead."""
        self.execute(
            "UPDATE engagement_message_queue SET lease_expires_at = now() - interval '1 hour' + id * interval '1 us'"
            " WHERE status = 'sending'"
        )
        for message in self.those(status="sending"):
            message.is_lost = True

    # Workers

    def next_due(self) -> Message | None:
        """Return what a worker takes next."""
        due = [message for message in self.model.values() if message.is_due]
        return min(due, key=lambda message: (message.next_attempt_at, message.id), default=None)

    def claim_and_freeze(self):
        """A worker claims, and then dies or is slow."""
        with self.engine.begin() as connection:
            taken = claims.claim(connection, HOLDER, limit=1, after=START, busy=[], one_per_destination=True)
        message = self.next_due()
        if message is not None and message.ends_instead_of_a_claim(idempotent=False):
            ended = {given.id: status for given, status in taken.ended.items()}
            assert (taken.claims, ended) == ([], {message.id: message.status})
        elif message is not None:
            (claim,) = taken.claims
            message.hand_over(idempotent=False)
            assert (claim.message.id, claim.message.attempt) == (message.id, message.attempt)
            message.holder = claim
            self.claims.append(claim)
        else:
            assert (taken.claims, taken.ended) == ([], {})

    def settle_early_or_late(self, which, outcome, delay):
        """A worker that claimed settles: in time, late, twice, or after somebody else has taken over."""
        if not self.claims:
            return
        claim = self.claims[which % len(self.claims)]
        given = claim.message
        verdict = decide(
            outcome,
            retry_count=given.retry_count,
            max_retries=MAX_RETRIES,
            idempotent=False,
            worker_lost=False,
            backoff=lambda _: delay,
        )
        with self.engine.begin() as connection:
            recorded = claims.settle(connection, [(claim, verdict)]).recorded
        message = self.model[given.idempotency_key]
        is_its_attempt, is_its_own = message.attempt == given.attempt, message.holder is claim
        is_late_but_sent = isinstance(outcome, Sent) and message.status != "sent"
        if is_late_but_sent or (is_its_attempt and message.status == "sending" and is_its_own):
            message.settle(outcome, given.attempt, self.now(), delay)
            message.holder = claim
            assert recorded == {claim: message.status}
        elif is_its_own and message.status == verdict.status:
            assert recorded == {claim: message.status}
        elif is_its_own:
            assert recorded in ({}, {claim: message.status})
        else:
            assert recorded == ({claim: message.status} if is_its_attempt and isinstance(outcome, Sent) else {})
            is_doubt = isinstance(outcome, InDoubt) and not message.has_doubt
            if is_its_attempt and is_doubt and message.status not in ("sent", "in_doubt"):
                message.may_have_left(given.attempt)

    def process_one(self, outcome, answer, idempotent, delay):
        """A cron job recovers what was lost, and sends one message."""
        handed_over, looked_up = [], []
        can_look_up = answer != "cannot look up"

        class Transport:
            def send(self, message):
                handed_over.append((message.id, message.attempt))
                return outcome

        def look_up(message):
            looked_up.append(message.id)
            return answer

        transport = Transport()
        transport.idempotent = idempotent
        if can_look_up:
            transport.look_up = look_up
        process_message_queue(self.engine, transport, limit=1, backoff=lambda _: delay, max_retries=MAX_RETRIES)

        lost = self.those(is_lost=True)
        for message in sorted(lost, key=lambda message: message.id):
            found = (can_look_up and answer) or InDoubt("its worker was lost")
            message.holder = None
            message.settle(found, message.attempt, self.now(), delay, idempotent=idempotent, lost=True)
        assert sorted(looked_up) == sorted(message.id for message in lost if can_look_up)
        while (message := self.next_due()) is not None and message.ends_instead_of_a_claim(idempotent=idempotent):
            pass
        if message is None:
            assert handed_over == []
        else:
            message.hand_over(idempotent=idempotent)
            assert handed_over == [(message.id, message.attempt)]
            message.settle(outcome, message.attempt, self.now(), delay, idempotent=idempotent)

    # The whole table

    @invariant()
    def the_table_is_what_the_dictionary_says(self):
        """Row by row."""
        rows = self.execute(
            "SELECT *, destination_jid IS NULL AND message_params = '{}' AS is_blanked,"
            " status = 'pending' AND next_attempt_at <= now() AS is_due FROM engagement_message_queue"
        ).all()
        assert len(rows) == len(self.model)
        for found in rows:
            message = self.model[found.idempotency_key]
            for name in ("id", "user_id", "status", "attempt", "retry_count", "has_doubt", "is_blanked", "is_due"):
                assert getattr(found, name) == getattr(message, name), name
            assert [entry["event"] for entry in found.history] == message.events
            assert (found.sent_at is not None) == (message.status == "sent")
            assert not (message.maybe_sent and message.status in ("failed", "cancelled", "expired")), "ended as unsent"

    @invariant()
    def what_is_counted_is_there(self):
        """Zeros are zeros."""
        counts = self.call("count_by_status").by_status
        assert {status: count for status, count in counts.items() if count} == {
            status: len(self.those(status=status)) for status in {message.status for message in self.model.values()}
        }


def test_every_history_is_what_the_contract_says(engine):
    """Whatever hosts, workers and people do in whatever order, the table is what the contract says it is.

    Above all: no message is handed to a transport while an earlier attempt may have had an effect.
    """
    histories = type("Histories", (Histories,), {"engine": engine})
    run_state_machine_as_test(
        histories,
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],  # Phase.shrink finds the shortest history that fails, and takes minutes
            suppress_health_check=list(HealthCheck),  # a database is slow, and that is no fault
        ),
    )
