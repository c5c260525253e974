"""Every yes or no that guards something is True or False: a text, a number or a coroutine is never a yes.

"no" is true to Python, and so are a method that nobody called and what an `async def` returns.
"""

import logging
import warnings
from types import SimpleNamespace

import pytest
from admin_page import SECRETS, admin_of, put_secrets
from conftest import new_message, outgoing, queue, row
from sqlalchemy import create_engine

from engagement import Sent, Worker, process_message_queue
from engagement._operating.timeline import timeline
from engagement.admin import create_admin
from engagement.policies import Consent, Route
from engagement.transports.console import Console
from engagement.transports.gateway import WhatsAppGateway
from engagement.transports.shadow import Shadow
from engagement.transports.webhook import Webhook

NEITHER = ["no", "yes", "", 1, 0, None, [], lambda: False, Sent()]


async def no(*_) -> bool:
    return False


async def yes(*_) -> bool:
    return True


def no_later(*arguments):
    return no(*arguments)


def yes_later(*arguments):
    return yes(*arguments)


# What a transport says of itself


@pytest.mark.parametrize("answer", [*NEITHER, no])
@pytest.mark.parametrize(
    "around",
    [
        lambda it: it,
        lambda it: Consent(it, lambda _: True),
        lambda it: Route(it, lambda _: None, across_addresses=True),
    ],
    ids=["alone", "consent", "route"],
)
def test_what_is_no_plain_yes_does_not_send_again(engine, around, answer):
    """`idempotent` allows a second send: a method of that name, or a text, is refused before anything is claimed."""
    (message_id,) = queue(engine, new_message())
    transport = SimpleNamespace(idempotent=answer, send=lambda _: pytest.fail("was sent"))

    with pytest.raises(TypeError, match=f"idempotent: must be True or False, not {type(answer).__name__}"):
        process_message_queue(engine, around(transport))

    assert row(engine, message_id).attempt == 0


@pytest.mark.parametrize("answer", NEITHER)
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("idempotent", lambda no_yes: Webhook(url="https://example.org", idempotent=no_yes)),
        ("idempotent", lambda no_yes: WhatsAppGateway(url="https://x.org", key="k", render=str, idempotent=no_yes)),
        ("across_addresses", lambda no_yes: Route(print, lambda _: None, across_addresses=no_yes)),
        ("reveal", lambda no_yes: Console(reveal=no_yes)),
        ("in_order", lambda no_yes: Worker(create_engine("postgresql+psycopg://"), print, in_order=no_yes)),
        ("strict", lambda no_yes: Worker(create_engine("postgresql+psycopg://"), print, strict=no_yes)),
    ],
)
def test_an_option_that_guards_is_true_or_false(name, make, answer):
    """What it was given instead is told, not shown."""
    with pytest.raises(TypeError, match=f"^{name}: must be True or False, not {type(answer).__name__}$"):
        make(answer)


@pytest.mark.parametrize("answer", NEITHER)
def test_only_a_yes_is_ready(engine, answer, caplog):
    """Nothing is claimed, and the log says what `ready` answered instead."""
    (message_id,) = queue(engine, new_message())
    transport = SimpleNamespace(ready=lambda: answer, send=lambda _: pytest.fail("was sent"))

    with caplog.at_level(logging.WARNING, logger="engagement"):
        assert process_message_queue(engine, transport).processed == 0

    assert row(engine, message_id).attempt == 0
    assert caplog.messages == [
        f"engagement.ready_failed error=TypeError answered={type(answer).__name__}",
        "engagement.not_ready reason=unknown",
    ]


@pytest.mark.parametrize("ready", [no, no_later], ids=["async", "coroutine"])
@pytest.mark.parametrize("around", [Shadow, lambda it: Consent(it, lambda _: True)], ids=["shadow", "consent"])
def test_an_async_ready_is_awaited_through_what_is_around_it(engine, ready, around):
    """A coroutine was taken for a yes."""
    (message_id,) = queue(engine, new_message())
    transport = SimpleNamespace(ready=ready, send=lambda _: pytest.fail("was sent"), prepare=lambda _: None)

    assert process_message_queue(engine, around(transport)).processed == 0

    assert row(engine, message_id).attempt == 0


@pytest.mark.parametrize("answer", [*NEITHER, yes()])
def test_only_a_yes_is_consent(answer):
    """What is neither is no consent, and no refusal either: it is tried again."""
    with warnings.catch_warnings(action="ignore"):  # A coroutine of a `lambda` is never awaited.
        held_back = Consent(lambda _: pytest.fail("was sent"), lambda _: answer).send(outgoing())

    assert held_back.reason == f"wants answered {type(answer).__name__}, not bool"


# Who may see what is personal


@pytest.mark.parametrize("answer", [no, no_later, lambda _: False, False])
def test_a_no_that_is_awaited_reveals_nothing(engine, answer):
    """A function that looks somebody up is often async; what it returns first is no answer yet."""
    message_id = put_secrets(engine)
    with admin_of(engine, may_reveal=answer) as client:
        for path in ("messages?reveal=1", f"messages/{message_id}?reveal=1"):
            page = client.get(path)
            assert page.status_code == 200
            assert [secret for secret in SECRETS if secret in page.text] == []
            assert "eveal what is personal" not in page.text


@pytest.mark.parametrize("answer", [yes, yes_later, lambda _: True, True])
def test_a_yes_that_is_awaited_reveals(engine, answer):
    """Once somebody asks."""
    message_id = put_secrets(engine)
    with admin_of(engine, may_reveal=answer) as client:
        assert "user-ana" not in client.get(f"messages/{message_id}").text
        assert "user-ana" in client.get(f"messages/{message_id}?reveal=1").text


async def _later(answer):
    return answer


@pytest.mark.parametrize("answer", NEITHER)
@pytest.mark.parametrize("how", [lambda it: it, _later], ids=["plain", "async"])
def test_what_is_neither_reveals_nothing_and_is_told(engine, answer, how, caplog):
    """The page fails, masked or not, and the log says why."""
    message_id = put_secrets(engine)
    with admin_of(engine, may_reveal=lambda _: how(answer)) as client:
        for path in ("messages", f"messages/{message_id}?reveal=1"):
            page = client.get(path, headers={"Connection": "close"})
            assert (page.status_code, page.text) == (500, "Internal Server Error")
    assert f"may_reveal: must be True or False, not {type(answer).__name__}" in caplog.text


@pytest.mark.parametrize("answer", [it for it in NEITHER if not callable(it)])
def test_a_page_is_not_made_with_what_is_neither(engine, answer):
    """It is told when the app starts, not when somebody looks."""
    with pytest.raises(TypeError, match="may_reveal: must be True or False, not "):
        create_admin(engine, authentication=lambda _: "ana", may_reveal=answer)


@pytest.mark.parametrize("answer", NEITHER)
def test_a_timeline_is_not_revealed_by_what_is_neither(answer):
    """It is refused before anything of the message is read."""
    with pytest.raises(TypeError, match="reveal: must be True or False, not "):
        timeline(None, reveal=answer)
