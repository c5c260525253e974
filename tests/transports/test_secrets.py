"""Secrets, numbers and words stay out of logs, `repr`, reasons and errors."""

import logging
import traceback
from datetime import timedelta

import h11
import loopback
import pytest
from gateways import KEY, NUMBER, TEXT, close_clients, outgoing, say  # noqa: F401 - autouse
from loopback import Reply, serving

from engagement.transports.cloud import Template, WhatsAppCloud
from engagement.transports.dialects import DIALECTS
from engagement.transports.gateway import WhatsAppGateway
from engagement.transports.webhook import Webhook

TOKEN = "t0k3n-in-url-77aa"
PASSWORD = "passw0rd-9f2e"
SECRET = "whsec_c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0"
PRIVATE = (KEY, TOKEN, PASSWORD, SECRET, SECRET.removeprefix("whsec_"), NUMBER, TEXT, "Ana", "user7")


def transports(url: str):
    host = url.removeprefix("http://")
    for dialect in DIALECTS.values():
        yield WhatsAppGateway(url=f"http://u:{PASSWORD}@{host}", key=KEY, render=say, dialect=dialect, verify=False)
    yield WhatsAppCloud(phone_number_id="1065", token=KEY, render=say, base_url=url, verify=False)
    yield Webhook(
        url=f"http://u:{PASSWORD}@{host}/{TOKEN}?token={TOKEN}",
        render=say,
        secret=SECRET,
        authorization=f"Bearer {KEY}",
        verify=False,
    )


def nothing_private_in(*texts: str) -> None:
    for text in texts:
        assert not [private for private in PRIVATE if private in text], text


def repeat(request) -> Reply:
    """Answer an error that repeats all that was received, as WAHA's does."""
    everything = {"headers": request.headers, "path": request.path, "body": request.body.decode(), "code": 131026}
    return Reply(
        500, {"error": everything | {"fbtrace_id": request.body.decode()}, "response": {"message": [everything]}}
    )


def unauthorized(_) -> Reply:
    return Reply(401, {"error": {"message": f"Invalid OAuth token {KEY}", "code": 190}, "message": f"no {KEY}"})


def traced(_) -> Reply:
    return Reply(400, {"error": {"code": 131026, "fbtrace_id": NUMBER}})


SAYING = loopback.saying(f"HTTP/1.1 400 {KEY} {NUMBER}\r\nContent-Length: 0\r\nX-{KEY}: {NUMBER}\r\n\r\n".encode())
GARBLED = loopback.saying(f"{KEY} {NUMBER}\r\n\r\n".encode())


@pytest.mark.parametrize(
    "behaviour",
    [
        repeat,
        unauthorized,
        traced,
        lambda _: SAYING,
        lambda _: GARBLED,
        lambda _: loopback.reset,
        lambda _: Reply(201, f'"{KEY}'),
    ],
)
def test_nothing_private_is_logged_or_told(behaviour, caplog, monkeypatch):
    """At the lowest level, of all libraries: no key, token, number or word, whatever the provider answers."""
    monkeypatch.setattr("engagement.transports.trouble.FIRST_PAUSE", timedelta(microseconds=1))
    caplog.set_level(logging.DEBUG)
    with serving(behaviour) as server:
        for transport in transports(server.url):
            outcome = transport.send(outgoing())
            transport.ready()
            if getattr(transport, "look_up", None):
                transport.look_up(outgoing())
            nothing_private_in(repr(outcome), repr(transport), str(transport), repr(transport.prepare(outgoing())))
        assert server.received

    nothing_private_in(caplog.text)


@pytest.mark.parametrize("kind", [ValueError, OSError, h11.RemoteProtocolError, RecursionError])
@pytest.mark.parametrize(
    "step", ["exchange.Connections._written", "exchange.Connections._new_one", "connection.Connection._exchange"]
)
def test_no_error_leaves_a_transport(monkeypatch, step, kind):
    """Whatever the network or h11 raises becomes an outcome, without the text that it holds."""

    def fail(*arguments):
        raise kind(f"{KEY} {arguments}")

    monkeypatch.setattr("engagement.transports.trouble.FIRST_PAUSE", timedelta(microseconds=1))
    monkeypatch.setattr(f"engagement.transports.{step}", fail)
    with serving(lambda _: Reply(500)) as server:
        for transport in transports(server.url):
            nothing_private_in(repr(transport.send(outgoing())))
            assert not transport.ready()


@pytest.mark.parametrize(
    "make",
    [
        lambda: WhatsAppGateway(url=f"ftp://u:{PASSWORD}@h/{TOKEN}", key=KEY, render=say),
        lambda: WhatsAppGateway(url="http://h", key=f"{KEY}\n", render=say),
        lambda: WhatsAppCloud(phone_number_id=NUMBER + "x", token=KEY, render=say),
        lambda: WhatsAppCloud(phone_number_id="1", token=f"{KEY}\n", render=say),
        lambda: Webhook(url=f"{TOKEN}:{PASSWORD}"),
        lambda: Webhook(url=f"http://{TOKEN}:{PASSWORD}"),
        lambda: Webhook(url="http://h", secret=f"{SECRET}!"),
        lambda: Webhook.from_environment(
            environ={"ENGAGEMENT_WEBHOOK_IDEMPOTENT": KEY, "ENGAGEMENT_WEBHOOK_URL": "http://h"}
        ),
        lambda: Webhook.from_environment(
            environ={"ENGAGEMENT_WEBHOOK_ANSWER_SECONDS": KEY, "ENGAGEMENT_WEBHOOK_URL": "http://h"}
        ),
    ],
)
def test_an_error_of_configuration_shows_no_value(make):
    """Also the traceback's chain, which a host's log prints whole, holds no secret but in the test's own lines."""
    with pytest.raises(ValueError) as raised:
        make()
    error = raised.value
    shown = "".join(traceback.format_exception_only(error))
    while (error := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        shown += "".join(traceback.format_exception_only(error))

    nothing_private_in(shown)


def test_a_render_s_error_is_not_repeated():
    """What the host's rendering says of its failure may be the message itself."""

    def fail(message):
        raise LookupError(f"no words for {message.message_params} of {message.destination_jid}")

    outcome = WhatsAppGateway(url="http://127.0.0.1:1", key=KEY, render=fail, verify=False).send(outgoing())
    nothing_private_in(repr(outcome))


def test_a_template_shows_nothing():
    """A template holds what is said to a person: its `repr` does not."""
    nothing_private_in(repr(Template("goodbye", "pt_BR", [{"parameters": [{"text": "Ana"}]}])))
