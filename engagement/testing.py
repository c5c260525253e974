"""What every transport must keep, as tests: point `TransportContract` at yours, and let pytest or unittest run it.

A transport is called here by what calls it in a worker, so an outcome means here what it means there.
"""

from __future__ import annotations

import logging
import sys
import time
import unittest
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import count
from queue import Empty

from engagement._claim import START, Claim, clock
from engagement._sending.protocols import Transport
from engagement._sending.sender import Answer, Ready, Sender
from engagement.messages import OutgoingMessage
from engagement.models import Destination
from engagement.outcomes import InDoubt, NotSent, Outcome, Refused, Sent, classify_exception
from engagement.words import RenderedMessage

_numbers = count(1)


class TransportContract:
    """The contract of a transport. Subclass it as `class TestMine(TransportContract)`, and say how to reach yours.

    Needed are `make_transport` and the four `far_side_…` hooks that raise `NotImplementedError`; each says what the
    far side does from then on, and a test calls one before `make_transport`, some a second one after it. The far side
    is yours: best a real server on loopback. Set it up in an autouse fixture, or in `setup_method`.

    `answers_within` is the longest that a send may take, time-out included. `secrets` must show up nowhere.
    """

    answers_within: timedelta = timedelta(seconds=10)
    secrets: Collection[str] = ()

    # What the host says

    def make_transport(self) -> Transport:
        """Return a new transport, to be used from any thread."""
        raise NotImplementedError("make_transport: return your transport")

    def close_transport(self, transport: Transport) -> None:
        """Free what the transport holds: by default with its `close`, if it has one."""
        close = getattr(transport, "close", None)
        if close is not None:
            close()

    def make_message(self) -> OutgoingMessage:
        """Return a message of its own: another id, key, destination and content than any before."""
        number = next(_numbers)
        return RenderedMessage(
            id=number,
            idempotency_key=f"contract-{number}:reminder:2030-01-01",
            user_id=f"contract-{number}",
            message_type="reminder",
            message_key="reminder.appointment",
            message_params={"name": f"Personal-{number}-Param", "at": "12:30"},
            destination=Destination.INDIVIDUAL,
            destination_jid=f"{55_119_000_000_000 + number}@s.whatsapp.net",
            scheduled_for=datetime.now(UTC),
            attempt=1,
            retry_count=0,
            text=f"Hello Personal-{number}-Text",
        )

    def far_side_accepts(self) -> None:
        """Make the far side take messages."""
        raise NotImplementedError("far_side_accepts: make the far side take messages")

    def far_side_refuses(self) -> None:
        """Make the far side say that it never will take a message: a wrong number, say."""
        raise NotImplementedError("far_side_refuses: make the far side refuse messages")

    def far_side_times_out(self) -> None:
        """Make the far side take requests and answer none for longer than `answers_within`."""
        raise NotImplementedError("far_side_times_out: make the far side silent")

    def far_side_unreachable(self) -> None:
        """Make it impossible to connect to the far side."""
        raise NotImplementedError("far_side_unreachable: stop the far side")

    def far_side_breaks_off(self) -> None:
        """Make the far side take requests, and cut the connection instead of answering. Optional."""
        raise unittest.SkipTest("far_side_breaks_off is not given")

    def effects_of(self, message: OutgoingMessage) -> int | None:
        """Return how often the far side acted on the message's delivery id; None if it cannot be told.

        Optional, unless the transport says that it is idempotent.
        """
        del message
        return None

    def classify(self, error: BaseException) -> Outcome:
        """Return what an exception of the transport means: by default, what a worker takes it for."""
        return classify_exception(error)

    # What is promised

    def test_what_is_accepted_is_sent(self) -> None:
        """A message that the far side takes is `Sent`, and has one effect."""
        self.far_side_accepts()
        with self._calling() as calls:
            message = self.make_message()
            answer = calls.send(message)
            _expect(answer, Sent, "the far side took the message")
            self._expect_effects(message, at_least=1, at_most=1)

    def test_what_is_refused_is_refused(self) -> None:
        """An ordinary refusal is `Refused`, without an exception and without an effect."""
        self.far_side_refuses()
        with self._calling() as calls:
            answer = calls.send(self.make_message())
            _require(answer.error is None, f"an ordinary refusal raised {type(answer.error).__name__}")
            _expect(answer, Refused, "the far side never will take the message")

    def test_silence_is_a_doubt(self) -> None:
        """A far side that took the request and says nothing may have acted: `InDoubt`, in time, and no second try."""
        self.far_side_times_out()
        with self._calling() as calls:
            message = self.make_message()
            _expect(calls.send(message), InDoubt, "the far side took the request and may have acted")
            self._expect_effects(message, at_most=1)

    def test_a_broken_connection_is_a_doubt(self) -> None:
        """A connection that breaks after the request was written leaves a doubt, and no second try is made."""
        self.far_side_breaks_off()
        with self._calling() as calls:
            message = self.make_message()
            _expect(calls.send(message), InDoubt, "the far side took the request and may have acted")
            self._expect_effects(message, at_most=1)

    def test_what_cannot_be_reached_was_not_sent(self) -> None:
        """Without a connection nothing left: `NotSent`, so that it is tried again."""
        self.far_side_unreachable()
        with self._calling() as calls:
            _expect(calls.send(self.make_message()), NotSent, "no connection was made, so nothing left")

    def test_an_idempotent_transport_has_one_effect(self) -> None:
        """A transport that says it is idempotent may send a delivery id again: `Sent` both times, and one effect."""
        self.far_side_accepts()
        with self._calling() as calls:
            self._skip_unless_idempotent(calls)
            message = self.make_message()
            for attempt in (1, 2):
                answer = calls.send(replace(message, attempt=attempt, retry_count=attempt - 1))
                _expect(answer, Sent, f"the far side has the message (attempt {attempt})")
            self._expect_effects(message, at_least=1, at_most=1)

    def test_sending_again_resolves_a_doubt(self) -> None:
        """With an idempotent transport, a delivery id that is sent again after a time-out has one effect."""
        self.far_side_times_out()
        with self._calling() as calls:
            self._skip_unless_idempotent(calls)
            message = self.make_message()
            calls.send(message)
            self.far_side_accepts()
            again = calls.send(replace(message, attempt=2, retry_count=1))
            _expect(again, Sent, "the far side takes messages again")
            self._expect_effects(message, at_least=1, at_most=1)

    def test_look_up_finds_what_was_sent(self) -> None:
        """`look_up` says `Sent` of a message that was, and never of one that was not."""
        self.far_side_accepts()
        with self._calling() as calls:
            self._skip_without(calls, "look_up")
            message = self.make_message()
            calls.send(message)
            _expect(calls.look_up(message), Sent, "look_up was asked for a message that was sent")
            unknown = calls.look_up(self.make_message())
            _require(not isinstance(unknown.outcome, Sent), "look_up says Sent of a message that was never sent")

    def test_look_up_without_an_answer_knows_nothing(self) -> None:
        """While the far side cannot be reached, `look_up` does not know: `NotSent` would send a second time."""
        self.far_side_accepts()
        with self._calling() as calls:
            self._skip_without(calls, "look_up")
            message = self.make_message()
            calls.send(message)
            self.far_side_unreachable()
            answer = calls.look_up(message)
            _require(not isinstance(answer.outcome, NotSent), "look_up says NotSent without an answer of the far side")

    def test_look_up_does_not_deny_what_timed_out(self) -> None:
        """What the far side acted on before the time-out is never `NotSent` in `look_up`."""
        self.far_side_times_out()
        with self._calling() as calls:
            self._skip_without(calls, "look_up")
            message = self.make_message()
            calls.send(message)
            self.far_side_accepts()
            denies = isinstance(calls.look_up(message).outcome, NotSent)
            _require(not (denies and self.effects_of(message)), "look_up says NotSent of what has had an effect")

    def test_ready_tells_whether_it_can_send(self) -> None:
        """`ready` is True while the far side takes messages."""
        self.far_side_accepts()
        with self._calling() as calls:
            self._skip_without(calls, "ready")
            answer = calls.ready()
            _require(answer is True, f"ready answered {answer!r} while the far side takes messages")

    def test_ready_is_false_without_a_far_side(self) -> None:
        """`ready` is False, or raises, in time, while the far side cannot be reached."""
        self.far_side_unreachable()
        with self._calling() as calls:
            self._skip_without(calls, "ready")
            answer = calls.ready()
            _require(answer is False or isinstance(answer, Exception), f"ready answered {answer!r} without a far side")

    def test_threads_do_not_mix_messages(self) -> None:
        """Messages that are sent at the same time all arrive, each once."""
        self.far_side_accepts()
        with self._calling(concurrency=8) as calls, _threads_that_interrupt_each_other():
            messages = [self.make_message() for _ in range(24)]
            answers = calls.send_at_once(messages)
            for message, answer in zip(messages, answers, strict=True):
                _expect(answer, Sent, "the far side takes messages")
                self._expect_effects(message, at_least=1, at_most=1)
            ids = [answer.outcome.provider_message_id for answer in answers if isinstance(answer.outcome, Sent)]
            given = [provider_id for provider_id in ids if provider_id is not None]
            _require(len(set(given)) == len(given), "two messages that were sent at once have one provider id")

    # How it is found out

    @contextmanager
    def _calling(self, *, concurrency: int = 1) -> Iterator[_Calls]:
        with _logged() as logged:
            transport = self.make_transport()
            calls = _Calls(self, transport, concurrency)
            try:
                yield calls
            finally:
                calls.close()
                self.close_transport(transport)
        self._expect_no_secrets([repr(transport), str(transport)], calls.messages, "repr of the transport")
        self._expect_no_secrets(calls.reasons, calls.messages, "reason of an outcome")
        self._expect_no_secrets(logged, calls.messages, "log")

    def _expect_effects(self, message: OutgoingMessage, *, at_least: int = 0, at_most: int) -> None:
        effects = self.effects_of(message)
        _require(
            effects is None or at_least <= effects <= at_most,
            f"the far side acted {effects} times on one delivery id, not {at_least} to {at_most} times",
        )

    def _skip_unless_idempotent(self, calls: _Calls) -> None:
        if not calls.is_idempotent:
            raise unittest.SkipTest("the transport does not say that it is idempotent")
        effects = self.effects_of(self.make_message())
        _require(effects is not None, "idempotent: cannot be checked without effects_of")

    def _skip_without(self, calls: _Calls, name: str) -> None:
        if getattr(calls.transport, name, None) is None:
            raise unittest.SkipTest(f"the transport has no {name}")

    def _expect_no_secrets(self, texts: Sequence[str], messages: Sequence[OutgoingMessage], where: str) -> None:
        personal = [secret for message in messages for secret in _personal(message)]
        for kind, values in (("secret", self.secrets), ("person's address, params or text", personal)):
            shown = any(value in text for value in values for text in texts)
            _require(not shown, f"a {kind} is in the {where}")


@dataclass(slots=True)
class _Answer:
    outcome: Outcome
    error: BaseException | None


@dataclass(slots=True)
class _Calls:
    """Calls a transport as a worker does, and waits no longer than the contract allows."""

    contract: TransportContract
    transport: Transport
    concurrency: int
    messages: list[OutgoingMessage] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    _errors: list[BaseException] = field(default_factory=list)
    _sender: Sender = field(init=False)

    def __post_init__(self) -> None:
        self._sender = Sender(self.transport, concurrency=self.concurrency, classify=self._classify)

    @property
    def is_idempotent(self) -> bool:
        return self._sender.idempotent

    def send(self, message: OutgoingMessage) -> _Answer:
        return self.send_at_once([message])[0]

    def send_at_once(self, messages: Sequence[OutgoingMessage]) -> list[_Answer]:
        answers = self._call([_claim(message) for message in messages])
        for message, answer in zip(messages, answers, strict=True):
            effects = None if isinstance(answer.outcome, Sent | InDoubt) else self.contract.effects_of(message)
            _require(not effects, f"the answer is {type(answer.outcome).__name__}, and the far side acted")
        return answers

    def look_up(self, message: OutgoingMessage) -> _Answer:
        return self._call([_claim(message, lost_workers=1)])[0]

    def ready(self) -> object:
        """Return what a worker would hear: the answer, or the exception."""
        self._sender.ask_ready()
        try:
            news = self._sender.news.get(timeout=self.contract.answers_within.total_seconds())
        except Empty:
            raise AssertionError(f"ready did not answer within {self.contract.answers_within}") from None
        assert isinstance(news, Ready)
        return news.said

    def close(self) -> None:
        self._sender.close()

    def _call(self, claims: list[Claim]) -> list[_Answer]:
        self.messages += [claim.message for claim in claims]
        self._errors.clear()
        last = time.monotonic() + self.contract.answers_within.total_seconds()
        self._sender.start(claims)
        outcomes: dict[int, Outcome] = {}
        with suppress(Empty):
            while len(outcomes) < len(claims):
                news = self._sender.news.get(timeout=max(last - time.monotonic(), 0.001))
                if isinstance(news, Answer):
                    outcomes[id(news.claim)] = news.outcome
        _require(len(outcomes) == len(claims), f"no answer came within {self.contract.answers_within}")
        self.reasons += [reason for outcome in outcomes.values() if (reason := getattr(outcome, "reason", None))]
        error = self._errors[0] if self._errors else None
        return [_Answer(outcomes[id(claim)], error) for claim in claims]

    def _classify(self, error: BaseException) -> Outcome:
        self._errors.append(error)
        return self.contract.classify(error)


def _claim(message: OutgoingMessage, *, lost_workers: int = 0) -> Claim:
    an_hour = 3600
    return Claim(
        message=message, place=START, claimed_by="contract", held_until=clock() + an_hour, lost_workers=lost_workers
    )


def _expect(answer: _Answer, wanted: type[Outcome], because: str) -> None:
    raised = "" if answer.error is None else f", from {type(answer.error).__name__}"
    _require(
        isinstance(answer.outcome, wanted),
        f"{because}: that is {wanted.__name__}, not {type(answer.outcome).__name__}{raised}",
    )


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise AssertionError(problem)


def _personal(message: OutgoingMessage) -> list[str]:
    number = message.destination_jid.partition("@")[0].rpartition(".")[2]  # Of a JID, or of Meta's id of a person.
    texts = [message.destination_jid, number]
    # Short ones, such as a number or a time of day, would be found anywhere.
    texts += [value for value in message.message_params.values() if isinstance(value, str) and len(value) > 5]  # noqa: PLR2004
    return [*texts, message.text] if isinstance(message, RenderedMessage) else texts


@contextmanager
def _logged() -> Iterator[list[str]]:
    """Collect what would be logged in production: INFO and above, of everybody."""
    texts: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(self.format(record))

    root, collector = logging.getLogger(), Collector(logging.INFO)
    level = root.level
    root.addHandler(collector)
    root.setLevel(min(level, logging.INFO) or logging.INFO)
    try:
        yield texts
    finally:
        root.removeHandler(collector)
        root.setLevel(level)


@contextmanager
def _threads_that_interrupt_each_other() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
