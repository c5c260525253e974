"""Who signed in to `engagement admin`: no other port learns of it, and it comes to an end."""

import re
import threading
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from admin_page import admin_of, form_of, press, put, said, send
from conftest import row
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import RedirectResponse
from starlette.routing import Mount
from test_admin_command import browser_on, serving
from test_examples import served_by_uvicorn

from engagement.admin import anyone, create_admin
from engagement.admin.serving import TokenInAddress


@contextmanager
def another_port():
    """Serve something else on this machine, and hand out its address and the cookies that it is given."""
    given = []

    class Neighbour(BaseHTTPRequestHandler):
        def do_GET(self):
            given.append(self.headers.get("Cookie"))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Neighbour) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", given
        finally:
            server.shutdown()
            thread.join()


def everything_told(client, answer: httpx.Response) -> str:
    """Return all that a browser keeps and shows of a page."""
    return f"{answer.url} {answer.text} {answer.headers} {client.cookies.jar}"


def test_another_port_is_given_nothing(engine):
    """A browser gives its cookies to every port of a host: ours are for a path that nobody else knows."""
    message_id = put(engine, "pending")
    with serving(engine) as (_, address), browser_on(address) as client, another_port() as (neighbour, given):
        client.get(address, follow_redirects=True)
        assert said(send(client, message_id, "cancel", **form_of(client, message_id, "cancel"))).startswith("Cancelled")
        kept = {cookie.name for cookie in client.cookies.jar}
        for path in ("/", "/messages", f"/messages/{message_id}/cancel", "/static/engagement.css"):
            client.get(neighbour + path)

    assert len(kept) >= 2  # the session and the token of the forms
    assert given == [None] * 4


def test_the_path_cannot_be_guessed_and_is_not_the_token(engine):
    """Two runs have two of them. Outside of it nobody is told more than how to come in."""
    places = []
    for _ in range(2):
        with serving(engine) as (_, address), browser_on(address) as client:
            path, token = re.fullmatch(r"http://127\.0\.0\.1:\d+/([\w-]{20,})/\?token=([\w-]{30,})", address).groups()
            outside = client.get(address.split(path)[0])
            assert (outside.status_code, outside.text) == (403, "Open the address that `engagement admin` has printed.")
            assert token not in path
            places.append(path)

    assert len(set(places)) == 2


def test_the_token_is_in_no_cookie_and_in_no_address(engine):
    """What a browser keeps lets in until the session ends, and no longer."""
    with serving(engine) as (_, address), browser_on(address) as client:
        token = address.partition("?token=")[2]
        answers = [client.get(address, follow_redirects=True), client.get("messages")]
        told = [everything_told(client, answer) for answer in answers]
        sessions = []
        for _ in range(2):
            client.cookies.clear()
            client.get(address)
            sessions.append(next(cookie.value for cookie in client.cookies.jar if "admin" in cookie.name))

    assert [token in each for each in told] == [False, False]
    assert len(set(sessions)) == 2


def test_somebody_signs_out(engine):
    """The session is over, also for a cookie that was copied; another one goes on, and the address opens a new one."""
    message_id = put(engine, "pending")
    with serving(engine) as (_, address), browser_on(address) as mine, browser_on(address) as other:
        for client in (mine, other):
            client.get(address, follow_redirects=True)
        fields = form_of(mine, message_id, "cancel")
        cookies = "; ".join(f"{cookie.name}={cookie.value}" for cookie in mine.cookies.jar)
        action = re.search(r'<form class="sign-out" method="post" action="([^"]*)">', mine.get("").text)[1]
        where = httpx.URL(address).join(action)
        assert mine.get(where).status_code != 303  # Not by a link or a prefetch.
        assert mine.get("").status_code == 200
        assert mine.post(where, headers={"Sec-Fetch-Site": "same-site"}).status_code == 403
        assert mine.get("").status_code == 200

        out = mine.post(where)
        assert (out.status_code, "Signed out" in out.text) == (200, True)
        assert [cookie for cookie in mine.cookies.jar if "starlette" not in cookie.name] == []
        assert mine.get("").status_code == 403
        assert mine.get("", headers={"Cookie": cookies}).status_code == 403
        assert send(mine, message_id, "cancel", {"Cookie": cookies}, **fields).status_code == 403
        assert row(engine, message_id).status == "pending"

        assert other.get("").status_code == 200
        assert mine.get(address, follow_redirects=True).status_code == 200


def test_a_session_ends_by_itself(engine):
    """After its time nobody comes in with its cookie, whatever the browser does with it."""
    now = [0.0]
    gate = TokenInAddress(lasts=timedelta(hours=8), now=lambda: now[0])
    page = create_admin(engine, authentication=gate, sign_out=gate.sign_out)
    with served_by_uvicorn(Starlette(routes=[Mount(gate.path, page)])) as client:
        client.get(f"{gate.path}/?token={gate.token}")
        (kept,) = [cookie for cookie in client.cookies.jar if "starlette" not in cookie.name]
        header = {"Cookie": f"{kept.name}={kept.value}"}
        now[0] = 8 * 3600 - 1
        before = client.get(f"{gate.path}/", headers=header).status_code
        now[0] = 8 * 3600
        after = client.get(f"{gate.path}/", headers=header).status_code
        assert (before, after) == (200, 403)

        client.get(f"{gate.path}/?token={gate.token}")
        assert client.get(f"{gate.path}/").status_code == 200
        assert kept.expires is not None


def test_what_is_kept_of_sessions_has_an_end(engine):
    """Whoever opens the address again and again leaves nothing behind that is over."""
    now = [0.0]
    gate = TokenInAddress(lasts=timedelta(hours=1), now=lambda: now[0])
    with served_by_uvicorn(Starlette(routes=[Mount(gate.path, create_admin(engine, authentication=gate))])) as client:
        for _ in range(20):
            client.get(f"{gate.path}/?token={gate.token}")
            now[0] += 900

    assert len(gate.ends) <= 4


# Mounted in a host's app


def test_the_cookies_of_a_page_are_for_its_path(engine):
    """Another port of that name, and the rest of the app, are not given them; the host's own stay as they are."""

    def who(request):
        if "in" in request.query_params:
            answer = RedirectResponse(request.url.path, 303)
            answer.set_cookie("session", "of the host", path="/")
            return answer
        return request.cookies.get("session")

    message_id = put(engine, "pending")
    host = FastAPI()
    host.mount("/a b/queue", create_admin(engine, authentication=who))
    with served_by_uvicorn(host) as client:
        client.base_url = client.base_url.copy_with(path="/a b/queue")
        client.get("?in=1")
        told = press(client, message_id, "cancel")
        paths = {cookie.name: cookie.path for cookie in client.cookies.jar}

    assert said(told) == "Cancelled. It is not sent."
    assert paths.pop("session") == "/"
    assert set(paths.values()) == {"/a%20b/queue"}


def test_a_name_that_was_pointed_at_the_page_sees_nothing(engine):
    """Where everybody comes in, the app answers to its own name only, as the document says."""
    host = FastAPI()
    host.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1"])
    host.mount("/queue", create_admin(engine, authentication=anyone))
    with served_by_uvicorn(host) as client:
        assert client.get("/queue/").status_code == 200
        assert client.get("/queue/", headers={"Host": "evil.example"}).status_code == 400
    document = (Path(__file__).parent.parent / "docs" / "admin.md").read_text()
    assert "`app.add_middleware(TrustedHostMiddleware, allowed_hosts=" in document


# Only to look


@pytest.mark.parametrize("asked", ["cancel", "reschedule", "retry", "resolve-sent", "resolve-not-sent"])
@pytest.mark.parametrize("status", ["pending", "failed", "in_doubt"])
def test_who_may_only_look_changes_nothing(engine, status, asked):
    """No page has a button, and neither the question nor a form that was right a moment ago gets further."""
    message_id = put(engine, status)
    may_act = [True]
    with admin_of(engine, may_act=lambda _: may_act[0]) as client:
        fields = form_of(client, message_id, asked) | {"attempt": str(row(engine, message_id).attempt)}
        fields.setdefault("csrftoken", form_of(client, put(engine, "pending"), "cancel")["csrftoken"])
        may_act[0] = False
        before = row(engine, message_id)
        pages = [client.get(path) for path in ("", "messages", f"messages/{message_id}")]
        question = client.get(f"messages/{message_id}/{asked}")
        answer = send(client, message_id, asked, **fields)

    assert [page.status_code for page in pages] == [200] * 3
    assert not any('method="post"' in page.text or f"{message_id}/" in page.text for page in pages)
    assert (question.status_code, answer.status_code) == (403, 403)
    assert "You may look, and not act." in answer.text
    assert row(engine, message_id) == before


def test_a_role_may_act_and_another_may_look(engine):
    """The host says who, by the name that it gave or as it likes; the function may be async."""

    async def may_act(request) -> bool:
        return request.state.operator == "boss"

    message_id = put(engine, "pending")
    with admin_of(engine, authentication=lambda request: request.headers["who"], may_act=may_act) as client:
        client.headers["who"] = "ana"
        assert client.get(f"messages/{message_id}/cancel").status_code == 403
        client.headers["who"] = "boss"
        assert said(press(client, message_id, "cancel")) == "Cancelled. It is not sent."


@pytest.mark.parametrize("answer", ["no", "yes", 1, 0, None])
def test_only_a_yes_may_act(engine, answer):
    """As with `may_reveal`."""
    with pytest.raises(TypeError, match="may_act: must be True or False, not "):
        create_admin(engine, authentication=lambda _: "ana", may_act=answer)
    message_id = put(engine, "pending")
    with admin_of(engine, may_act=lambda _: answer) as client:
        assert client.get(f"messages/{message_id}/cancel").status_code == 500


def test_the_command_serves_a_page_only_to_look(engine):
    """`--read-only`: what may be signed out of, and nothing else, takes a form."""
    message_id = put(engine, "in_doubt")
    with serving(engine, "--read-only") as (_, address), browser_on(address) as client:
        page = client.get(address, follow_redirects=True).text + client.get(f"messages/{message_id}").text
        assert re.findall(r'method="post" action="[^"]*/([\w-]+)"', page) == ["sign-out"] * 2
        assert client.get(f"messages/{message_id}/resolve-not-sent").status_code == 403
