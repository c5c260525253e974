"""WhatsApp Cloud API: a server on loopback that behaves like Meta's."""

import itertools
import re
import threading
from datetime import UTC, datetime, timedelta

import loopback
import pytest
from gateways import KEY, NUMBER, TEXT, CloudLike, close_clients, later, outgoing, say  # noqa: F401 - autouse
from loopback import Reply, serving

from engagement import InDoubt, NotSent, Postpone, Refused, Sent
from engagement.transports.cloud import LONGEST_TEXT, Template, WhatsAppCloud
from engagement.transports.cloud_codes import CODES
from engagement.transports.http import Proof

PHONE_NUMBER_ID = "106540352242922"
OUTCOMES = {
    Proof.NOT_SENT: NotSent,
    Proof.WAIT: NotSent,
    Proof.STOPPED: Postpone,
    Proof.LATER: Postpone,
    Proof.REFUSED: Refused,
    Proof.IN_DOUBT: InDoubt,
}


def cloud(server, **options) -> WhatsAppCloud:
    given = {"phone_number_id": PHONE_NUMBER_ID, "token": KEY, "base_url": server.url, "render": say, "verify": False}
    return WhatsAppCloud(**given | {"answer_within": timedelta(seconds=5)} | options)


@pytest.fixture(name="meta")
def _meta():
    like = CloudLike()
    with serving(like) as server:
        like.server = server
        yield like


def test_a_text_is_sent_to_the_number(meta):
    """Meta gets the number, the text and the delivery id; its message id is kept."""
    outcome = cloud(meta.server).send(outgoing())

    assert outcome == Sent("wamid." + meta.sent[0][0])
    (request,) = meta.server.received
    assert (request.method, request.path) == ("POST", f"/v25.0/{PHONE_NUMBER_ID}/messages")
    assert request.json == {
        "messaging_product": "whatsapp",
        "recipient_type": "individual",
        "to": NUMBER,
        "type": "text",
        "text": {"body": TEXT},
        "biz_opaque_callback_data": outgoing().reference,
    }


def test_a_template_is_sent_as_one(meta):
    """A `Template` becomes Meta's template message, with the components as they are given."""
    components = [{"type": "body", "parameters": [{"type": "text", "text": "Ana"}]}]
    cloud(meta.server, render=lambda _: Template("goodbye", "pt_BR", components)).send(outgoing())
    cloud(meta.server, render=lambda _: Template("hello_world", "en_US")).send(outgoing())

    first, second = (request.json for request in meta.server.received)
    assert (first["type"], "text" in first) == ("template", False)
    assert first["template"] == {"name": "goodbye", "language": {"code": "pt_BR"}, "components": components}
    assert second["template"] == {"name": "hello_world", "language": {"code": "en_US"}}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"destination_jid": "98765432101234@lid"},
            "the Cloud API sends to phone numbers and business-scoped user ids",
        ),
        (
            {"destination_jid": "120363025246125486@g.us"},
            "the Cloud API sends to phone numbers and business-scoped user ids",
        ),
        ({"destination_jid": ""}, "the Cloud API sends to phone numbers and business-scoped user ids"),
        (
            {"destination_jid": "BR.1502576394655843\n"},
            "the Cloud API sends to phone numbers and business-scoped user ids",
        ),
        ({"destination_jid": NUMBER}, "the Cloud API sends to phone numbers and business-scoped user ids"),
        (
            {"destination_jid": f"{NUMBER}@s.whatsapp.net\n"},
            "the Cloud API sends to phone numbers and business-scoped user ids",
        ),
    ],
)
def test_only_phone_numbers_are_sent_to(meta, fields, reason):
    """A destination that Meta has no number for is refused before anything is sent."""
    outcome = cloud(meta.server).send(outgoing(**fields))

    assert isinstance(outcome, Refused)
    assert outcome.reason.startswith(reason)
    assert meta.server.received == []


@pytest.mark.parametrize(
    "words",
    [
        "",
        " ",
        None,
        7,
        "x" * (LONGEST_TEXT + 1),
        "\ud83d",
        Template("t", "en", [{"type": object()}]),
        Template("t", "\ud83d"),
    ],
)
def test_what_cannot_be_said_is_refused_before_anything_is_sent(meta, words):
    """Neither text nor a template that is JSON: refused, and Meta hears nothing."""
    assert isinstance(cloud(meta.server, render=lambda _: words).send(outgoing()), Refused)
    assert meta.server.received == []


def test_the_longest_text_is_sent(meta):
    """The limit itself is no mistake."""
    assert isinstance(cloud(meta.server, render=lambda _: "x" * LONGEST_TEXT).send(outgoing()), Sent)


# People without a number


@pytest.mark.parametrize("bsuid", ["BR.1502576394655843", "US.ENT.11815799212886844830"])
@pytest.mark.parametrize(
    "words", [TEXT, Template("goodbye", "pt_BR"), Template("goodbye", "pt_BR", category="UTILITY")]
)
def test_a_person_without_a_number_is_named_as_the_recipient(meta, bsuid, words):
    """Meta's id goes into `recipient`: in `to` Meta answers 200 with a message id, and drops the message."""
    outcome = cloud(meta.server, render=lambda _: words).send(outgoing(destination_jid=bsuid))

    assert isinstance(outcome, Sent)
    (request,) = meta.server.received
    assert request.json["recipient"] == bsuid
    assert request.json["recipient_type"] == "individual"
    assert "to" not in request.json


@pytest.mark.parametrize("category", ["authentication", "AUTHENTICATION"])
def test_an_authentication_template_needs_a_number(meta, category):
    """Meta refuses it to an id of a person (131062): so do we, before anything is sent."""
    one = cloud(meta.server, render=lambda _: Template("code", "pt_BR", category=category))

    assert one.send(outgoing(destination_jid="BR.1502576394655843")) == Refused(
        "an authentication template needs a phone number, not a business-scoped user id"
    )
    assert meta.server.received == []
    assert isinstance(one.send(outgoing()), Sent)
    assert "category" not in str(meta.server.received[0].json)


# Codes


@pytest.mark.parametrize("code", CODES, ids=lambda code: str(code.code))
def test_each_code_proves_what_the_table_says_whatever_the_status(meta, code):
    """Meta asks to go by the code and not by the status: so does each line of the table, ends of ranges included.

    With a 5xx it is in doubt, unless it names a state of the sender in which nothing can be sent.
    """
    for given, status in itertools.product({code.code, code.last or code.code}, (400, 403, 500, 503)):
        meta.fails_with = (given, status)
        before = datetime.now(UTC)
        outcome = cloud(meta.server).send(outgoing())

        is_doubtful = status >= 500 and not code.is_lasting
        assert type(outcome) is (InDoubt if is_doubtful else OUTCOMES[code.proof])
        assert outcome.reason == f"Cloud API: {given}, {code.means} (HTTP {status})"
        if isinstance(outcome, NotSent):
            assert outcome.retry_after == code.wait
        if isinstance(outcome, Postpone):
            assert outcome.until - before >= (code.wait or timedelta(0))
            assert outcome.until - before >= timedelta(minutes=1)


def test_the_codes_of_the_issue_are_where_it_wants_them():
    """What was asked for by name: limits are not sent, dead ends are refused, and a doubt stays one."""
    proof = {code.code: code.proof for code in CODES}

    assert {proof[code] for code in (130429, 2, 131016)} == {Proof.WAIT}
    assert {proof[code] for code in (80007, 4)} == {Proof.STOPPED}
    assert proof[131056] is Proof.NOT_SENT
    assert {proof[code] for code in (190, 368, 131031, 131042, 131048)} == {Proof.STOPPED}
    assert {proof[code] for code in (131026, 131047, 131049, 131050, 130472, 131051, 132000, 132016)} == {Proof.REFUSED}
    assert {proof[code] for code in (1, 131000, 135000)} == {Proof.IN_DOUBT}


@pytest.mark.parametrize("status", [500, 502, 503, 504])
@pytest.mark.parametrize(
    "code",
    [
        1,
        2,
        4,
        80007,
        100,
        130429,
        131000,
        131016,
        131026,
        131047,
        131048,
        131056,
        131057,
        132000,
        132069,
        133004,
        135000,
    ],
)
def test_no_code_of_something_that_passes_denies_a_send_with_a_5xx(meta, code, status):
    """Temporary is not absent: a service that failed after another one had acted says the same; so it is in doubt."""
    meta.fails_with = (code, status)
    meta.headers = {"Retry-After": "3"}

    assert isinstance(cloud(meta.server).send(outgoing()), InDoubt)


@pytest.mark.parametrize("code", [0, 3, 10, 190, 200, 368, 131005, 131031, 131042, 131045, 133010])
def test_a_sender_that_may_not_send_sends_nothing_whatever_the_status(meta, code):
    """A token, a permission, an account that is locked or not registered: no message left, and none pays for it."""
    meta.fails_with = (code, 500)

    assert isinstance(cloud(meta.server).send(outgoing()), Postpone)


def test_no_code_has_two_readings():
    """Ranges and single codes do not overlap."""
    given = sorted((code.code, code.last or code.code) for code in CODES)

    assert all(end < start for (_, end), (start, _) in itertools.pairwise(given))


@pytest.mark.parametrize(
    ("code", "status", "outcome"),
    [
        (131030, 400, Postpone),
        (999999, 422, Postpone),
        (999999, 403, Postpone),
        (999999, 429, NotSent),
        (999999, 409, InDoubt),
        (999999, 500, InDoubt),
        (999999, 501, InDoubt),
    ],
)
def test_a_code_that_is_not_listed_goes_by_the_status_and_is_never_final(meta, code, status, outcome):
    """An unknown code is named in the reason, and the status decides; but where that refuses, the code may be new."""
    meta.fails_with = (code, status)
    found = cloud(meta.server).send(outgoing())

    assert type(found) is outcome
    assert found.reason.startswith(f"Cloud API: {code}, not listed (HTTP {status}")


@pytest.mark.parametrize(("code", "outcome"), [("190", Postpone), ("131026", Refused), ("999999", Postpone)])
def test_a_code_is_one_as_a_text_too(meta, code, outcome):
    """Some who stand between Meta and us write numbers as texts: that makes no refusal of them."""
    meta.override = meta.error(code, 400)

    assert type(cloud(meta.server).send(outgoing())) is outcome


@pytest.mark.parametrize("code", [4, 17, 32, 102, 341, 613, 80000, 80007, 80008, 80014, 0, 190, 368, 131044])
def test_what_speaks_of_the_app_or_the_sender_costs_no_message_a_retry(meta, code):
    """Throttling, a session, a payment: however often it is answered, the message waits, and the sender pauses."""
    meta.fails_with = (code, 400)
    for attempt in (1, 3, 60):
        one = cloud(meta.server)

        assert isinstance(one.send(outgoing(attempt=attempt)), Postpone)
        assert not one.ready()


@pytest.mark.parametrize("code", [130497, 131030, 131063, 134011, 999999, -1, 2500])
def test_a_code_that_may_be_the_message_s_or_the_sender_s_ends_neither(meta, code):
    """Nobody else waits for it; the message does, up to an hour each time, and only after two days it pays."""
    meta.fails_with = (code, 400)
    one = cloud(meta.server)
    assert one.ready()

    outcomes = [one.send(outgoing(attempt=attempt)) for attempt in (1, 3, 50, 51)]
    assert [type(outcome) for outcome in outcomes] == [Postpone, Postpone, Postpone, NotSent]
    assert one.ready()
    assert outcomes[2].until - datetime.now(UTC) > timedelta(minutes=59)


def test_a_wrong_phone_number_id_stops_the_sender(meta):
    """Code 100 of a node that is not there is no message's fault; every other 100 is."""
    meta.override = meta.error(100, 400, type="GraphMethodException", error_subcode=33)
    assert isinstance(cloud(meta.server).send(outgoing()), Postpone)

    meta.override = meta.error(100, 400)
    assert isinstance(cloud(meta.server).send(outgoing()), Refused)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "170"}, 170),
        ({"Retry-After": "17"}, 60),
        (
            {
                "X-Business-Use-Case-Usage": '{"1022":[{"type":"whatsapp","call_count":100,"total_cputime":9,'
                '"estimated_time_to_regain_access":19},{"type":"other","estimated_time_to_regain_access":3}]}'
            },
            19 * 60,
        ),
        ({"X-Business-Use-Case-Usage": '{"1022":[{"estimated_time_to_regain_access":0}]}'}, 60),
        ({"X-Business-Use-Case-Usage": "{broken"}, 60),
        ({"X-Business-Use-Case-Usage": '{"1022":[{"estimated_time_to_regain_access":999999}]}'}, 86_400),
        ({"X-Business-Use-Case-Usage": f'{{"1":[{{"estimated_time_to_regain_access":{"9" * 300}}}]}}'}, 86_400),
        ({"Retry-After": "9999999999"}, 86_400),
        ({"Retry-After": "9" * 5000}, 86_400),
    ],
)
def test_a_rate_limit_waits_as_long_as_meta_asks(meta, headers, seconds):
    """Retry-After, else Meta's estimate in minutes, else the table; and meanwhile nothing is tried."""
    meta.fails_with = (80007, 400)
    meta.headers = headers
    one = cloud(meta.server)
    before = datetime.now(UTC)
    outcome = one.send(outgoing())

    assert isinstance(outcome, Postpone)
    assert timedelta(0) <= outcome.until - before - timedelta(seconds=seconds) < timedelta(seconds=5)
    assert not one.ready()


def test_a_limit_of_one_recipient_stops_nobody_else(meta):
    """131056 is about one number: the others go on."""
    meta.fails_with = (131056, 400)
    one = cloud(meta.server)
    assert one.ready()

    assert isinstance(one.send(outgoing()), NotSent)
    assert one.ready()
    assert len(meta.server.received) == 2


def test_nothing_of_an_error_s_text_is_quoted(meta):
    """A trace, a title or a detail may repeat the number, or the key: the code alone is read."""
    meta.override = meta.error(131026, 400, fbtrace_id=NUMBER, message=KEY)

    assert cloud(meta.server).send(outgoing()).reason == f"Cloud API: 131026, {_means(131026)} (HTTP 400)"


def _means(given: int) -> str:
    return next(code.means for code in CODES if given in code)


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (Reply(200, {"messages": []}), InDoubt("Cloud API: HTTP 200")),
        (Reply(200, {"messages": [{"id": 7}]}), InDoubt("Cloud API: HTTP 200")),
        (Reply(200, {"messages": [{"id": ""}]}), InDoubt("Cloud API: HTTP 200")),
        (Reply(200, {"messages": [{"id": "undefined"}]}), InDoubt("Cloud API: HTTP 200")),
        (Reply(200, {"messages": [{"id": "wamid.A"}], "error": {"message": "x"}}), InDoubt("Cloud API: HTTP 200")),
        (Reply(200, {"messages": [{"id": "wamid.A"}], "error": {"code": 131047}}), InDoubt("Cloud API: HTTP 200")),
        (Reply(200, {"messages": [{"id": "wamid.A"}], "errors": [{"code": 131047}]}), InDoubt("Cloud API: HTTP 200")),
        (Reply(200, {"messages": [{"id": "wamid.A", "message_status": "failed"}]}), InDoubt("Cloud API: HTTP 200")),
        (Reply(200, {"messages": [{"id": "wamid.A", "message_status": "accepted"}]}), Sent("wamid.A")),
        (Reply(500, {"messages": [{"id": "wamid.A"}]}), InDoubt("Cloud API: HTTP 500")),
        (Reply(200, {"error": {"message": "no code"}}), InDoubt("Cloud API: HTTP 200")),
        (Reply(200, {"error": {"type": "x", "code": True}}), InDoubt("Cloud API: HTTP 200")),
        (Reply(200, "<html>"), InDoubt("Cloud API: HTTP 200")),
        (Reply(200, [1]), InDoubt("Cloud API: HTTP 200")),
        (Reply(500, "<html>"), InDoubt("Cloud API: HTTP 500")),
        (Reply(502), InDoubt("Cloud API: HTTP 502")),
        (Reply(400, {"error": {"message": "no code"}}), Refused("Cloud API: HTTP 400")),
        (Reply(400, {"error": "text"}), Refused("Cloud API: HTTP 400")),
        (loopback.reset, InDoubt("Cloud API: ReadError")),
    ],
)
def test_an_answer_in_other_words_proves_what_its_status_does(answer, outcome):
    """Without a message id nothing is sent for sure, and without a code the status decides."""
    with serving(lambda _: answer) as server:
        assert cloud(server).send(outgoing()) == outcome


@pytest.mark.parametrize(
    ("code", "outcome"),
    [(131047, Refused), (190, Postpone), (130429, NotSent), (2, InDoubt), (131000, InDoubt), (999999, InDoubt)],
)
def test_an_error_in_a_success_is_read_by_its_code(meta, code, outcome):
    """A proxy of the host's may turn Meta's status into a 200: the error object speaks, and what it was is unknown."""
    meta.fails_with = (code, 200)

    assert type(cloud(meta.server).send(outgoing())) is outcome


# Ready


def test_ready_asks_only_at_the_beginning_and_after_trouble(meta, monkeypatch):
    """While all is well nothing is asked, since questions count against the limit; after trouble the health is."""
    one = cloud(meta.server)
    assert one.ready()
    assert one.ready()
    assert [request.path for request in meta.server.received] == [f"/v25.0/{PHONE_NUMBER_ID}?fields=health_status"]

    meta.fails_with = (131042, 400)
    one.send(outgoing())
    assert not one.ready()
    assert len(meta.server.received) == 2

    monkeypatch.setattr("engagement.transports.trouble.monotonic", later(minutes=15))
    meta.health = "BLOCKED"
    assert not one.ready()
    assert not one.ready()
    assert len(meta.server.received) == 3

    monkeypatch.setattr("engagement.transports.trouble.monotonic", later(hours=1))
    meta.health = "LIMITED"
    assert one.ready()
    assert one.ready()
    assert len(meta.server.received) == 4


def test_it_tells_why_it_is_not_ready(meta):
    """A blocked account, a token, a limit: in our words."""
    meta.health = "BLOCKED"
    one = cloud(meta.server)
    assert not one.ready()
    assert one.why_not_ready == "Cloud API: its health status is BLOCKED"

    expired = cloud(meta.server, token="expired")
    assert not expired.ready()
    assert expired.why_not_ready == "Cloud API: 190, the access token has expired (HTTP 401)"


@pytest.mark.parametrize("code", [3, 10, 100, 200, 299])
def test_a_token_that_may_not_read_the_health_status_may_send(code):
    """The question was refused, and not the message: an answer is an answer, and a message is the better question."""
    like = CloudLike()
    with serving(lambda request: like.error(code, 403) if request.method == "GET" else like(request)) as server:
        one = cloud(server)

        assert one.ready()
        assert isinstance(one.send(outgoing()), Sent)


def test_a_run_that_is_started_into_an_outage_claims_nothing():
    """A cron job's process remembers nothing, so it asks before the first message."""
    with loopback.refusing() as url:
        assert not cloud(type("Nobody", (), {"url": url})).ready()


def test_an_expired_token_is_not_ready_until_it_is_mended(meta, monkeypatch):
    """A token that Meta does not take is looked at again every now and then; no message pays for it."""
    one = cloud(meta.server, token="expired")
    assert isinstance(one.send(outgoing()), Postpone)

    for hours in (1, 2):
        monkeypatch.setattr("engagement.transports.trouble.monotonic", later(hours=hours))
        assert not one.ready()
    assert [request.method for request in meta.server.received] == ["POST", "GET", "GET"]


def test_an_outage_is_noticed_by_the_first_message_only(monkeypatch):
    """While Meta cannot be reached, `ready` finds out: no message after the first spends a retry on it."""
    with loopback.refusing() as url:
        one = cloud(type("Nobody", (), {"url": url}))
        assert isinstance(one.send(outgoing()), NotSent)
        for minutes in (1, 30, 60):
            monkeypatch.setattr("engagement.transports.trouble.monotonic", later(minutes=minutes))
            assert not one.ready()


def test_it_is_never_idempotent():
    """The Cloud API has no idempotency key, so a repeat may be a second message."""
    assert WhatsAppCloud.idempotent is False
    assert not hasattr(WhatsAppCloud, "look_up")


def test_twenty_threads_send_each_message_once(meta):
    """Twenty threads share one transport: every message goes out once and gets its own id."""
    one = cloud(meta.server)
    outcomes = {}

    def send(thread: int) -> None:
        for number in range(thread, 60, 20):
            outcomes[f"55119{number:08}"] = one.send(outgoing(destination_jid=f"55119{number:08}@s.whatsapp.net"))

    threads = [threading.Thread(target=send, args=(thread,)) for thread in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert {to: Sent("wamid." + message_id) for message_id, to, _ in meta.sent} == outcomes
    assert len(meta.sent) == 60


def test_it_is_made_from_the_environment(meta, monkeypatch):
    """Variables of the process configure everything."""
    for name, value in {
        "ENGAGEMENT_RENDER": "gateways:say",
        "ENGAGEMENT_CLOUD_PHONE_NUMBER_ID": PHONE_NUMBER_ID,
        "ENGAGEMENT_CLOUD_TOKEN": KEY,
        "ENGAGEMENT_CLOUD_VERSION": "v26.0",
        "ENGAGEMENT_CLOUD_BASE_URL": meta.server.url,
    }.items():
        monkeypatch.setenv(name, value)

    assert isinstance(WhatsAppCloud.from_environment().send(outgoing()), Sent)
    assert meta.server.received[0].path == f"/v26.0/{PHONE_NUMBER_ID}/messages"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"phone_number_id": "+55 11"}, "phone_number_id: must be digits; it is not the phone number"),
        ({"phone_number_id": ""}, "phone_number_id: must be digits"),
        ({"version": "25"}, "version: must be written as v25.0"),
        ({"token": "line\nbreak"}, "Authorization: must be printable ASCII"),
    ],
)
def test_a_wrong_setting_is_refused_at_once(meta, options, problem):
    """A mistake is found where it is made, not by each message."""
    with pytest.raises(ValueError, match=re.escape(problem)):
        cloud(meta.server, **options)
