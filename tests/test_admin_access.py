"""Who comes in to the admin page, who sees what is personal, and how a host mounts it."""

import hashlib
import logging
import re
from html import unescape
from pathlib import Path

import httpx
import pytest
from admin_page import (
    NUMBER,
    SECRETS,
    admin_of,
    form_of,
    press,
    put,
    put_secrets,
    said,
    send,
)
from conftest import new_message, queue, row
from fastapi import FastAPI
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse
from test_examples import served_by_uvicorn

from engagement.admin import anyone, create_admin
from engagement.messages import delivery_id

DOCUMENT = Path(__file__).parent.parent / "docs" / "admin.md"


# Who comes in


def test_an_admin_without_authentication_is_refused(engine):
    """Nobody gets an open page by leaving something out: that everybody may come in has to be said."""
    with pytest.raises(TypeError, match="authentication"):
        create_admin(engine)
    with pytest.raises(TypeError, match="anyone"):
        create_admin(engine, authentication=None)


def test_who_is_not_signed_in_sees_nothing(engine):
    """Every page and every file of the admin is behind the host's authentication."""
    put_secrets(engine)
    paths = [
        "",
        "messages",
        "messages/1",
        "messages/1/cancel",
        "people?q=1",
        "suppressed",
        "static/engagement.css",
        "nowhere",
    ]
    with admin_of(engine, authentication=lambda _: None) as client:
        answers = {(client.get(path).status_code, client.get(path).text) for path in paths}

    assert answers == {(403, "Not signed in.")}


def test_who_is_not_signed_in_changes_nothing(engine):
    """A form that was right a moment ago does nothing for somebody who is signed out."""
    message_id = put(engine, "pending")
    signed_in = True
    with admin_of(engine, authentication=lambda _: "ana" if signed_in else None) as client:
        fields = form_of(client, message_id, "cancel")
        signed_in = False
        assert send(client, message_id, "cancel", **fields).status_code == 403

    assert row(engine, message_id).status == "pending"


async def _late(_request) -> str:
    return "ana"


def _refuse(_request) -> str:
    raise HTTPException(401, "Who?", {"WWW-Authenticate": "Basic"})


@pytest.mark.parametrize(
    ("authentication", "status", "header"),
    [
        (_late, 200, None),
        (_refuse, 401, ("www-authenticate", "Basic")),
        (lambda _: RedirectResponse("/login"), 307, ("location", "/login")),
        (lambda _: "", 403, None),
    ],
)
def test_the_host_decides_how_somebody_signs_in(engine, authentication, status, header):
    """Its function may be async, may answer itself, and may refuse as FastAPI's security schemes do."""
    with admin_of(engine, authentication=authentication) as client:
        answer = client.get("")

    assert answer.status_code == status
    assert header is None or answer.headers[header[0]] == header[1]


@pytest.mark.parametrize("answer", [5, b"ana", True, ["ana"], HTTPBasicCredentials(username="ana", password="x")])
def test_what_is_no_name_is_nobody(engine, caplog, answer):
    """A host that returns what it was given, unchecked, or a truth is told so, and nobody comes in."""
    put_secrets(engine)
    with admin_of(engine, authentication=lambda _: answer) as client:
        page = client.get("messages")

    assert (page.status_code, page.text) == (500, "Internal Server Error")
    assert f"must return a name, a Response or None, not {type(answer).__name__}" in caplog.text


# From where


def test_links_hold_wherever_it_is_mounted(engine):
    """Under a name, under another app, and behind a proxy that cuts off the beginning of the path."""
    inner, outer = FastAPI(), FastAPI()
    inner.mount("/queue", create_admin(engine, authentication=anyone), name="anything")
    outer.mount("/inner", inner)

    async def proxied(scope, receive, send):
        await outer(scope | {"root_path": "/proxied", "path": "/proxied" + scope.get("path", "")}, receive, send)

    with served_by_uvicorn(proxied) as client:
        page = client.get("/inner/queue/messages")

    assert page.status_code == 200
    assert 'href="/proxied/inner/queue/static/engagement.css"' in page.text


def test_the_hosts_templates_are_not_ours(engine, tmp_path, monkeypatch):
    """A host has a directory `templates`, too, and a layout, a list of messages and an error page in it."""
    (tmp_path / "templates").mkdir()
    for name in ("layout", "messages", "error", "overview", "parts"):
        (tmp_path / "templates" / f"{name}.html").write_text("the host's")
    monkeypatch.chdir(tmp_path)
    with admin_of(engine) as client:
        assert "the host's" not in "".join(client.get(path).text for path in ("", "messages", "messages/0"))


# What it shows and hides


def paths_of(message_id: int) -> list[str]:
    return ["", "messages", "messages?user=user-ana", f"messages/{message_id}", f"messages/{message_id}/resolve-sent"]


def without_filled_in(page: str) -> str:
    """Return a page without what the person has typed into the filters."""
    return re.sub(r'<input class="form-control" id="user"[^>]*>', "", page)


@pytest.mark.parametrize("may_reveal", [False, lambda request: request.state.operator == "boss"])
@pytest.mark.parametrize("asked", [{}, {"reveal": "1"}])
def test_what_is_personal_is_masked(engine, may_reveal, asked):
    """Params, address, reasons, provider's id, user and key: hidden on every page, whatever the address asks for."""
    message_id = put_secrets(engine)
    with admin_of(engine, may_reveal=may_reveal) as client:
        for path in paths_of(message_id):
            page = client.get(path, params=httpx.URL(path).params.merge(asked))
            assert page.status_code == 200
            assert [secret for secret in SECRETS if secret in without_filled_in(unescape(page.text))] == []
            assert "eveal what is personal" not in page.text
        assert "***21@s.whatsapp.net" in client.get(f"messages/{message_id}").text


def test_who_may_see_it_has_to_ask_and_is_written_down(engine, caplog):
    """It is masked until somebody asks whom the host allows; that they looked is logged, and what they saw is not."""
    caplog.set_level(logging.INFO, "engagement")
    message_id = put_secrets(engine)
    other = put(engine, "pending")
    with admin_of(engine, authentication=lambda _: "boss", may_reveal=True) as client:
        page = client.get(f"messages/{message_id}")
        assert [secret for secret in SECRETS if secret in unescape(page.text)] == []
        assert caplog.messages == []
        revealed = unescape(client.get(f"messages/{message_id}?reveal=1").text)
        listed = unescape(client.get("messages?reveal=1").text)

    assert [secret for secret in SECRETS if secret not in revealed] == []
    assert NUMBER in listed
    assert caplog.messages == [
        f"engagement.admin action=reveal message_id={ids} verdict=revealed by='boss'"
        for ids in (message_id, f"{other},{message_id}")
    ]
    assert [secret for secret in SECRETS if secret in caplog.text] == []


def test_what_is_shown_and_what_is_logged_go_by_one_answer(engine, caplog):
    """`may_reveal` is asked once for a page: one that changes its mind shows nothing that is not written down."""
    caplog.set_level(logging.INFO, "engagement")
    message_id = put_secrets(engine)
    answers = [False, True, True, True, False, False]
    with admin_of(engine, may_reveal=lambda _: answers.pop(0)) as client:
        for path, is_revealed in (("messages", False), (f"messages/{message_id}", True)):
            page = unescape(client.get(f"{path}?reveal=1").text)
            assert (NUMBER in page) == is_revealed == bool(caplog.messages)

    assert len(answers) == 4


@pytest.mark.parametrize("option", ["secret_key", "sign_out"])
def test_an_empty_option_is_a_variable_that_is_not_set(engine, option):
    """Each process would make a secret of its own, and the forms of one fail in the others."""
    with pytest.raises(ValueError, match=f"^{option}: is empty"):
        create_admin(engine, authentication=anyone, **{option: ""})


def test_a_name_that_is_no_text_is_shown_all_the_same(engine):
    """What an authentication makes of a header's bytes may hold half a character."""
    message_id = put(engine, "pending")
    with admin_of(engine, authentication=lambda _: "ana\udcff") as client:
        assert "ana?" in client.get(f"messages/{message_id}").text
        assert client.get(f"messages/{message_id}/cancel").status_code == 200


def test_a_list_does_not_say_who_it_is_to_who_tries_all_numbers(engine):
    """What stands for a person on a masked list follows from a secret: pages that share it show the same."""
    queue(engine, new_message(NUMBER, destination_jid=f"{NUMBER}@s.whatsapp.net"))
    shown = []
    for secret in ("one", "one", "another"):
        with admin_of(engine, secret_key=secret) as client:
            page = client.get("messages").text
            guesses = [NUMBER, f"{NUMBER}@s.whatsapp.net", new_message(NUMBER).key]
            made = [
                hashlib.new(name, guess.encode()).hexdigest()[:8]
                for name in ("md5", "sha1", "sha256")
                for guess in guesses
            ]
            made += [str(delivery_id(guess)) for guess in guesses]
            assert [text for text in made if text in page] == []
            shown.append(re.search(r'data-label="User">([0-9a-f]{8})<', page)[1])

    assert shown[0] == shown[1] != shown[2]


def test_the_document_says_what_masking_does_not_hide():
    """A delivery id follows from the key: what is masked is hidden from a glance, not from who computes."""
    for name in ("admin.md", "cli.md"):
        said = " ".join((DOCUMENT.parent / name).read_text().split())
        assert "hides from a glance, not from somebody who computes" in said


# In a host


def test_the_document_shows_how_to_mount_it(engine):
    """The example in the document is short, runs, and lets in who has the password, and nobody else."""
    (block,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    namespace = {"engine": engine, "PASSWORD": "correct horse", "HTTPBasic": HTTPBasic}
    exec(compile(block, str(DOCUMENT), "exec"), namespace)
    message_id = put(engine, "pending")

    with served_by_uvicorn(namespace["app"]) as client:
        answers = [
            client.get("/engagement/", auth=auth).status_code
            for auth in (None, ("ana", "wrong"), ("ana", "correct horse"))
        ]
        client.auth, client.base_url = ("ana", "correct horse"), client.base_url.copy_with(path="/engagement")
        assert said(press(client, message_id, "cancel")) == "Cancelled. It is not sent."

    assert answers == [401, 401, 200]
    assert len(block.splitlines()) < 20
