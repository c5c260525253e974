"""Our migrations, for hosts and the command line.

They keep a history of their own in `engagement_alembic_version`, apart from the host's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from sqlalchemy import Connection, Engine, text

from engagement._columns import ReadableJson, TextOf
from engagement._logging import logger
from engagement._sql import adopting, turns
from engagement._sql.errors import sqlstate
from engagement._sql.own_transactions import SAFE_PATH
from engagement._sql.schemas import find_schema, schema_in_force
from engagement.models import TABLE_NAME, TABLE_NAMES, checked_schema

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext
    from alembic.config import Config

VERSION_TABLE = "engagement_alembic_version"
LOCK_POLL_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 60.0
"""How long another migration is waited for. Each of its steps gives up on its locks after five."""


def script_location() -> Path:
    """Return the folder of the migration scripts: inside an installed package, else in the repository."""
    package = Path(__file__).parent
    shipped = package / "_alembic"
    return shipped if shipped.is_dir() else package.parent / "alembic"


def upgrade(
    bind: Engine | Connection,
    revision: str = "head",
    *,
    schema: str | None = None,
    row_level_security: bool = False,
) -> None:
    """Bring the table to `revision`. Twice is as good as once, and so is from two processes at the same time.

    On an `Engine` this commits; on a `Connection` it runs in its transaction and leaves the commit to the caller. One
    in AUTOCOMMIT, which would keep half of a failed migration, is a `ValueError`. `schema` is created if it does not
    exist. It waits for another migration for a minute at most. Then Alembic's `CommandError` names the session that has
    the lock.

    `row_level_security` leaves our tables to their owner and to roles that bypass it, in spite of all grants to others,
    since there is no policy. Once it is on it stays on.
    """
    from alembic import command
    from alembic.util import CommandError

    with _connected(bind, schema) as (connection, place):
        if adopting.is_anothers(connection, place):
            raise CommandError(f"{TABLE_NAME} is there, and is not ours. See docs/migrations.md, or: engagement adopt")
        config = _config(connection=connection, schema=place, row_level_security=row_level_security)
        command.upgrade(config, revision)


def adopt(bind: Engine | Connection, *, schema: str | None = None) -> int:
    """Take over the messages of an earlier service that has a table of our name; return their number.

    Its keys go on blocking, and messages that it may have sent are in doubt, not sent again (`processing`). Its table
    is moved, as it is, into a new schema `engagement_before`, for you to drop. On an `Engine` this commits; on a
    `Connection` the caller does. Raises Alembic's `CommandError` if there is no such table.
    See docs/decisions.md#2026-11-29--adopt-takes-over-an-earlier-services-table.
    """
    from alembic.util import CommandError

    with _connected(bind, schema) as (connection, place):
        if not adopting.is_anothers(connection, place):
            raise CommandError(f"there is no {TABLE_NAME} of another service to adopt")
        adopting.set_aside(connection, place)
        upgrade(connection, schema=place)
        return adopting.copy(connection, place)


def downgrade(bind: Engine | Connection, revision: str = "base", *, schema: str | None = None) -> None:
    """Take the table back to `revision`. `base` drops it, with all messages and their keys.

    A message that was sent can then be queued, and sent, again (`user123:goodbye:2025-11-21`).
    """
    from alembic import command

    with _connected(bind, schema) as (connection, place):
        command.downgrade(_config(connection=connection, schema=place), revision)


def current(bind: Engine | Connection, *, schema: str | None = None) -> str | None:
    """Return the revision that the database is at (`eng_0001`), or None if it has none of our migrations."""
    from alembic.migration import MigrationContext

    with _connected(bind, schema) as (connection, place):
        options = {"version_table": VERSION_TABLE, "version_table_schema": place}
        return MigrationContext.configure(connection, opts=options).get_current_revision()


def head() -> str:
    """Return the newest revision that this version of the package brings."""
    from alembic.script import ScriptDirectory

    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None
    return revision


def upgrade_sql(
    output: TextIO, revision: str = "head", *, schema: str | None = None, row_level_security: bool = False
) -> None:
    """Write the SQL of an upgrade from nothing to `output`, for databases that only a person may change."""
    from alembic import command

    config = _config(schema=schema, row_level_security=row_level_security, output=output)
    command.upgrade(config, revision, sql=True)


def includes_ours(name: str | None, type_: str, parent_names: Mapping[Any, Any]) -> bool:
    """Be the `include_name` of our own autogenerate: leave out the host's tables."""
    return type_ == "schema" or _is_ours(name, type_, parent_names)


def includes_all_but_ours(name: str | None, type_: str, parent_names: Mapping[Any, Any]) -> bool:
    """Be the `include_name` of a host's autogenerate, which would otherwise propose to drop our tables.

    In its `env.py`: `context.configure(include_name=includes_all_but_ours)`.
    """
    return type_ == "schema" or not _is_ours(name, type_, parent_names)


def render_plain_types(type_: str, item: Any, autogen_context: AutogenContext) -> str | Literal[False]:
    """Be the `render_item` of a host that maps our mixin, so that its migrations hold SQLAlchemy's types only.

    A status is `sa.Text()` there.
    """
    if type_ == "type" and isinstance(item, TextOf):
        return f"{autogen_context.opts['sqlalchemy_module_prefix']}Text()"
    if type_ == "type" and isinstance(item, ReadableJson):
        autogen_context.imports.add("from sqlalchemy.dialects import postgresql")
        return "postgresql.JSONB()"
    return False


def _is_ours(name: str | None, type_: str, parent_names: Mapping[Any, Any]) -> bool:
    table = name if type_ == "table" else parent_names.get("table_name")
    return table in {*TABLE_NAMES, VERSION_TABLE}


def wait_for_turn(connection: Connection, schema: str | None = None) -> None:
    """Let one migration run at a time: take a lock that the end of the transaction gives back.

    It is polled: a session that waits inside `pg_advisory_xact_lock` holds a snapshot, and CREATE INDEX CONCURRENTLY in
    another session would wait for that snapshot without end. Any role that may connect can hold the lock, so after
    `LONGEST_WAIT_SECONDS` this raises Alembic's `CommandError`.
    See docs/decisions.md#2026-11-29--our-advisory-locks-can-be-held-by-anybody-so-nobody-waits-for-them-in-silence.
    """
    from alembic.util import CommandError

    name, began, holders = f"{VERSION_TABLE}:{schema or _place(connection)}", time.monotonic(), None
    while not connection.scalar(turns.take_turn(name)):
        if holders is None:
            holders = [row.pid for row in connection.execute(turns.who_has_turn(name))]
            logger.warning("engagement.migration_waits pids=%s", holders)
        if time.monotonic() - began > LONGEST_WAIT_SECONDS:
            raise CommandError(
                f"another session (process {holders} of the server) has held the lock of our migrations for "
                f"{LONGEST_WAIT_SECONDS:g} s. If it is migrating, try again; else end it with pg_terminate_backend"
            )
        time.sleep(LOCK_POLL_SECONDS)


@contextmanager
def _connected(bind: Engine | Connection, schema: str | None) -> Iterator[tuple[Connection, str | None]]:
    """Hand out a connection of `bind` that translates no schema, and the schema of our table."""
    # docs/decisions.md#2026-11-29--where-a-hosts-engine-sends-what-names-no-schema-there-our-table-is
    schema, translated = schema_in_force(schema, bind), bind.get_execution_options().get("schema_translate_map")
    if isinstance(bind, Engine):
        # An older snapshot would not see the work of the migration that we waited for.
        plain = bind.execution_options(isolation_level="READ COMMITTED", schema_translate_map=None)
        with plain.begin() as connection, _on_a_safe_path(connection, schema) as place:
            yield connection, place
        return
    if getattr(bind.connection.driver_connection, "autocommit", False):
        raise ValueError("connection: is in AUTOCOMMIT, and a migration is one transaction")
    bind.execution_options(schema_translate_map=None)
    try:
        with _on_a_safe_path(bind, schema) as place:
            yield bind, place
    finally:
        bind.execution_options(schema_translate_map=translated)


@contextmanager
def _on_a_safe_path(connection: Connection, schema: str | None) -> Iterator[str | None]:
    """Search `pg_catalog` alone inside the block, then the earlier path again. Hand out the schema of our table.

    If none is given, it is the one in which the search path finds our tables, or would make them. Alembic's queries run
    with the rights of the table's owner, and name operators that a stranger may have made as well.
    See docs/decisions.md#2026-11-29--a-migration-searches-pg_catalog-alone-too.
    """
    place = schema or _place(connection)
    if place is None:
        yield None  # No schema to make a table in: PostgreSQL's error will say so.
        return
    before = connection.scalar(text("SELECT pg_catalog.current_setting('search_path')"))
    set_path = text("SELECT pg_catalog.set_config('search_path', :path, true)")
    connection.execute(set_path, {"path": SAFE_PATH})
    try:
        yield place
    except BaseException as error:
        # Else the transaction is over, or back at a savepoint, and the setting with it.
        if sqlstate(error) is None and not connection.invalidated:
            connection.execute(set_path, {"path": before})
        raise
    connection.execute(set_path, {"path": before})


def _place(connection: Connection) -> str | None:
    found = (find_schema(connection, name) for name in (VERSION_TABLE, TABLE_NAME))
    return next(filter(None, found), None) or connection.scalar(text("SELECT pg_catalog.current_schema()"))


def _config(
    *,
    connection: Connection | None = None,
    schema: str | None = None,
    row_level_security: bool = False,
    output: TextIO | None = None,
) -> Config:
    from alembic.config import Config

    config = Config(output_buffer=output)
    config.set_main_option("script_location", str(script_location()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes.update(
        connection=connection, schema=checked_schema(schema), row_level_security=row_level_security
    )
    return config
