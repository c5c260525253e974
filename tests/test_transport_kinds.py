"""Each kind of transport: plain, async, in batches, and not ready."""

import asyncio
import threading
from datetime import UTC, datetime, timedelta

import pytest
from conftest import PATIENCE, execute, in_thread, new_message, queue, row, until
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from engagement import EngagementMessageRepository, InDoubt, Refused, Sent, Worker, process_message_queue


def test_an_async_transport(engine):
    """`async def` runs in one event loop, many sends at once."""
    queue(engine, *(new_message(f"u{n}") for n in range(10)))
    under_way, most = set(), []

    class Transport:
        async def send(self, message):
            under_way.add(message.id)
            most.append(len(under_way))
            await asyncio.sleep(0.02)
            under_way.discard(message.id)
            return Sent(str(message.id))

    assert process_message_queue(engine, Transport(), concurrency=5).succeeded == 10
    assert 1 < max(most) <= 5


def test_a_function_that_returns_a_coroutine(engine):
    """A lambda around an `async def` works too."""
    queue(engine, new_message())

    async def send(_message):
        return Sent("x")

    assert process_message_queue(engine, lambda message: send(message)).succeeded == 1  # noqa: PLW0108 - the point


def test_an_async_send_that_is_cancelled_is_a_doubt(engine):
    """A send that was torn down in the middle proves nothing."""
    (message_id,) = queue(engine, new_message())

    async def send(_message):
        raise asyncio.CancelledError

    process_message_queue(engine, send)

    assert row(engine, message_id).status == "in_doubt"


def test_a_batch_transport_is_called_once_for_what_was_claimed(engine):
    """`send_many` gets up to `concurrency` messages, and each outcome goes to its message."""
    ids = queue(engine, *(new_message(f"u{n}") for n in range(5)))
    batches = []

    class Batch:
        def send_many(self, messages):
            batches.append(len(messages))
            return [Refused("no") if message.id == ids[1] else Sent(f"p{message.id}") for message in messages]

    result = process_message_queue(engine, Batch(), concurrency=3)

    assert batches == [3, 2]
    assert (result.succeeded, result.failed) == (4, 1)
    assert row(engine, ids[1]).status == "failed"
    assert row(engine, ids[4]).provider_message_id == f"p{ids[4]}"


def test_one_batch_at_a_time(engine):
    """While a batch is being sent, no other one begins beside it, though there is room."""
    queue(engine, new_message("first"))
    batches, is_waiting, may_end = [], threading.Event(), threading.Event()

    class Batch:
        def send_many(self, messages):
            batches.append([message.user_id for message in messages])
            is_waiting.set()
            assert may_end.wait(PATIENCE)
            return [Sent() for _ in messages]

    stop = threading.Event()
    run = in_thread(Worker(engine, Batch(), concurrency=4, poll_interval=timedelta(milliseconds=10)).run, stop)
    assert is_waiting.wait(PATIENCE)
    queue(engine, new_message("second"), new_message("third"))
    threading.Event().wait(0.3)  # Thirty polls: what is not claimed by then is not claimed.
    assert batches == [["first"]]
    may_end.set()
    until(lambda: len(batches) == 2)
    stop.set()
    run.result(PATIENCE)

    assert sorted(batches[1]) == ["second", "third"]


def test_a_batch_is_in_the_order_in_which_it_is_due(engine):
    """Messages to one person leave in their order also within one call of `send_many`."""
    now = datetime.now(UTC)
    ids = queue(
        engine,
        *(
            new_message(idempotency_key=str(hours), scheduled_for=now - timedelta(hours=hours))
            for hours in (2, 5, 1, 4, 3)
        ),
    )
    batches = []

    class Batch:
        def send_many(self, messages):
            batches.append([message.id for message in messages])
            return [Sent()] * len(messages)

    process_message_queue(engine, Batch(), concurrency=5)

    assert batches == [[ids[place] for place in (1, 3, 4, 0, 2)]]


@pytest.mark.direct("nothing is prepared behind a pooler")
def test_a_worker_plans_its_statements_once(engine):
    """Not anew for each message's values, which takes longer than running them: PostgreSQL tries that five times."""
    with Session(engine) as session, session.begin():  # In a table of two pages, no plan is cheaper than another.
        EngagementMessageRepository(session).queue_messages(new_message(f"u{n}") for n in range(4_000))
    execute(engine, "ANALYZE engagement_message_queue")
    own = create_engine(engine.url, pool_size=1, max_overflow=0)
    process_message_queue(own, lambda _: None, limit=40)

    with own.connect() as connection:
        plans = connection.execute(
            text(
                "SELECT generic_plans, custom_plans FROM pg_prepared_statements"
                " WHERE statement LIKE 'UPDATE public.engagement%'"
            )
        ).all()
    own.dispose()

    assert len(plans) == 2, "settle and claim"
    for generic, custom in plans:
        assert generic >= 15
        assert custom <= 5


@pytest.mark.parametrize(
    "answer", [[Sent()], None, InDoubt("x"), TimeoutError("slow")], ids=["too_few", "none", "one_outcome", "raises"]
)
def test_a_batch_without_an_outcome_for_each_is_a_doubt(engine, answer):
    """A batch call that does not say what became of each message proves nothing of any."""
    ids = queue(engine, new_message("a"), new_message("b"))

    class Batch:
        def send_many(self, _messages):
            if isinstance(answer, Exception):
                raise answer
            return answer

    process_message_queue(engine, Batch(), concurrency=2)

    assert [row(engine, message_id).status for message_id in ids] == ["in_doubt", "in_doubt"]


@pytest.mark.parametrize("answer", [False, RuntimeError("gateway")], ids=["false", "raises"])
def test_nothing_is_claimed_while_the_transport_is_not_ready(engine, answer):
    """A transport that cannot send costs no message an attempt."""
    (message_id,) = queue(engine, new_message())

    class NotReady:
        def ready(self):
            if isinstance(answer, Exception):
                raise answer
            return answer

        def send(self, _message):
            pytest.fail("was sent")

    assert process_message_queue(engine, NotReady()).processed == 0
    assert (row(engine, message_id).status, row(engine, message_id).attempt) == ("pending", 0)


def test_a_ready_that_is_cancelled_is_a_no(engine):
    """An `async def ready` that is torn down does not end the worker, and costs no message an attempt."""
    (message_id,) = queue(engine, new_message())

    class Cancelled:
        async def ready(self):
            raise asyncio.CancelledError

        def send(self, _message):
            pytest.fail("was sent")

    assert process_message_queue(engine, Cancelled()).processed == 0
    assert (row(engine, message_id).status, row(engine, message_id).attempt) == ("pending", 0)


def test_a_worker_goes_on_when_the_transport_is_ready_again(engine):
    """A worker whose transport is not ready waits, and sends when it is; `ready` may be async."""
    queue(engine, new_message())
    stop = threading.Event()
    answers = iter([False, False])

    class Recovering:
        async def ready(self):
            return next(answers, True)

        def send(self, _message):
            stop.set()

    result = Worker(engine, Recovering(), poll_interval=timedelta(milliseconds=50)).run(stop)

    assert result.succeeded == 1
