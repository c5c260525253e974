"""Index when messages were sent: how many go out in a minute is counted also while a backlog is being sent."""

from contextlib import contextmanager

from alembic import op

revision = "eng_0008"
down_revision = "eng_0007"
branch_labels = None
depends_on = None

TABLE = "engagement_message_queue"


def schema():
    """Return where the table is, if not on the search path: what env.py gives to `context.configure`, or its engine."""
    context = op.get_context()
    options = {} if context.as_sql else context.connection.get_execution_options()
    translated = (options.get("schema_translate_map") or {}).get(None)
    return context.opts.get("engagement_schema") or translated


def table():
    """Return the table's name as `op.execute` reads it: it doubles a %, and takes a colon for a parameter."""
    return TABLE if schema() is None else '"{}".{}'.format(schema().replace('"', '""').replace(":", "\\:"), TABLE)


@contextmanager
def giving_up_soon():
    """Give up rather than queue behind a long transaction and make everybody wait behind us; then wait as before."""
    # Kept by the server: Python may only be writing SQL for a person.
    op.execute("SELECT set_config('engagement.lock_timeout', current_setting('lock_timeout'), true)")
    op.execute("SET LOCAL lock_timeout = '5s'")
    yield
    op.execute("SELECT set_config('lock_timeout', current_setting('engagement.lock_timeout'), true)")


@giving_up_soon()
def upgrade() -> None:
    # On a large table it is made before, CONCURRENTLY: see docs/migrations.md.
    op.execute(
        f"CREATE INDEX IF NOT EXISTS {TABLE}_sent ON {table()} (sent_at)"
        " WHERE status = 'sent' AND destination_jid IS NOT NULL"
    )


@giving_up_soon()
def downgrade() -> None:
    op.drop_index(f"{TABLE}_sent", TABLE, schema=schema())
