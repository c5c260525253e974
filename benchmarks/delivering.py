"""Work 9: deliver a queue over HTTP, as hosts do, beside the fastest client without any queue."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from statistics import median
from typing import Any

from sqlalchemy import URL

from benchmarks.draining import processes
from benchmarks.exchanging import gateway, messages_of, posted, words
from benchmarks.floors import Floor
from benchmarks.given import given
from benchmarks.measuring import Contender, Fact, compare, facts, peak_megabytes, timed
from benchmarks.server import Database, database
from benchmarks.setup import Setup
from engagement import NotSent, OutgoingMessage, Sent, process_message_queue
from engagement.transports.gateway import WhatsAppGateway

ALONE = "aiohttp alone"


class AsyncGateway:
    """A host's own `async def send`, on aiohttp."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session: Any = None

    async def send(self, message: OutgoingMessage) -> Sent | NotSent:
        """Post the text, and return the id that the gateway gave it."""
        import aiohttp

        if self._session is None:
            connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=90)
            headers = {"apikey": "secret"}
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers)
        body = {"number": message.destination_jid, "text": words(message)}
        async with self._session.post(f"{self._url}/message/sendText/x", json=body) as answer:
            if answer.status != 201:
                return NotSent(f"answered {answer.status}")
            return Sent((await answer.json())["key"]["id"])


def deliver(setup: Setup) -> Iterator[str]:
    """Deliver one at a time, then 100 and 500 at once; with two processes; and many, for the memory."""
    with gateway() as url, database(setup.url) as db:
        for at_once, size, target in ((1, 200, 0.95), (100, 6_000, 0.8), (500, 12_000, 0.8)):
            yield from _beside_the_client(setup, db, url, at_once, size=setup.size(size, 2 * at_once), target=target)
        with processes(db, partial(_transport, url)) as delivered_by:
            at_once, size = 25, setup.size(3_000, 50)
            contenders = [
                Contender("one process", partial(delivered_by, 1, at_once, size)),
                Contender("two processes", partial(delivered_by, 2, at_once, 2 * size), "one process", 1.8),
            ]
            title = f"deliver {size:,} for each process, {at_once} at once"
            yield compare(title, contenders, rounds=setup.rounds, warm_up=not setup.small).table()
        yield facts("WhatsAppGateway, 100 at once", _memory(db, url, setup.size(100_000, 400)))


def _transport(url: str) -> WhatsAppGateway:
    return WhatsAppGateway(url=url, key="secret", render=words)


def _beside_the_client(
    setup: Setup, db: Database, url: str, at_once: int, *, size: int, target: float
) -> Iterator[str]:
    body = _transport(url).prepare(messages_of(1)[0]).body
    used: dict[str, list[float]] = {}
    runs: dict[str, Callable[[], float]] = {
        ALONE: partial(posted, f"{url}/message/sendText/x", body, size, at_once),
        "ours, WhatsAppGateway": partial(_delivered, db, _transport(url), size, at_once),
        "ours, async def send": partial(_delivered, db, AsyncGateway(url), size, at_once),
    }
    contenders = [
        Contender(name, partial(_counted, run, db, size, used.setdefault(name, [])), *_target(name, target))
        for name, run in runs.items()
    ]
    title = f"deliver {size:,} answered after 50 ms, {at_once} at once"
    yield compare(title, contenders, rounds=setup.rounds, warm_up=not setup.small).table()
    yield facts(f"processor time of the client, {at_once} at once", _processor_time(used))


def _target(name: str, target: float) -> tuple[str, float] | tuple[()]:
    return () if name == ALONE else (ALONE, target)


def _processor_time(used: dict[str, list[float]]) -> Iterator[Fact]:
    return (Fact(name, median(each) * 1e6, "µs a message") for name, each in used.items())


def _counted(run: Callable[[], float], db: Database, size: int, used: list[float]) -> float:
    """Return the rate of a run, and keep the processor time that this process took for each message."""
    _fill(db, size)
    before = time.process_time()
    rate = run()
    used.append((time.process_time() - before) / size)
    return rate


def _fill(db: Database, size: int) -> None:
    Floor(db).empty()
    Floor(db).fill(given(size))


def _delivered(db: Database, transport: Any, size: int, at_once: int) -> float:
    with timed() as timer:
        result = process_message_queue(db.engine, transport, concurrency=at_once)
    assert result.succeeded == size, result
    return size / timer.seconds


def _memory(db: Database, url: str, size: int) -> Iterator[Fact]:
    """Deliver a tenth, and all, each in a process of its own."""
    few, many = (_peak_in_a_process(db, url, each) for each in (size // 10, size))
    yield Fact(f"peak memory, {size // 10:,} messages", few, "MB")
    yield Fact(f"peak memory, {size:,} messages", many, "MB", at_most=1.05 * few)


def _peak_in_a_process(db: Database, url: str, size: int) -> float:
    _fill(db, size)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, db.url, url, size).result()


def _peak(database_url: URL, url: str, size: int) -> float:
    _delivered(Database(database_url), _transport(url), size, at_once=100)
    return peak_megabytes()
