"""Runs our migrations: on a connection that somebody passes, on a URL, or as SQL text.

What is passed comes in `config.attributes`: `connection`, `schema` for a table that is not on the search path, and
`row_level_security`; the last two also as `-x schema=…` and `-x row_level_security=on`.
"""

import logging.config
import os
from contextlib import contextmanager

from alembic import context
from sqlalchemy import TextClause, create_engine, pool, text

from engagement.migrations import VERSION_TABLE, includes_ours, wait_for_turn
from engagement.models import TABLE_NAMES, EngagementBase, checked_schema, qualified_name

config = context.config
given = context.get_x_argument(as_dictionary=True)
schema = checked_schema(config.attributes.get("schema") or given.get("schema"))
row_level_security = config.attributes.get("row_level_security") or given.get("row_level_security") == "on"
options = {
    "target_metadata": EngagementBase.metadata,
    "version_table": VERSION_TABLE,
    "version_table_schema": schema,
    # For the scripts. They run in hosts' environments too, where the version table is not ours and lies elsewhere.
    "engagement_schema": schema,
    "include_name": includes_ours,
}


def database_url() -> str:
    """Return where to run: `-x url=…`, else ENGAGEMENT_DATABASE_URL."""
    url = given.get("url") or os.environ.get("ENGAGEMENT_DATABASE_URL")
    if not url:
        raise SystemExit("Set ENGAGEMENT_DATABASE_URL, or pass -x url=postgresql+psycopg://…")
    return url


def run() -> None:
    """Migrate and, if that is wanted, close the tables before anybody has seen them."""
    with context.begin_transaction():
        if schema is not None:
            create_schema_if_missing()
        context.run_migrations()
        if row_level_security:
            enable_row_level_security(context.get_context())


def create_schema_if_missing() -> None:
    """Look first: even in vain, CREATE SCHEMA asks for a right on the whole database."""
    name, word = schema.replace('"', '""'), schema.replace("'", "''")
    context.execute(
        literally(
            f"DO $engagement$ BEGIN IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = '{word}') "
            f'THEN CREATE SCHEMA "{name}"; END IF; END $engagement$'
        )
    )


def literally(sql: str) -> TextClause:
    """Return SQL in which no colon names a parameter."""
    return text(sql.replace(":", r"\:"))


@contextmanager
def giving_up_soon():
    """Give up rather than queue behind a long transaction and make everybody wait behind us; then wait as before."""
    # Kept by the server: Python may only be writing SQL for a person.
    context.execute("SELECT set_config('engagement.lock_timeout', current_setting('lock_timeout'), true)")
    context.execute("SET LOCAL lock_timeout = '5s'")
    yield
    context.execute("SELECT set_config('lock_timeout', current_setting('engagement.lock_timeout'), true)")


@giving_up_soon()
def enable_row_level_security(migration) -> None:
    """Leave our tables to their owner and to the roles that bypass it: there is no policy for anybody else."""
    is_on = text("SELECT relrowsecurity FROM pg_class WHERE oid = to_regclass(:table)")
    for name in (*TABLE_NAMES, VERSION_TABLE):
        table = qualified_name(schema, name)
        # Even in vain, ALTER TABLE would make everybody wait for every open transaction.
        if migration.as_sql or not migration.connection.scalar(is_on, {"table": table}):
            # An earlier revision has not all of them.
            context.execute(literally(f"ALTER TABLE IF EXISTS {table} ENABLE ROW LEVEL SECURITY"))


def run_offline() -> None:
    """Print the SQL."""
    context.configure(dialect_name="postgresql", literal_binds=True, dialect_opts={"paramstyle": "named"}, **options)
    run()


def run_online(connection) -> None:
    """Run on `connection`; its transaction, if it has one, stays the caller's."""
    wait_for_turn(connection, schema)
    context.configure(connection=connection, **options)
    run()


if config.config_file_name is not None:
    logging.config.fileConfig(config.config_file_name, disable_existing_loggers=False)

if context.is_offline_mode():
    run_offline()
elif (connection := config.attributes.get("connection")) is not None:
    run_online(connection)
else:
    engine = create_engine(database_url(), poolclass=pool.NullPool)
    with engine.connect() as connection:
        run_online(connection)
        connection.commit()
    engine.dispose()
