"""The contract test kit, run against each transport that speaks HTTP and a server that behaves like its provider."""

# ruff: noqa: D102 - the kit says what each hook does

from datetime import timedelta
from operator import attrgetter

import loopback
import pytest
from gateways import KEY, CloudLike, EvolutionLike, WahaLike, WuzapiLike
from loopback import Reply, serving

from engagement.testing import TransportContract
from engagement.transports.cloud import WhatsAppCloud
from engagement.transports.dialects import EVOLUTION, WAHA, WUZAPI
from engagement.transports.gateway import WhatsAppGateway
from engagement.transports.webhook import Webhook

SOON = timedelta(seconds=1.5)  # and long enough for 24 messages on a busy machine


class OverHttp(TransportContract):
    """What the far sides have in common: a `like` behind a server, or nobody."""

    secrets = (KEY,)
    # pytest would collect the class itself.
    __test__ = False

    @pytest.fixture(autouse=True)
    def _far_side(self, monkeypatch):
        monkeypatch.setattr("engagement.transports.trouble.FIRST_PAUSE", timedelta(seconds=0.05))
        self.like = self.make_like()
        with serving(self.like) as server, loopback.refusing() as nobody:
            self.server, self.url, self.nobody = server, server.url, nobody
            yield

    def far_side_accepts(self):
        self.like.fault = lambda _: None
        self.like.override = None

    def far_side_times_out(self):
        self.like.fault = lambda _: loopback.hang

    def far_side_breaks_off(self):
        self.like.fault = lambda _: loopback.reset

    def far_side_unreachable(self):
        self.url = self.nobody
        self.server.close()

    def effects_of(self, message):
        """WhatsApp shows a repeated id once: so do we count."""
        ours = {sent for sent in self.like.sent if message.text in sent[2]}
        return len(ours)


class TestEvolutionApi(OverHttp):
    __test__ = True
    make_like = EvolutionLike

    def make_transport(self):
        options = {"url": self.url, "key": KEY, "session": "main", "verify": False, "answer_within": SOON}
        return WhatsAppGateway(dialect=EVOLUTION, render=attrgetter("text"), idempotent=True, **options)

    def far_side_refuses(self):
        self.like.override = self.like.error(400, "Bad Request", [{"exists": False}])


class TestWaha(OverHttp):
    __test__ = True
    make_like = WahaLike

    def make_transport(self):
        options = {"url": self.url, "key": KEY, "verify": False, "answer_within": SOON}
        return WhatsAppGateway(dialect=WAHA, render=attrgetter("text"), **options)

    def far_side_refuses(self):
        self.like.override = Reply(400, {"statusCode": 400, "message": ["chatId must be a string"]})


class TestWuzapi(OverHttp):
    __test__ = True
    make_like = WuzapiLike

    def make_transport(self):
        options = {"url": self.url, "key": KEY, "verify": False, "answer_within": SOON}
        return WhatsAppGateway(dialect=WUZAPI, render=attrgetter("text"), idempotent=True, **options)

    def far_side_refuses(self):
        self.like.override = self.like.error(400, "Could not parse phone")


class TestCloud(OverHttp):
    __test__ = True
    make_like = CloudLike

    def make_transport(self):
        options = {"phone_number_id": "1065", "token": KEY, "verify": False, "answer_within": SOON}
        return WhatsAppCloud(base_url=self.url, render=attrgetter("text"), **options)

    def far_side_refuses(self):
        self.like.override = self.like.error(131026, 400)


class EndpointLike:
    """A host's endpoint that does each delivery id once."""

    def __init__(self):
        self.texts = {}
        self.fault = lambda _: None
        self.override = None

    def __call__(self, request):
        if self.override:
            return self.override
        if request.method == "POST":
            self.texts[request.headers["idempotency-key"]] = request.json["text"]
        return self.fault(request) or Reply(202, {"provider_message_id": request.headers.get("idempotency-key")})


class TestWebhook(OverHttp):
    __test__ = True
    make_like = EndpointLike

    def make_transport(self):
        options = {"authorization": f"Bearer {KEY}", "verify": False, "answer_within": SOON}
        return Webhook(url=f"{self.url}/{KEY}", render=attrgetter("text"), idempotent=True, **options)

    def far_side_refuses(self):
        self.like.override = Reply(422)

    def effects_of(self, message):
        return int(str(message.delivery_id) in self.like.texts)
