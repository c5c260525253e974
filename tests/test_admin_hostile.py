"""What a request may do to the page that no browser sends: it gets a short no, and never a traceback."""

import logging
import random
import re
import socket
from html import unescape
from urllib.parse import urlencode

import pytest
from admin_page import admin_of, bring, form_of, ids_of, press, put, said, send
from conftest import new_message, queue, row
from fastapi import FastAPI
from starlette.responses import Response
from test_examples import PATIENCE, served_by_uvicorn

from engagement.admin import create_admin
from engagement.admin.guards import LONGEST_FORM


@pytest.fixture(scope="module", name="page")
def _page(shared_engine):
    with admin_of(shared_engine, authentication=lambda request: request.headers.get("who", "ana")) as client:
        yield client


@pytest.fixture(autouse=True)
def _no_error_is_logged(caplog):
    """An exception that reached the server would be logged as an error, with its traceback."""
    yield
    assert [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR] == []


def raw(client, request: bytes) -> int:
    """Send what httpx would not, and return the status of the answer."""
    with socket.create_connection((client.base_url.host, client.base_url.port), PATIENCE) as connection:
        connection.sendall(request)
        return int(connection.makefile("rb").readline().split()[1])


MALFORMED = [
    "http://[",
    "http://[::1",
    "http://]",
    "http://a]b[",
    "http://[v1]",
    "http://a:b",
    "http://a b",
    "://",
    "[",
    "\xff",
]


@pytest.mark.parametrize("who", ["ana", ""])
@pytest.mark.parametrize("origin", MALFORMED)
def test_an_origin_that_is_no_address_is_foreign(page, engine, origin, who):
    """Whether or not somebody is signed in."""
    message_id = put(engine, "pending")
    fields = form_of(page, message_id, "cancel")

    answer = send(page, message_id, "cancel", {"Origin": origin.encode("latin-1"), "who": who}, **fields)

    assert answer.status_code == 403
    assert row(engine, message_id).status == "pending"


@pytest.mark.parametrize("who", ["ana", ""])
@pytest.mark.parametrize("host", MALFORMED)
def test_a_host_that_is_no_address_breaks_nothing(page, host, who):
    """Links and cookies name no host, so that it does not matter which one is given."""
    name = host.removeprefix("http://").encode("latin-1")
    for path in ("/queue/", "/queue/messages", "/queue/static/engagement.css", "/queue/nowhere"):
        asked = b"GET %b HTTP/1.1\r\nHost: %b\r\nwho: %b\r\nConnection: close\r\n\r\n"
        assert 200 <= raw(page, asked % (path.encode(), name, who.encode())) < 500


@pytest.mark.parametrize("boundary", ["", "; boundary=", "; boundary=x", "; charset=nonsense; boundary=x"])
@pytest.mark.parametrize("body", [b"", b"--x", b"--x\r\nContent-Disposition: form-data\r\n\r\nx\r\n--x--\r\n"])
def test_a_form_of_another_kind_is_refused(page, engine, boundary, body):
    """Ours has no files; what cannot be read is not guessed at."""
    message_id = put(engine, "pending")
    headers = {"Content-Type": f"multipart/form-data{boundary}"}

    answer = page.post(f"messages/{message_id}/cancel", content=body, headers=headers)

    assert answer.status_code == 400
    assert row(engine, message_id).status == "pending"


@pytest.mark.parametrize("kind", ["application/json", "MULTIPART/Form-Data; boundary=x", "text/plain", "x", ";"])
def test_only_a_form_is_a_form(page, engine, kind):
    """Also with the library's other way to give its token, for scripts."""
    message_id = put(engine, "pending")
    fields = form_of(page, message_id, "cancel")
    headers = {"Content-Type": kind, "X-CSRFToken": fields["csrftoken"]}

    assert page.post(f"messages/{message_id}/cancel", content=b"x", headers=headers).status_code == 400
    assert row(engine, message_id).status == "pending"


@pytest.mark.parametrize("value", ["\x00", "\x1b[31m", "\ud800", "\u202e", "%", "=", "9" * 5_000])
def test_a_form_may_hold_anything(page, engine, value):
    """What cannot be stored or read is cleaned, or told."""
    message_id = put(engine, "pending")
    for action in ("cancel", "reschedule"):
        for name in ("attempt", "moment", "reason", "other", "csrftoken"):
            fields = form_of(page, message_id, action) | {name: value}
            body = urlencode(fields, errors="surrogatepass").encode()
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            answer = page.post(f"messages/{message_id}/{action}", content=body, headers=headers)
            assert answer.status_code in {303, 403, 422}
        bring(engine, message_id, "pending")


def test_a_file_is_no_reason(page, engine):
    """Also in a form that is right otherwise."""
    message_id = put(engine, "pending")
    fields = form_of(page, message_id, "cancel")

    answer = page.post(f"messages/{message_id}/cancel", data=fields, files={"reason": b"x"})

    assert answer.status_code == 400
    assert row(engine, message_id).status == "pending"


def test_a_form_of_too_many_fields_is_refused(page, engine):
    """One more than the library reads."""
    message_id = put(engine, "pending")
    fields = form_of(page, message_id, "cancel") | {f"f{number}": "" for number in range(1_001)}

    assert send(page, message_id, "cancel", **fields).status_code == 400
    assert row(engine, message_id).status == "pending"


@pytest.mark.parametrize("name", ["reason", "x"])
@pytest.mark.parametrize("length", [LONGEST_FORM, 1024 * 1024 + 1])
@pytest.mark.parametrize("how", ["at once", "in chunks"])
def test_a_body_that_is_too_long_is_refused(page, engine, name, length, how):
    """Whether its length is told before or found out while it is read."""
    message_id = put(engine, "pending")
    form = urlencode(form_of(page, message_id, "cancel") | {name: "x" * length}).encode()
    content = form if how == "at once" else (form[at : at + 10_000] for at in range(0, len(form), 10_000))

    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = page.post(f"messages/{message_id}/cancel", content=content, headers=headers)

    assert answer.status_code == 413
    assert row(engine, message_id).status == "pending"


@pytest.mark.parametrize("path", ["messages/1/cancel", "messages", "static/engagement.css", "nowhere"])
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_body_without_an_end_is_not_waited_for(page, path, method):
    """The answer comes while the body still does."""
    head = f"{method} /queue/{path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    head += "Content-Type: application/x-www-form-urlencoded\r\n\r\n"
    chunk = b"2710\r\n" + b"x" * 10_000 + b"\r\n"

    assert 200 <= raw(page, head.encode() + chunk * (LONGEST_FORM // 10_000 + 1)) < 500


def test_the_longest_reason_is_taken(page, engine):
    """The form allows 500 characters, of which each may take twelve bytes."""
    message_id = put(engine, "pending")

    assert said(press(page, message_id, "cancel", reason="\N{GRINNING FACE}" * 500)) == "Cancelled. It is not sent."


@pytest.mark.parametrize("length", ["-1", "x", "1" * 400, "1, 2", ""])
def test_a_length_that_is_none_is_refused(page, length):
    """By the server or by us."""
    head = f"POST /queue/messages/1/cancel HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"

    assert 400 <= raw(page, head.encode()) < 500


def test_a_sign_in_that_reads_a_form_reads_no_more(engine):
    """The limit stands before the host's function, too."""

    async def who(request) -> str:
        return (await request.form()).get("who", "ana")

    with admin_of(engine, authentication=who) as client:
        answer = client.post("messages/1/cancel", data={"who": "x" * LONGEST_FORM})

    assert answer.status_code == 413


WORDS = ["", "1", "-1", "9" * 30, "x", "%00", "%ff", "%ed%a0%80", "0001-01-01", "9999-12-31", "%F0%9F%98%80", ".."]
ASKED = [
    "status",
    "user",
    "type",
    "since",
    "until",
    "before",
    "after",
    "reveal",
    "span",
    "q",
    "skip",
    "address",
    "message",
    "self",
    "%00",
    "",
]
PATHS = ["", "messages", "people", "messages/x", "messages/1/cancel", "messages/%00", "messages/%ff/%ff", "//"]
PATHS += ["suppressed", "suppressed/suppress", "suppressed/%00"]
PATHS += ["static/engagement.css", "static/..%2fx", "static/%00", "static", f"messages/{'9' * 4_000}", "messages;x"]
HEADERS = ["X: x", "Cookie: a", "Cookie: starlette_admin_csrftoken=\xff", "Cookie: starlette_admin_flash=x.y.z"]
HEADERS += ["Range: x", "Range: bytes=5-1", "If-Modified-Since: x", "X-CSRFToken: \xff", "X-Forwarded-Proto: ["]


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_asked_is_answered(page, engine, seed):
    """No path, no filter and no header is more than a page that was not found, or a form that is refused."""
    queue(engine, *(new_message(f"user{number}") for number in range(60)))
    dice = random.Random(seed)
    for _ in range(100):
        asked = "&".join(f"{dice.choice(ASKED)}={dice.choice(WORDS)}" for _ in range(dice.randrange(6)))
        line = f"{dice.choice(['GET', 'GET', 'HEAD', 'POST', 'FOO'])} /queue/{dice.choice(PATHS)}?{asked} HTTP/1.1"
        request = f"{line}\r\nHost: x\r\n{dice.choice(HEADERS)}\r\nConnection: close\r\n\r\n"
        assert 200 <= raw(page, request.encode("latin-1")) < 500, request


def test_a_page_of_the_list_keeps_what_was_asked(page, engine):
    """Also a filter of a name that means something to Python."""
    queue(engine, *(new_message("user1", message_key=str(number), idempotency_key=str(number)) for number in range(60)))

    older = re.search(r'rel="next" href="([^"]*)"', page.get("messages?self=1&user=user1").text)[1]

    assert set(unescape(older).removeprefix("?").split("&")) >= {"self=1", "user=user1"}
    assert len(ids_of(page.get(f"messages{unescape(older)}"))) == 10


# What may be kept


@pytest.mark.parametrize("at", ["/queue", "/static", "/a/static/b"])
def test_no_page_is_kept_wherever_it_is_mounted(engine, at):
    """A path of the host's that looks like one of our files makes no page one of them; nor is one that is not there."""
    message_id = put(engine, "pending")
    with admin_of(engine, at=at) as client:
        paths = [
            "",
            "messages",
            f"messages/{message_id}",
            "static/nowhere.css",
            "messages/static/x",
            "nowhere/static/x",
        ]
        kept = [path for path in paths if client.get(path).headers.get("cache-control") != "no-store"]
        file = client.get("static/engagement.css")

    assert kept == []
    assert file.status_code == 200
    assert file.headers.get("cache-control") != "no-store"


@pytest.mark.parametrize("status", [301, 302, 303, 401])
def test_an_answer_in_place_of_a_file_is_not_kept(engine, status):
    """It may set a cookie: a host's own redirect to its login, say."""

    def to_login(_):
        return Response(status_code=status, headers={"Location": "/login", "Set-Cookie": "a=b"})

    with admin_of(engine, authentication=to_login) as client:
        answer = client.get("static/engagement.css", follow_redirects=False)

    assert (answer.status_code, answer.headers["cache-control"]) == (status, "no-store")


def test_no_page_is_kept_behind_a_proxy_that_cuts_the_path(engine):
    """The path that a server sees may begin with what it was told to put before it."""
    host = FastAPI()
    host.mount("/queue", create_admin(engine, authentication=lambda _: "ana"))

    async def proxied(scope, receive, send):
        await host(scope | {"root_path": "/static/x", "path": "/static/x" + scope.get("path", "")}, receive, send)

    with served_by_uvicorn(proxied) as client:
        assert client.get("/queue/messages").headers["cache-control"] == "no-store"
