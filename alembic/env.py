"""Runs our migrations: on a connection that somebody passes, on a URL, or as SQL text.

What is passed comes in `config.attributes`: `connection`, and `schema` for a table that is not on the search path.
"""

import logging.config
import os

from alembic import context
from sqlalchemy import create_engine, pool
from sqlalchemy.schema import CreateSchema

from engagement.migrations import VERSION_TABLE, includes_ours, wait_for_turn
from engagement.models import EngagementBase

config = context.config
schema = config.attributes.get("schema") or context.get_x_argument(as_dictionary=True).get("schema")
options = {
    "target_metadata": EngagementBase.metadata,
    "version_table": VERSION_TABLE,
    "version_table_schema": schema,
    "include_name": includes_ours,
}


def database_url() -> str:
    """Return where to run: `-x url=…`, else ENGAGEMENT_DATABASE_URL."""
    url = context.get_x_argument(as_dictionary=True).get("url") or os.environ.get("ENGAGEMENT_DATABASE_URL")
    if not url:
        raise SystemExit("Set ENGAGEMENT_DATABASE_URL, or pass -x url=postgresql+psycopg://…")
    return url


def run_offline() -> None:
    """Print the SQL."""
    context.configure(dialect_name="postgresql", literal_binds=True, dialect_opts={"paramstyle": "named"}, **options)
    run()


def run_online(connection) -> None:
    """Run on `connection`; its transaction, if it has one, stays the caller's."""
    wait_for_turn(connection, schema)
    context.configure(connection=connection, **options)
    run()


def run():
    """Run the migrations, in the schema that was asked for."""
    with context.begin_transaction():
        if schema is not None:
            context.execute(CreateSchema(schema, if_not_exists=True))
        context.run_migrations()


if config.config_file_name is not None:
    logging.config.fileConfig(config.config_file_name, disable_existing_loggers=False)

if context.is_offline_mode():
    run_offline()
elif (given := config.attributes.get("connection")) is not None:
    run_online(given)
else:
    engine = create_engine(database_url(), poolclass=pool.NullPool)
    with engine.connect() as connection:
        run_online(connection)
        connection.commit()
    engine.dispose()
