"""What an outcome means, and what an exception says: pure rules, with rows on both sides of each boundary."""

import asyncio
import errno
import socket
import ssl
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from engagement.messages import InvalidMessage
from engagement.models import MessageStatus
from engagement.outcomes import (
    LONGEST_DELAY,
    MAX_REASON,
    InDoubt,
    NotSent,
    Postpone,
    Refused,
    Sent,
    Withdraw,
    as_outcome,
    classify_exception,
    clean_reason,
    decide,
    exponential_backoff,
)


def verdict(outcome, *, retry_count=0, idempotent=False, worker_lost=False, backoff=lambda n: timedelta(minutes=n)):
    return decide(
        outcome,
        retry_count=retry_count,
        max_retries=3,
        idempotent=idempotent,
        worker_lost=worker_lost,
        backoff=backoff,
    )


@pytest.mark.parametrize(
    ("outcome", "options", "status", "counts"),
    [
        (Sent("id"), {}, "sent", False),
        (NotSent("x"), {"retry_count": 1}, "pending", True),
        (NotSent("x"), {"retry_count": 2}, "failed", True),
        (NotSent("x"), {"retry_count": 1, "worker_lost": True}, "pending", True),
        (NotSent("x"), {"retry_count": 2, "worker_lost": True}, "in_doubt", True),
        (Refused("x"), {}, "failed", False),
        (InDoubt("x"), {}, "in_doubt", False),
        (InDoubt("x"), {"worker_lost": True}, "in_doubt", False),
        (InDoubt("x"), {"idempotent": True, "retry_count": 1}, "pending", True),
        (InDoubt("x"), {"idempotent": True, "retry_count": 2}, "in_doubt", True),
        (Postpone(datetime(2030, 1, 1, tzinfo=UTC), "x"), {"retry_count": 2}, "pending", False),
        (Withdraw("x"), {}, "cancelled", False),
    ],
)
def test_the_table_of_outcomes(outcome, options, status, counts):
    """Each outcome leads where the contract's table says, on both sides of the last retry."""
    found = verdict(outcome, **options)

    assert (found.status, found.counts_as_failure) == (MessageStatus(status), counts)


def test_a_retry_waits_for_the_longer_of_backoff_and_retry_after():
    """A provider's Retry-After is respected, and cannot make a retry come sooner than the backoff."""
    assert verdict(NotSent("x", timedelta(hours=1))).delay == timedelta(hours=1)
    assert verdict(NotSent("x", timedelta(seconds=1))).delay == timedelta(minutes=1)
    assert verdict(NotSent("x")).delay == timedelta(minutes=1)


def test_a_delay_has_a_bound():
    """A backoff of the host's cannot move a retry beyond what the database can hold."""
    assert verdict(NotSent("x"), backoff=lambda _: timedelta.max).delay == LONGEST_DELAY


def test_exponential_backoff_grows_to_its_longest_and_jitters():
    """The default waits about 1, 5 and 25 minutes, spread by a fifth both ways, and never overflows."""
    exact = exponential_backoff(jitter=0)

    assert [exact(n) for n in (1, 2, 3)] == [timedelta(minutes=1), timedelta(minutes=5), timedelta(minutes=25)]
    assert exact(10_000) == timedelta(hours=6)
    spread = {exponential_backoff()(1).total_seconds() for _ in range(100)}
    assert len(spread) > 50
    assert all(48 <= seconds <= 72 for seconds in spread)


@pytest.mark.parametrize(
    "bad",
    [{"first": timedelta(0)}, {"longest": timedelta(seconds=1)}, {"factor": 0.9}, {"jitter": 1.0}, {"jitter": -0.1}],
)
def test_a_backoff_that_makes_no_sense_is_refused_when_it_is_made(bad):
    """The mistake shows at construction, not at the first failure."""
    with pytest.raises(ValueError, match="exponential_backoff"):
        exponential_backoff(**bad)


def test_answers_in_short_form():
    """None and a provider's id mean sent; anything else that is no outcome proves nothing."""
    assert as_outcome(None) == Sent()
    assert as_outcome("wamid.1") == Sent("wamid.1")
    assert as_outcome(Refused("x")) == Refused("x")
    assert isinstance(as_outcome(True), InDoubt)
    assert isinstance(as_outcome({"status": "ok"}), InDoubt)


def raised_from(error, cause):
    try:
        try:
            raise cause
        except BaseException as inner:
            raise error from inner
    except BaseException as outer:
        return outer


def raised_during(error, context, *, suppressed=False):
    try:
        try:
            raise context
        except Exception:
            if suppressed:
                raise error from None
            raise error
    except Exception as outer:
        return outer


class Timeout(Exception):
    pass


Timeout.__module__ = "requests.exceptions"


class NewConnectionError(Exception):
    pass


NewConnectionError.__module__ = "urllib3.exceptions"


@pytest.mark.parametrize(
    ("error", "usual", "strict"),
    [
        (TimeoutError(), InDoubt, InDoubt),
        (ConnectionResetError(), InDoubt, InDoubt),
        (BrokenPipeError(), InDoubt, InDoubt),
        (ConnectionAbortedError(), InDoubt, InDoubt),
        (asyncio.IncompleteReadError(b"", 1), InDoubt, InDoubt),
        (httpx.RemoteProtocolError("server disconnected"), InDoubt, InDoubt),
        (raised_from(httpx.ReadTimeout("slow"), TimeoutError()), InDoubt, InDoubt),
        (raised_during(RuntimeError("wrapped"), TimeoutError()), InDoubt, InDoubt),
        (Timeout(), InDoubt, InDoubt),
        (KeyboardInterrupt(), InDoubt, InDoubt),
        (ConnectionRefusedError(), NotSent, NotSent),
        (OSError(errno.ECONNREFUSED, "refused"), NotSent, NotSent),
        (socket.gaierror(-2, "unknown"), NotSent, NotSent),
        (ssl.SSLCertVerificationError("bad"), NotSent, NotSent),
        (httpx.ConnectError("no"), NotSent, NotSent),
        (raised_from(httpx.ConnectTimeout("no"), TimeoutError()), NotSent, NotSent),
        (raised_from(Timeout(), NewConnectionError()), NotSent, NotSent),
        (KeyError("template"), NotSent, InDoubt),
        (FileNotFoundError("template"), NotSent, InDoubt),
        (raised_during(KeyError("x"), TimeoutError(), suppressed=True), NotSent, InDoubt),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
def test_what_an_exception_says(error, usual, strict):
    """A time-out or broken connection proves nothing, also as a cause; a connection never made proves it unsent."""
    assert type(classify_exception(error)) is usual
    assert type(classify_exception(error, strict=True)) is strict


def test_a_circle_of_causes_ends():
    """An exception that is its own cause does not hang the worker."""
    first, second = KeyError("a"), KeyError("b")
    first.__cause__, second.__cause__ = second, first

    assert isinstance(classify_exception(first), NotSent)


def test_a_reason_is_stored_as_one_clean_line():
    """A provider's page of HTML, its NULs and lone surrogates cannot make the settle itself fail."""
    assert clean_reason("a\x00b\n\n c\ud800d") == "a b c d"
    assert len(clean_reason("x" * 10_000)) == MAX_REASON
    assert clean_reason("\x00\n") is None
    assert clean_reason(None) is None


def test_outcomes_refuse_times_that_cannot_be_stored():
    """A naive or far moment, and a negative or endless wait, are refused where the host makes them."""
    with pytest.raises(InvalidMessage, match="until"):
        Postpone(datetime(2030, 1, 1), "naive")  # noqa: DTZ001
    with pytest.raises(ValueError, match="retry_after"):
        NotSent("x", timedelta(seconds=-1))
    with pytest.raises(ValueError, match="retry_after"):
        NotSent("x", LONGEST_DELAY + timedelta(seconds=1))
