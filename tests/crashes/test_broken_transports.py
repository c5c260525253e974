"""Transports and rules of the host that break: what they say of a message is taken for no more than it is."""

import logging
import threading
import time
from datetime import timedelta

import pytest
from conftest import execute, new_message, queue, row, until

from crashes.accidents import LATER, PATIENCE_SECONDS, Running, Transport
from engagement import InDoubt, NotSent, Refused, Sent, process_message_queue


class WithoutText(Exception):
    def __str__(self):
        raise LookupError


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (lambda: Sent(12345), "sent"),
        (lambda: Refused(ValueError("no such number")), "failed"),
        (lambda: Refused(WithoutText()), "failed"),
        (lambda: NotSent(None), "pending"),
        (lambda: InDoubt(7), "in_doubt"),
    ],
)
def test_an_outcome_that_does_not_hold_text_is_recorded_all_the_same(engine, answer, status):
    """A provider's id that is a number, or an exception for a reason, must not turn a known outcome into a doubt."""
    first, second = queue(engine, new_message("first"), new_message("second"))

    process_message_queue(engine, lambda _: answer(), backoff=lambda _: LATER)

    assert (row(engine, first).status, row(engine, second).status) == (status, status)


@pytest.mark.parametrize("sent_first", [0, 1])
def test_a_batch_that_breaks_while_its_outcomes_are_read_keeps_those_that_were(engine, sent_first):
    """`send_many` may be a generator: what it raises on the way speaks of the messages that it had not come to."""
    ids = queue(engine, new_message("first"), new_message("second"))

    class Batch:
        def send_many(self, messages):
            for _ in messages[:sent_first]:
                yield Sent()
            raise TimeoutError

    with Running(engine, Batch(), concurrency=2):
        wanted = ["sent", "in_doubt"] if sent_first else ["in_doubt", "in_doubt"]
        until(lambda: [row(engine, message_id).status for message_id in ids] == wanted)


@pytest.mark.parametrize(
    "answer",
    [lambda messages: {str(message.delivery_id): Refused("no") for message in messages}, lambda _: "ok"],
    ids=["dict", "text"],
)
def test_a_batch_answer_that_is_no_sequence_of_outcomes_is_in_doubt(engine, answer):
    """Neither the keys of a dict nor the letters of a text are taken for provider ids, as if all had been sent."""
    ids = queue(engine, new_message("first"), new_message("second"))

    class Batch:
        def send_many(self, messages):
            return answer(messages)

    process_message_queue(engine, Batch(), concurrency=2)

    assert {row(engine, message_id).status for message_id in ids} == {"in_doubt"}


def test_a_batch_that_is_a_generator_is_timed_out_as_any_other(engine):
    """The sends of a generator are made beside the worker too, which sees that they take too long."""
    (message_id,) = queue(engine, new_message())
    may_end = threading.Event()

    class Batch:
        def send_many(self, messages):
            for _ in messages:
                assert may_end.wait(PATIENCE_SECONDS)
                yield Sent()

    with Running(engine, Batch(), send_timeout=timedelta(seconds=0.1)):
        try:
            until(lambda: row(engine, message_id).status == "in_doubt")
        finally:
            may_end.set()
        until(lambda: row(engine, message_id).status == "sent")


@pytest.mark.parametrize("error", [KeyError, SystemExit])
def test_a_backoff_that_breaks_loses_nothing(engine, error):
    """A host's rule that raises for the second failure neither ends the worker nor forgets what was not sent."""
    failing, other = queue(engine, new_message("failing"), new_message("other"))
    execute(engine, f"UPDATE engagement_message_queue SET retry_count = 1, attempt = 1 WHERE id = {failing}")

    def backoff(failures):
        if failures > 1:
            raise error(failures)
        return LATER

    with Running(engine, Transport(lambda _: NotSent("busy")), backoff=backoff, max_retries=5):
        until(lambda: row(engine, other).status == "pending" and row(engine, other).retry_count == 1)

    assert (row(engine, failing).status, row(engine, failing).retry_count) == ("pending", 2)


def test_a_slow_ready_is_heard(engine):
    """A transport that takes longer to say that it is ready than it is asked for still gets its messages."""
    (message_id,) = queue(engine, new_message())

    class Slow(Transport):
        def ready(self):
            time.sleep(1.2)
            return True

    with Running(engine, Slow()):
        until(lambda: row(engine, message_id).status == "sent")


def test_what_was_claimed_and_not_begun_is_given_back_whatever_ends_the_run(engine):
    """An error between the commit of a claim and the send, in a filter of the host's logging here."""
    first, second = queue(engine, new_message("first"), new_message("second"))

    def break_off(record):
        raise LookupError(record.name)

    logger = logging.getLogger("engagement")
    logger.addFilter(break_off)
    try:
        with pytest.raises(LookupError):
            process_message_queue(engine, lambda _: NotSent("it is told to the log"), backoff=lambda _: LATER)
    finally:
        logger.removeFilter(break_off)

    # The second was claimed as the first was settled.
    assert (row(engine, first).retry_count, row(engine, second).attempt) == (1, 1)
    assert (row(engine, first).status, row(engine, second).status) == ("pending", "pending")
