"""The calls of a transport, through a worker's own `Sender`: an outcome has the same meaning here as there."""

from __future__ import annotations

import logging
import sys
import time
import unittest
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import Empty

from engagement._claim import START, Claim, clock
from engagement._sending.protocols import Transport
from engagement._sending.sender import Ready, Sender
from engagement.messages import OutgoingMessage
from engagement.outcomes import InDoubt, Outcome, Sent
from engagement.testing.far_side import FarSide
from engagement.words import RenderedMessage


@dataclass(slots=True)
class CallAnswer:
    """The answer to one call: the outcome, and the exception behind it, if there was one."""

    outcome: Outcome
    error: BaseException | None


@dataclass(slots=True)
class Calls:
    """Calls a transport as a worker does, and waits no longer than the contract allows."""

    far_side: FarSide
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
        """Whether the transport says that it is idempotent."""
        return self._sender.idempotent

    def send(self, message: OutgoingMessage) -> CallAnswer:
        """Send one message."""
        return self.send_at_once([message])[0]

    def send_at_once(self, messages: Sequence[OutgoingMessage]) -> list[CallAnswer]:
        """Send several messages at the same time. Fail the test if one had an effect and is `NotSent` or `Refused`."""
        answers = self._call([_claim(message) for message in messages])
        for message, answer in zip(messages, answers, strict=True):
            effects = None if isinstance(answer.outcome, Sent | InDoubt) else self.far_side.effects_of(message)
            require(not effects, f"the answer is {type(answer.outcome).__name__}, and the far side acted")
        return answers

    def look_up(self, message: OutgoingMessage) -> CallAnswer:
        """Look a message up, like a worker that has recovered it."""
        return self._call([_claim(message, lost_workers=1)])[0]

    def ready(self) -> object:
        """Return the answer of `ready`, or its exception, as a worker hears it."""
        self._sender.ask_ready()
        try:
            news = self._sender.news.get(timeout=self.far_side.answers_within.total_seconds())
        except Empty:
            raise AssertionError(f"ready did not answer within {self.far_side.answers_within}") from None
        assert isinstance(news, Ready)
        return news.said

    def expect_effects(self, message: OutgoingMessage, *, at_least: int = 0, at_most: int) -> None:
        """Fail the test unless the far side acted so often. Nothing is checked if `effects_of` cannot tell."""
        effects = self.far_side.effects_of(message)
        require(
            effects is None or at_least <= effects <= at_most,
            f"the far side acted {effects} times on one delivery id, not {at_least} to {at_most} times",
        )

    def skip_unless_idempotent(self) -> None:
        """Skip the test if the transport does not say that it is idempotent."""
        if not self.is_idempotent:
            raise unittest.SkipTest("the transport does not say that it is idempotent")
        effects = self.far_side.effects_of(self.far_side.make_message())
        require(effects is not None, "idempotent: cannot be checked without effects_of")

    def skip_without(self, name: str) -> None:
        """Skip the test if the transport lacks something optional."""
        if getattr(self.transport, name, None) is None:
            raise unittest.SkipTest(f"the transport has no {name}")

    def expect_no_secrets(self, texts: Sequence[str], where: str) -> None:
        """Fail the test if a text shows a secret, or personal data of a message (its address, params, text)."""
        personal = [secret for message in self.messages for secret in _personal(message)]
        for kind, values in (("secret", self.far_side.secrets), ("person's address, params or text", personal)):
            shown = any(value in text for value in values for text in texts)
            require(not shown, f"a {kind} is in the {where}")

    def close(self) -> None:
        """End the calling threads."""
        self._sender.close()

    def _call(self, claims: list[Claim]) -> list[CallAnswer]:
        self.messages += [claim.message for claim in claims]
        self._errors.clear()
        last = time.monotonic() + self.far_side.answers_within.total_seconds()
        self._sender.start(claims)
        outcomes: dict[int, Outcome] = {}
        with suppress(Empty):
            while len(outcomes) < len(claims):
                news = self._sender.news.get(timeout=max(last - time.monotonic(), 0.001))
                if isinstance(news, tuple):
                    claim, outcome = news
                    outcomes[id(claim)] = outcome
        require(len(outcomes) == len(claims), f"no answer came within {self.far_side.answers_within}")
        self.reasons += [reason for outcome in outcomes.values() if (reason := getattr(outcome, "reason", None))]
        error = self._errors[0] if self._errors else None
        return [CallAnswer(outcomes[id(claim)], error) for claim in claims]

    def _classify(self, error: BaseException) -> Outcome:
        self._errors.append(error)
        return self.far_side.classify(error)


@contextmanager
def calling(far_side: FarSide, *, concurrency: int = 1) -> Iterator[Calls]:
    """Hand out a transport to be called. At the end, look for secrets in its `repr`, its reasons and the log."""
    with _logged() as logged:
        transport = far_side.make_transport()
        calls = Calls(far_side, transport, concurrency)
        try:
            yield calls
        finally:
            calls.close()
            far_side.close_transport(transport)
    calls.expect_no_secrets([repr(transport), str(transport)], "repr of the transport")
    calls.expect_no_secrets(calls.reasons, "reason of an outcome")
    calls.expect_no_secrets(logged, "log")


def _claim(message: OutgoingMessage, *, lost_workers: int = 0) -> Claim:
    an_hour = 3600
    return Claim(
        message=message, place=START, claimed_by="contract", held_until=clock() + an_hour, lost_workers=lost_workers
    )


def expect(answer: CallAnswer, wanted: type[Outcome], because: str) -> None:
    """Fail the test unless the outcome is of the kind that follows from the far side's behaviour."""
    raised = "" if answer.error is None else f", from {type(answer.error).__name__}"
    require(
        isinstance(answer.outcome, wanted),
        f"{because}: that is {wanted.__name__}, not {type(answer.outcome).__name__}{raised}",
    )


def require(holds: bool, problem: str) -> None:
    """Fail the test with the problem unless it holds."""
    if not holds:
        raise AssertionError(problem)


def _personal(message: OutgoingMessage) -> list[str]:
    number = message.destination_jid.partition("@")[0].rpartition(".")[2]  # From a JID, or from Meta's id of a person.
    texts = [message.destination_jid, number]
    # Short ones, such as a number or a time of day, would be found anywhere.
    texts += [value for value in message.message_params.values() if isinstance(value, str) and len(value) > 5]  # noqa: PLR2004
    return [*texts, message.text] if isinstance(message, RenderedMessage) else texts


@contextmanager
def _logged() -> Iterator[list[str]]:
    """Collect the log of production: INFO and above, of every logger."""
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
def threads_that_interrupt_each_other() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
