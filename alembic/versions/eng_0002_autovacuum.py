"""Let autovacuum come when a fiftieth of the table is dead, not a fifth: each message leaves two dead rows."""

from contextlib import contextmanager

from alembic import op

revision = "eng_0002"
down_revision = "eng_0001"
branch_labels = None
depends_on = None

TABLE = "engagement_message_queue"


def table():
    """Return the table's name as SQL has it. SQLAlchemy's quoting doubles a %, and `op.execute` would do so again."""
    schema = op.get_context().opts.get("engagement_schema")
    return TABLE if schema is None else '"{}".{}'.format(schema.replace('"', '""'), TABLE)


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
