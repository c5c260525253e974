"""Four providers on loopback that lose their answers, and tell the truth by webhooks: late, doubled and shuffled."""

import heapq
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from typing import Self

import gateways
from loopback import Received, Reply, hang_up, reset, serving
from receipts import gateway_webhooks as webhooks
from receipts import test_cloud as meta
from receipts.served import Provider as Postbox
from receipts.served import served

from engagement.receipts.cloud import CloudReceipts
from engagement.receipts.evolution import EvolutionReceipts
from engagement.receipts.waha import WahaReceipts
from engagement.receipts.wuzapi import WuzapiReceipts

from .ledger import Ledger

SECRET, FORGED = webhooks.SECRET, "a guess that is as long as a real key"
BY_OUR_ID = ("cloud", "evolution", "wuzapi")
"""Their receipts find a message whose answer was lost. Those of WAHA name an id that only its answer tells."""
PROVIDERS = (*BY_OUR_ID, "waha")


@dataclass(frozen=True, kw_only=True)
class Manners:
    """How often a provider loses a request or an answer, and how it tells the truth."""

    lost_requests: float = 0.01
    lost_answers: float = 0.1
    doubled: float = 0.3
    forged: float = 0.1
    undeliverable: float = 0.05
    held_back: float = 0.2
    """The share of webhooks that come after all workers have finished."""
    longest_delay: float = 3.0


@dataclass
class Taken:
    """One message in a provider's ledger, and what became of it."""

    provider: str
    key: str
    id: str
    reference: str | None
    at: float
    events: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Dialect:
    """The words of one provider: where a message stands in its request and its id in the answer, and its webhooks."""

    like: Callable[[], Callable[[Received], Reply]]
    source: object
    endpoint: str
    key_in: Callable[[dict], str]
    id_in: Callable[[dict], str]
    words: dict[str, object]
    """From each event that it reports to its word for it."""
    webhook: Callable[[Taken, object, float, str], tuple[bytes, dict[str, str]]]
    """From message, word, moment and secret to body and headers."""


def _cloud(taken: Taken, word: object, at: float, secret: str) -> tuple[bytes, dict[str, str]]:
    given = {"id": taken.id, "status": word, "timestamp": str(int(at)), "biz_opaque_callback_data": taken.reference}
    errors = {"errors": meta.FAILED["errors"]} if word == "failed" else {}
    body = json.dumps(meta.event(meta.change(meta.status(**given, **errors)))).encode()
    return body, meta.signed(body, secret)


def _evolution(taken: Taken, word: object, at: float, secret: str) -> tuple[bytes, dict[str, str]]:
    """Return the first receipt, which repeats the lost answer, as `send.message`, and the others as updates."""
    if word == "send.message":
        key = {"remoteJid": f"{webhooks.NUMBER}@s.whatsapp.net", "fromMe": True, "id": taken.id}
        posted = webhooks.evolution(word, webhooks.sent(key=key, messageTimestamp=int(at)))
    else:
        posted = webhooks.evolution("messages.update", webhooks.update(word, keyId=taken.id))
    issued = {"iat": int(time.time()), "exp": int(time.time()) + 600}
    headers = {"authorization": webhooks.token(secret, **issued), "x-timestamp": str(int(at * 1000))}
    return webhooks.as_json(posted), headers


def _waha(taken: Taken, word: object, at: float, secret: str) -> tuple[bytes, dict[str, str]]:
    said = webhooks.ack(word, id=f"true_{webhooks.NUMBER}@c.us_{taken.id}") | {"timestamp": int(at * 1000)}
    body = webhooks.as_json(said)
    return body, webhooks.waha_headers(body, secret)


def _wuzapi(taken: Taken, word: object, at: float, secret: str) -> tuple[bytes, dict[str, str]]:
    moment = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
    body = webhooks.as_form(webhooks.receipt(word, MessageIDs=[taken.id], Timestamp=moment))
    return body, webhooks.wuzapi_headers(body, secret)


DIALECTS = {
    "cloud": Dialect(
        like=gateways.CloudLike,
        source=CloudReceipts(SECRET),
        endpoint="asgi",
        key_in=lambda asked: asked["text"]["body"],
        id_in=lambda answer: answer["messages"][0]["id"],
        words={"accepted": "sent", "delivered": "delivered", "read": "read", "undeliverable": "failed"},
        webhook=_cloud,
    ),
    "evolution": Dialect(
        like=gateways.EvolutionLike,
        source=EvolutionReceipts(jwt_key=SECRET),
        endpoint="wsgi",
        key_in=lambda asked: asked["text"],
        id_in=lambda answer: answer["key"]["id"],
        words={"accepted": "send.message", "delivered": "DELIVERY_ACK", "read": "READ", "undeliverable": "ERROR"},
        webhook=_evolution,
    ),
    "wuzapi": Dialect(
        like=gateways.WuzapiLike,
        source=WuzapiReceipts(key=SECRET),
        endpoint="wsgi",
        key_in=lambda asked: asked["Body"],
        id_in=lambda answer: answer["data"]["Id"],
        words={"delivered": "", "read": "read"},
        webhook=_wuzapi,
    ),
    "waha": Dialect(
        like=gateways.WahaLike,
        source=WahaReceipts(key=SECRET),
        endpoint="asgi",
        key_in=lambda asked: asked["text"],
        id_in=lambda answer: answer["key"]["id"],
        words={"accepted": 1, "delivered": 2, "read": 3, "undeliverable": -1},
        webhook=_waha,
    ),
}


class Post:
    """Carries webhooks to the endpoints, each when it is due; one that gets a 503 comes again."""

    def __init__(self, postboxes: dict[str, Postbox]) -> None:
        self.statuses: dict[tuple[bool, int], int] = {}
        """By whether it was forged and the answer's status, the number of requests."""
        self._postboxes = postboxes
        self._bag: list[tuple] = []
        self._held_back: list[tuple] = []
        self._under_way = 0
        self._numbers = count()
        self._change = threading.Condition()
        self._is_over = False
        self._carriers = [threading.Thread(target=self._carry) for _ in range(4)]

    def __enter__(self) -> Self:
        for carrier in self._carriers:
            carrier.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._is_over = True
            self._change.notify_all()
        for carrier in self._carriers:
            carrier.join()

    def give(self, letter: tuple, delay: float | None) -> None:
        """Take a webhook, to be carried after a delay in seconds; None: when all others are."""
        with self._change:
            if delay is None:
                self._held_back.append(letter)
            else:
                heapq.heappush(self._bag, (time.monotonic() + delay, next(self._numbers), letter))
                self._change.notify()

    def deliver_all(self, draw: random.Random, patience_seconds: float = 300) -> None:
        """Carry also those that were held back, in any order, and return when none is left."""
        draw.shuffle(self._held_back)
        for letter in self._held_back:
            self.give(letter, 0)
        with self._change:
            is_done = self._change.wait_for(lambda: not self._bag and not self._under_way, patience_seconds)
        assert is_done, f"{len(self._bag)} webhooks are left"

    def _carry(self) -> None:
        while (letter := self._next()) is not None:
            name, is_forged, body, headers = letter
            status = 503
            try:
                status = self._postboxes[name].ask(body=body, **headers).status
            finally:
                with self._change:
                    self._under_way -= 1
                    self.statuses[is_forged, status] = self.statuses.get((is_forged, status), 0) + 1
                    if status == 503:
                        due = time.monotonic() + 0.5
                        heapq.heappush(self._bag, (due, next(self._numbers), letter))
                    self._change.notify_all()

    def _next(self) -> tuple | None:
        with self._change:
            while not self._is_over:
                wait = self._bag[0][0] - time.monotonic() if self._bag else None
                if wait is not None and wait <= 0:
                    self._under_way += 1
                    return heapq.heappop(self._bag)[2]
                self._change.wait(wait)
        return None


class Provider:
    """One provider: takes messages, loses some requests and answers, and posts what became of each."""

    def __init__(self, name: str, manners: Manners, post: Post, ledger: Ledger, seed: int) -> None:
        self.taken: list[Taken] = []
        self._name = name
        self._dialect = DIALECTS[name]
        self._like = self._dialect.like()
        self._manners = manners
        self._post = post
        self._ledger = ledger
        self._random = random.Random(f"{name} {seed}")
        self._lock = threading.Lock()

    def __call__(self, request: Received):
        """Answer a request, or lose it before or after the message has left."""
        with self._lock:
            is_lost, is_answer_lost = (
                self._random.random() < share for share in (self._manners.lost_requests, self._manners.lost_answers)
            )
        if request.method == "GET":
            return self._like(request)
        if is_lost:
            return hang_up
        reply = self._like(request)
        asked = request.json
        taken = Taken(
            self._name,
            self._dialect.key_in(asked),
            self._dialect.id_in(reply.body),
            asked.get("biz_opaque_callback_data"),
            time.time(),
        )
        self._ledger.record(taken.key, taken.id, 0)
        with self._lock:
            self.taken.append(taken)
            self._tell(taken)
            return self._random.choice([hang_up, reset]) if is_answer_lost else reply

    def _tell(self, taken: Taken) -> None:
        """Decide what becomes of a message, and post each event of it: late, twice, or with a forgery beside it."""
        draw, manners, words = self._random, self._manners, self._dialect.words
        if "undeliverable" in words and draw.random() < manners.undeliverable:
            taken.events = ["accepted", "undeliverable"]
        else:
            taken.events = ["accepted", "delivered", "read"][: draw.randint(1, 3)]
        taken.events = [event for event in taken.events if event in words] or ["delivered"]
        for place, event in enumerate(taken.events):
            letter = self._letter(taken, event, taken.at + place, SECRET)
            for _ in range(1 + (draw.random() < manners.doubled)):
                is_held_back = draw.random() < manners.held_back
                self._post.give(letter, None if is_held_back else draw.uniform(0, manners.longest_delay))
        if draw.random() < manners.forged:
            event = next(event for event in ("undeliverable", "read") if event in words)
            self._post.give(self._letter(taken, event, taken.at + 9, FORGED), draw.uniform(0, manners.longest_delay))

    def _letter(self, taken: Taken, event: str, at: float, secret: str) -> tuple:
        body, headers = self._dialect.webhook(taken, self._dialect.words[event], at, secret)
        given = {name.replace("-", "_"): value for name, value in headers.items()}
        return self._name, secret == FORGED, body, given


@contextmanager
def providers(names: tuple[str, ...], manners: Manners, engine, ledger: Ledger, seed: int) -> Iterator[tuple]:
    """Serve providers, and the endpoints of their receipts; yield their URLs, themselves, and the post between them."""
    with ExitStack() as stack:
        boxes = {
            name: stack.enter_context(served(DIALECTS[name].endpoint, engine, DIALECTS[name].source)) for name in names
        }
        post = stack.enter_context(Post(boxes))
        made = {name: Provider(name, manners, post, ledger, seed) for name in names}
        urls = {name: stack.enter_context(serving(provider)).url for name, provider in made.items()}
        yield urls, made, post
