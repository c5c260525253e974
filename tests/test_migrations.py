"""Migrations: up and down, in any schema, from two processes at once, and as SQL."""

import ast
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from conftest import new_message, queue
from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session

from engagement import EngagementMessageRepository, migrations, process_message_queue
from engagement._operating.overview import overview
from engagement._watching.metrics import QueueReader
from engagement.models import TABLE_NAME, TABLE_NAMES, EngagementBase
from engagement.verification import verify

PATIENCE = 60
ROOT = Path(__file__).parent.parent
OURS = {*TABLE_NAMES, migrations.VERSION_TABLE}


def tables(engine: Engine, schema: str | None = None) -> set[str]:
    return set(inspect(engine).get_table_names(schema=schema))


def environment(engine: Engine) -> dict[str, str]:
    url = engine.url.render_as_string(hide_password=False)
    return os.environ | {"ENGAGEMENT_DATABASE_URL": url, "PYTHONPATH": str(ROOT)}


def revisions() -> list[str]:
    """Return all revisions, the first one first."""
    config = Config()
    config.set_main_option("script_location", str(migrations.script_location()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()][::-1]


# Up and down


def test_upgrading_twice_is_as_good_as_once(empty_engine):
    """The first run makes the table and our own version table; the second one finds nothing to do."""
    assert migrations.current(empty_engine) is None

    migrations.upgrade(empty_engine)
    assert tables(empty_engine) == OURS
    queue(empty_engine, new_message())
    migrations.upgrade(empty_engine)

    assert migrations.current(empty_engine) == migrations.head()
    with Session(empty_engine) as session:
        assert EngagementMessageRepository(session).queue_message(new_message()).created is False


def test_every_step_goes_up_down_and_up_again(empty_engine):
    """Each revision can be taken back, wholly, and made again; at the end only an empty version table is left."""

    def described() -> dict[str, list] | None:
        with empty_engine.connect() as connection:
            return catalogue(connection) if TABLE_NAME in tables(empty_engine) else None

    steps = revisions()
    for revision, before in zip(steps, [None, *steps], strict=False):
        was = described()
        migrations.upgrade(empty_engine, revision)
        migrations.downgrade(empty_engine, before or "base")
        assert migrations.current(empty_engine) == before
        assert described() == was
        migrations.upgrade(empty_engine, revision)
        assert migrations.current(empty_engine) == revision
    assert steps[-1] == migrations.head()

    migrations.downgrade(empty_engine)

    assert migrations.current(empty_engine) is None
    assert tables(empty_engine) == {migrations.VERSION_TABLE}
    with empty_engine.connect() as connection:
        left = connection.execute(text("SELECT relname FROM pg_class WHERE relname LIKE 'engagement_message%'")).all()
    assert left == []


def test_a_change_of_a_living_table_does_not_wait_for_ever(empty_engine):
    """Whatever takes a lock that others need sets a lock timeout first, so that nobody queues behind it for long."""
    first, *later = revisions()
    executed = []
    with empty_engine.connect() as connection:
        migrations.upgrade(connection, first)
        event.listen(connection, "before_cursor_execute", lambda _c, _cursor, statement, *_: executed.append(statement))
        for revision in later:
            executed.append("-- a step")
            migrations.upgrade(connection, revision)
        for revision in reversed([None, *revisions()[:-1]]):
            executed.append("-- a step")
            migrations.downgrade(connection, revision or "base")

    for step in "\n".join(executed).split("-- a step")[1:]:
        changes = [
            step.index(word) for word in ("ALTER TABLE", "DROP TABLE", "CREATE INDEX", "DROP INDEX") if word in step
        ]
        assert step.index("SET LOCAL lock_timeout") < min(changes, default=len(step))


def test_the_settings_of_the_table_wait_for_nobody_who_reads_or_writes(empty_engine):
    """A host's open transaction that has queued does not hold up the revision, nor does it wait for that."""
    migrations.upgrade(empty_engine, "eng_0001")
    with Session(empty_engine) as session, session.begin():
        EngagementMessageRepository(session).queue_message(new_message())
        with empty_engine.connect() as connection:
            migrations.upgrade(connection, "eng_0002")
            EngagementMessageRepository(session).queue_message(new_message("other"))
            migrations.downgrade(connection, "eng_0001")


def test_a_new_revision_can_be_written_from_the_template(tmp_path, empty_engine):
    """What `alembic revision` writes can be loaded, run up and down, and read by `history`, as it is."""
    shutil.copytree(ROOT / "alembic", tmp_path / "alembic")
    config = Config(ROOT / "alembic.ini")
    config.set_main_option("script_location", str(tmp_path / "alembic").replace("%", "%%"))
    written = command.revision(config, "another step", rev_id="eng_9999")
    program = ast.parse(Path(written.path).read_text())
    assert ast.get_docstring(program).startswith("another step")

    command.history(config)
    with empty_engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        assert migrations.current(connection) == "eng_9999"
        command.downgrade(config, "base")
        assert migrations.current(connection) is None


def test_our_revisions_are_recognised_among_a_hosts():
    """One line of revisions with ids of our own, under a label of our own, that needs nothing but the libraries."""
    scripts = sorted((ROOT / "alembic" / "versions").glob("*.py"))
    assert len(scripts) == len(revisions())
    for script in scripts:
        tree = ast.parse(script.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}

        assert {name.partition(".")[0] for name in imported} - sys.stdlib_module_names <= {"alembic", "sqlalchemy"}
        assert script.name.startswith("eng_")
    assert all(revision.startswith("eng_") for revision in revisions())
    assert not (ROOT / "alembic" / "__init__.py").exists(), "it would hide the library"


# On an engine, on a connection, in another schema


def settings(connection: Connection) -> dict[str, str]:
    return dict(connection.execute(text("SELECT name, setting FROM pg_settings")).all())


@pytest.mark.parametrize("schema", [None, "guest"])
def test_the_callers_settings_are_as_before(empty_engine, schema):
    """Whatever a step sets in the caller's transaction is set back: each way up, each way down, row-level security."""
    with empty_engine.connect() as connection:
        connection.execute(text("SET LOCAL lock_timeout = '1234ms'"))
        before = settings(connection)
        for revision in revisions():
            migrations.upgrade(connection, revision, schema=schema)
            assert before.items() <= settings(connection).items()
        migrations.upgrade(connection, schema=schema, row_level_security=True)
        assert before.items() <= settings(connection).items()
        for revision in [*revisions()[-2::-1], "base"]:
            migrations.downgrade(connection, revision, schema=schema)
            assert before.items() <= settings(connection).items()


def test_the_sql_sets_back_what_it_sets(empty_engine):
    """A person may run it in a transaction that has more to do."""
    written = io.StringIO()
    migrations.upgrade_sql(written, row_level_security=True)
    script = written.getvalue().removeprefix("BEGIN;").strip().removesuffix("COMMIT;")
    with empty_engine.connect() as connection:
        connection.execute(text("SET LOCAL lock_timeout = '1234ms'"))
        before = settings(connection)
        connection.exec_driver_sql(script.replace("%", "%%"))

        assert before.items() <= settings(connection).items()


def test_on_a_connection_the_caller_commits(empty_engine):
    """What runs in the caller's transaction is gone after a rollback, and there after a commit."""
    with empty_engine.connect() as connection:
        migrations.upgrade(connection)
        assert migrations.current(connection) == migrations.head()
        connection.rollback()
    assert tables(empty_engine) == set()

    with empty_engine.connect() as connection:
        migrations.upgrade(connection)
        connection.commit()
        migrations.downgrade(connection)
        assert migrations.current(connection) is None
        connection.rollback()
    assert migrations.current(empty_engine) == migrations.head()


def test_in_another_schema(empty_engine):
    """With `schema=` the schema is made, everything is in it, and what is elsewhere is left alone."""
    migrations.upgrade(empty_engine)
    migrations.upgrade(empty_engine, schema="guest")

    assert tables(empty_engine, "guest") == OURS
    assert migrations.current(empty_engine, schema="guest") == migrations.head()
    migrations.downgrade(empty_engine)
    migrations.upgrade(empty_engine, schema="guest")
    assert tables(empty_engine) == {migrations.VERSION_TABLE}
    assert migrations.current(empty_engine) is None
    assert tables(empty_engine, "guest") == OURS

    migrations.downgrade(empty_engine, schema="guest")
    assert tables(empty_engine, "guest") == {migrations.VERSION_TABLE}


@pytest.fixture(name="owner_of_a_schema")
def _owner_of_a_schema(empty_engine):
    """An engine whose transactions are those of a role that owns the schema `guest`, and may create no other one."""
    role = f"{empty_engine.url.database}_guest"
    with empty_engine.begin() as connection:
        if not connection.scalar(text("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")):
            pytest.skip("only a superuser can make roles")
        connection.execute(text(f"CREATE ROLE {role} NOLOGIN"))
        connection.execute(text(f"CREATE SCHEMA guest AUTHORIZATION {role}"))
    engine = create_engine(empty_engine.url)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(f"SET LOCAL ROLE {role}"))
    yield engine
    engine.dispose()
    with empty_engine.begin() as connection:
        connection.execute(text(f"DROP OWNED BY {role} CASCADE"))
        connection.execute(text(f"DROP ROLE {role}"))


def test_a_schema_that_is_there_needs_no_right_to_make_one(owner_of_a_schema):
    """Even in vain, CREATE SCHEMA asks for a right on the whole database, the second time too."""
    for _ in range(2):
        migrations.upgrade(owner_of_a_schema, schema="guest")

    assert tables(owner_of_a_schema, "guest") == OURS
    with pytest.raises(ProgrammingError, match="permission denied for database"):
        migrations.upgrade(owner_of_a_schema, schema="another")


def test_the_sql_looks_for_the_schema_too(owner_of_a_schema):
    """A person who owns the schema can run it."""
    written = io.StringIO()
    migrations.upgrade_sql(written, schema="guest")
    with owner_of_a_schema.begin() as connection:
        script = written.getvalue().removeprefix("BEGIN;").strip().removesuffix("COMMIT;")
        connection.exec_driver_sql(script.replace("%", "%%"))

    assert tables(owner_of_a_schema, "guest") == OURS


@pytest.mark.parametrize("schema", ["it's :mine, 100 %", 'a "b" :c', "$$ \\"])
@pytest.mark.parametrize("by", ["upgrade", "the SQL"])
def test_a_schema_may_have_any_name(empty_engine, schema, by):
    """Whatever it has to be quoted for."""
    if by == "upgrade":
        migrations.upgrade(empty_engine, schema=schema, row_level_security=True)
    else:
        written = io.StringIO()
        migrations.upgrade_sql(written, schema=schema, row_level_security=True)
        with empty_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(written.getvalue().replace("%", "%%"))

    assert tables(empty_engine, schema) == OURS
    assert migrations.current(empty_engine, schema=schema) == migrations.head()
    migrations.downgrade(empty_engine, schema=schema)


# On an engine that translates schemas


@pytest.fixture(name="tenant")
def _tenant(empty_engine):
    """An engine of a host with a schema for each tenant: what names no schema is this one's."""
    with empty_engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA tenant"))
    return empty_engine.execution_options(schema_translate_map={None: "tenant", "guest": "elsewhere"})


def test_an_engine_that_translates_schemas_says_where_the_table_is(empty_engine, tenant):
    """All that we do on it speaks of one table: where the repository and the worker look for it."""
    migrations.upgrade(tenant, "eng_0001")
    migrations.upgrade(tenant, row_level_security=True)

    assert (tables(empty_engine), tables(empty_engine, "tenant")) == (set(), OURS)
    assert migrations.current(tenant) == migrations.head()
    assert migrations.current(empty_engine) is None
    queue(tenant, new_message("one"), new_message("two"))
    assert process_message_queue(tenant, lambda _: None, limit=1).succeeded == 1
    with Session(tenant) as session:
        assert verify(session) == []
        assert overview(session, count_up_to=10).by_status["pending"] == 1
    samples = {(metric.name, tuple(labels.values())): value for metric, labels, value in QueueReader(tenant).read()}
    assert samples["engagement.up", ()] == 1

    with empty_engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE tenant.{TABLE_NAME} DROP CONSTRAINT {TABLE_NAME}_status_known"))
    with Session(tenant) as session:
        assert [violation.promise for violation in verify(session)] == ["guards_in_force"]
    migrations.downgrade(tenant)
    assert tables(empty_engine, "tenant") == {migrations.VERSION_TABLE}


def test_a_schema_that_is_named_is_not_translated(empty_engine, tenant):
    """`schema=` is a schema of the database, as it is for the repository."""
    migrations.upgrade(tenant, schema="guest")

    assert tables(empty_engine, "guest") == OURS
    assert migrations.current(tenant, schema="guest") == migrations.head()


def test_a_connection_that_translates_schemas_goes_on_doing_so(empty_engine, tenant):
    """In the caller's transaction too, and what the caller has set on its connection stays."""
    with tenant.connect() as connection:
        migrations.upgrade(connection)
        assert connection.get_execution_options()["schema_translate_map"][None] == "tenant"
        assert migrations.current(connection) == migrations.head()
        connection.commit()

    assert tables(empty_engine, "tenant") == OURS


def test_the_indexes_of_a_large_table_may_be_made_before(empty_engine):
    """By the statements of docs/migrations.md: the revisions find them, and the table is as any other."""
    migrations.upgrade(empty_engine)
    with empty_engine.connect() as connection:
        usual = catalogue(connection)
    migrations.downgrade(empty_engine, "eng_0004")
    statements = re.findall(r"CREATE INDEX CONCURRENTLY[^`;]*", (ROOT / "docs" / "migrations.md").read_text())
    with empty_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in statements:
            connection.execute(text(statement))

    migrations.upgrade(empty_engine)

    with empty_engine.connect() as connection:
        assert catalogue(connection) == usual


# As SQL, and by Alembic's own command


@pytest.mark.parametrize("schema", [None, "guest"])
def test_the_sql_makes_the_same_on_an_empty_database(empty_engine, schema):
    """What `upgrade_sql` writes can be run by a person, and leads to where `upgrade` leads."""
    written = io.StringIO()
    migrations.upgrade_sql(written, schema=schema)

    with empty_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(written.getvalue())
        by_sql = catalogue(connection, schema)
    assert migrations.current(empty_engine, schema=schema) == migrations.head()
    migrations.downgrade(empty_engine, schema=schema)
    migrations.upgrade(empty_engine, schema=schema)

    with empty_engine.connect() as connection:
        assert catalogue(connection, schema) == by_sql


def alembic(engine: Engine, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=ROOT,
        env=environment(engine),
        capture_output=True,
        text=True,
        check=False,
    )


def test_alembics_own_command_works_in_the_repository(empty_engine):
    """`alembic upgrade head` and `alembic check` run as they stand, and a host's tables are none of their business."""
    with empty_engine.begin() as connection:
        connection.execute(text("CREATE TABLE customers (id integer PRIMARY KEY)"))

    upgrade, check = alembic(empty_engine, "upgrade", "head"), alembic(empty_engine, "check")

    assert (upgrade.returncode, check.returncode) == (0, 0), upgrade.stderr + check.stderr
    assert "No new upgrade operations detected" in check.stdout
    assert migrations.current(empty_engine) == migrations.head()
    assert tables(empty_engine) == {*OURS, "customers"}


def test_alembics_command_asks_for_a_database():
    """Without a URL it says what to set, and shows no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "upgrade", "head"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "ENGAGEMENT_DATABASE_URL"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode != 0
    assert "ENGAGEMENT_DATABASE_URL" in done.stderr
    assert "Traceback" not in done.stderr


# Models and migrations


def catalogue(connection: Connection, schema: str | None = None, table: str = TABLE_NAME) -> dict[str, list]:
    """Return what PostgreSQL knows of our table: columns, constraints, indexes and sequence, in its own words."""
    name = f"{schema or 'public'}.{table}"
    queries = {
        "columns": "SELECT attname, format_type(atttypid, atttypmod), attnotnull, attidentity, attgenerated,"
        " pg_get_expr(adbin, adrelid), collname"
        " FROM pg_attribute LEFT JOIN pg_attrdef ON (adrelid, adnum) = (attrelid, attnum)"
        " LEFT JOIN pg_collation AS c ON c.oid = attcollation"
        " WHERE attrelid = CAST(:name AS regclass) AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
        "constraints": "SELECT conname, contype, convalidated, condeferrable, pg_get_constraintdef(oid)"
        " FROM pg_constraint WHERE conrelid = CAST(:name AS regclass) AND contype <> 'n' ORDER BY conname",
        "indexes": "SELECT relname, indisvalid, indisunique, pg_get_indexdef(indexrelid),"
        " pg_get_expr(indpred, indrelid), reloptions"
        " FROM pg_index JOIN pg_class AS c ON c.oid = indexrelid"
        " WHERE indrelid = CAST(:name AS regclass) ORDER BY relname",
        "sequence": "SELECT pg_get_serial_sequence(:name, 'id'), format_type(seqtypid, NULL), seqmax, seqincrement,"
        " seqcache, seqcycle FROM pg_sequence WHERE seqrelid = CAST(pg_get_serial_sequence(:name, 'id') AS regclass)",
        "table": "SELECT relpersistence, reloptions, obj_description(oid) FROM pg_class"
        " WHERE oid = CAST(:name AS regclass)",
    }
    if table != TABLE_NAME:
        del queries["sequence"]  # Only messages are numbered.
    return {what: connection.execute(text(query), {"name": name}).all() for what, query in queries.items()}


@pytest.mark.parametrize("table", TABLE_NAMES)
def test_the_migrations_make_what_the_models_say(empty_engine, table):
    """Down to defaults, collations, CHECKs, index predicates and the sequence, the two make the same table."""
    with empty_engine.connect() as connection:
        EngagementBase.metadata.create_all(connection)
        by_models = catalogue(connection, table=table)
        connection.rollback()
        migrations.upgrade(connection)
        by_migrations = catalogue(connection, table=table)

    for what, described in by_models.items():
        assert described
        assert described == by_migrations[what], what


def test_the_id_comes_from_a_sequence(empty_engine):
    """It is no identity column, which a distributed table could not have, and a bigint, since duplicates leave gaps."""
    migrations.upgrade(empty_engine)
    with empty_engine.connect() as connection:
        found = catalogue(connection)

    assert found["columns"][0][:4] == ("id", "bigint", True, "")
    assert found["sequence"][0][1] == "bigint"


def test_all_names_are_recognised_as_ours(empty_engine):
    """Tables, constraints, indexes and the sequence begin with our name: we are guests in the host's database."""
    migrations.upgrade(empty_engine)
    with empty_engine.connect() as connection:
        names = connection.execute(
            text(
                "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
                " UNION SELECT conname FROM pg_constraint WHERE connamespace = 'public'::regnamespace"
            )
        ).scalars()

        assert {name for name in names if not name.startswith("engagement_")} == set()
