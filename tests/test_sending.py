"""How calls of the transport are run: all of them, so many at once, and none that was taken back."""

import gc
import threading
from types import SimpleNamespace

import pytest
from conftest import PATIENCE, outgoing, until

from engagement import OutgoingMessage, Postpone
from engagement.outcomes import classify_exception
from engagement.sending import Claim, Sender, clock


def claim(number: int) -> Claim:
    message = outgoing(id=number)
    return Claim(message, (message.scheduled_for, number), "test", clock() + 300)


@pytest.fixture(name="sender")
def _sender():
    senders = []

    def make(send, *, concurrency: int) -> Sender:
        senders.append(Sender(send, concurrency=concurrency, classify=classify_exception))
        return senders[-1]

    yield make
    for sender in senders:
        sender.close()


def answered(sender: Sender, how_many: int) -> set[int]:
    return {sender.answers.get(timeout=PATIENCE)[0].message.id for _ in range(how_many)}


@pytest.mark.parametrize("concurrency", [1, 2, 5])
def test_as_many_calls_run_at_once_as_are_allowed_and_no_more(sender, concurrency):
    """Each call waits for the others; one more than there may be waits until one of them is over."""
    running, is_running, go_on = [], threading.Semaphore(0), threading.Event()

    def send(message):
        running.append(message.id)
        is_running.release()
        go_on.wait(PATIENCE)

    one = sender(send, concurrency=concurrency)
    for _ in range(2):  # With new threads, and with threads that sleep.
        one.start([claim(number) for number in range(concurrency + 1)])
        for _ in range(concurrency):
            assert is_running.acquire(timeout=PATIENCE)
        assert not is_running.acquire(timeout=0.1)
        assert sorted(running) == list(range(concurrency))
        go_on.set()
        assert answered(one, concurrency + 1) == set(range(concurrency + 1))
        assert is_running.acquire(timeout=PATIENCE)
        go_on.clear()
        running.clear()


def test_no_call_is_forgotten(sender):
    """Whenever calls are handed over: while all threads sleep, while they work, and while they fall asleep."""
    pause = threading.Event()

    def send(message):
        if message.id % 5 == 0:
            pause.wait(0.0005)

    one = sender(send, concurrency=4)
    waiting = set()
    for round_ in range(1_000):
        first = round_ * 10
        batch = range(first, first + round_ % 7 + 1)
        one.start([claim(number) for number in batch])
        waiting |= set(batch)
        if round_ % 3:  # Else the next calls come while these are still being made.
            assert answered(one, len(waiting)) == waiting
            waiting.clear()


def test_a_call_that_was_taken_back_is_never_made(sender):
    """What waits for a thread can be taken back; what a thread has taken, cannot, and says when it is over."""
    began, go_on, sent = threading.Event(), threading.Event(), []

    def send(message):
        sent.append(message.id)
        began.set()
        go_on.wait(PATIENCE)

    one = sender(send, concurrency=1)
    first, second, third = (claim(number) for number in range(3))
    one.start([first, second, third])
    assert began.wait(PATIENCE)

    assert (first.handle.cancel(), first.handle.done()) == (False, False)
    assert (second.handle.cancel(), second.handle.done()) == (True, True)
    assert second.handle.cancel() is False
    go_on.set()
    assert answered(one, 2) == {0, 2}
    assert sent == [0, 2]


def plain(sent):
    return lambda message: sent.append(message.id)


def asynchronous(sent):
    async def send(message):
        sent.append(message.id)

    return send


def a_coroutine(sent):
    return lambda message: asynchronous(sent)(message)  # noqa: PLW0108 - no `async def`, but a function that returns one


def in_batches(sent):
    return SimpleNamespace(send_many=lambda messages: sent.extend(message.id for message in messages))


@pytest.mark.parametrize("kind", [plain, asynchronous, a_coroutine, in_batches])
def test_nothing_is_sent_under_a_lease_that_ran_out(sender, kind):
    """A worker that stood still since its claim sends nothing, and says so; of a batch, one such message is enough."""
    sent = []
    one = sender(kind(sent), concurrency=2)
    held, lost = claim(1), claim(2)
    lost.held_until = clock()

    one.start([held, lost])

    outcomes = dict(one.answers.get(timeout=PATIENCE) for _ in range(2))
    assert isinstance(outcomes[lost], Postpone)
    assert sent == ([] if one.sends_many else [1])


def in_a_thread(_message):
    pass


async def in_the_loop(_message):
    pass


@pytest.mark.parametrize("send", [in_a_thread, in_the_loop])
def test_nothing_of_a_call_waits_for_the_garbage_collector(sender, send):
    """Claims and messages are gone with their answers: a worker makes hundreds of thousands an hour."""
    one = sender(send, concurrency=2)
    gc.collect()
    gc.disable()
    try:
        there = claims_and_messages()
        one.start([claim(number) for number in range(20)])
        answered(one, 20)
        until(lambda: claims_and_messages() <= there)
    finally:
        gc.enable()


def claims_and_messages() -> int:
    return sum(isinstance(thing, Claim | OutgoingMessage) for thing in gc.get_objects())


def test_no_more_threads_than_are_needed(sender):
    """One call after the other needs no second thread, however many calls there may be at once."""
    threads = set()
    one = sender(lambda _: threads.add(threading.get_ident()), concurrency=50)
    for number in range(50):
        one.start([claim(number)])
        answered(one, 1)
        until(lambda: one._threads._idle)  # noqa: SLF001 - an answer is there a moment before its thread is idle

    assert len(threads) == 1
