"""WhatsApp gateways: servers on loopback that behave like Evolution API, WAHA and wuzapi."""

import logging
import re
import threading
from datetime import UTC, datetime, timedelta

import loopback
import pytest
from gateways import (  # noqa: F401 - close_clients is autouse
    KEY,
    LIKES,
    MESSAGE_ID,
    NUMBER,
    TEXT,
    EvolutionLike,
    WahaLike,
    WuzapiLike,
    close_clients,
    gateway,
    later,
    outgoing,
    say,
)
from loopback import Reply, serving

from engagement import Destination, InDoubt, NotSent, Postpone, Refused, Sent
from engagement._claim import Claim, clock
from engagement._sending.sender import Sender
from engagement.outcomes import classify_exception
from engagement.transports.dialects import DIALECTS, EVOLUTION, WAHA, WUZAPI
from engagement.transports.gateway import LONGEST_TEXT, WhatsAppGateway

GROUP = "120363025246125486@g.us"


@pytest.fixture(name="evolution")
def _evolution():
    like = EvolutionLike()
    with serving(like) as server:
        like.server = server
        yield like


@pytest.fixture(name="waha")
def _waha():
    like = WahaLike()
    with serving(like) as server:
        like.server = server
        yield like


@pytest.fixture(name="wuzapi")
def _wuzapi():
    like = WuzapiLike()
    with serving(like) as server:
        like.server = server
        yield like


# Sending


def test_evolution_api_sends_text_with_our_message_id(evolution):
    """Evolution API gets the JID, the text and the message id of the delivery; its own words say that it was sent."""
    assert gateway(evolution.server).send(outgoing()) == Sent(MESSAGE_ID)
    assert evolution.sent == [(MESSAGE_ID, f"{NUMBER}@s.whatsapp.net", TEXT)]
    (request,) = evolution.server.received
    assert (request.method, request.path) == ("POST", "/message/sendText/main")


def test_words_that_take_longer_than_the_lease_are_not_sent(evolution):
    """While the message was put into words, another worker may have recovered it."""
    message = Claim(outgoing(), (outgoing().scheduled_for, 7), "test", clock() + 300)

    def render(_):
        message.held_until = 0.0
        return TEXT

    sender = Sender(gateway(evolution.server, render=render), concurrency=1, classify=classify_exception)
    sender.start([message])
    _, outcome = sender.news.get(timeout=10)
    sender.close()

    assert isinstance(outcome, Postpone)
    assert evolution.sent == []


def test_an_older_evolution_api_makes_an_id_of_its_own(caplog):
    """Before 2.4 the message id is ignored; the message is sent under the gateway's id."""
    with serving(EvolutionLike(version="2.3.7")) as server:
        outcome = gateway(server).send(outgoing())

        assert isinstance(outcome, Sent)
        assert outcome.provider_message_id == server.behave.sent[0][0] != MESSAGE_ID


@pytest.mark.parametrize(
    ("jid", "chat"),
    [
        (f"{NUMBER}@s.whatsapp.net", f"{NUMBER}@c.us"),
        ("98765432101234@lid", "98765432101234@lid"),
        (GROUP, GROUP),
    ],
)
def test_waha_sends_text(waha, jid, chat):
    """WAHA gets the session and the chat in its own form; the id is the one that it answers."""
    destination = Destination.GROUP if jid == GROUP else Destination.INDIVIDUAL
    outcome = gateway(waha.server, WAHA).send(outgoing(destination_jid=jid, destination=destination))

    assert outcome == Sent(waha.sent[0][0])
    assert waha.sent[0][1:] == (chat, TEXT)
    assert waha.server.received[0].json == {"session": "default", "chatId": chat, "text": TEXT}


@pytest.mark.parametrize(
    "answer",
    [
        {"id": "true_1@c.us_3EB0"},
        {"id": {"_serialized": "true_1@lid_3EB0"}},
        {"id": "true_120363041234567890@g.us_3EB0_5511999999999@c.us"},
    ],
)
def test_waha_s_other_engines_have_the_chat_around_the_id(waha, answer):
    """WEBJS, GOWS and the newer versions answer it with the chat, NOWEB without: kept is WhatsApp's own id."""
    waha.override = Reply(201, answer)

    assert gateway(waha.server, WAHA).send(outgoing()) == Sent("3EB0")


def test_wuzapi_sends_text_with_our_message_id(wuzapi):
    """The message id of the delivery goes to wuzapi too."""
    assert gateway(wuzapi.server, WUZAPI).send(outgoing()) == Sent(MESSAGE_ID)
    assert wuzapi.sent == [(MESSAGE_ID, f"{NUMBER}@s.whatsapp.net", TEXT)]


def test_the_message_id_is_the_same_for_every_attempt_and_no_other_delivery(evolution):
    """What WhatsApp could recognise a repeat by does not change between attempts, and differs between deliveries."""
    one = gateway(evolution.server)
    for attempt in (1, 2, 9):
        one.send(outgoing(attempt=attempt))
    one.send(outgoing(idempotency_key="user7:goodbye:2026-11-25"))

    ids = [message_id for message_id, _, _ in evolution.sent]
    assert len(set(ids[:3])) == 1
    assert ids[3] != ids[0]
    assert re.fullmatch(r"3EB0[0-9A-F]{18}", ids[0])


def test_a_session_name_cannot_change_the_path(evolution):
    """A session's name is quoted: it stays one part of the path."""
    evolution.instance = "a%2F..%20b%3F"

    assert gateway(evolution.server, session="a/.. b?").ready()
    assert evolution.server.received[0].path == "/instance/connectionState/a%2F..%20b%3F"


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("bsuid", ["BR.1502576394655843", "US.ENT.11815799212886844830"])
def test_a_person_without_a_number_is_refused_by_a_gateway(name, bsuid):
    """A gateway would make a number of the id: it is refused in a clear word, and the gateway hears nothing."""
    with serving(LIKES[name]()) as server:
        outcome = gateway(server, DIALECTS[name]).send(outgoing(destination_jid=bsuid))

        assert outcome == Refused(
            f"{DIALECTS[name].name} sends to numbers and groups, not to a business-scoped user id"
        )
        assert server.received == []


# What cannot be said


@pytest.mark.parametrize(
    ("render", "reason"),
    [
        (lambda message: message.message_params["plan"], "the message has no words: KeyError"),
        (lambda _: "".encode("x"), "the message has no words: LookupError"),
        (lambda _: int("x"), "the message has no words: ValueError"),
        (lambda _: "", "the text is empty"),
        (lambda _: " \n", "the text is empty"),
        (lambda _: None, "render returned NoneType, which is no text"),
        (lambda _: b"hello", "render returned bytes, which is no text"),
        (lambda _: "x" * (LONGEST_TEXT + 1), f"the text has {LONGEST_TEXT + 1} characters, more than {LONGEST_TEXT}"),
        (lambda _: "\ud83d", "the text holds a lone surrogate, which is no character"),
    ],
)
def test_what_cannot_be_said_is_refused_before_anything_is_sent(evolution, render, reason):
    """Missing words, empty text and what is no text: refused, and the gateway hears nothing."""
    assert gateway(evolution.server, render=render).send(outgoing()) == Refused(reason)
    assert evolution.server.received == []


def test_a_render_that_breaks_is_not_sent(evolution):
    """A bug in the host's rendering sends nothing, and does not fail the message at once; its text is not repeated."""
    outcome = gateway(evolution.server, render=lambda message: message.nothing).send(outgoing())

    assert outcome == NotSent("render raised AttributeError")
    assert evolution.server.received == []


def test_the_longest_text_is_sent(evolution):
    """The limit itself is no mistake."""
    assert isinstance(gateway(evolution.server, render=lambda _: "x" * LONGEST_TEXT).send(outgoing()), Sent)


# What the gateways say when it goes wrong


def test_a_number_that_is_not_on_whatsapp_is_refused(evolution):
    """Evolution API checks the number first: refused, without the number in the reason."""
    evolution.not_on_whatsapp.add(f"{NUMBER}@s.whatsapp.net")
    outcome = gateway(evolution.server).send(outgoing())

    assert outcome == Refused("Evolution API: the number is not on WhatsApp; checked before the send (HTTP 400)")
    assert evolution.sent == []


@pytest.mark.parametrize(
    "message", ["PrismaClientKnownRequestError: Error", "Error: Timed Out", "[object Object]", [["x"]], [], None, 7]
)
def test_any_other_400_of_evolution_api_is_in_doubt(evolution, message):
    """Evolution API answers 400 for whatever fails, also after the message left: only its words tell them apart."""
    evolution.fault = lambda _: evolution.error(400, "Bad Request", message)
    outcome = gateway(evolution.server).send(outgoing())

    assert outcome == InDoubt("Evolution API: HTTP 400")
    assert len(evolution.sent) == 1


def test_a_session_that_is_not_connected_costs_the_message_nothing(waha, wuzapi):
    """A session that ended between `ready` and `send`: postponed, and nothing was sent."""
    waha.status = "SCAN_QR_CODE"
    wuzapi.connected = False

    for server, dialect in ((waha.server, WAHA), (wuzapi.server, WUZAPI)):
        before = datetime.now(UTC)
        one = gateway(server, dialect)
        outcome = one.send(outgoing())
        assert isinstance(outcome, Postpone)
        assert outcome.until > before + timedelta(seconds=59)
        assert not one.ready()
    assert waha.sent == wuzapi.sent == []


def test_a_closed_socket_is_not_sent(evolution, waha):
    """Baileys says `Connection Closed` before it writes: not sent, in both gateways' words."""
    evolution.state = "close"
    waha.fault = lambda request: waha.failure(request, "Connection Closed")

    assert isinstance(gateway(evolution.server).send(outgoing()), NotSent)
    assert isinstance(gateway(waha.server, WAHA).send(outgoing()), NotSent)


def test_an_exception_that_repeats_the_request_leaks_nothing(waha):
    """WAHA's 500 repeats number and text: in doubt, and none of it is in the reason."""
    waha.fault = lambda request: waha.failure(request, f"Timed Out for {NUMBER}: {TEXT}")

    assert gateway(waha.server, WAHA).send(outgoing()) == InDoubt("WAHA: HTTP 500")


@pytest.mark.parametrize("name", DIALECTS)
def test_a_wrong_key_or_session_stops_the_sender(name):
    """A 401 or 404 of the gateway is the sender's trouble: no message pays for it."""
    with serving(LIKES[name]()) as server:
        assert isinstance(gateway(server, DIALECTS[name], key="other").send(outgoing()), Postpone)
        assert server.behave.sent == []
    with serving(EvolutionLike()) as server:
        assert isinstance(gateway(server, session="none").send(outgoing()), Postpone)


def test_a_business_instance_s_own_id_is_one(evolution):
    """Meta's message ids are taken as such too."""
    evolution.override = Reply(201, {"key": {"fromMe": True, "id": "wamid.HBgNNTUxMTk4NzY1NDMyMRUCABEYEjNF=="}})

    assert gateway(evolution.server).send(outgoing()) == Sent("wamid.HBgNNTUxMTk4NzY1NDMyMRUCABEYEjNF==")


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [(loopback.reset, "ReadError"), (loopback.hang_up, "RemoteProtocolError"), (loopback.hang, "ReadTimeout")],
)
def test_a_gateway_that_crashes_after_the_send_is_in_doubt(evolution, behaviour, error):
    """The message left and the answer did not come: in doubt, sent once."""
    evolution.fault = lambda _: behaviour
    outcome = gateway(evolution.server, answer_within=timedelta(seconds=0.4)).send(outgoing())

    assert outcome == InDoubt(f"Evolution API: {error}")
    assert len(evolution.sent) == 1


# Ready


@pytest.mark.parametrize(
    ("state", "expected"), [("open", True), ("connecting", False), ("close", False), (None, False)]
)
def test_evolution_api_is_ready_while_it_is_connected(evolution, state, expected):
    """`ready` is the connection state."""
    evolution.state = state

    assert gateway(evolution.server).ready() is expected


@pytest.mark.parametrize("status", ["WORKING", "STARTING", "SCAN_QR_CODE", "FAILED", "STOPPED"])
def test_waha_is_ready_while_it_is_working(waha, status):
    """`ready` is the session's status."""
    waha.status = status

    assert gateway(waha.server, WAHA).ready() is (status == "WORKING")


@pytest.mark.parametrize(("connected", "logged_in"), [(True, True), (True, False), (False, True), (False, False)])
def test_wuzapi_is_ready_while_it_is_connected_and_logged_in(wuzapi, connected, logged_in):
    """`ready` is the session's status."""
    wuzapi.connected, wuzapi.logged_in = connected, logged_in

    assert gateway(wuzapi.server, WUZAPI).ready() is (connected and logged_in)


def test_it_tells_why_it_is_not_ready(evolution, monkeypatch):
    """A queue that waits for a session, a key, a gateway or a pause can be told so; none of it quotes anybody."""
    one = gateway(evolution.server)
    evolution.state = "close"
    assert not one.ready()
    assert one.why_not_ready == "Evolution API: the session is not connected"
    evolution.state = "open"
    assert one.ready()
    assert one.why_not_ready is None

    wrong = gateway(evolution.server, key="other")
    assert not wrong.ready()
    assert wrong.why_not_ready == "Evolution API: HTTP 401, asked for the session's state"
    wrong.send(outgoing())
    assert not wrong.ready()
    assert wrong.why_not_ready == "Evolution API: HTTP 401"
    with loopback.refusing() as url:
        nobody = gateway(type("Nobody", (), {"url": url}))
        assert not nobody.ready()
        assert nobody.why_not_ready.startswith("Evolution API: Connect")


@pytest.mark.parametrize("dialect", [EVOLUTION, WAHA, WUZAPI])
def test_a_gateway_that_does_not_answer_is_not_ready(dialect):
    """No connection, a wrong key, an error, a reset: not ready, and no exception."""
    with loopback.refusing() as url:
        server = type("Nobody", (), {"url": url})
        assert gateway(server, dialect).ready() is False
    for behaviour in (Reply(401), Reply(500), Reply(200, "<html>"), Reply(200, [1]), loopback.reset):
        with serving(lambda _, behaviour=behaviour: behaviour) as server:
            assert gateway(server, dialect).ready() is False


def test_after_much_trouble_nothing_is_asked_for_a_while(evolution, monkeypatch):
    """A long pause is not ready, without a question; after a success the gateway is asked again."""
    one = gateway(evolution.server, key="other")
    one.send(outgoing())
    asked = len(evolution.server.received)

    assert not one.ready()
    assert len(evolution.server.received) == asked

    monkeypatch.setattr("engagement.transports.trouble.monotonic", later(minutes=2))
    assert not one.ready()
    assert evolution.server.received[-1].path == "/instance/connectionState/main"


# Idempotence


def test_idempotent_is_off_by_default_and_refused_without_message_ids(evolution, waha):
    """Only a dialect with message ids can be called idempotent, and only by the host."""
    assert gateway(evolution.server).idempotent is False
    assert gateway(evolution.server, idempotent=True).idempotent is True
    with pytest.raises(ValueError, match="idempotent: WAHA takes no message id"):
        gateway(waha.server, WAHA, idempotent=True)


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.4.0", True), ("2.4.0-rc2", True), ("3.0.0", True), ("2.3.7", False), ("1.9.0", False), ("next", False)],
)
def test_an_evolution_api_without_message_ids_is_never_ready_as_idempotent(version, expected, caplog):
    """Before anything is claimed, the version is asked: an old one would send a repeat as a new message."""
    with serving(EvolutionLike(version=version)) as server:
        one = gateway(server, idempotent=True)

        assert one.ready() is expected
        assert one.ready() is expected
        assert gateway(server).ready()
    assert ("gateway_ignores_message_ids" in caplog.text) is (version in {"2.3.7", "1.9.0"})


def test_an_id_of_the_gateway_s_own_stops_an_idempotent_sender(evolution, caplog):
    """Whatever its version says: a gateway that answers another id is not used any more."""
    one = gateway(evolution.server, idempotent=True)
    assert one.ready()
    evolution.override = Reply(201, {"key": {"id": "3EB0FFFFFFFFFFFFFFFFFF"}})

    assert one.send(outgoing()) == Sent("3EB0FFFFFFFFFFFFFFFFFF")
    assert not one.ready()
    assert [record.levelno for record in caplog.records if record.name == "engagement"] == [logging.ERROR]


def test_wuzapi_can_be_idempotent(wuzapi):
    """Message ids are as old as wuzapi; no version is asked."""
    one = gateway(wuzapi.server, WUZAPI, idempotent=True)

    assert one.ready()
    assert one.send(outgoing()) == Sent(MESSAGE_ID)
    assert one.ready()


# Looking up


def test_a_message_that_the_gateway_stored_was_sent(evolution):
    """What was sent under our id is found by it, also if its answer never came."""
    evolution.fault = lambda _: loopback.reset
    one = gateway(evolution.server)
    assert isinstance(one.send(outgoing()), InDoubt)

    assert one.look_up(outgoing()) == Sent(MESSAGE_ID)
    assert one.look_up(outgoing(idempotency_key="another")) is None
    assert evolution.server.received[-1].json["where"]["key"]["fromMe"] is True


def test_what_is_not_found_may_have_been_sent(evolution):
    """A gateway that does not keep its messages knows nothing: None, never `NotSent`."""
    one = gateway(evolution.server)
    one.send(outgoing())
    evolution.keeps_messages = False

    assert one.look_up(outgoing()) is None


def record(**fields):
    return {"key": {"id": MESSAGE_ID, "fromMe": True}, "MessageUpdate": []} | fields


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Reply(200, {"messages": {"records": [record()]}}), Sent(MESSAGE_ID)),
        (Reply(200, {"messages": {"records": [record(MessageUpdate=[{"status": "DELIVERY_ACK"}])]}}), Sent(MESSAGE_ID)),
        (Reply(200, {"messages": {"records": [record(MessageUpdate=None)]}}), Sent(MESSAGE_ID)),
        (Reply(200, {"messages": {"records": [record(MessageUpdate=[{"status": "ERROR"}])]}}), None),
        (Reply(200, {"messages": {"records": [record(status="ERROR")]}}), None),
        (Reply(200, {"messages": {"records": [record(status=0)]}}), None),
        (Reply(200, {"messages": {"records": [record(MessageUpdate=[{"ack": -1}])]}}), None),
        (Reply(200, {"messages": {"records": [record(status="PENDING")]}}), Sent(MESSAGE_ID)),
        (Reply(200, {"messages": {"records": [record(key={"id": "3EB0"})]}}), None),
        (Reply(200, {"messages": {"records": []}}), None),
        (Reply(200, {"messages": {"records": "none"}}), None),
        (Reply(200, "<html>"), None),
        (Reply(404), None),
        (Reply(500, {"messages": {"records": [record()]}}), None),
        (loopback.reset, None),
    ],
)
def test_a_look_up_believes_only_what_names_the_id(answer, expected):
    """Only a stored message with our id counts, and only if WhatsApp did not refuse it; any failure says nothing."""
    with serving(lambda _: answer) as server:
        assert gateway(server).look_up(outgoing()) == expected


def test_gateways_that_cannot_answer_are_not_asked(waha, wuzapi):
    """WAHA and wuzapi find no message by our id, so a worker sees that there is no `look_up`."""
    assert gateway(waha.server, WAHA).look_up is None
    assert gateway(wuzapi.server, WUZAPI).look_up is None


# Threads and settings


@pytest.mark.parametrize("name", DIALECTS)
def test_twenty_threads_send_each_message_once(name):
    """Twenty threads share one transport: every message goes out once, to its own destination."""
    with serving(LIKES[name]()) as server:
        one = gateway(server, DIALECTS[name])
        jids = [f"55119{number:08}@s.whatsapp.net" for number in range(60)]
        outcomes = {}

        def send(thread: int) -> None:
            for number in range(thread, 60, 20):
                message = outgoing(idempotency_key=f"key{number}", destination_jid=jids[number])
                outcomes[number] = one.send(message).provider_message_id

        threads = [threading.Thread(target=send, args=(thread,)) for thread in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)

        sent = {to.split("@")[0]: message_id for message_id, to, _ in server.behave.sent}
        assert len(server.behave.sent) == 60
        assert outcomes == {number: sent[jid.split("@")[0]] for number, jid in enumerate(jids)}


def test_it_is_made_from_the_environment(tmp_path):
    """Variables configure everything; the key may be in a file."""
    (tmp_path / "key").write_text(f"{KEY}\n")
    like = WuzapiLike()
    with serving(like) as server:
        environ = {
            "ENGAGEMENT_RENDER": "gateways:say",
            "ENGAGEMENT_GATEWAY_URL": server.url,
            "ENGAGEMENT_GATEWAY_KEY_FILE": str(tmp_path / "key"),
            "ENGAGEMENT_GATEWAY_DIALECT": "wuzapi",
            "ENGAGEMENT_GATEWAY_IDEMPOTENT": "yes",
            "ENGAGEMENT_GATEWAY_ANSWER_SECONDS": "5",
        }
        one = WhatsAppGateway.from_environment(environ=environ)

        assert one.idempotent
        assert one.ready()
        assert one.send(outgoing()) == Sent(MESSAGE_ID)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ENGAGEMENT_GATEWAY_URL": ""}, "ENGAGEMENT_GATEWAY_URL: is not set"),
        ({"ENGAGEMENT_GATEWAY_KEY": ""}, "ENGAGEMENT_GATEWAY_KEY: is not set"),
        ({"ENGAGEMENT_RENDER": ""}, "ENGAGEMENT_RENDER: is not set: name the function"),
        ({"ENGAGEMENT_RENDER": "gateways:nothing"}, "ENGAGEMENT_RENDER: is no package.module:name"),
        ({"ENGAGEMENT_RENDER": "no.such.module:x"}, "ENGAGEMENT_RENDER: is no package.module:name"),
        ({"ENGAGEMENT_RENDER": ":"}, "ENGAGEMENT_RENDER: is no package.module:name"),
        ({"ENGAGEMENT_GATEWAY_DIALECT": "other"}, "ENGAGEMENT_GATEWAY_DIALECT: must be one of evolution, waha, wuzapi"),
        ({"ENGAGEMENT_GATEWAY_IDEMPOTENT": "maybe"}, "ENGAGEMENT_GATEWAY_IDEMPOTENT: must be yes or no"),
        (
            {"ENGAGEMENT_GATEWAY_ANSWER_SECONDS": "soon"},
            "ENGAGEMENT_GATEWAY_ANSWER_SECONDS: must be a number of seconds",
        ),
        ({"ENGAGEMENT_GATEWAY_ANSWER_SECONDS": "9999999"}, "answer_within: must be positive, and at most a day"),
        ({"ENGAGEMENT_GATEWAY_ANSWER_SECONDS": "0"}, "answer_within: must be positive, and at most a day"),
        (
            {"ENGAGEMENT_GATEWAY_KEY_FILE": "/nowhere/key"},
            "ENGAGEMENT_GATEWAY_KEY_FILE: cannot be read: FileNotFoundError",
        ),
    ],
)
def test_a_wrong_setting_names_its_variable(changes, problem):
    """What is wrong is said with the variable's name and without any value."""
    environ = {"ENGAGEMENT_RENDER": "gateways:say", "ENGAGEMENT_GATEWAY_URL": "http://h", "ENGAGEMENT_GATEWAY_KEY": KEY}

    with pytest.raises(ValueError, match=re.escape(problem)) as raised:
        WhatsAppGateway.from_environment(environ=environ | changes)
    assert KEY not in str(raised.value)
    assert raised.value.__cause__ is None
