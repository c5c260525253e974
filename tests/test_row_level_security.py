"""Row-level security as an opt-in of `upgrade`, with roles like Supabase's: what was granted to them is no key."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import new_message
from seen import a_worker
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session

from engagement import EngagementMessageRepository, Pauses, Receipt, SuppressionList, migrations, process_message_queue
from engagement._operating.suppressed import list_suppressed
from engagement.models import TABLE_NAMES
from engagement.policies import Suppression
from engagement.verification import verify

TABLES = sorted([*TABLE_NAMES, migrations.VERSION_TABLE])
REPOSITORY = Path(__file__).parent.parent
DOCUMENTATION = (REPOSITORY / "docs" / "migrations.md").read_text()


@dataclass
class Project:
    """A database as Supabase sets it up: what its owner creates in `public` is granted to the public roles too."""

    admin: Engine
    roles: dict[str, str]

    @contextmanager
    def acting_as(self, role: str) -> Iterator[Engine]:
        """Hand out an engine whose transactions are the role's, as PostgREST does it."""
        engine = create_engine(self.admin.url)

        @event.listens_for(engine, "begin")
        def become(connection) -> None:
            connection.exec_driver_sql(f"SET LOCAL ROLE {self.roles[role]}")

        try:
            yield engine
        finally:
            engine.dispose()

    def as_written(self, statement: str) -> str:
        """Return a statement of the documentation with this database's names of the roles."""
        for role, name in self.roles.items():
            statement = re.sub(rf"\b{role}\b", name, statement)
        return statement


@pytest.fixture(name="project")
def _project(empty_engine) -> Iterator[Project]:
    # Roles belong to the whole server, which other tests use at the same time.
    database = empty_engine.url.database
    attributes = {"owner": "", "anon": "", "authenticated": "", "service_role": "BYPASSRLS", "worker": ""}
    roles = {role: f"{database}_{role}" for role in attributes}
    public = f"{roles['anon']}, {roles['authenticated']}, {roles['service_role']}"
    with empty_engine.begin() as connection:
        if not connection.scalar(text("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")):
            pytest.skip("only a superuser can make roles like Supabase's")
        for role, name in roles.items():
            connection.execute(text(f"CREATE ROLE {name} NOLOGIN {attributes[role]}"))
        connection.execute(text(f"GRANT ALL ON SCHEMA public TO {roles['owner']}"))
        connection.execute(text(f"GRANT CREATE ON DATABASE {database} TO {roles['owner']}"))
        connection.execute(text(f"GRANT USAGE ON SCHEMA public TO {public}, {roles['worker']}"))
        for kind in ("TABLES", "SEQUENCES"):
            connection.execute(
                text(f"ALTER DEFAULT PRIVILEGES FOR ROLE {roles['owner']} GRANT ALL ON {kind} TO {public}")
            )
    yield Project(empty_engine, roles)
    with empty_engine.begin() as connection:
        for name in roles.values():
            connection.execute(text(f"DROP OWNED BY {name} CASCADE"))
            connection.execute(text(f"DROP ROLE {name}"))


@pytest.fixture(name="closed")
def _closed(project) -> Project:
    """A project whose tables were made with row-level security, with one message in the queue."""
    with project.acting_as("owner") as engine:
        migrations.upgrade(engine, row_level_security=True)
        assert queue_as(engine, "user1")
        with Session(engine) as session, session.begin():
            SuppressionList(session).suppress("5511999990001@s.whatsapp.net", "answered STOP")
            early = Receipt(event="read", at=datetime.now(UTC), provider="waha", provider_message_id="early")
            EngagementMessageRepository(session).record_receipts([early])
            session.execute(a_worker(run="00000001"))
            Pauses(session).pause("wrong wording", message_type="campaign")
    return project


def queue_as(engine: Engine, user_id: str) -> bool:
    with Session(engine) as session, session.begin():
        return EngagementMessageRepository(session).queue_message(new_message(user_id)).created


def is_on(engine: Engine, schema: str = "public") -> dict[str, bool]:
    question = text(
        "SELECT relname, relrowsecurity FROM pg_class WHERE relname = ANY(:tables) AND relnamespace = "
        "CAST(CAST(:schema AS text) AS regnamespace)"
    )
    with engine.connect() as connection:
        return dict(connection.execute(question, {"tables": TABLES, "schema": schema}).all())


def change(engine: Engine, statement: str) -> int:
    with engine.begin() as connection:
        return connection.execute(text(statement)).rowcount


def count(engine: Engine, table: str) -> int:
    with engine.connect() as connection:
        return connection.scalar(text(f"SELECT count(*) FROM {table}"))


@pytest.mark.parametrize("role", ["anon", "authenticated"])
def test_public_roles_see_and_change_nothing(closed, role):
    """All was granted to them, and yet there is no row to read, change or delete, and none can be added."""
    with closed.acting_as(role) as engine:
        for table in TABLES:
            privileges = f"has_table_privilege('{table}', 'SELECT') AND has_table_privilege('{table}', 'INSERT')"
            assert change(engine, f"SELECT WHERE {privileges}") == 1, table
            assert count(engine, table) == 0
            assert change(engine, f"DELETE FROM {table}") == 0
        assert change(engine, "UPDATE engagement_message_queue SET user_id = 'x'") == 0
        with pytest.raises(ProgrammingError, match="row-level security"):
            queue_as(engine, "user2")
        with pytest.raises(ProgrammingError, match="row-level security"):
            change(engine, "INSERT INTO engagement_alembic_version VALUES ('eng_9999')")
        assert process_message_queue(engine, lambda _: None).processed == 0

    assert [count(closed.admin, table) for table in TABLES] == [1] * len(TABLES)


@pytest.mark.parametrize("role", ["service_role", "owner"])
def test_the_service_role_and_the_owner_queue_and_send(closed, role):
    """Who bypasses row-level security, or owns the table, works as ever."""
    with closed.acting_as(role) as engine:
        assert queue_as(engine, "user2")
        assert not queue_as(engine, "user2")
        assert process_message_queue(engine, lambda _: None).succeeded == 2
        with Session(engine) as session, session.begin():
            assert EngagementMessageRepository(session).forget_user("user1").blanked == 1


def test_it_is_an_opt_in(project):
    """Without it what was granted holds: that is what most hosts want of their own roles."""
    with project.acting_as("owner") as engine:
        migrations.upgrade(engine)
        queue_as(engine, "user1")
    with project.acting_as("anon") as engine:
        assert count(engine, "engagement_message_queue") == 1

    assert is_on(project.admin) == dict.fromkeys(TABLES, False)


def test_it_can_come_later_and_stays(project):
    """A table that is in use is closed by the next upgrade that asks for it, and not opened by one that does not."""
    with project.acting_as("owner") as engine:
        migrations.upgrade(engine)
        migrations.upgrade(engine, row_level_security=True)
        assert is_on(project.admin) == dict.fromkeys(TABLES, True)
        migrations.upgrade(engine)

    assert is_on(project.admin) == dict.fromkeys(TABLES, True)


def test_the_second_time_nobody_waits(closed):
    """An upgrade that finds it on takes no lock that a reader's open transaction could hold up."""
    with closed.admin.connect() as reader, closed.acting_as("owner") as engine:
        reader.execute(text("SELECT FROM engagement_message_queue"))
        with engine.begin() as connection:
            connection.execute(text("SET LOCAL lock_timeout = '100ms'"))
            migrations.upgrade(connection, row_level_security=True)


def test_a_schema_is_closed_too(project):
    """`schema=` and `row_level_security=` go together, whatever the schema's name has to be quoted for."""
    with project.acting_as("owner") as engine:
        migrations.upgrade(engine, schema='Messages of "ours", 100 %', row_level_security=True)

    assert is_on(project.admin, '"Messages of ""ours"", 100 %"') == dict.fromkeys(TABLES, True)


def test_the_sql_for_a_person_says_so_too(project):
    """What `upgrade_sql` writes closes the tables in the transaction that makes them, and gives up on a busy one."""
    open_script, script = io.StringIO(), io.StringIO()
    migrations.upgrade_sql(open_script)
    migrations.upgrade_sql(script, row_level_security=True)
    statements = [statement.strip() for statement in script.getvalue().split(";\n")]
    begin, *between, commit, _ = statements
    with project.acting_as("owner") as engine, engine.begin() as connection:
        for statement in between:
            connection.exec_driver_sql(statement)

    assert is_on(project.admin) == dict.fromkeys(TABLES, True)
    assert (begin, commit) == ("BEGIN", "COMMIT")
    enabled = [
        number
        for number, statement in enumerate(between)
        if statement.startswith("ALTER TABLE") and "ROW LEVEL SECURITY" in statement
    ]
    assert len(enabled) == len(TABLES)
    assert between[enabled[0] - 1] == "SET LOCAL lock_timeout = '5s'"
    assert "\nALTER TABLE IF EXISTS" not in open_script.getvalue()


def test_a_table_that_comes_later_is_as_closed_as_the_queue(project):
    """What a later revision makes is closed where the queue is, though nobody asks for it again; and only there."""
    with project.acting_as("owner") as engine:
        migrations.upgrade(engine, "eng_0006", row_level_security=True)
        migrations.upgrade(engine)
        assert is_on(project.admin) == dict.fromkeys(TABLES, True)

        migrations.downgrade(engine)
        migrations.upgrade(engine)
    assert not any(is_on(project.admin)[table] for table in TABLE_NAMES)


@pytest.mark.parametrize(
    "command", ["engagement upgrade --row-level-security", "alembic -x row_level_security=on upgrade head"]
)
def test_both_commands_take_it_as_an_option(project, command):
    """The commands of the documentation, in the repository, say the same."""
    url = project.admin.url.render_as_string(hide_password=False)
    program, *arguments = command.split()
    start = {"alembic": ["-m", "alembic"], "engagement": ["-c", "from engagement.cli import main; main()"]}[program]

    environment = os.environ | {"ENGAGEMENT_DATABASE_URL": url}
    subprocess.run([sys.executable, *start, *arguments], cwd=REPOSITORY, env=environment, timeout=60, check=True)

    assert command in " ".join(DOCUMENTATION.split())
    assert is_on(project.admin) == dict.fromkeys(TABLES, True)


# What the documentation says beside it


def documented(word: str) -> list[str]:
    """Return the statements of the block of SQL in docs/migrations.md that `word` is in."""
    (block,) = (block for block in re.findall(r"```sql\n(.*?)```", DOCUMENTATION, re.DOTALL) if word in block)
    return [statement.strip() for statement in block.split(";") if statement.strip()]


def test_what_row_level_security_does_not_cover_can_be_revoked(closed):
    """What asks for a privilege only, the documented REVOKE takes away, and the service role keeps working."""
    attempts = [
        "TRUNCATE engagement_message_queue",
        "LOCK engagement_message_queue",
        *(
            f"CREATE TRIGGER mine BEFORE UPDATE ON {name} EXECUTE FUNCTION suppress_redundant_updates_trigger()"
            for name in TABLES
        ),
        "SELECT setval('engagement_message_queue_id_seq', 1)",
    ]
    with closed.acting_as("anon") as engine, engine.connect() as connection:
        for attempt in attempts:
            connection.execute(text(attempt))
            connection.rollback()

    with closed.acting_as("owner") as engine:
        for statement in documented("REVOKE"):
            change(engine, closed.as_written(statement))

    for role in ("anon", "authenticated"):
        with closed.acting_as(role) as engine:
            for attempt in attempts:
                with pytest.raises(ProgrammingError, match="permission denied"):
                    change(engine, attempt)
    with closed.acting_as("service_role") as engine:
        assert process_message_queue(engine, lambda _: None).succeeded == 1


def test_a_role_of_the_hosts_own_gets_a_policy(closed):
    """A worker that neither owns the table nor bypasses its security sees nothing before the documented policy."""
    with closed.acting_as("owner") as engine:
        statements = documented("CREATE POLICY")
        policy = [statement for statement in statements if statement.startswith("CREATE POLICY")]
        for grant in statements:
            if grant not in policy:
                change(engine, closed.as_written(grant))
    with closed.acting_as("worker") as engine:
        assert process_message_queue(engine, lambda _: None).processed == 0

    with closed.acting_as("owner") as engine:
        for statement in policy:
            change(engine, closed.as_written(statement))
    with closed.acting_as("worker") as engine:
        assert queue_as(engine, "user2")
        assert process_message_queue(engine, lambda _: None).succeeded == 2
    with closed.acting_as("anon") as engine:
        assert count(engine, "engagement_message_queue") == 0


# A list that is hidden looks empty, and an empty one lets everything pass


GIVEN = "5511999990001@s.whatsapp.net"


@pytest.fixture(name="half_open")
def _half_open(closed) -> Project:
    """The documented grants and policies of a worker, but for the policy that shows it the suppression list."""
    with closed.acting_as("owner") as engine:
        for statement in documented("CREATE POLICY"):
            if not ("POLICY" in statement and "engagement_suppression" in statement):
                change(engine, closed.as_written(statement))
        with Session(engine) as session, session.begin():
            EngagementMessageRepository(session).queue_message(new_message("stopped", destination_jid=GIVEN))
    return closed


def shown(project: Project, policy: str) -> None:
    with project.acting_as("owner") as engine:
        change(engine, project.as_written(f"CREATE POLICY mine ON engagement_suppression {policy}"))


@pytest.mark.parametrize(
    "policy", [None, "FOR INSERT TO worker WITH CHECK (true)", "TO anon USING (true)", "AS RESTRICTIVE USING (true)"]
)
def test_a_hidden_suppression_list_lets_nothing_pass(half_open, policy):
    """Without a policy that lets the worker's role read it, nothing is sent, to whomever, and the reason is kept."""
    if policy:
        shown(half_open, policy)
    sent = []
    with half_open.acting_as("worker") as engine:
        result = process_message_queue(engine, Suppression(sent.append, engine))

    assert (sent, result.succeeded, result.retried) == ([], 0, 2)
    with half_open.admin.connect() as connection:
        reasons = set(connection.scalars(text("SELECT error_message FROM engagement_message_queue")))
    assert reasons == {"Suppression raised ListIsHidden"}


@pytest.mark.parametrize("policy", ["TO worker USING (true)", "FOR SELECT TO worker USING (true)", "USING (true)"])
def test_a_policy_opens_the_suppression_list(half_open, policy):
    """To the role itself or to all: the address on it gets nothing, the other one its message."""
    shown(half_open, policy)
    sent = []
    with half_open.acting_as("worker") as engine:
        result = process_message_queue(engine, Suppression(sent.append, engine))

    assert [message.user_id for message in sent] == ["user1"]
    assert (result.succeeded, result.cancelled) == (1, 1)


def test_a_policy_of_a_group_counts_for_its_members(half_open):
    """As PostgreSQL has it: who has the privileges of the policy's role."""
    half_open.admin.dispose()
    change(half_open.admin, half_open.as_written("GRANT authenticated TO worker"))
    shown(half_open, "TO authenticated USING (true)")
    with half_open.acting_as("worker") as engine, Session(engine) as session:
        assert SuppressionList(session).find(GIVEN).reason == "answered STOP"


def test_nobody_is_told_that_a_hidden_list_is_empty(half_open):
    """A look-up, a removal and the list say that they cannot know."""
    with half_open.acting_as("owner") as engine:
        change(engine, half_open.as_written("GRANT SELECT, DELETE ON engagement_suppression TO worker"))
    with half_open.acting_as("worker") as engine, Session(engine) as session:
        for ask in (SuppressionList(session).find, SuppressionList(session).unsuppress):
            with pytest.raises(RuntimeError, match="row-level security hides the suppression list from this role"):
                ask(GIVEN)
        with pytest.raises(RuntimeError, match="needs a policy"):
            list_suppressed(session)


def test_verify_names_a_table_that_is_hidden(half_open):
    """To a role that sees no row, each promise would look kept."""

    def hidden(role: str) -> list[str]:
        with half_open.acting_as(role) as engine, Session(engine) as session:
            found = [each for each in verify(session) if each.promise == "rows_visible"]
        assert {each.message_id for each in found} <= {None}
        return [name for each in found for name in TABLE_NAMES if f" hides {name} " in each.problem]

    assert hidden("anon") == list(TABLE_NAMES)
    assert "engagement_suppression" in hidden("worker")
    assert "engagement_message_queue" not in hidden("worker")
    assert hidden("owner") == hidden("service_role") == []


def test_the_command_says_that_the_list_is_hidden(half_open, run):
    """On one line with status 3, and not as an empty list or an address that is not on it."""
    with half_open.acting_as("owner") as engine:
        change(engine, half_open.as_written("GRANT DELETE ON engagement_suppression TO worker"))
    url = half_open.admin.url.update_query_dict({"options": f"-c role={half_open.roles['worker']}"})
    for command in (["suppressed"], ["suppressed", GIVEN], ["unsuppress", GIVEN]):
        ran = run(*command, "--database-url", url.render_as_string(hide_password=False))
        assert (ran.status, ran.out, ran.err.count("\n")) == (3, "", 1), command
        assert "row-level security hides the suppression list" in ran.err
