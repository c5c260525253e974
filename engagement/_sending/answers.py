"""Turns each answer of a transport into an outcome: a value that it returned, or an exception that it raised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError
from typing import Any

from engagement._logging import logger
from engagement._sending.call import LeaseRanOut, MayHaveLeft, Result
from engagement.models import EARLIEST
from engagement.outcomes import Classify, InDoubt, NotSent, Outcome, Postpone, Sent, as_outcome

Read = Callable[[Any, int], list[Outcome]]
"""Turns a returned value into an outcome for each of so many messages."""


class BrokenOff(Exception):  # noqa: N818 - what happened
    """A batch raised `error` after it had told the outcomes of the first messages."""

    def __init__(self, told: list[Outcome], error: BaseException) -> None:
        super().__init__()
        self.told = told
        self.error = error


def outcomes(result: Result, messages: int, read: Read, classify: Classify) -> list[Outcome]:
    """Return an outcome for each message of a call: the transport's answers, or the meaning of its exception.

    See docs/decisions.md#2026-11-27--an-answer-always-arrives.
    """
    try:
        return read(result(), messages)
    except BrokenOff as broken:
        told, outcome = broken.told, _meaning(broken.error, read, classify)
    except BaseException as error:  # noqa: BLE001 - the one place where exceptions of a transport become outcomes
        told, outcome = [], _meaning(error, read, classify)
    return told + [outcome] * (messages - len(told))


def _meaning(error: BaseException, read: Read, classify: Classify) -> Outcome:
    if read is read_look_up:
        return worker_lost(error)  # A look-up that fails says nothing of the send.
    if isinstance(error, LeaseRanOut):
        return Postpone(EARLIEST, "the lease ran out before the send")  # Until now, by the database's clock.
    if isinstance(error, MayHaveLeft):
        return InDoubt(str(error))
    if isinstance(error, CancelledError) or not isinstance(error, Exception):
        return InDoubt(f"{type(error).__name__} in the transport")  # It was torn down, which proves nothing.
    return _classified(error, classify)


def _classified(error: Exception, classify: Classify) -> Outcome:
    try:
        outcome = classify(error)
    except BaseException as second:  # noqa: BLE001 - a broken rule must not lose the outcome
        return InDoubt(f"classify raised {type(second).__name__} for {type(error).__name__}")
    if isinstance(outcome, Outcome):
        return outcome
    return InDoubt(f"classify returned {type(outcome).__name__} for {type(error).__name__}")


def read_send(answer: Any, _: int) -> list[Outcome]:
    return [as_outcome(answer)]


def read_send_many(answers: Any, messages: int) -> list[Outcome]:
    if isinstance(answers, Outcome):
        return [answers] * messages
    # A text, or a mapping, has members too, and says nothing of any message.
    is_sequence = isinstance(answers, Iterable) and not isinstance(answers, str | bytes | Mapping)
    told: list[Outcome] = []
    try:
        for answer in answers if is_sequence else ():
            told.append(as_outcome(answer))  # noqa: PERF401 - a generator sends as it goes, and may raise on its way
    except BaseException as error:
        if len(told) <= messages:
            raise BrokenOff(told, error) from error
    if len(told) != messages:
        return [InDoubt(f"send_many returned {len(told)} outcomes for {messages} messages")] * messages
    return told


def read_look_up(answer: Any, _: int) -> list[Outcome]:
    return [answer if isinstance(answer, Sent | NotSent) else worker_lost()]


def worker_lost(error: BaseException | None = None) -> InDoubt:
    besides = "" if error is None else f"; look_up raised {type(error).__name__}"
    return InDoubt(f"its worker was lost between claim and settle{besides}")


def is_yes(said: object) -> bool:
    """Return whether `ready` said yes. Only True is a yes: most mistakes are true to Python (a coroutine, a text)."""
    if isinstance(said, BaseException):
        logger.warning("engagement.ready_failed error=%s", type(said).__name__)
    elif not isinstance(said, bool):
        logger.warning("engagement.ready_failed error=TypeError answered=%s", type(said).__name__)
    return said is True
