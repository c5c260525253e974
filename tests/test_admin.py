"""The admin page over HTTP: from where it is asked, what it shows, and what it does."""

import json
import logging
import re
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from html import unescape
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import pytest
from admin_page import admin_of, bring, change, fields_of, form_of, ids_of, press, put, said, send
from conftest import new_message, queue, row
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from engagement import process_message_queue
from engagement._operating.overview import Activity
from engagement.admin import pages
from engagement.admin.chart import HEIGHT, WIDTH, chart_of
from engagement.admin.shown import long_words
from engagement.verification import verify


@pytest.fixture(scope="module", name="served")
def _served(shared_engine):
    with admin_of(shared_engine) as client:
        yield client


@pytest.fixture(name="admin")
def _admin(served, engine):
    """A browser of its own on a page that everybody may see, and an empty queue."""
    served.cookies.clear()
    return served


# From where


def test_a_form_without_its_token_changes_nothing(admin, engine):
    """Another site can send our form, but not what only our page knows."""
    message_id = put(engine, "pending")
    fields = form_of(admin, message_id, "cancel")
    del fields["csrftoken"]

    assert send(admin, message_id, "cancel", **fields).status_code == 403
    assert send(admin, message_id, "cancel", **fields, csrftoken="x").status_code == 403
    assert row(engine, message_id).status == "pending"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://{host}"}, 200),
    ],
)
def test_a_form_from_elsewhere_changes_nothing(admin, engine, headers, status):
    """Also with a token that is right: who controls a sibling domain or another port can plant the cookie."""
    message_id = put(engine, "pending")
    fields = form_of(admin, message_id, "cancel")
    headers = {name: value.format(host=admin.base_url.netloc.decode()) for name, value in headers.items()}

    assert send(admin, message_id, "cancel", headers, **fields).status_code == status
    assert row(engine, message_id).status == ("pending" if status == 403 else "cancelled")


@pytest.mark.parametrize("action", ["cancel", "reschedule", "retry", "resolve-sent", "resolve-not-sent"])
@pytest.mark.parametrize("status", ["pending", "failed", "in_doubt"])
def test_asking_changes_nothing(admin, engine, action, status):
    """A link, a prefetch or a crawler only ever gets the question."""
    message_id = put(engine, status)
    before = row(engine, message_id)

    assert admin.get(f"messages/{message_id}/{action}").status_code == 200
    assert row(engine, message_id) == before


def test_pages_load_nothing_from_elsewhere_and_run_no_script(admin, engine):
    """The browser is told so, and pages ask for nothing else."""
    message_id = put(engine, "pending")
    of_message = [
        f"messages/{message_id}",
        f"messages/{message_id}/cancel",
        f"suppressed/suppress?message={message_id}",
    ]
    for path in ("", "messages", *of_message, "suppressed", "messages/0"):
        page = admin.get(path)
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src" not in policy
        assert "frame-ancestors 'none'" in policy
        assert page.headers["cache-control"] == "no-store"
        assert "<script" not in page.text
        assert " style=" not in page.text
        links = re.findall(r'(?:href|src|action)="([^"]*)"', page.text)
        assert links
        assert [link for link in links if not re.match(r"/queue/|\?|#|data:,", link)] == []
        for link in re.findall(r'<link rel="stylesheet" href="/queue/([^"]*)"', page.text):
            assert admin.get(link).status_code == 200


# What it shows and hides


def test_the_ends_of_the_calendar_can_be_shown(engine):
    """A history written by hand may hold a moment that the page's time zone has no time for."""
    message_id = put(engine, "failed")
    entry = {"attempt": 1, "event": "failed", "reason": "no"}
    for at, offset in (("0001-01-01T00:00:00", "America/Sao_Paulo"), ("9999-12-31T23:59:59", "Asia/Tokyo")):
        change(engine, message_id, history=json.dumps([entry | {"at": f"{at}+00:00"}]))
        with admin_of(engine, tz=ZoneInfo(offset)) as client:
            page = client.get(f"messages/{message_id}")
        assert page.status_code == 200
        assert f'datetime="{at}+00:00"' in page.text


def test_text_of_others_is_text(admin, engine):
    """What a host, a provider or a colleague wrote is shown as it is, and never as HTML."""
    evil = "<img src=x onerror=alert(1)>"
    (message_id,) = queue(engine, new_message("user1", message_key=evil))
    change(engine, message_id, status="failed", attempt=1, error_message=evil)

    page = admin.get(f"messages/{message_id}")

    assert evil not in page.text
    assert unescape(page.text).count(evil) == 2


def test_the_overview_counts_and_warns(admin, engine):
    """Each status has its count and leads to its list; what needs somebody stands out."""
    for status, count in {"in_doubt": 2, "failed": 1, "sent": 3}.items():
        for number in range(count):
            (message_id,) = queue(engine, new_message(f"{status}{number}"))
            sent_at = datetime.now(UTC) if status == "sent" else None
            change(engine, message_id, status=status, attempt=1, sent_at=sent_at)

    page = admin.get("").text
    cards = dict(re.findall(r'status=(\w+)">\s*<span class="name">[^<]*</span>\s*<span class="count">([^<]*)<', page))

    assert cards == {
        "in_doubt": "2", "failed": "1", "pending": "0", "sending": "0", "sent": "3", "cancelled": "0", "expired": "0",
    }  # fmt: skip
    assert page.count('class="card attention"') == 2
    assert re.search(r"<td>6</td><td>3</td>", page)  # this hour: all were due, three were sent
    assert admin.get("?span=week").text.count("<rect ") == 56
    assert admin.get("?span=nonsense").status_code == 200


def test_the_chart_has_one_scale_that_begins_at_zero():
    """The length of a bar is its share of a round top that holds the highest; nothing is drawn outside."""
    hours = [datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=hour) for hour in range(24)]
    chart = chart_of([Activity(at, due=number * 100, sent=number) for number, at in enumerate(hours)])

    assert chart.amounts == (3_200, 2_400, 1_600, 800, 0)
    assert [bar.height for _, bar, _ in chart.buckets[:3]] == pytest.approx([0, 3.125, 6.25], abs=0.01)
    assert all(bar.y + bar.height == pytest.approx(HEIGHT) for _, *bars in chart.buckets for bar in bars)
    assert all(bar.x >= 0 and bar.x + bar.width <= WIDTH for _, *bars in chart.buckets for bar in bars)
    assert chart.times == tuple(hours[::3])
    assert chart_of([Activity(hours[0], 0, 0)]).amounts == (4, 3, 2, 1, 0)


def test_the_list_is_filtered(admin, engine):
    """By status, user, type and day of the schedule, in the page's time zone, and by all together."""
    day = datetime(2026, 3, 1, 23, 30, tzinfo=UTC)
    (first, second, third) = queue(
        engine,
        new_message("ana", scheduled_for=day),
        new_message("bia", message_type="review", scheduled_for=day + timedelta(hours=1)),
        new_message("ana", message_type="review", scheduled_for=day + timedelta(days=1)),
    )
    change(engine, second, status="failed", attempt=1)

    assert ids_of(admin.get("messages")) == [third, second, first]
    assert ids_of(admin.get("messages?status=failed")) == [second]
    assert ids_of(admin.get("messages?user=ana")) == [third, first]
    assert ids_of(admin.get("messages?type=review")) == [third, second]
    assert ids_of(admin.get("messages?user=ana&type=review&status=pending")) == [third]
    assert ids_of(admin.get("messages?since=2026-03-02")) == [third, second]
    assert ids_of(admin.get("messages?until=2026-03-01")) == [first]
    assert "No message fits." in admin.get("messages?user=nobody").text
    with admin_of(engine, tz=ZoneInfo("America/Sao_Paulo")) as client:
        assert ids_of(client.get("messages?since=2026-03-01&until=2026-03-01")) == [second, first]


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ("status=lost", "Status must be one of the list."),
        ("receipt=lost", "Receipt must be one of the list."),
        ("since=yesterday", "Scheduled from is no date."),
        ("since=0001-01-01", "Scheduled from is out of range"),
        ("user=%00", "User id holds a control character"),
        (f"type={'x' * 300}", "Type has 300 characters, more than"),
        ("before=x", "The message's number must be a positive integer that fits in 64 bits."),
        ("before=99999999999999999999", "The message's number must be a positive integer that fits in 64 bits."),
        (f"before={'9' * 5_000}", "The message's number must be a positive integer that fits in 64 bits."),
        ("after=0", "The message's number must be a positive integer that fits in 64 bits."),
        ("until=9999-12-31", "Scheduled until is no date."),
    ],
)
def test_a_filter_that_cannot_be_is_told(admin, asked, problem):
    """No page breaks because of what somebody typed."""
    page = admin.get(f"messages?{asked}")

    assert page.status_code == 200
    assert problem in unescape(page.text)


def test_pages_of_the_list_hold_each_message_once(admin, engine, monkeypatch):
    """From the newest to the oldest and back, with the filters kept, and no button that leads to nothing."""
    monkeypatch.setattr(pages, "PAGE", 3)
    wanted = queue(engine, *(new_message(f"user{number}") for number in range(7)))[::-1]
    queue(engine, new_message("other", message_type="other"))
    link = re.compile(r'rel="(prev|next)" href="([^"]*)"')

    seen, address, last = [], "messages?type=goodbye", None
    while address:
        last = admin.get(address)
        seen += ids_of(last)
        links = dict(link.findall(last.text))
        address = f"messages{unescape(links['next'])}" if "next" in links else None
    assert seen == wanted

    back = []
    while "prev" in (links := dict(link.findall(last.text))):
        last = admin.get(f"messages{unescape(links['prev'])}")
        back = ids_of(last) + back
    assert back == wanted[:6]


def test_a_message_is_found_by_number_or_key(admin, engine):
    """A number that is no message may still be a key."""
    (first, second) = queue(engine, new_message("ana"), new_message("bia", idempotency_key="770077"))

    def find(sought):
        return admin.get("people", params={"q": sought}, follow_redirects=True)

    assert find(str(first)).url.path == f"/queue/messages/{first}"
    assert find(row(engine, first).idempotency_key).url.path == f"/queue/messages/{first}"
    assert find(" 770077 ").url.path == f"/queue/messages/{second}"
    for nothing in ("12345", "no:such:key", "", "x" * 600, "9" * 30, "9" * 5_000, "\x00"):
        assert said(find(nothing)) == "No message has this number or key, and nobody this user id or address."


MANY = "9" * 5_000
"""More digits than Python reads as a number."""


@pytest.mark.parametrize(
    "path",
    [
        "messages/1",
        "messages/9223372036854775808",
        f"messages/{MANY}",
        "messages/one",
        "messages/1/cancel",
        f"messages/{MANY}/cancel",
        "messages/1/burn",
    ],
)
def test_what_does_not_exist_is_said_to_be_so(admin, path):
    """A page for it, with the way back, and no error."""
    page = admin.get(path)

    assert page.status_code == 404
    assert "There is no such" in page.text


# What it does


ASKED_OF = {
    "cancel": "pending",
    "reschedule": "pending",
    "retry": "failed",
    "resolve-sent": "in_doubt",
    "resolve-not-sent": "in_doubt",
}


@pytest.mark.parametrize("action", list(ASKED_OF))
def test_a_question_that_cannot_be_is_not_put(admin, engine, action):
    """By an old link, or when a worker was faster: the page says where the message stands, and has nothing to send."""
    for status in ("sent", "in_doubt", "failed", "pending"):
        message_id = put(engine, status)
        page = admin.get(f"messages/{message_id}/{action}").text
        fits = status == ASKED_OF[action]
        assert ('type="submit"' in page.partition('class="card ask"')[2]) == fits
        assert (f"This cannot be done: the message is {status.replace('_', ' ')}." in page) != fits
        assert fits == bool(fields_of(page))
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM engagement_message_queue"))


@pytest.mark.parametrize(
    ("status", "action", "then", "sentence"),
    [
        ("pending", "cancel", "cancelled", "Cancelled. It is not sent."),
        ("cancelled", "cancel", "cancelled", "It was cancelled before."),
        ("sent", "cancel", "sent", "Too late to cancel: the message is sent."),
        ("sending", "cancel", "sending", "Too late to cancel: the message is sending."),
        ("in_doubt", "cancel", "in_doubt", "Too late to cancel: the message is in doubt."),
        ("failed", "retry", "pending", "Due again, with all its retries."),
        ("expired", "retry", "pending", "Due again, with all its retries."),
        ("sent", "retry", "sent", "Nothing was changed: it is sent."),
        ("in_doubt", "retry", "in_doubt", "Nothing was changed: it is in doubt."),
        ("in_doubt", "resolve-sent", "sent", "Resolved: it was sent."),
        ("in_doubt", "resolve-not-sent", "pending", "Resolved: it was not sent, and is due again."),
        ("sending", "resolve-not-sent", "sending", "Nothing was changed: it is sending."),
        ("sent", "resolve-not-sent", "sent", "Nothing was changed: it is sent."),
        ("sent", "reschedule", "sent", "Nothing was changed: it is sent."),
    ],
)
def test_an_action_is_the_repositorys_and_its_verdict_is_told(  # noqa: PLR0917
    admin, engine, status, action, then, sentence
):
    """Also where the page would no longer offer it: what was true when it was shown may not be any more."""
    message_id = put(engine, ASKED_OF[action], attempt=1)
    fields = form_of(admin, message_id, action)
    bring(engine, message_id, status, attempt=1)

    told = send(admin, message_id, action, **fields)

    assert (told.status_code, told.url.path) == (200, f"/queue/messages/{message_id}")
    assert said(told) == sentence
    assert row(engine, message_id).status == then


def test_who_did_what_is_logged(admin, engine, caplog):
    """With the message's number, the verdict and the name that the host gave, and nothing of the reason."""
    caplog.set_level(logging.INFO, "engagement")
    message_id = put(engine, "pending")

    fields = form_of(admin, message_id, "cancel")
    send(admin, message_id, "cancel", **fields | {"reason": "Ana called"})
    send(admin, message_id, "retry", **fields)

    assert caplog.messages == [
        f"engagement.admin action=cancel message_id={message_id} verdict=cancelled by='anyone'",
        f"engagement.admin action=retry message_id={message_id} verdict=refused by='anyone'",
    ]


@pytest.mark.parametrize(
    ("status", "offered"),
    [
        ("pending", {"reschedule", "cancel"}),
        ("sending", set()),
        ("sent", set()),
        ("failed", {"retry"}),
        ("expired", {"retry"}),
        ("cancelled", set()),
        ("in_doubt", {"resolve-sent", "resolve-not-sent"}),
    ],
)
def test_a_page_offers_what_fits(admin, engine, status, offered):
    """No button that can only say no."""
    message_id = put(engine, status)

    page = admin.get(f"messages/{message_id}").text

    assert set(re.findall(rf'href="/queue/messages/{message_id}/([a-z-]+)"', page)) == offered


def test_a_reason_is_kept(admin, engine):
    """What somebody found out stands in the message's history, and on its timeline."""
    message_id = put(engine, "in_doubt")

    told = press(admin, message_id, "resolve-sent", reason="seen in the chat")

    assert row(engine, message_id).history[-1]["reason"] == "seen in the chat"
    assert "seen in the chat" in told.text


def test_a_message_is_rescheduled_in_the_pages_time_zone(engine):
    """The form begins with when it is due, and takes a time as the page shows times."""
    due = datetime(2030, 1, 1, 15, 0, tzinfo=UTC)
    (message_id,) = queue(engine, new_message(scheduled_for=due))
    with admin_of(engine, tz=ZoneInfo("America/Sao_Paulo")) as client:
        assert form_of(client, message_id, "reschedule")["moment"] == "2030-01-01T12:00"
        told = press(client, message_id, "reschedule", moment="2030-01-02T09:30")
        assert said(told) == "Rescheduled."
        assert "2030-01-02 09:30:00" in told.text

    assert row(engine, message_id).scheduled_for == datetime(2030, 1, 2, 12, 30, tzinfo=UTC)


def test_a_message_is_not_rescheduled_past_its_end(admin, engine):
    """The repository says no, and the page says why."""
    (message_id,) = queue(engine, new_message(expires_at=datetime.now(UTC) + timedelta(days=1)))

    told = press(admin, message_id, "reschedule", moment="2100-01-01T00:00")

    assert said(told) == "Nothing was changed: it is pending, and expires before then."


@pytest.mark.parametrize("moment", ["", "soon", "0001-01-01T00:00"])
def test_a_time_that_cannot_be_is_asked_for_again(admin, engine, moment):
    """The question is put once more, with what is wrong."""
    (message_id,) = queue(engine, new_message())

    told = press(admin, message_id, "reschedule", moment=moment)

    assert told.status_code == 422
    assert 'role="alert"' in told.text
    assert row(engine, message_id).status == "pending"


def test_a_forgotten_message_is_not_retried(admin, engine):
    """There is nowhere to send it to, and the page says so."""
    message_id = put(engine, "failed", destination_jid=None, message_params="{}")

    assert said(press(admin, message_id, "retry")) == "Nothing was changed: it is failed, and was forgotten or pruned."


def test_a_message_that_is_gone_is_told(admin, engine):
    """The page may be old, and the table downgraded or restored since."""
    message_id = put(engine, "pending")
    fields = form_of(admin, message_id, "cancel")
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM engagement_message_queue"))

    told = send(admin, message_id, "cancel", **fields)

    assert (told.url.path, said(told)) == ("/queue/messages", "There is no such message.")


def test_what_is_known_of_one_attempt_is_not_said_of_the_next(admin, engine):
    """Somebody looked up an attempt; meanwhile another says that it did not leave, and the next one is in doubt."""
    message_id = put(engine, "in_doubt")
    fields = form_of(admin, message_id, "resolve-not-sent")
    change(engine, message_id, attempt=2)

    told = send(admin, message_id, "resolve-not-sent", **fields)

    assert said(told) == "Nothing was done: the message was tried again meanwhile."
    assert row(engine, message_id).status == "in_doubt"


def test_a_form_without_its_attempt_is_not_guessed_at(admin, engine):
    """It is not said that the message was tried again, which it was not."""
    message_id = put(engine, "in_doubt")
    fields = form_of(admin, message_id, "resolve-not-sent")
    del fields["attempt"]

    told = send(admin, message_id, "resolve-not-sent", **fields)

    assert said(told) == "Nothing was done: the form did not say which attempt it is about."
    assert row(engine, message_id).status == "in_doubt"


def test_no_row_is_made_edited_or_deleted(admin, engine):
    """The only thing that takes a form is an action; what the library can do for models answers nowhere."""
    message_id = put(engine, "pending")
    before = row(engine, message_id)
    fields = form_of(admin, message_id, "cancel")
    paths = ["", "messages", f"messages/{message_id}", "messages/create", f"messages/edit/{message_id}"]
    paths += [f"_api/messages/{name}" for name in ("action", "row-action", "import", "inline-edit", message_id)]

    for path in paths:
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            assert admin.request(method, path, data=fields).status_code in {404, 405}, (method, path)
    for method in ("PUT", "PATCH", "DELETE"):
        assert admin.request(method, f"messages/{message_id}/cancel", data=fields).status_code == 405
    with engine.connect() as connection:
        assert connection.execute(text("SELECT * FROM engagement_message_queue")).all() == [before]


# How much it reads, and how long it waits


ROWS = 5_000


@pytest.fixture(name="large")
def _large(engine):
    """A queue that is large for what a page may read: old messages that were sent, and some that need somebody."""
    statement = text(
        """
        INSERT INTO engagement_message_queue
          (user_id, message_type, message_key, destination, destination_jid, status, attempt, sent_at, idempotency_key,
           created_at, scheduled_for, next_attempt_at)
        SELECT 'user' || i, 'goodbye', 'k', 'individual', (5511900000000 + i) || '@s.whatsapp.net',
               CASE WHEN i % 500 = 0 THEN 'in_doubt' ELSE 'sent' END, 1, CASE WHEN i % 500 <> 0 THEN at END, 'k' || i,
               at, at, at
        FROM (SELECT i, now() - interval '30 days' - i * interval '1 second' AS at FROM generate_series(1, :n) AS i) x
        """
    )
    with engine.begin() as connection:
        connection.execute(statement, {"n": ROWS})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE engagement_message_queue"))
    yield engine
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("TRUNCATE engagement_message_queue"))
        connection.execute(text("VACUUM ANALYZE engagement_message_queue"))


@contextmanager
def plans(engine):
    """Gather what each SELECT reads, as the database reports it: (rows, statement)."""
    read = []

    def explain(connection, cursor, statement, parameters, _context, _many):
        if not statement.startswith("SELECT"):
            return
        with connection.connection.cursor() as another:
            another.execute("EXPLAIN (ANALYZE, FORMAT JSON) " + statement, parameters)
            ((plan,),) = another.fetchone()
        read.append((_rows_of(plan["Plan"]), statement))

    event.listen(engine, "before_cursor_execute", explain)
    try:
        yield read
    finally:
        event.remove(engine, "before_cursor_execute", explain)


def _rows_of(node: dict) -> int:
    """Return the most rows that any node of a plan took in. A catalog has rows by columns, and not by messages."""
    if node.get("Relation Name", "").startswith("pg_"):
        return 0
    mine = (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
    return max([mine, *(_rows_of(child) for child in node.get("Plans", ()))])


def test_pages_read_little_of_a_large_queue(large, admin, monkeypatch):
    """No count of all rows and no sort of them: what is read does not grow with what was sent long ago."""
    monkeypatch.setattr(pages, "COUNT_UP_TO", 100)
    monkeypatch.setattr("engagement._operating.flow.MOST_READ", 100)
    for path in ("", "?span=week", "messages", "messages?status=in_doubt", "messages?user=user7", "messages/7"):
        with plans(large) as read:
            assert admin.get(path).status_code == 200
        assert read
        assert [statement for rows, statement in read if rows > 200] == []

    overview = admin.get("").text
    assert re.search(r'<span class="count">≈ 4,9[89]\d</span>', overview)  # sent: estimated
    assert re.search(r'<span class="count">10</span>', overview)  # in doubt: counted


def test_a_row_that_cannot_be_read_is_told(admin, engine):
    """The database answers; what it holds was written by hand, and `engagement verify` finds it."""
    message_id = put(engine, "failed")
    change(engine, message_id, created_at="infinity")

    for path in ("messages", f"messages/{message_id}"):
        page = admin.get(path)
        assert page.status_code == 503
        assert "A message cannot be read. Run: engagement verify" in page.text
    with Session(engine) as session:
        assert message_id in {violation.message_id for violation in verify(session)}


def test_the_page_tells_what_keeps_a_queue_waiting(admin, engine):
    """On the overview, and on the message that has been due for longest."""
    (message_id,) = queue(engine, new_message())
    assert "Waiting for" not in admin.get("").text
    why = "Evolution API: the session is not connected"
    process_message_queue(engine, SimpleNamespace(send=print, ready=lambda: False, why_not_ready=why))

    assert f"<dt>Waiting for</dt><dd>{why}</dd>" in admin.get("").text
    assert why in admin.get(f"messages/{message_id}").text


@pytest.mark.parametrize(
    ("duration", "words"),
    [
        (None, "-"),
        (timedelta(0), "0 s"),
        (timedelta(seconds=59), "59 s"),
        (timedelta(seconds=60), "1 min 0 s"),
        (timedelta(hours=25, minutes=1), "1 d 1 h"),
        (timedelta(days=400), "400 d 0 h"),
    ],
)
def test_durations_are_said_in_two_units(duration, words):
    """Enough to know whether to worry."""
    assert long_words(duration) == words
