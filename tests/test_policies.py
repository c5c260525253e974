"""Policies around a transport: consent and an address of now, asked before each send, and what all policies keep."""

import asyncio
import threading
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from conftest import new_message, outgoing, queue, row
from far import JID, NIGHT, Far, fails

from engagement import Destination, InDoubt, NotSent, Postpone, Refused, Sent, Withdraw, process_message_queue
from engagement.policies import Consent, Gate, QuietHours, Route
from engagement.transports.webhook import Webhook
from engagement.words import FluentRenderer, Rendered

OTHER_JID = "5511888888888@s.whatsapp.net"


# Around any transport


def gates(transport):
    return [
        Consent(transport, lambda _: True),
        Route(transport, lambda message: (message.destination, message.destination_jid), across_addresses=True),
        QuietHours(transport, lambda _: "UTC", **NIGHT, now=lambda: datetime(2026, 1, 1, 12, tzinfo=UTC)),
    ]


@pytest.mark.parametrize("place", range(3))
def test_a_policy_keeps_what_the_transport_can_do(place):
    """`send`, `ready`, `look_up` and `idempotent` of what is wrapped are kept, through any number of wraps."""
    far = Far(found=Sent("far"))
    gate = Consent(gates(far)[place], lambda _: True)

    assert gate.send(outgoing()) == Sent("far")
    assert gate.look_up(outgoing()) == Sent("far")
    assert gate.ready() is False
    assert gate.idempotent is True
    assert far.sent == far.looked_up == [outgoing()]


@pytest.mark.parametrize("place", range(3))
def test_a_policy_adds_nothing_that_the_transport_lacks(place):
    """Around a plain function there is no `look_up` and no `ready`, or a worker would ask what nobody can answer."""
    gate = gates(lambda _: "id")[place]

    assert gate.send(outgoing()) == "id"
    assert not gate.idempotent
    assert not any(hasattr(gate, name) for name in ("look_up", "ready", "send_many"))


def test_a_batch_transport_is_refused_at_once():
    """What has only `send_many` cannot be asked message by message, and says so before anything is claimed."""

    class Batch:
        def send_many(self, messages):
            raise AssertionError

    with pytest.raises(TypeError, match="send_many"):
        Consent(Batch(), lambda _: True)


async def _answers_later(_message):
    return True


@pytest.mark.parametrize(
    "make",
    [
        lambda: Consent(print, _answers_later),
        lambda: Route(print, _answers_later),
        lambda: QuietHours(print, _answers_later, **NIGHT),
        lambda: Consent(print, None),
    ],
)
def test_an_async_question_is_refused_at_once(make):
    """A coroutine is true: taken for an answer, it would send to people who opted out."""
    with pytest.raises(TypeError, match="plain function"):
        make()


def test_an_async_transport_is_asked_in_a_thread_and_awaited_in_the_loop(engine):
    """Around `async def` a policy may block without holding up the loop, and both its answers reach the row."""
    wanted, unwanted = queue(engine, new_message("a"), new_message("b"))
    threads = {}

    async def send(message):
        await asyncio.sleep(0)
        threads["send"] = threading.current_thread().name
        return Sent(f"far-{message.id}")

    def wants(message):
        threads["wants"] = threading.current_thread().name
        return message.id == wanted

    process_message_queue(engine, Consent(send, wants), concurrency=2)

    assert row(engine, wanted).provider_message_id == f"far-{wanted}"
    assert row(engine, unwanted).status == "cancelled"
    assert threads["send"] == "engagement-loop"
    assert threads["wants"].startswith("engagement-send")


@pytest.mark.parametrize(
    "make",
    [
        lambda far: Consent(far, fails),
        lambda far: Route(far, fails),
        lambda far: QuietHours(far, fails, **NIGHT),
        lambda far: Consent(far, lambda _: 1),
        lambda far: Consent(far, lambda _: None),
        lambda far: Route(far, lambda _: (JID,)),
    ],
)
def test_a_question_that_fails_is_not_sent(engine, make):
    """A look-up that raises, even a time-out, or answers nonsense, is tried again, sends nothing and quotes nothing."""
    (message_id,) = queue(engine, new_message())
    far = Far()
    far.ready = lambda: True
    process_message_queue(engine, make(far))

    found = row(engine, message_id)
    assert far.sent == []
    assert (found.status, found.retry_count, found.history[-1]["event"]) == ("pending", 1, "not_sent")
    assert "5511" not in found.error_message


@pytest.mark.parametrize("ends", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError])
@pytest.mark.parametrize(
    "make",
    [
        Consent,
        Route,
        lambda far, ask: QuietHours(far, ask, **NIGHT),
        lambda far, ask: Consent(Route(far, ask), lambda _: True),
        lambda far, ask: Rendered(far, FluentRenderer(), ask),
        lambda _, ask: Webhook(url="http://127.0.0.1:9/", render=ask).send,
    ],
)
def test_what_ends_a_process_is_no_doubt_in_a_question(engine, make, ends):
    """`sys.exit()` in what is asked before the send: nothing has left, so it is tried again."""
    (message_id,) = queue(engine, new_message())
    far = Far()
    far.ready = lambda: True

    def ask(_message):
        raise ends

    process_message_queue(engine, make(far, ask))

    found = row(engine, message_id)
    assert (far.sent, found.status, found.retry_count, found.history[-1]["event"]) == ([], "pending", 1, "not_sent")
    assert ends.__name__ in found.error_message


def test_a_policy_of_ones_own_that_forgets_to_answer_sends_nothing():
    """A `check` without a return sends nothing, rather than anything."""

    class Forgetful(Gate):
        def check(self, message):
            pass

    far = Far()

    assert Forgetful(far).send(outgoing()) == NotSent("Forgetful answered NoneType")
    assert far.sent == []


def test_an_error_of_the_transport_passes_through():
    """What the transport itself raises is for the worker to classify: a policy never calls it not sent."""
    with pytest.raises(TimeoutError):
        Consent(fails, lambda _: True).send(outgoing())


# Route


def test_a_message_goes_to_the_address_of_now(engine):
    """Destination and JID are those that the host gives at the send; the row keeps what was queued."""
    (message_id,) = queue(engine, new_message())
    queued_for = row(engine, message_id).destination_jid
    sent = []

    process_message_queue(engine, Route(sent.append, lambda _: ("group", "120363000000000003@g.us")))

    assert [(message.destination, message.destination_jid) for message in sent] == [
        (Destination.GROUP, "120363000000000003@g.us")
    ]
    assert row(engine, message_id).destination_jid == queued_for


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (None, "no address"),
        (("individual", "120363000000000003@g.us"), "destination_jid"),
        (("group", JID), "destination_jid"),
        (("individual", "5511999999999@s.whatsapp.net\n"), "destination_jid"),
        (("individual", ""), "destination_jid"),
        (("individual", None), "destination_jid"),
        (("nobody", JID), "destination"),
    ],
)
def test_no_address_or_a_wrong_one_is_refused(engine, address, reason):
    """Without an address that could be queued nothing is sent; the message fails, so that a person can try it again."""
    (message_id,) = queue(engine, new_message())
    sent = []

    process_message_queue(engine, Route(sent.append, lambda _: address))

    found = row(engine, message_id)
    assert (sent, found.status, found.history[-1]["event"]) == ([], "failed", "refused")
    assert reason in found.error_message
    assert "5511" not in found.error_message


@pytest.mark.parametrize(
    ("found", "across_addresses", "told"),
    [
        (Sent("x"), False, Sent("x")),
        (NotSent("unknown"), False, None),
        (None, False, None),
        (NotSent("unknown"), True, NotSent("unknown")),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_look_up_at_another_address_does_not_prove_that_nothing_left(found, across_addresses, told, is_async):
    """Looked up where the person is now: finding it is a fact, and not finding it says nothing of the last address."""

    class AsyncFar(Far):
        async def look_up(self, message):
            return Far.look_up(self, message)

    far = AsyncFar(found) if is_async else Far(found)
    route = Route(far, lambda _: ("individual", OTHER_JID), across_addresses=across_addresses)
    answer = route.look_up(outgoing())

    assert (asyncio.run(answer) if is_async else answer) == told
    assert [message.destination_jid for message in far.looked_up] == [OTHER_JID]


@pytest.mark.parametrize("where", [fails, lambda _: None])
def test_a_look_up_without_an_address_knows_nothing(where):
    """A routing error during recovery must not become `NotSent`, which would send a second time."""
    far = Far(NotSent("unknown"))

    assert Route(far, where, across_addresses=True).look_up(outgoing()) is None
    assert far.looked_up == []


def test_the_same_delivery_id_at_two_addresses_is_not_idempotent():
    """A repeat to a new address would be a second message: only the host can say that the far side sees through it."""
    assert not Route(Far(), lambda _: None).idempotent
    assert Route(Far(), lambda _: None, across_addresses=True).idempotent
    assert not Route(print, lambda _: None, across_addresses=True).idempotent


# Consent


def test_who_opted_out_gets_nothing(engine):
    """Consent is asked at the send, not when the message was queued; the message is cancelled, with the reason."""
    stays, leaves = queue(engine, new_message("stays"), new_message("leaves"))
    sent = []

    process_message_queue(engine, Consent(sent.append, lambda message: message.user_id != "leaves"))

    assert [message.id for message in sent] == [stays]
    found = row(engine, leaves)
    assert (found.status, found.history[-1]["event"], found.history[-1]["reason"]) == (
        "cancelled",
        "withdrawn",
        "opted out",
    )


# All together


def test_no_outcome_of_a_policy_tells_about_a_person():
    """Reasons end in the history, which outlives the message: they hold no address and no name."""
    message = outgoing(message_params={"name": "Ana"})
    night = datetime(2026, 1, 1, 23, tzinfo=UTC)
    outcomes = [
        Consent(print, lambda _: False).send(message),
        Route(print, lambda _: ("individual", "Ana@5511999999999")).send(message),
        Route(print, fails).send(message),
        QuietHours(print, lambda _: "UTC", **NIGHT, now=lambda: night).send(message),
    ]

    assert [type(outcome) for outcome in outcomes] == [Withdraw, Refused, NotSent, Postpone]
    assert not any(secret in outcome.reason for outcome in outcomes for secret in ("Ana", "5511", "user1"))


def test_a_policy_does_not_touch_the_message():
    """What passes a check is the very message that came in, in every field but those it is about."""
    routed = []
    Route(routed.append, lambda _: ("individual", OTHER_JID)).send(outgoing())

    assert routed == [replace(outgoing(), destination_jid=OTHER_JID)]
    assert Consent(lambda message: InDoubt(str(message.id)), lambda _: True).send(outgoing()) == InDoubt("1")
