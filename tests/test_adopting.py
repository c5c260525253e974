"""An earlier service has a table of our name, with its messages: they become ours, and its keys go on blocking."""

import uuid
from datetime import UTC, datetime, timedelta

import pytest
from alembic.util import CommandError
from conftest import execute
from sqlalchemy import inspect, text
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.orm import Session

from engagement import EngagementMessageRepository, migrations, process_message_queue
from engagement.verification import verify

ANA = uuid.UUID("6f1f4d0e-7c5b-4f0e-9a53-0d5a3c1b2e4f")
THEIRS = """
CREATE TABLE user_profiles (id uuid PRIMARY KEY);
CREATE TABLE engagement_message_queue (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL REFERENCES user_profiles (id) ON DELETE CASCADE,
    message_type text NOT NULL CHECK (message_type IN ('goodbye', 'weekly-review', 'reminder')),
    {more}
    destination_jid text NOT NULL,
    scheduled_for {moment} NOT NULL DEFAULT now(),
    sent_at {moment},
    status text NOT NULL DEFAULT 'pending'
        CHECK (status IN ('pending', 'processing', 'sent', 'failed', 'cancelled')),
    retry_count integer NOT NULL DEFAULT 0,
    idempotency_key text NOT NULL UNIQUE,
    created_at {moment} NOT NULL DEFAULT now()
);
CREATE INDEX engagement_message_queue_due ON engagement_message_queue (status, scheduled_for);
"""
FULL = "message_key text NOT NULL, message_params jsonb, destination text, error_message text,"
LAST_WEEK = datetime.now(UTC).replace(microsecond=123456) - timedelta(days=7)
JID, GROUP = "5511999999999@s.whatsapp.net", "120363000000000003@g.us"
# What it was, and what becomes of it.
ROWS = [
    ({"status": "sent", "sent_at": LAST_WEEK}, ("sent", JID)),
    ({"status": "sent", "message_type": "weekly-review"}, ("sent", JID)),
    ({"status": "pending"}, ("pending", JID)),
    ({"status": "pending", "destination_jid": "+5511999999999"}, ("pending", JID)),
    ({"status": "pending", "destination_jid": "5511999999999@c.us"}, ("pending", JID)),
    ({"status": "pending", "destination_jid": GROUP}, ("pending", GROUP)),
    ({"status": "pending", "destination_jid": "nobody"}, ("failed", None)),
    ({"status": "pending", "retry_count": 1}, ("in_doubt", JID)),
    ({"status": "pending", "sent_at": LAST_WEEK}, ("in_doubt", JID)),
    ({"status": "processing"}, ("in_doubt", JID)),
    ({"status": "failed", "retry_count": 3}, ("failed", JID)),
    ({"status": "cancelled", "destination_jid": "nobody"}, ("cancelled", None)),
]


def key(number):
    """Return the key of a row, as that service made it."""
    return f"{ANA}:{ROWS[number][0].get('message_type', 'goodbye')}:2026-11-{number + 1:02}"


@pytest.fixture(name="theirs", params=["timestamptz", "timestamp"])
def _theirs(request, empty_engine):
    """The earlier service's table, with a row of each kind; its times are in UTC, with and without saying so."""
    execute(empty_engine, THEIRS.format(more=FULL, moment=request.param).replace(":", r"\:"))
    execute(empty_engine, "INSERT INTO user_profiles VALUES (:ana)", ana=ANA)
    for number, (given, _) in enumerate(ROWS):
        values = {
            "user_id": ANA,
            "message_type": "goodbye",
            "message_key": "goodbye.14_days",
            "message_params": '{"name": "Ana"}',
            "destination_jid": JID,
            "scheduled_for": LAST_WEEK,
            "created_at": LAST_WEEK + timedelta(seconds=number),
            "idempotency_key": key(number),
        } | given
        names, bound = ", ".join(values), ", ".join(f":{name}" for name in values)
        with empty_engine.begin() as connection:
            connection.execute(text("SET LOCAL timezone = 'UTC'"))
            connection.execute(text(f"INSERT INTO engagement_message_queue ({names}) VALUES ({bound})"), values)
    execute(empty_engine, f"ALTER DATABASE {empty_engine.url.database} SET timezone = 'America/Sao_Paulo'")
    empty_engine.dispose()
    return empty_engine


def test_an_earlier_services_messages_become_ours(theirs, run):
    """By one command: each row has its status and key, none may go twice, and `verify` finds nothing."""
    assert run("upgrade", on=theirs).err.endswith("or: engagement adopt\n")
    ran = run("adopt", on=theirs)
    assert (ran.status, ran.out.partition(";")[0]) == (0, f"adopted {len(ROWS)} messages")

    with Session(theirs) as session:
        assert verify(session) == []
        repository = EngagementMessageRepository(session)
        for number, (given, expected) in enumerate(ROWS):
            found = repository.get_message_by_key(key(number))
            assert (found.status, found.destination_jid) == expected
            assert (found.user_id, found.message_params) == (str(ANA), {"name": "Ana"})
            assert found.message_type == given.get("message_type", "goodbye").replace("-", "_")
            assert (found.scheduled_for, found.created_at) == (LAST_WEEK, LAST_WEEK + timedelta(seconds=number))
            assert (found.sent_at is not None) == (found.status == "sent")
            assert found.id == number + 1
    assert migrations.current(theirs) == migrations.head()


def test_only_what_was_never_tried_is_sent_and_every_key_blocks(theirs):
    """What the earlier service may have sent waits for a person, and what it has queued cannot be queued again."""
    migrations.adopt(theirs)
    sent = []
    process_message_queue(theirs, lambda message: sent.append(message.idempotency_key))

    assert sorted(sent) == [
        f"{ANA}:goodbye:2026-11-{n + 1:02}" for n, (_, now) in enumerate(ROWS) if now[0] == "pending"
    ]
    with Session(theirs) as session, session.begin():
        for number in range(len(ROWS)):
            queued = EngagementMessageRepository(session).queue_message(
                user_id=ANA.hex,
                message_type="goodbye",
                message_key="goodbye",
                destination="individual",
                destination_jid=JID,
                idempotency_key=key(number),
            )
            assert not queued.created
    with Session(theirs) as session:
        assert verify(session) == []


def test_the_earlier_table_is_kept(theirs):
    """As it was, in a schema of its own; a second time there is nothing to adopt."""
    migrations.adopt(theirs)

    assert inspect(theirs).get_table_names("engagement_before") == ["engagement_message_queue"]
    assert execute(theirs, "SELECT count(*) FROM engagement_before.engagement_message_queue").scalar_one() == len(ROWS)
    assert inspect(theirs).get_foreign_keys("engagement_message_queue", "engagement_before")
    with pytest.raises(CommandError, match="no engagement_message_queue of another service"):
        migrations.adopt(theirs)
    migrations.upgrade(theirs)


def test_a_service_that_was_not_stopped_is_not_waited_for_for_ever(theirs):
    """It gives up, and nothing has changed; a connection of the caller's keeps its own time-out."""
    with theirs.connect() as reader:
        reader.execute(text("SELECT FROM engagement_message_queue"))
        with pytest.raises(OperationalError, match="lock timeout"):
            migrations.adopt(theirs)
    with theirs.begin() as connection:
        connection.execute(text("SET LOCAL lock_timeout = '1234ms'"))
        assert migrations.adopt(connection) == len(ROWS)
        assert connection.scalar(text("SHOW lock_timeout")) == "1234ms"


def test_a_table_with_less_will_do(empty_engine):
    """Without keys, params and errors a message is named by its type. On a connection the caller commits."""
    execute(empty_engine, THEIRS.format(more="", moment="timestamptz").replace(":", r"\:"))
    execute(empty_engine, "INSERT INTO user_profiles VALUES (:ana)", ana=ANA)
    insert = "INSERT INTO engagement_message_queue (user_id, message_type, destination_jid, idempotency_key)"
    execute(empty_engine, f"{insert} VALUES (:ana, 'goodbye', :jid, 'a key of its own')", ana=ANA, jid=JID)
    with empty_engine.connect() as connection:
        assert migrations.adopt(connection) == 1
        connection.rollback()
        with pytest.raises(ProgrammingError):
            connection.execute(text("SELECT next_attempt_at FROM engagement_message_queue"))
        connection.rollback()
        assert migrations.adopt(connection) == 1
        connection.commit()

    with Session(empty_engine) as session:
        found = EngagementMessageRepository(session).get_message_by_key("a key of its own")
        assert (found.message_key, found.message_params, found.status) == ("goodbye", {}, "pending")
        assert verify(session) == []
