"""Let autovacuum come when a fiftieth of the table is dead, not a fifth: each message leaves two dead rows."""

from contextlib import contextmanager

from alembic import op

revision = "eng_0002"
down_revision = "eng_0001"
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
    # It does not wait for who reads or writes, but for a vacuum or another change of the table.
    op.execute(f"ALTER TABLE {table()} SET (autovacuum_vacuum_scale_factor = 0.02)")


@giving_up_soon()
def downgrade() -> None:
    op.execute(f"ALTER TABLE {table()} RESET (autovacuum_vacuum_scale_factor)")
