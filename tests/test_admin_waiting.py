"""How long the admin page waits for a database, and what it says when it waited for nothing."""

import logging
from datetime import timedelta

from admin_page import admin_of, form_of, press, put, said, send
from conftest import row
from sqlalchemy import create_engine, text

from engagement import migrations


def test_a_page_that_takes_too_long_says_so(engine):
    """It gives up, and leaves the database alone; the overview is still worth showing without its chart."""
    with admin_of(engine, patience=timedelta(milliseconds=200)) as client, engine.begin() as connection:
        connection.execute(text("LOCK TABLE engagement_message_queue"))
        page = client.get("messages")

    assert page.status_code == 503
    assert "The database took longer than 0.2 s. Narrow the filters, or try again." in page.text


def test_an_action_that_takes_too_long_says_that_nothing_was_done(engine, caplog):
    """There are no filters to narrow; that somebody tried is logged."""
    caplog.set_level(logging.INFO, "engagement")
    message_id = put(engine, "pending")
    with admin_of(engine, patience=timedelta(milliseconds=200)) as client:
        fields = form_of(client, message_id, "cancel")
        with engine.begin() as connection:
            connection.execute(text("SELECT FROM engagement_message_queue FOR UPDATE"))
            page = send(client, message_id, "cancel", **fields)

    assert page.status_code == 503
    assert "The database took longer than 0.2 s. Nothing was done. Try again." in page.text
    assert caplog.messages[-1] == f"engagement.admin action=cancel message_id={message_id} verdict=failed by='anyone'"
    assert row(engine, message_id).status == "pending"


def test_the_overview_does_without_a_chart_that_takes_too_long(engine, monkeypatch):
    """The counts do not wait for it."""
    slow = lambda session, *_, **__: session.execute(text("SELECT pg_sleep(20)"))  # noqa: E731
    monkeypatch.setattr("engagement.admin.pages.activity", slow)
    put(engine, "failed")
    with admin_of(engine, patience=timedelta(milliseconds=300)) as client:
        page = client.get("")

    assert page.status_code == 200
    assert "too much of it to be shown in time" in page.text
    assert 'class="card attention"' in page.text


def test_a_table_that_is_missing_is_told(empty_engine):
    """The page says what to do."""
    with admin_of(empty_engine) as client:
        page = client.get("messages")

    assert page.status_code == 503
    assert "Run: engagement upgrade" in page.text


def test_a_database_that_is_away_is_told_without_its_password():
    """Neither page nor log shows where it is."""
    engine = create_engine("postgresql+psycopg://someone:hunter2@127.0.0.1:1/nowhere")
    with admin_of(engine) as client:
        page = client.get("")

    assert page.status_code == 503
    assert "The database does not answer." in page.text
    assert "hunter2" not in page.text


def test_the_table_may_be_in_a_schema(empty_engine):
    """Every page and action finds it there."""
    migrations.upgrade(empty_engine, schema="messaging")
    with empty_engine.begin() as connection:
        connection.execute(text("SET LOCAL search_path = messaging"))
        connection.execute(
            text(
                "INSERT INTO engagement_message_queue (user_id, message_type, message_key, destination, "
                "destination_jid, idempotency_key) VALUES ('u', 't', 'k', 'individual', '5511900000000@lid', 'key')"
            )
        )
    with admin_of(empty_engine, schema="messaging") as client:
        assert [client.get(path).status_code for path in ("", "messages", "messages/1")] == [200, 200, 200]
        assert client.get("people?q=key").headers["location"] == "/queue/messages/1"
        assert said(press(client, 1, "cancel")) == "Cancelled. It is not sent."
