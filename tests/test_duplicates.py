"""What a host is told of a key that was there: whose message holds it, what differs, and what is logged."""

import logging
import os
from datetime import UTC, datetime, timedelta

import pytest
from conftest import execute, new_message, queue
from sqlalchemy import text
from sqlalchemy.orm import Session

from engagement import EngagementMessageRepository, Queued, migrations

SECRETS = ("user1", "other-user", "Zx9name", "5511988887777", "k-of-ours")


@pytest.fixture(autouse=True)
def _everything_is_logged(caplog):
    caplog.set_level(logging.DEBUG, "engagement")


def events(caplog) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def queue_again(engine, **fields) -> Queued:
    with Session(engine) as session, session.begin():
        return EngagementMessageRepository(session).queue_message(new_message(idempotency_key="k-of-ours", **fields))


@pytest.fixture(name="there")
def _there(engine, caplog):
    (message_id,) = queue(engine, new_message(idempotency_key="k-of-ours", message_params={"n": 1, "at": [1.0, None]}))
    caplog.clear()
    return message_id


def test_the_same_message_differs_in_nothing(engine, there, caplog):
    """Equal JSON is equal, however it is written; when a message is to be sent is not what it says."""
    again = queue_again(
        engine, message_params={"at": [1, None], "n": 1.0}, scheduled_for=datetime.now(UTC) + timedelta(days=9)
    )

    assert (again.created, again.message_id, again.differs_in, again.is_of_another_user) == (False, there, (), False)
    assert events(caplog) == [("DEBUG", f"engagement.duplicate message_id={there} status=pending")]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("message_type", "weekly_review"),
        ("message_key", "Zx9name"),
        ("message_params", {"n": 2, "name": "Zx9name"}),
        ("destination_jid", "5511988887777@s.whatsapp.net"),
    ],
)
def test_other_content_under_the_same_key_is_told(engine, there, caplog, field, value):
    """The first message is kept; the answer and a warning name the field, and nothing of its content."""
    given = {"message_params": {"n": 1, "at": [1.0, None]}} | {field: value}

    again = queue_again(engine, **given)

    assert (again.created, again.message_id, again.differs_in) == (False, there, (field,))
    assert events(caplog)[-1] == ("WARNING", f"engagement.duplicate_differs message_id={there} fields={field}")
    assert not [secret for secret in SECRETS if secret in caplog.text]


def test_a_key_that_is_another_persons_is_told(engine, there, caplog):
    """Nothing is sent to this person, since the key is another one's: the host is told, and the log has no user."""
    again = queue_again(engine, user_id="other-user", message_params={"n": 1, "at": [1, None]})

    assert again.is_of_another_user
    assert again.differs_in == ("user_id", "destination_jid")
    assert not queue_again(engine, message_params={"n": 1, "at": [1, None]}).is_of_another_user
    told = f"engagement.duplicate_differs message_id={there} fields=user_id,destination_jid"
    assert ("WARNING", told) in events(caplog)
    assert not [secret for secret in SECRETS if secret in caplog.text]


def test_what_it_is_told_to_is_told_too(engine, there):
    """A group in place of a person is another destination."""
    again = queue_again(
        engine,
        destination="group",
        destination_jid="123456789012345678@g.us",
        message_params={"n": 1, "at": [1, None]},
    )

    assert again.differs_in == ("destination", "destination_jid")


@pytest.mark.parametrize("blank", ["forget_user", "prune_messages"])
def test_what_was_blanked_is_not_compared(engine, there, blank):
    """Of a message that was forgotten or pruned, what is left is compared: whose it is, and of what kind."""
    with Session(engine) as session, session.begin():
        repository = EngagementMessageRepository(session)
        repository.cancel_message(there)
        if blank == "forget_user":
            repository.forget_user("user1")
        else:
            assert repository.prune_messages(timedelta(0)) == 1

    assert queue_again(engine, message_params={"n": 2}).differs_in == ()
    assert queue_again(engine, user_id="other-user").differs_in == ("user_id",)


def test_what_is_new_differs_in_nothing(engine, caplog):
    """A message that was created is one event, at DEBUG; a batch is one too."""
    queued = queue_again(engine)
    with Session(engine) as session, session.begin():
        EngagementMessageRepository(session).queue_messages([new_message("a"), new_message("a"), new_message("b")])

    assert (queued.created, queued.differs_in, queued.is_of_another_user) == (True, (), False)
    assert events(caplog) == [
        ("DEBUG", f"engagement.queued message_id={queued.message_id}"),
        ("DEBUG", "engagement.queued_many created=2 duplicates=1"),
    ]


def test_a_role_that_may_not_read_is_told_what_it_may(engine, there):
    """With the columns that a duplicate needs, and no more, nothing is compared, and the transaction goes on."""
    role = f"blind_{os.getpid()}"
    execute(
        engine,
        f"CREATE ROLE {role}; GRANT INSERT, SELECT (id, status, idempotency_key) ON engagement_message_queue TO {role};"
        f" GRANT USAGE ON SEQUENCE engagement_message_queue_id_seq TO {role}",
    )
    try:
        with Session(engine) as session, session.begin():
            session.execute(text(f"SET LOCAL ROLE {role}"))
            again = EngagementMessageRepository(session).queue_message(
                new_message("other-user", idempotency_key="k-of-ours")
            )
            session.execute(text("SELECT 1"))
    finally:
        execute(engine, f"DROP OWNED BY {role}; DROP ROLE {role}")

    assert (again.message_id, again.differs_in, again.is_of_another_user) == (there, None, False)


def test_a_duplicate_in_another_schema_is_compared_there(empty_engine):
    """`schema=` names the table whose columns are asked for."""
    migrations.upgrade(empty_engine, schema="messaging")
    with Session(empty_engine) as session, session.begin():
        repository = EngagementMessageRepository(session, schema="messaging")
        repository.queue_message(new_message())
        assert repository.queue_message(new_message(message_key="other")).differs_in == ("message_key",)


def test_another_tenants_key_is_hidden_and_blocks(empty_engine, caplog):
    """With row-level security by tenant, a key that another tenant has answers with no id and no status."""
    migrations.upgrade(empty_engine)
    role = f"tenant_{os.getpid()}"
    execute(
        empty_engine,
        f"CREATE ROLE {role}; GRANT INSERT, SELECT ON engagement_message_queue TO {role};"
        f" GRANT USAGE ON SEQUENCE engagement_message_queue_id_seq TO {role};"
        " ALTER TABLE engagement_message_queue ENABLE ROW LEVEL SECURITY;"
        " CREATE POLICY by_tenant ON engagement_message_queue"
        " USING (starts_with(user_id, current_setting('app.tenant') || '/'))",
    )

    def queue_as(tenant, key):
        with Session(empty_engine) as session, session.begin():
            session.execute(text(f"SET LOCAL ROLE {role}"))
            session.execute(text("SELECT set_config('app.tenant', :tenant, true)"), {"tenant": tenant})
            return EngagementMessageRepository(session).queue_message(new_message(f"{tenant}/ana", idempotency_key=key))

    try:
        assert queue_as("a", "goodbye:ana").created
        hidden = queue_as("b", "goodbye:ana")
        assert queue_as("b", "b/goodbye:ana").created
    finally:
        execute(empty_engine, f"DROP OWNED BY {role}; DROP ROLE {role}")

    assert hidden == Queued(False, None, "goodbye:ana", None)
    assert hidden.differs_in is None
    assert ("DEBUG", "engagement.duplicate message_id=None status=None") in events(caplog)
    assert "row-level security" in " ".join(Queued.__doc__.split())
