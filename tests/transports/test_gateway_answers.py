"""What the words and statuses of a WhatsApp gateway prove: sent, not sent, refused, or in doubt."""

from datetime import UTC, datetime, timedelta

import loopback
import pytest
from gateways import (  # noqa: F401 - close_clients is autouse
    MESSAGE_ID,
    NUMBER,
    close_clients,
    gateway,
    outgoing,
    say,
)
from loopback import Reply, serving

from engagement import InDoubt, NotSent, Postpone, Refused, Sent
from engagement.transports.dialects import DIALECTS, EVOLUTION, WAHA, WUZAPI
from engagement.transports.http import Proof


@pytest.mark.parametrize("words", [(name, words) for name, dialect in DIALECTS.items() for words in dialect.words])
def test_each_known_word_of_a_gateway_proves_what_its_table_says(words):
    """Each entry of a dialect's table is recognised in an answer of that gateway; the same words elsewhere are not."""
    name, words = words
    text = words.text.replace("…", " and more")
    outcomes = {
        Proof.REFUSED: Refused,
        Proof.NOT_SENT: NotSent,
        Proof.WAIT: NotSent,
        Proof.STOPPED: Postpone,
        Proof.LATER: Postpone,
        Proof.IN_DOUBT: InDoubt,
    }
    for said in (text, text.lower()) if name == "wuzapi" else (text,):
        outcome = believed(name, words.status, failure(name, words.status, said))

        assert type(outcome) is outcomes[words.proof]
        assert words.because in outcome.reason
    assert not words.match(words.status + 1, text)
    assert not words.match(words.status, "PrismaClientKnownRequestError: " + text)


def failure(name, status, text):
    """Return the body with which a gateway says this of a failure."""
    bodies = {
        "evolution": {"code": text} if text.isupper() else {"response": {"message": text}},
        "waha": {"exception": {"message": text}} if status == 500 else {"error": text},
        "wuzapi": {"error": text},
    }
    return {"response": {"message": [{"exists": False}]}} if text == "exists: false" else bodies[name]


WHATSMEOW = {"wuzapi": "error sending message: ", "waha": "2 UNKNOWN: "}


def of_whatsmeow(name, text, *, messages=1):
    """Return what a gateway makes of an error of whatsmeow's for so many messages, and how often it was posted."""
    with serving(lambda _: Reply(500, failure(name, 500, WHATSMEOW[name] + text))) as server:
        one = gateway(server, DIALECTS[name])
        outcomes = [one.send(outgoing(idempotency_key=f"key{number}")) for number in range(messages)]
        return outcomes, len(server.received)


@pytest.mark.parametrize("name", WHATSMEOW)
@pytest.mark.parametrize("number", [463, 429, 503])
def test_the_sender_s_trouble_pauses_the_sender_and_costs_no_message_its_retries(name, number):
    """A lock on the sender, which each further try prolongs, a rate limit, an outage: eight messages are one post."""
    outcomes, posts = of_whatsmeow(name, f"server returned error {number}", messages=8)

    assert posts == 1
    assert {type(outcome) for outcome in outcomes} == {Postpone}
    if number == 463:
        assert outcomes[0].until > datetime.now(UTC) + timedelta(minutes=59)


@pytest.mark.parametrize("name", WHATSMEOW)
@pytest.mark.parametrize(
    ("number", "outcome"),
    [(n, Postpone) for n in (400, 401, 403, 405, 406, 420, 479, 4630, 46)] + [(n, InDoubt) for n in (500, 530, 502)],
)
def test_another_number_of_whatsapp_s_ends_no_message(name, number, outcome):
    """It is known of messages and of senders alike, or may come after the act: never refused."""
    outcomes, _ = of_whatsmeow(name, f"server returned error {number}")

    assert type(outcomes[0]) is outcome


@pytest.mark.parametrize("name", WHATSMEOW)
@pytest.mark.parametrize(
    "text",
    [
        f"failed to get user info for {NUMBER}@s.whatsapp.net to fill LID cache: info query timed out",
        f"no LID found for {NUMBER}@s.whatsapp.net from server",
        "failed to get device list: failed to send usync query: websocket not connected",
        "failed to get group members: info query returned status 429: rate-overlimit",
        "can't encrypt message for device: no signal session established with 1:0",
    ],
)
def test_what_whatsmeow_raises_before_its_frame_was_not_sent(name, text):
    """Nothing had left: no doubt, and neither number nor text is in the reason."""
    (outcome, *_), _ = of_whatsmeow(name, text)

    assert isinstance(outcome, NotSent)
    assert NUMBER not in outcome.reason


@pytest.mark.parametrize("name", WHATSMEOW)
@pytest.mark.parametrize(
    "text",
    [
        "websocket not connected",
        "websocket disconnected before message send returned response",
        "timed out waiting for message send response",
        "failed to send message node: frame socket is closed",
        "context deadline exceeded",
        "sent, but: no LID found for 1",
    ],
)
def test_what_whatsmeow_may_raise_after_its_frame_is_in_doubt(name, text):
    """A frame may have been written, and be answered by nobody."""
    (outcome, *_), _ = of_whatsmeow(name, text)

    assert isinstance(outcome, InDoubt)


@pytest.mark.parametrize("dialect", [EVOLUTION, WAHA, WUZAPI])
def test_408_is_in_doubt_since_baileys_calls_its_time_outs_so(dialect):
    """A Baileys time-out is a 408: it says nothing about the effect, unlike one of an HTTP server."""
    with serving(lambda _: Reply(408)) as server:
        assert gateway(server, dialect).send(outgoing()) == InDoubt(f"{dialect.name}: HTTP 408")


TAKEN = {
    "evolution": {"key": {"id": MESSAGE_ID, "fromMe": True}, "status": "PENDING"},
    "waha": {"id": f"true_{NUMBER}@c.us_{MESSAGE_ID}"},
    "wuzapi": {"code": 200, "data": {"Details": "Sent", "Id": MESSAGE_ID}, "success": True},
}


def believed(name, status, body):
    """Return what is made of an answer of this gateway."""
    with serving(lambda _: Reply(status, body)) as server:
        return gateway(server, DIALECTS[name]).send(outgoing())


@pytest.mark.parametrize("name", DIALECTS)
def test_a_success_that_breaks_off_is_in_doubt(name):
    """Half a body does not say that the message was taken: it may be the beginning of an error."""
    half = b"HTTP/1.1 201 Created\r\nContent-Length: 500\r\n\r\n{"
    with serving(lambda _: loopback.saying(half, then=loopback.reset)) as server:
        dialect = DIALECTS[name]
        assert gateway(server, dialect).send(outgoing()) == InDoubt(f"{dialect.name}: HTTP 201")


META_ERROR = {"message": "(#131047) Re-engagement message", "type": "OAuthException", "code": 131047}


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize(
    "body",
    [
        "",
        "null",
        {},
        {"error": "no"},
        {"key": {"id": ""}},
        {"key": {"id": "undefined"}},
        {"key": {"id": MESSAGE_ID}, "status": "ERROR", "id": MESSAGE_ID, "data": {"Id": MESSAGE_ID}},
        {"key": {"id": MESSAGE_ID}, "id": MESSAGE_ID, "data": {"Id": MESSAGE_ID}, "success": True, "error": "Boom"},
        {"key": {"id": MESSAGE_ID}, "id": MESSAGE_ID, "data": {"Id": MESSAGE_ID}, "success": True, "exception": {}},
        {"id": "req-77", "statusCode": 500},
        {"id": {"_serialized": "null"}},
        {"keys": {"id": MESSAGE_ID}, "message": {"id": MESSAGE_ID}, "Id": MESSAGE_ID},
        {"data": {"Details": "Failed", "Id": ""}, "success": True},
        {"data": {"Id": MESSAGE_ID}, "success": False},
        {"code": 200, "message": "success"},
        {"message": "no", "code": "131047"},
        {"message": "no", "type": "x", "code": "many"},
        {"message": "no", "type": "x", "code": True},
        [META_ERROR],
    ],
)
def test_a_201_that_does_not_say_that_the_message_was_taken_is_in_doubt(name, body):
    """A success status is believed with its body only: an id of WhatsApp's form where it belongs, and no error."""
    assert believed(name, 201, body) == InDoubt(f"{DIALECTS[name].name}: HTTP 201")


@pytest.mark.parametrize("beside", [META_ERROR, {"error": META_ERROR}])
def test_an_id_beside_metas_error_is_in_doubt(beside):
    """The answer says both, and nobody knows which is true."""
    assert believed("evolution", 201, {"key": {"id": MESSAGE_ID}} | beside) == InDoubt("Evolution API: HTTP 201")


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("status", [200, 201])
def test_a_success_with_an_id_is_sent(name, status):
    """The body says it, whichever success status comes with it."""
    assert isinstance(believed(name, status, TAKEN[name]), Sent)


@pytest.mark.parametrize(
    ("codes", "outcome"),
    [
        ((131047, 131026, 132001), Refused),
        ((190, 131031), Postpone),
        ((130429, 131056), NotSent),
        ((2, 131016, 133004, 131000, 1, 999999), InDoubt),
    ],
)
@pytest.mark.parametrize("status", [200, 201])
def test_an_error_of_meta_s_in_a_success_is_read_by_its_code(codes, outcome, status):
    """An Evolution API of type WHATSAPP-BUSINESS answers 201 with Meta's error object, whose own status is lost."""
    for code in codes:
        error = META_ERROR | {"message": f"(#{code}) to {NUMBER}", "code": code, "fbtrace_id": "AbC"}
        found = believed("evolution", status, error)

        assert type(found) is outcome
        assert NUMBER not in found.reason
        assert type(believed("evolution", status, {"error": error})) is outcome


@pytest.mark.parametrize("dialect", [EVOLUTION, WAHA, WUZAPI])
@pytest.mark.parametrize(
    "body", ["<html>It works</html>", {}, {"key": {"id": 7}}, {"data": {"Details": "Sent"}}, [], None]
)
def test_a_200_in_other_words_is_in_doubt(dialect, body):
    """A 200 without a message id may be anybody's: in doubt."""
    with serving(lambda _: Reply(200, body)) as server:
        assert gateway(server, dialect).send(outgoing()) == InDoubt(f"{dialect.name}: HTTP 200")
