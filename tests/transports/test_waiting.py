"""The thread that waits for all connections: forks, interruptions, and how it may fail."""

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import loopback
import pytest
from exchanges import A_MINUTE, IN_TIME, SOON, client, deliver
from gateways import close_clients  # noqa: F401 - autouse
from loopback import Reply, serving

from engagement import InDoubt, NotSent, Sent
from engagement.transports.client import Prepared
from engagement.transports.connection import Connection
from engagement.transports.waiting import READ, STUCK_SECONDS, Waiter, the_waiter


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # what is tested here
def test_a_child_process_shares_nothing_with_its_parent():
    """After a fork, also in the middle of a send and of a lock, the child sends over connections of its own."""
    is_held, goes_on = threading.Event(), threading.Event()

    def hold(request):
        if "x-hold" in request.headers:
            is_held.set()
            goes_on.wait(10)
        return Reply(201, "1")

    with serving(hold) as server:
        one = client(server.url, connections=1)
        deliver(one)
        thread = threading.Thread(target=deliver, args=(one, Prepared("/messages", b"{}", {"X-Hold": "1"})))
        deliver(one)
        thread.start()
        is_held.wait(5)
        one.trouble._lock.acquire()  # noqa: SLF001 - another thread could hold it just now
        child = os.fork()
        if not child:
            outcomes = [deliver(one), deliver(one)]
            os._exit(0 if outcomes == [Sent("1"), Sent("1")] else 1)
        one.trouble._lock.release()  # noqa: SLF001
        assert os.waitpid(child, 0)[1] == 0
        goes_on.set()
        thread.join(5)
        assert [deliver(one), deliver(one)] == [Sent("1"), Sent("1")]
        assert len(server.received) == 7


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # what is tested here
def test_an_idle_connection_stays_the_parents():
    """Two processes on one connection would read each other's answers."""
    with serving(lambda _: Reply(201, "1")) as server:
        one = client(server.url)
        deliver(one)
        child = os.fork()
        if not child:
            os._exit(0 if deliver(one) == Sent("1") else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert deliver(one) == Sent("1")
        assert (len(server.received), server.connections) == (3, 2)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # what is tested here
@pytest.mark.parametrize("is_idle", [True, False])
def test_a_child_process_keeps_nothing_of_its_parent_open(is_idle):
    """A connection that the parent has closed is closed, while the child lives on."""
    has_ended = threading.Event()

    def answer_and_wait(connection):
        if is_idle:
            connection.sendall(Reply(201, "1").encode())
        is_there.set()
        if connection.recv(1) == b"":
            has_ended.set()

    is_there = threading.Event()
    with serving(lambda _: answer_and_wait) as server:
        one = client(server.url, answer_within=timedelta(seconds=1))
        thread = threading.Thread(target=deliver, args=(one,))
        thread.start()
        is_there.wait(5)
        if is_idle:
            thread.join(5)
        lives, ends = os.pipe()
        child = os.fork()
        if not child:
            os.close(ends)
            os.read(lives, 1)
            os._exit(0)
        thread.join(5)
        one.close()
        assert has_ended.wait(5)
        os.close(lives)
        os.close(ends)
        assert os.waitpid(child, 0)[1] == 0


def test_a_connection_is_watched_before_it_is_written_to(monkeypatch):
    """A child that is forked while the request is being written closes its copy too."""
    seen = []
    is_clean = Connection.is_clean

    def look(self):
        seen.append(self.watched_for)
        return is_clean(self)

    monkeypatch.setattr(Connection, "is_clean", look)
    with serving(lambda _: Reply(201, "1")) as server:
        deliver(client(server.url))
    assert seen[0] == READ


def test_all_clients_of_a_process_share_one_thread():
    """Memory and threads do not grow with the transports that a host makes."""
    with serving(lambda _: Reply(201, "1")) as server:
        assert [deliver(client(server.url)) for _ in range(3)] == [Sent("1")] * 3
    assert [thread.name for thread in threading.enumerate()].count("engagement-exchanges") == 1


def test_a_closed_connection_does_not_wait_for_the_next_message():
    """What the far side has ended, or written unasked, is closed at once, and not when somebody comes by."""
    ended = []

    def answer_and(connection):
        connection.sendall(Reply(201, "1").encode())
        time.sleep(0.2)
        connection.sendall(b"x")
        ended.append(connection.recv(1))
        has_ended.set()

    has_ended = threading.Event()
    with serving(lambda _: answer_and) as server:
        one = client(server.url)
        deliver(one)
        assert has_ended.wait(5)
        assert ended == [b""]
        server.behave = lambda _: Reply(201, "1")
        deliver(one)
        deliver(one)
        assert server.connections == 3  # All are distrusted.


def test_a_caller_that_is_interrupted_leaves_nothing_behind():
    """Ctrl-C ends the exchange that it comes into, whose answer nobody reads, and none of another."""
    has_ended = threading.Event()

    def hang(connection):
        if connection.recv(1) == b"":
            has_ended.set()

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with serving(lambda _: hang) as server:
            one = client(server.url, connections=1, answer_within=A_MINUTE)
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                deliver(one)
            assert has_ended.wait(5)
            server.behave = lambda _: Reply(201, "1")
            assert [deliver(one), deliver(one)] == [Sent("1"), Sent("1")]
            assert server.connections == 2
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("stuck", "outcome"), [(5, NotSent("test: ConnectTimeout")), (0, InDoubt("test: ReadTimeout"))]
)
def test_what_could_not_begin_in_time_does_not_begin(stuck, outcome, monkeypatch):
    """A thread that is held up writes nothing later; if it does not even say so, the caller comes back, in doubt."""
    monkeypatch.setattr("engagement.transports.waiting.STUCK_SECONDS", stuck)
    goes_on = threading.Event()
    with serving(lambda _: Reply(201, "1")) as server:
        one = client(server.url, answer_within=SOON)
        the_waiter().soon(lambda _: goes_on.wait(10), None)
        threading.Timer(0.6, goes_on.set).start()
        started = time.monotonic()

        assert deliver(one) == outcome
        assert time.monotonic() - started < IN_TIME
        goes_on.wait(10)
        deliver(client(server.url))
        assert len(server.received) == 1


def test_a_large_answer_is_read_in_turns(monkeypatch):
    """An answer in chunks of one byte takes h11 half a second, for which no other exchange waits."""
    turns = []
    turn = Waiter._turn  # noqa: SLF001
    monkeypatch.setattr(Waiter, "_turn", lambda self: (turns.append(1), turn(self))[1])
    large = Reply(201, b"x" * 240_000).encode()

    def answer(connection):
        is_written = threading.Event()
        the_waiter().soon(lambda _: is_written.wait(2), None)
        threading.Timer(0.3, is_written.set).start()
        connection.sendall(large)
        connection.recv(1)

    with serving(lambda _: answer) as server:
        one = client(server.url)
        turns.clear()
        deliver(one)
        assert len(turns) > len(large) / 16_384


def test_a_thread_that_fails_takes_no_exchange_with_it_for_ever(monkeypatch):
    """What it was waiting for is in doubt at once, and the next exchange has a new one."""
    is_there, fails = threading.Event(), threading.Event()
    turn = Waiter._turn  # noqa: SLF001

    def fail(self):
        turn(self)
        if fails.is_set():
            fails.clear()
            raise OSError

    monkeypatch.setattr(Waiter, "_turn", fail)

    def answer(request):
        is_there.set()
        return loopback.hang if "x-hang" in request.headers else Reply(201, "1")

    with serving(answer) as server:
        outcomes = []
        one = client(server.url, answer_within=A_MINUTE)
        deliver(one)
        is_there.clear()
        hanging = Prepared("/messages", b"{}", {"X-Hang": "1"})
        thread = threading.Thread(target=lambda: outcomes.append(deliver(one, hanging)))
        thread.start()
        is_there.wait(5)
        fails.set()
        the_waiter().soon(lambda _: None, None)
        thread.join(5)
        assert outcomes == [InDoubt("test: ReadError")]
        two = client(server.url)
        assert [deliver(two), deliver(two)] == [Sent("1")] * 2


@pytest.mark.parametrize("is_busy", [True, False])
def test_a_host_that_closes_all_descriptors_puts_no_later_message_in_doubt(is_busy):
    """A daemon may do so. The thread fails, or sleeps for ever: what is sent afterwards has a new one."""
    program = """
import os, sys, threading, time
from datetime import timedelta
from exchanges import client, deliver
from engagement.transports.client import Prepared
from engagement.transports import waiting
from engagement.transports.waiting import the_waiter

waiting.STUCK_SECONDS = 0.1
outcomes = []
one = client(sys.argv[1], answer_within=timedelta(seconds=3))
threads = [threading.Thread(target=lambda: outcomes.append(deliver(one, Prepared("/hang", b"{}")))) for _ in range(2)]
for thread in threads:
    thread.start()
deliver(one, Prepared("/held", b"{}"))
if sys.argv[2] == "True":
    goes_on = threading.Event()
    the_waiter().soon(lambda _: goes_on.wait(10), None)
    while the_waiter()._jobs:
        time.sleep(0.01)
else:
    time.sleep(0.3)  # Until it sleeps.
os.closerange(3, 100)
started = time.monotonic()
if sys.argv[2] == "True":
    goes_on.set()
    # What fails closes numbers that the next connections may have: a host that does this has stopped its sends.
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join()
first = deliver(client(sys.argv[1]))
print(first, deliver(client(sys.argv[1])), time.monotonic() - started < 2)
for thread in threads:
    thread.join()
print(*outcomes)
"""
    are_there = threading.Barrier(3)

    def answer(request):
        if request.path != "/messages":
            are_there.wait(10)
        return loopback.hang if request.path == "/hang" else Reply(201, "1")

    with serving(answer) as server:
        ran = subprocess.run(
            [sys.executable, "-c", program, server.url, str(is_busy)],
            env={"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        first = Sent("1") if is_busy else NotSent("test: ConnectError")
        doubt = InDoubt("test: ReadError" if is_busy else "test: ReadTimeout")
        assert (ran.stdout.splitlines(), ran.stderr) == ([f"{first} {Sent('1')} True", f"{doubt} {doubt}"], "")


def test_what_waited_for_a_thread_that_fails_was_not_sent():
    """What had not begun when it failed has not left."""
    is_failing, goes_on = threading.Event(), threading.Event()

    def fail(_):
        is_failing.set()
        goes_on.wait(10)
        raise OSError

    with serving(lambda _: Reply(201, "1")) as server:
        outcomes = []
        one = client(server.url, answer_within=A_MINUTE)
        deliver(one)
        waiter = the_waiter()
        waiter.soon(fail, None)
        assert is_failing.wait(10)  # Else it may be what stands there below.
        two = client(server.url, answer_within=A_MINUTE)
        thread = threading.Thread(target=lambda: outcomes.append(deliver(two)))
        thread.start()
        while not waiter._jobs:  # noqa: SLF001 - its exchange stands behind what fails
            time.sleep(0.01)
        goes_on.set()
        thread.join(5)
        assert outcomes == [NotSent("test: ConnectError")]
        assert len(server.received) == 1


def test_a_caller_that_is_interrupted_while_it_wakes_the_thread_stops_nobody():
    """Ctrl-C may come between any two steps: the thread is woken by the next."""
    with serving(lambda _: Reply(201, "1")) as server:
        one = client(server.url)
        deliver(one)
        waiter = the_waiter()
        bell = waiter._bell  # noqa: SLF001

        class Interrupted:
            def send(self, _):
                waiter._bell = bell  # noqa: SLF001
                raise KeyboardInterrupt

        waiter._bell = Interrupted()  # noqa: SLF001
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            deliver(one)
        assert deliver(one) == Sent("1")
        assert time.monotonic() - started < STUCK_SECONDS
        assert len(server.received) == 2
