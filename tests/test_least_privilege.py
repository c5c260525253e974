"""Real roles with the grants of docs/roles.md: they suffice, and without any one of them something fails."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import database_of_its_own, new_message
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from engagement import (
    EngagementMessageRepository,
    InDoubt,
    NotSent,
    Pauses,
    Receipt,
    Recorded,
    Refused,
    Sent,
    SuppressionList,
    migrations,
    process_message_queue,
)
from engagement._operating.lists import count_messages, list_messages
from engagement._operating.overview import activity, overview
from engagement._operating.person import find_people
from engagement._operating.suppressed import list_suppressed
from engagement._operating.workers import seen_workers
from engagement._sql.errors import sqlstate
from engagement._watching.metrics import QueueReader
from engagement.messages import delivery_id, reference
from engagement.policies import FrequencyCap, Suppression
from engagement.receipts.endpoint import PATIENCE, recorder
from engagement.verification import verify

pytestmark = pytest.mark.direct("roles are made and taken on the server")

DOCUMENT = Path(__file__).parent.parent / "docs" / "roles.md"
ROLES = ["owner", "host", "caller", "worker", "pruner", "receiver", "watcher"]
QUEUE = "app.engagement_message_queue"
SUPPRESSION = "app.engagement_suppression"
RECEIPT = "app.engagement_receipt"
WORKER = "app.engagement_worker"
PAUSE = "app.engagement_pause"
TABLES = (QUEUE, SUPPRESSION, RECEIPT, WORKER, PAUSE)
ADDRESS = "5511999990001@s.whatsapp.net"
DENIED = "42501"


@dataclass(frozen=True)
class Grant:
    """One privilege that one role has, of one column if it is of one."""

    privilege: str
    column: str | None
    on: str
    role: str

    def __str__(self) -> str:
        return f"{self.privilege} ({self.column}) ON {self.on}" if self.column else f"{self.privilege} ON {self.on}"


def documented() -> list[Grant]:
    """Return each single privilege that the document grants."""
    grants = []
    for block in re.findall(r"```sql\n(GRANT.*?)```", DOCUMENT.read_text(), re.DOTALL):
        for what, on, roles in re.findall(r"GRANT (.*?)\s+ON (.*?) TO (.*?);", block, re.DOTALL):
            kind = on.split(" ")[0] + " " if on.startswith(("SCHEMA ", "SEQUENCE ")) else ""
            for privilege, columns in re.findall(r"([A-Z]+)(?: \((.*?)\))?", what, re.DOTALL):
                grants += [
                    Grant(privilege, column, kind + name, role)
                    for column in re.split(r",\s+", columns)
                    for name in on.removeprefix(kind).split(", ")
                    for role in roles.split(", ")
                ]
    return grants


class Server:
    """A database with our table in `app`, and the roles of the document, in names of this database's own."""

    def __init__(self, url) -> None:
        self.admin = create_engine(url, poolclass=NullPool)
        self.names = {role: f"{url.database}_{role}" for role in ROLES}

    def as_admin(self, *statements: str) -> None:
        """Execute and commit."""
        with self.admin.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def grant(self, grant: Grant) -> None:
        """Give it to its role."""
        self.as_admin(f"GRANT {grant} TO {self.names[grant.role]}")

    def revoke(self, grant: Grant) -> None:
        """Take it back."""
        self.as_admin(f"REVOKE {grant} FROM {self.names[grant.role]}")

    def engine_of(self, role: str):
        """Return an engine whose sessions are the role's."""
        options = f"-c role={self.names[role]} -c search_path=app,pg_temp"
        return create_engine(self.admin.url, poolclass=NullPool, connect_args={"options": options})


@pytest.fixture(scope="module", name="server")
def _server(migrated_template):
    with database_of_its_own(migrated_template, "roles") as url:
        server = Server(url)
        with server.admin.connect() as connection:
            if not connection.exec_driver_sql("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").scalar():
                pytest.skip("only a superuser can make roles")
        server.as_admin(*(f"CREATE ROLE {name} NOLOGIN" for name in server.names.values()), "CREATE SCHEMA app")
        for grant in documented():
            if grant.role == "owner":
                server.grant(grant)
        migrations.upgrade(server.engine_of("owner"))
        for grant in documented():
            server.grant(grant)
        yield server
        server.as_admin(
            *(f"DROP OWNED BY {name} CASCADE" for name in server.names.values()),
            *(f"DROP ROLE {name}" for name in server.names.values()),
        )


@pytest.fixture(name="stocked")
def _stocked(server):
    """A queue with a message for each thing that somebody may do with it, and no key that a role queues."""
    with Session(server.admin) as session, session.begin():
        queue = EngagementMessageRepository(session, schema="app")
        for name in ("sent", "not_sent", "refused", "in_doubt", "lost", "expired", "pending", "failed", "doubted"):
            queue.queue_message(new_message(name))
    state = {
        "lost": "status = 'sending', attempt = 1, claimed_by = 'lost', lease_expires_at = now()",
        "expired": "scheduled_for = '2020-01-01', expires_at = '2020-01-02'",
        "pending": "next_attempt_at = '2100-01-01'",
        "failed": "status = 'failed', attempt = 1, next_attempt_at = '2020-01-01'",
        "doubted": "status = 'in_doubt', attempt = 1",
    }
    server.as_admin(*(f"UPDATE {QUEUE} SET {values} WHERE user_id = '{user}'" for user, values in state.items()))
    with Session(server.admin) as session, session.begin():
        early = {"at": datetime.now(UTC), "provider": "waha", "unreachable": True}
        names = "id", "old"
        EngagementMessageRepository(session, schema="app").record_receipts(
            [Receipt(event="undeliverable", provider_message_id=name, **early) for name in names]
        )
    server.as_admin(f"UPDATE {RECEIPT} SET kept_at = '2020-01-01' WHERE provider_message_id = 'old'")
    yield server
    server.as_admin(f"TRUNCATE {', '.join(TABLES)}")


# What each does ------------------------------------------------------------------------------------------------------


def own(engine):
    """Migrate down to nothing, and up again."""
    with engine.begin() as connection:
        if migrations.current(connection) is None:
            raise PermissionError  # What is there is not found.
        migrations.downgrade(connection)
        migrations.upgrade(connection)
        connection.rollback()


def host(engine):
    """Queue, one and many, what is new and what is there."""
    with Session(engine) as session:
        queue = EngagementMessageRepository(session)
        assert queue.queue_message(new_message("new")).created
        assert not queue.queue_message(new_message("new")).created
        assert queue.queue_messages([new_message("new"), new_message("newer")]).created == 1


def call(engine):
    """Do all that the host's side has."""
    host(engine)
    with Session(engine) as session:
        queue = EngagementMessageRepository(session)
        ids = {user: queue.get_pending_messages(user) for user in ("pending", "sent")}
        assert queue.reschedule_message(ids["pending"][0].id, ids["sent"][0].created_at + timedelta(days=1))
        assert queue.cancel_message(ids["sent"][0].id).is_cancelled
        assert queue.cancel_pending_messages("not_sent") == 1
        [failed] = list_messages(session, user_id="failed")
        [doubted] = list_messages(session, user_id="doubted")
        assert queue.retry_message(failed.id)
        assert queue.resolve_message(doubted.id, sent=True)
        suppressed = SuppressionList(session)
        suppressed.suppress(ADDRESS, "answered STOP")
        assert suppressed.find(ADDRESS).reason == "answered STOP"
        assert suppressed.unsuppress(ADDRESS)
        pauses = Pauses(session)
        pauses.pause("wrong wording", message_type="campaign")
        assert len(pauses.in_force()) == 1
        assert pauses.resume(message_type="campaign")
        assert queue.forget_user("pending").blanked == 1
        queue.prune_messages(timedelta(0))


def work(engine):
    """Deliver with each outcome, under a cap and past the suppression list; recover what was lost."""
    outcomes = {"not_sent": NotSent("x"), "refused": Refused("x"), "in_doubt": InDoubt("x")}

    def send(message):
        with engine.connect() as connection:
            if connection.exec_driver_sql(f"SELECT count(*) FROM {WORKER}").scalar() != 1:
                raise PermissionError  # It is not seen.
        return outcomes.get(message.user_id) or Sent("id")

    capped = FrequencyCap(send, engine, lambda _: UTC, limit=3, per="day")
    if process_message_queue(engine, Suppression(capped, engine), in_order=True).succeeded != 1:
        raise PermissionError  # The policy was denied the list, and so nothing is sent.
    with Session(engine) as session:
        if session.scalar(text(f"SELECT count(kept_at) FROM {RECEIPT}")):
            raise PermissionError  # An error of matching is logged, and the receipts stay.
    with engine.connect() as connection:
        if connection.exec_driver_sql(f"SELECT count(*) FROM {WORKER}").scalar():
            raise PermissionError  # It could not take its row away.


def prune(engine):
    """Blank what is finished."""
    with Session(engine) as session:
        assert EngagementMessageRepository(session).prune_messages(timedelta(days=1)) == 1


def receive(engine):
    """Record receipts that resolve a doubt and that make a message fail."""
    with Session(engine) as session:
        queue = EngagementMessageRepository(session)
        answers = queue.record_receipts(told(session))
        assert [each.answer for each in answers] == [Recorded.RECORDED] * 2
        early = Receipt(event="read", at=datetime.now(UTC), provider="waha", provider_message_id="another")
        assert [each.answer for each in queue.record_receipts([early])] == [Recorded.KEPT]


def told(session) -> list[Receipt]:
    """Return what a provider says of two of the messages, by a role that cannot read whose they are."""
    events = {"doubted": "read", "failed": "undeliverable"}
    keys = session.execute(text(f"SELECT id, idempotency_key FROM {QUEUE}")).all()
    return [
        Receipt(
            event=events[key.partition(":")[0]],
            at=datetime.now(UTC),
            provider="cloud",
            reference=reference(message_id, delivery_id(key)),
            reason="x",
            unreachable=key.startswith("failed"),
        )
        for message_id, key in keys
        if key.startswith(tuple(events))
    ]


def watch(engine):
    """Look, in each way there is."""
    with Session(engine) as session:
        assert overview(session).by_status["failed"] == 1
        overview(session, count_up_to=1)
        if not seen_workers(session).may_see:
            raise PermissionError
        assert len(list_messages(session)) == count_messages(session) == 9
        activity(session, list_messages(session)[0].created_at, timedelta(hours=1))
        assert len(find_people(session, "failed")) == 1
        assert list_suppressed(session).count == 0
        assert not [each for each in verify(session) if each.promise == "guards_in_force"]
    assert migrations.current(engine) == migrations.head()
    [up, *_] = QueueReader(engine).read()
    if up[2] != 1:
        raise PermissionError


WORK = {
    "owner": own,
    "host": host,
    "caller": call,
    "worker": work,
    "pruner": prune,
    "receiver": receive,
    "watcher": watch,
}


@pytest.mark.parametrize("role", ROLES)
def test_the_documented_grants_suffice(stocked, role):
    """Each role does its work with exactly them."""
    WORK[role](stocked.engine_of(role))


@pytest.mark.parametrize("grant", documented(), ids=lambda grant: f"{grant.role}: {grant}")
def test_no_documented_grant_can_be_left_out(stocked, grant):
    """Without any one of them, be it of a single column, something is denied."""
    stocked.revoke(grant)
    try:
        with pytest.raises((DBAPIError, PermissionError)) as denied:
            WORK[grant.role](stocked.engine_of(grant.role))
    finally:
        stocked.grant(grant)

    # Who may not use the schema does not find the table in it.
    assert isinstance(denied.value, PermissionError) or sqlstate(denied.value) in {DENIED, "42P01", "3F000"}


def test_an_endpoint_with_a_hook_needs_the_one_grant_more_that_is_documented(stocked):
    """SELECT of the whole queue, since the function gets the message. Without it nothing is recorded."""
    [more] = re.findall(r"`GRANT SELECT ON (\S+) TO receiver`", DOCUMENT.read_text())
    heard = []
    engine = stocked.engine_of("receiver")
    record = recorder(engine, None, PATIENCE, lambda _, message, status: heard.append((message.user_id, status)))
    with Session(engine) as session:
        receipts = told(session)

    with pytest.raises(DBAPIError) as denied:
        record(receipts)
    assert (sqlstate(denied.value), heard) == (DENIED, [])

    grant = Grant("SELECT", None, more, "receiver")
    stocked.grant(grant)
    try:
        record(receipts)
    finally:
        stocked.revoke(grant)
        for documented_grant in documented():  # REVOKE of the table takes its columns along.
            stocked.grant(documented_grant)
    assert heard == [("doubted", "sent")]


@pytest.mark.parametrize("role", ["host", "caller", "worker", "pruner", "receiver", "watcher"])
def test_nobody_gets_further(stocked, role):
    """Neither a trigger nor a foreign key, no key, no other's content, and no lock but for who may change all."""
    refused = [
        f"CREATE TRIGGER mine BEFORE UPDATE ON {QUEUE} EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        f"DELETE FROM {QUEUE}",
        f"TRUNCATE {QUEUE}",
        f"TRUNCATE {SUPPRESSION}",
        f"TRUNCATE {RECEIPT}",
        f"TRUNCATE {WORKER}",
        f"TRUNCATE {PAUSE}",
        "SELECT setval('app.engagement_message_queue_id_seq', 1)",
    ]
    if role != "caller":
        refused += [f"LOCK {QUEUE}", f"UPDATE {QUEUE} SET idempotency_key = 'x'", f"UPDATE {QUEUE} SET user_id = 'x'"]
    if role in {"host", "pruner"}:
        refused += [f"SELECT message_params FROM {QUEUE}", f"SELECT user_id FROM {QUEUE}"]
    for statement in refused:
        with pytest.raises(DBAPIError) as denied, stocked.engine_of(role).begin() as connection:
            connection.exec_driver_sql(statement)
        assert sqlstate(denied.value) == DENIED, statement
    with stocked.engine_of(role).begin() as connection:
        may_refer = f"SELECT has_any_column_privilege(current_user, '{QUEUE}', 'REFERENCES')"
        assert not connection.exec_driver_sql(may_refer).scalar_one()


@pytest.mark.parametrize("role", ROLES)
def test_with_row_level_security_a_policy_is_all_that_is_added(stocked, role):
    """The documented one; without it nothing is found, and nothing can be queued."""
    policies = re.findall(r"`(CREATE POLICY[^`]*)`", DOCUMENT.read_text())
    for each, name in stocked.names.items():
        policies = [re.sub(rf"(?<=[ ,]){each}(?=[ ,])", name, policy) for policy in policies]
    stocked.as_admin(*(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY" for table in TABLES))
    try:
        if role != "owner":
            with Session(stocked.engine_of(role)) as session:
                assert session.connection().exec_driver_sql(f"SELECT count(id) FROM {QUEUE}").scalar() == 0
        stocked.as_admin(*policies)
        WORK[role](stocked.engine_of(role))
    finally:
        for table in TABLES:
            stocked.as_admin(
                f"DROP POLICY IF EXISTS engagement_ours ON {table}", f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY"
            )
