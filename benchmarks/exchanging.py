"""Work 8: send over HTTP through our transports, beside aiohttp alone, to a gateway that answers after 50 ms."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.given import given, key
from benchmarks.measuring import Contender, compare, timed
from benchmarks.setup import Setup
from engagement import OutgoingMessage, Sent
from engagement.models import Destination
from engagement.transports.cloud import WhatsAppCloud
from engagement.transports.gateway import WhatsAppGateway
from engagement.transports.webhook import Webhook

ANSWER_SECONDS = 0.05
ANSWERS = {
    b"/instance/": (200, b'{"instance": {"instanceName": "x", "state": "open"}}'),
    b"/message/": (201, b'{"key": {"id": "3EB0A1B2C3D4E5F60718", "fromMe": true}, "status": "PENDING"}'),
    b"/v25.0/": (200, b'{"messaging_product": "whatsapp", "messages": [{"id": "wamid.HBgNNTUxMTk5OTk5OTk5ORUCABEY"}]}'),
    b"/webhook": (200, b'{"provider_message_id": "m1"}'),
}


def send(setup: Setup) -> Iterator[str]:
    """Send one at a time, then 100 and 500 at once, each thread one message after the other."""
    with gateway() as url:
        transports = {
            "WhatsAppGateway": WhatsAppGateway(url=url, key="secret", render=words),
            "WhatsAppCloud": WhatsAppCloud(phone_number_id="1065", token="secret", render=words, base_url=url),
            "Webhook": Webhook(url=f"{url}/webhook", render=words),
        }
        for at_once, size, target in ((1, 60, 0.95), (100, 6_000, 0.8), (500, 12_000, 0.8)):
            messages = messages_of(setup.size(size, 2 * at_once))
            body = transports["WhatsAppGateway"].prepare(messages[0]).body
            contenders = [
                Contender("aiohttp alone", partial(posted, f"{url}/message/sendText/x", body, len(messages), at_once)),
                *(
                    Contender(name, partial(_sent, transport, messages, at_once), "aiohttp alone", target)
                    for name, transport in transports.items()
                ),
            ]
            title = f"{at_once} at once, {len(messages):,} answered after 50 ms"
            yield compare(title, contenders, rounds=setup.rounds, warm_up=not setup.small).table()
        for transport in transports.values():
            transport.close()


def words(message: OutgoingMessage) -> str:
    """Return a text with one of the params."""
    return f"Hello {message.message_params['name']}, we miss you!"


def messages_of(how_many: int) -> list[OutgoingMessage]:
    """Make messages as a worker has them in hand."""
    return [
        OutgoingMessage(
            id=number,
            idempotency_key=key(row),
            user_id=row.user_id,
            message_type="goodbye",
            message_key="goodbye.14_days",
            message_params=row.message_params,
            destination=Destination.INDIVIDUAL,
            destination_jid=row.destination_jid,
            scheduled_for=datetime.now(UTC),
            attempt=1,
            retry_count=0,
        )
        for number, row in enumerate(given(how_many), 1)
    ]


def _sent(transport: Any, messages: list[OutgoingMessage], at_once: int) -> float:
    """Send in threads, as a worker does, and return the rate."""
    left = iter(messages)
    outcomes: list[object] = []

    def work() -> None:
        outcomes.extend(map(transport.send, left))

    threads = [threading.Thread(target=work) for _ in range(at_once)]
    with timed() as timer:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(outcomes) == len(messages)
    assert all(isinstance(outcome, Sent) for outcome in outcomes)
    return len(messages) / timer.seconds


def posted(url: str, body: bytes, size: int, at_once: int) -> float:
    """Post in one event loop, and return the rate."""
    import aiohttp

    headers = {"Content-Type": "application/json", "apikey": "secret"}

    async def post_all() -> float:
        connector, left = aiohttp.TCPConnector(limit=0), iter(range(size))
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=90)) as session:

            async def work() -> None:
                for _ in left:
                    async with session.post(url, data=body, headers=headers) as answer:
                        assert answer.status == 201
                        await answer.json()

            with timed() as timer:
                await asyncio.gather(*(work() for _ in range(at_once)))
        return size / timer.seconds

    return asyncio.run(post_all())


@contextmanager
def gateway() -> Iterator[str]:
    """Yield the address of a gateway in a process of its own."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def _serve(pipe: Connection) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(_Answering, "127.0.0.1", 0, backlog=1024)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


class _Answering(asyncio.Protocol):
    """Answers each whole request after a while. It does as little as possible, since it is not measured."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._read = b""

    def data_received(self, data: bytes) -> None:
        self._read += data
        head, end, body = self._read.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        if end and len(body) >= length:
            self._read = b""
            answer = next(answer for path, answer in ANSWERS.items() if path in head[:40])
            asyncio.get_running_loop().call_later(ANSWER_SECONDS, self._answer, *answer)

    def _answer(self, status: int, body: bytes) -> None:
        head = b"HTTP/1.1 %d Taken\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        if not self._transport.is_closing():
            self._transport.write(head % (status, len(body)) + body)
