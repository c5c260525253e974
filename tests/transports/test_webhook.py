"""The webhook: a server on loopback that is the host's endpoint."""

import base64
import hashlib
import hmac
import re
import threading
import time
from datetime import timedelta

import loopback
import pytest
from gateways import NUMBER, TEXT, close_clients, later, outgoing, say  # noqa: F401 - autouse
from loopback import Reply, serving

from engagement import InDoubt, NotSent, Postpone, Refused, Sent
from engagement._signing import signature, signing_key
from engagement.transports.webhook import Webhook

KEY_BYTES = bytes(range(24))
SECRET = "whsec_" + base64.b64encode(KEY_BYTES).decode()


def webhook(server, path="/hooks/engagement?token=t0k3n", **options) -> Webhook:
    return Webhook(**{"url": server.url + path, "answer_within": timedelta(seconds=5), "verify": False} | options)


def accept(_) -> Reply:
    return Reply(204)


def test_a_message_is_posted_as_json():
    """The endpoint gets all it needs, at the very address that was given, query included."""
    with serving(accept) as server:
        assert webhook(server).send(outgoing()) == Sent()

    (request,) = server.received
    assert (request.method, request.path) == ("POST", "/hooks/engagement?token=t0k3n")
    assert request.headers["content-type"] == "application/json"
    assert request.headers["idempotency-key"] == str(outgoing().delivery_id)
    assert request.headers["engagement-attempt"] == "1"
    assert not any(name.startswith("webhook-") for name in request.headers)
    assert request.json == {
        "delivery_id": str(outgoing().delivery_id),
        "reference": outgoing().reference,
        "message_id": 7,
        "message_type": "goodbye",
        "message_key": "goodbye.14_days",
        "message_params": {"name": "Ana"},
        "user_id": "user7",
        "destination": "individual",
        "destination_jid": f"{NUMBER}@s.whatsapp.net",
        "scheduled_for": outgoing().scheduled_for.isoformat(),
    }


@pytest.mark.parametrize("path", ["", "/", "/hook", "/hook/", "/a?b=c&d=%2F#f"])
def test_the_address_is_used_as_it_is(path):
    """No slash is added and no query lost."""
    with serving(accept) as server:
        webhook(server, path).send(outgoing())

    assert server.received[0].path == (path.partition("#")[0] or "/")


def test_every_attempt_has_the_same_key_and_the_same_bytes():
    """An endpoint that compares requests under one key finds no difference between two attempts."""
    with serving(accept) as server:
        one = webhook(server, render=say)
        for attempt in (1, 2, 3):
            one.send(outgoing(attempt=attempt, retry_count=attempt - 1))

    assert len({request.body for request in server.received}) == 1
    assert len({request.headers["idempotency-key"] for request in server.received}) == 1
    assert [request.headers["engagement-attempt"] for request in server.received] == ["1", "2", "3"]


def test_with_a_render_the_text_goes_along():
    """The host may render here or there; what cannot be said is refused before anything is sent."""
    with serving(accept) as server:
        webhook(server, render=say).send(outgoing())
        assert isinstance(webhook(server, render=lambda _: " ").send(outgoing()), Refused)
        assert isinstance(webhook(server, render=lambda _: {}["x"]).send(outgoing()), Refused)
        assert isinstance(webhook(server, render=lambda _: None.x).send(outgoing()), NotSent)

    assert [request.json["text"] for request in server.received] == [TEXT]


def test_a_signed_request_can_be_checked():
    """The signature is that of Standard Webhooks over id, time and the very bytes of the body."""
    with serving(accept) as server:
        webhook(server, secret=SECRET, render=say).send(outgoing())

    (request,) = server.received
    headers = request.headers
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + request.body
    expected = base64.b64encode(hmac.new(KEY_BYTES, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert headers["webhook-id"] == headers["idempotency-key"]
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 5


def test_a_secret_is_changed_without_a_gap():
    """While both secrets are given, each request carries a signature of either, and a receiver of either takes it."""
    new = "whsec_" + base64.b64encode(bytes(range(32))).decode()
    with serving(accept) as server:
        for secret in (SECRET, [SECRET, new], [new]):
            webhook(server, secret=secret).send(outgoing())
        environ = {"ENGAGEMENT_WEBHOOK_URL": server.url, "ENGAGEMENT_WEBHOOK_SECRET": f"{SECRET}\n{new} "}
        Webhook.from_environment(environ=environ).send(outgoing())

    def takes(request, secret) -> bool:
        headers = request.headers
        expected = signature(
            signing_key(secret), headers["webhook-id"], int(headers["webhook-timestamp"]), request.body
        )
        return expected in headers["webhook-signature"].split(" ")

    takers = [(takes(request, SECRET), takes(request, new)) for request in server.received]
    assert takers == [(True, False), (True, True), (False, True), (True, True)]


def test_each_of_several_secrets_is_checked():
    """One that is broken, or no secret at all where some were meant, is a mistake."""
    for secret in ([SECRET, "plain"], [SECRET, ""], []):
        with pytest.raises(ValueError, match=r"^secret: "):
            Webhook(url="http://h", secret=secret)


def test_the_signature_is_the_one_of_the_specification():
    """The key is what the secret's Base64 stands for, not its letters: checked against the specification's example."""
    key = signing_key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signed = signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')

    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    "secret", ["", "plain", "whsec_", "whsec_!!!", "whsec_" + base64.b64encode(bytes(23)).decode()]
)
def test_a_weak_or_broken_secret_is_refused_at_once(secret):
    """A secret that signs nothing worth checking is a mistake, and is not repeated."""
    with pytest.raises(ValueError, match=r"^secret: must be whsec_ and 24 bytes or more in Base64$"):
        Webhook(url="http://h", secret=secret)


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (Reply(200), Sent()),
        (Reply(202, "taken"), Sent()),
        (Reply(200, "<html>"), Sent()),
        (Reply(201, {"provider_message_id": "wamid.7"}), Sent("wamid.7")),
        (Reply(201, {"provider_message_id": 7}), Sent()),
        (Reply(201, ["wamid.7"]), Sent()),
        (loopback.saying(b"HTTP/1.1 202 Accepted\r\nContent-Length: 9\r\n\r\n{", then=loopback.reset), Sent()),
        (Reply(400), Refused("webhook: HTTP 400")),
        (Reply(422), Refused("webhook: HTTP 422")),
        (Reply(408), InDoubt("webhook: HTTP 408")),
        (Reply(499), InDoubt("webhook: HTTP 499")),
        (Reply(429, "", {"Retry-After": "3"}), NotSent("webhook: HTTP 429", timedelta(seconds=3))),
        (Reply(503, "", {"Retry-After": "3"}), InDoubt("webhook: HTTP 503")),
        (Reply(409), InDoubt("webhook: HTTP 409")),
        (Reply(500), InDoubt("webhook: HTTP 500")),
        (Reply(502), InDoubt("webhook: HTTP 502")),
        (Reply(503), InDoubt("webhook: HTTP 503")),
        (Reply(302, "", {"Location": "/elsewhere"}), InDoubt("webhook: HTTP 302")),
        (loopback.reset, InDoubt("webhook: ReadError")),
    ],
)
def test_each_answer_of_the_endpoint_means_what_is_documented(reply, outcome):
    """Any 2xx is the endpoint's word that it took the message, whatever it says besides; all else goes by the table."""
    with serving(lambda _: reply) as server:
        assert webhook(server).send(outgoing()) == outcome
        assert len(server.received) == 1


@pytest.mark.parametrize("status", [401, 403, 404, 405, 410, 301])
def test_an_endpoint_that_is_not_there_costs_no_message(status):
    """A wrong address or token postpones, and pauses the rest."""
    with serving(lambda _: Reply(status)) as server:
        one = webhook(server)

        assert isinstance(one.send(outgoing()), Postpone)
        assert not one.ready()


@pytest.mark.parametrize("status", [200, 204, 301, 400, 401, 403, 404, 405, 410, 429, 500, 501, 505])
def test_an_answer_to_head_is_an_answer(status):
    """An endpoint that has no HEAD, or breaks on it, gets its messages: it is there."""
    with serving(lambda request: Reply(status if request.method == "HEAD" else 204)) as server:
        one = webhook(server)

        assert one.ready()
        assert one.send(outgoing()) == Sent()


@pytest.mark.parametrize("status", [502, 503, 504, 521, 522, 530])
def test_a_proxy_that_does_not_reach_the_endpoint_is_no_answer(status):
    """Nothing is risked while a proxy, or the endpoint itself, says that it is down."""
    with serving(lambda _: Reply(status)) as server:
        one = webhook(server)
        assert not one.ready()
        assert one.why_not_ready == f"webhook: HTTP {status}, asked with HEAD"


def test_ready_asks_only_at_the_beginning_and_after_trouble(monkeypatch):
    """While all is well nothing is asked; else any answer to HEAD will do, but a proxy's that it is not reached."""
    status = 405
    with serving(lambda request: Reply(status if request.method == "HEAD" else 500)) as server:
        one = webhook(server)
        assert one.ready()
        assert one.ready()
        one.send(outgoing())

        monkeypatch.setattr("engagement.transports.trouble.monotonic", later(minutes=1))
        status = 502
        assert not one.ready()
        monkeypatch.setattr("engagement.transports.trouble.monotonic", later(hours=1))
        status = 405
        assert one.ready()
        assert one.ready()
        assert [request.method for request in server.received] == ["HEAD", "POST", "HEAD", "HEAD"]


def test_an_outage_is_noticed_by_the_first_message_only(monkeypatch):
    """While nobody listens, `ready` finds out: no message after the first spends a retry on it."""
    with loopback.refusing() as url:
        nobody = type("Nobody", (), {"url": url})
        assert not webhook(nobody).ready()
        one = webhook(nobody)
        assert isinstance(one.send(outgoing()), NotSent)
        for minutes in (1, 30, 60):
            monkeypatch.setattr("engagement.transports.trouble.monotonic", later(minutes=minutes))
            assert not one.ready()


def test_idempotent_is_the_host_s_word():
    """Only the host knows what its endpoint does with a repeat."""
    assert Webhook(url="http://h").idempotent is False
    assert Webhook(url="http://h", idempotent=True).idempotent is True


def test_twenty_threads_send_each_message_once():
    """Twenty threads share one transport: every message arrives once, with its own key and a signature that fits."""
    with serving(accept) as server:
        one = webhook(server, secret=SECRET)

        def send(thread: int) -> None:
            for number in range(thread, 60, 20):
                one.send(outgoing(id=number, idempotency_key=f"key{number}"))

        threads = [threading.Thread(target=send, args=(thread,)) for thread in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)

    assert sorted(request.json["message_id"] for request in server.received) == list(range(60))
    for request in server.received:
        assert request.headers["idempotency-key"] == request.json["delivery_id"]


def test_it_is_made_from_the_environment(tmp_path):
    """Variables configure everything; address, secret and authorization may be in files."""
    (tmp_path / "secret").write_text(SECRET)
    with serving(accept) as server:
        (tmp_path / "url").write_text(f"{server.url}/hook\n")
        environ = {
            "ENGAGEMENT_WEBHOOK_URL_FILE": str(tmp_path / "url"),
            "ENGAGEMENT_WEBHOOK_SECRET_FILE": str(tmp_path / "secret"),
            "ENGAGEMENT_WEBHOOK_AUTHORIZATION": "Bearer x",
            "ENGAGEMENT_WEBHOOK_IDEMPOTENT": "true",
        }
        one = Webhook.from_environment(environ=environ)
        assert one.idempotent
        assert one.send(outgoing()) == Sent()

    (request,) = server.received
    assert request.headers["authorization"] == "Bearer x"
    assert "webhook-signature" in request.headers
    assert "text" not in request.json


def test_a_missing_address_names_its_variable():
    """The only thing that it needs is asked for by name."""
    with pytest.raises(ValueError, match=re.escape("ENGAGEMENT_WEBHOOK_URL: is not set")):
        Webhook.from_environment(environ={})
