"""How calls of the transport are run: all of them, so many at once, and none that was taken back."""

import asyncio
import gc
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from conftest import PATIENCE, outgoing, until

from engagement import InDoubt, NotSent, OutgoingMessage, Postpone, Sent
from engagement._claim import Claim, clock
from engagement._sending.sender import Sender
from engagement._watching import observers as observing
from engagement.models import EARLIEST
from engagement.outcomes import classify_exception
from engagement.policies import Consent

LOST = 0.0
"""A lease that ran out long ago, by `clock`."""


def claim(number: int) -> Claim:
    message = outgoing(id=number)
    return Claim(message, (message.scheduled_for, number), "test", clock() + 300)


@pytest.fixture(name="sender")
def _sender():
    senders = []

    def make(send, *, concurrency: int, classify=classify_exception) -> Sender:
        senders.append(Sender(send, concurrency=concurrency, classify=classify))
        return senders[-1]

    yield make
    for sender in senders:
        sender.close()


def answered(sender: Sender, how_many: int) -> set[int]:
    return {sender.news.get(timeout=PATIENCE)[0].message.id for _ in range(how_many)}


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
    """What waits for a thread can be taken back; what a thread has taken, cannot."""
    began, go_on, sent = threading.Event(), threading.Event(), []

    def send(message):
        sent.append(message.id)
        began.set()
        go_on.wait(PATIENCE)

    one = sender(send, concurrency=1)
    first, second, third = (claim(number) for number in range(3))
    one.start([first, second, third])
    assert began.wait(PATIENCE)

    assert first.handle.cancel() is False
    assert second.handle.cancel() is True
    assert second.handle.cancel() is True, "it is asked for each message of a batch"
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

    outcomes = dict(one.news.get(timeout=PATIENCE) for _ in range(2))
    assert isinstance(outcomes[lost], Postpone)
    assert outcomes[lost].until < datetime.now(UTC) - timedelta(days=1), (
        "it would wait for as long as our clock is wrong"
    )
    assert sent == ([] if one.sends_many else [1])


@pytest.mark.parametrize("kind", [plain, asynchronous, a_coroutine, in_batches])
def test_nothing_is_sent_after_it_was_given_up(sender, kind):
    """A person may have been told that it did not leave, and it may have been sent since."""
    sent = []
    one = sender(kind(sent), concurrency=2)
    given_up = claim(1)
    given_up.is_overdue = True

    one.start([given_up])

    answered(one, 1)
    assert sent == []


def test_a_look_up_that_does_not_happen_says_nothing_of_the_send(sender):
    """Whatever keeps it from being made, its message may have been sent, and is not given back as unsent."""
    transport = SimpleNamespace(send=lambda _: None, look_up=lambda _: pytest.fail("it was given up"))
    one = sender(transport, concurrency=1)
    given_up = claim(1)
    given_up.lost_workers, given_up.is_overdue = 1, True

    one.start([given_up])

    assert isinstance(one.news.get(timeout=PATIENCE)[1], InDoubt)


def test_nothing_begins_after_the_end(sender):
    """What still waits for a thread when its worker ends is never sent: nobody would record it."""
    began, go_on, sent, threads = threading.Event(), threading.Event(), [], []

    def send(message):
        sent.append(message.id)
        threads.append(threading.current_thread())
        began.set()
        go_on.wait(PATIENCE)

    one = sender(send, concurrency=1)
    one.start([claim(1), claim(2)])
    assert began.wait(PATIENCE)
    one.close()
    go_on.set()

    threads[0].join(PATIENCE)
    assert sent == [1]


def test_a_function_that_ran_may_have_sent_whatever_becomes_of_its_coroutine(sender):
    """It may send before it returns what waits for the answer; a lease that runs out between proves nothing."""
    published, is_blocked, go_on = [], threading.Event(), threading.Event()

    async def acknowledged(message):
        if message.id == 1:
            is_blocked.set()
            go_on.wait(PATIENCE)  # In the event loop: the other coroutine cannot begin.

    def send(message):
        if message.id == 2:
            assert is_blocked.wait(PATIENCE)
        published.append(message.id)
        return acknowledged(message)

    one = sender(send, concurrency=2)
    first, second = claim(1), claim(2)
    one.start([first, second])
    until(lambda: len(published) == 2)
    second.held_until = LOST
    go_on.set()

    outcomes = dict(one.news.get(timeout=PATIENCE) for _ in range(2))
    assert outcomes[first] == Sent()
    assert isinstance(outcomes[second], InDoubt)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_policy_that_takes_longer_than_the_lease_lets_nothing_through(sender, is_async):
    """While the host's function is asked, another worker may have recovered the message, and sent it."""
    sent, message = [], claim(1)

    def wants(_):
        message.held_until = LOST
        return True

    one = sender(Consent(Consent((asynchronous if is_async else plain)(sent), wants), lambda _: True), concurrency=1)
    one.start([message])

    (_, outcome) = one.news.get(timeout=PATIENCE)
    assert isinstance(outcome, Postpone)
    assert sent == []


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
@pytest.mark.parametrize("is_async", [False, True])
def test_whatever_is_raised_an_answer_arrives_and_the_next_call_is_made(sender, error, is_async):
    """By the transport or by the host's rule: else the message would be held, and its lease extended, for ever."""

    def fail(message):
        if message.id == 1:
            raise error
        if message.id == 2:
            raise ValueError

    async def fail_in_the_loop(message):
        fail(message)

    def classify(_):
        raise error

    one = sender(fail_in_the_loop if is_async else fail, concurrency=1, classify=classify)
    outcomes = []
    for number in range(1, 4):
        one.start([claim(number)])
        outcomes.append(one.news.get(timeout=PATIENCE)[1])

    assert [type(outcome) for outcome in outcomes] == [InDoubt, InDoubt, Sent]


@pytest.mark.parametrize("error", [SystemExit, asyncio.CancelledError])
@pytest.mark.parametrize("kind", [plain, asynchronous, a_coroutine])
def test_what_was_torn_down_is_in_doubt_whatever_the_rule_says(sender, kind, error):
    """The host's rule is asked about errors of the transport; that a send was ended in the middle is none."""

    class Torn(list):
        def append(self, _):
            raise error

    one = sender(kind(Torn()), concurrency=1, classify=lambda _: NotSent("the rule says so"))
    one.start([claim(1)])

    assert isinstance(one.news.get(timeout=PATIENCE)[1], InDoubt)


@pytest.mark.parametrize("is_async", [False, True])
def test_an_observer_cannot_hold_back_an_answer(sender, is_async):
    """Not even by what ends a thread."""

    class Fatal(BaseException):
        pass

    class Observer:
        def sending(self, _):
            def end(_):
                raise Fatal

            return end

    one = sender((asynchronous if is_async else plain)([]), concurrency=1)
    observer = Observer()
    observing.observe(observer)
    try:
        for number in (1, 2):
            one.start([claim(number)])
            assert answered(one, 1) == {number}
    finally:
        observing.unobserve(observer)


def test_a_send_in_the_loop_that_is_broken_off_has_the_last_word(sender):
    """It is over when its coroutine is, which may still learn that the message was sent."""
    is_sending, may_end = asyncio.Event(), asyncio.Event()
    loops = []

    async def send(_):
        loops.append(asyncio.get_running_loop())
        try:
            await is_sending.wait()
        except asyncio.CancelledError:
            await may_end.wait()
            return Sent("late")

    one = sender(send, concurrency=1)
    late = claim(1)
    one.start([late])
    until(lambda: loops)

    assert late.handle.cancel() is False
    loops[0].call_soon_threadsafe(may_end.set)
    assert one.news.get(timeout=PATIENCE) == (late, Sent("late"))


def test_a_send_that_is_broken_off_before_it_began_is_never_made(sender):
    """Nor does anything of it stay behind, to be warned of."""
    is_blocked, go_on, sent = threading.Event(), threading.Event(), []

    async def send(message):
        sent.append(message.id)
        is_blocked.set()
        go_on.wait(PATIENCE)  # In the event loop.

    one = sender(send, concurrency=2)
    first, second = claim(1), claim(2)
    one.start([first])
    assert is_blocked.wait(PATIENCE)
    one.start([second])
    second.handle.cancel()
    go_on.set()

    assert answered(one, 2) == {1, 2}
    assert sent == [1]


def test_a_batch_in_the_loop_is_broken_off_once(sender):
    """Not once for each of its messages: what it does in the end is not broken off again."""
    is_asked_to_end, may_end = threading.Event(), asyncio.Event()
    loops = []

    async def send_many(messages):
        loops.append(asyncio.get_running_loop())
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            is_asked_to_end.set()
            await may_end.wait()
            return [Sent("late") for _ in messages]

    one = sender(SimpleNamespace(send_many=send_many), concurrency=3)
    batch = [claim(number) for number in range(3)]
    one.start(batch)
    until(lambda: loops)
    for each in batch:
        each.handle.cancel()
        assert is_asked_to_end.wait(PATIENCE)
    loops[0].call_soon_threadsafe(may_end.set)

    assert [one.news.get(timeout=PATIENCE)[1] for _ in batch] == [Sent("late")] * 3


async def leave():
    raise SystemExit


def sends_in_the_loop(published):
    async def send(message):
        published.append(message.id)
        if message.id == 1:
            await asyncio.gather(leave())

    return send


def sends_and_waits_in_the_loop(published):
    async def acknowledged(message):
        if message.id == 1:
            await asyncio.gather(leave())

    def send(message):
        published.append(message.id)
        return acknowledged(message)

    return send


@pytest.mark.parametrize("kind", [sends_in_the_loop, sends_and_waits_in_the_loop])
def test_a_task_of_a_send_cannot_end_the_loop_of_all_the_others(sender, kind):
    """What it raises is told to who awaits it, and the next send is made as if nothing had happened."""
    published = []
    one = sender(kind(published), concurrency=1)
    outcomes = []
    for number in (1, 2):
        one.start([claim(number)])
        outcomes.append(one.news.get(timeout=PATIENCE)[1])

    assert [type(outcome) for outcome in outcomes] == [InDoubt, Sent]
    assert published == [1, 2]


def no_loop():
    raise OSError(24, "Too many open files")


def test_a_system_without_another_event_loop_loses_nothing(sender, monkeypatch):
    """Nothing was sent, and the messages are given back."""
    sent = []
    one = sender(asynchronous(sent), concurrency=1)
    monkeypatch.setattr(asyncio, "new_event_loop", no_loop)

    one.start([claim(1)])
    assert one.news.get(timeout=PATIENCE)[1] == Postpone(EARLIEST, "no thread could be started")
    assert sent == []


def test_a_function_that_ran_may_have_sent_if_there_is_no_loop_for_its_coroutine(sender, monkeypatch):
    """An error of ours, after it ran, does not say that nothing was sent."""
    one = sender(a_coroutine([]), concurrency=1)
    monkeypatch.setattr(asyncio, "new_event_loop", no_loop)
    one.start([claim(1)])

    assert isinstance(one.news.get(timeout=PATIENCE)[1], InDoubt)


@pytest.mark.parametrize("answers", [True, False])
def test_a_lease_that_runs_out_between_two_tries_is_a_doubt(sender, answers):
    """A transport of the host's that tries a policy or a client of ours again: the first try may have left."""
    message, sent = claim(1), []

    def wire(_):
        sent.append(1)
        message.held_until = LOST
        if answers:
            return InDoubt("no receipt")
        raise TimeoutError

    consent = Consent(wire, lambda _: True)

    def send(message):
        with suppress(TimeoutError):
            consent.send(message)
        return consent.send(message)

    one = sender(send, concurrency=1)
    one.start([message])

    _, outcome = one.news.get(timeout=PATIENCE)
    assert outcome == InDoubt("the lease ran out after something that may have sent it")
    assert sent == [1]


@pytest.mark.usefixtures("one_send_thread")
def test_a_system_without_another_thread_makes_sends_wait(sender, caplog):
    """They are made by the threads that there are."""
    one = sender(lambda _: None, concurrency=5)
    one.start([claim(number) for number in range(5)])

    assert answered(one, 5) == set(range(5))
    assert [record.getMessage() for record in caplog.records] == ["engagement.no_more_threads started=1"]


@pytest.mark.parametrize("function", [plain, asynchronous])
def test_a_system_without_any_thread_loses_nothing(sender, monkeypatch, function):
    """The claims are committed by then: what was provably not sent is given back, and not left in doubt."""

    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    sent = []
    one = sender(function(sent), concurrency=2)
    one.start([claim(1), claim(2)])

    assert [one.news.get(timeout=PATIENCE)[1] for _ in range(2)] == [
        Postpone(EARLIEST, "no thread could be started")
    ] * 2
    monkeypatch.undo()
    one.start([claim(3)])
    assert answered(one, 1) == {3}
    assert sent == [3]


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
