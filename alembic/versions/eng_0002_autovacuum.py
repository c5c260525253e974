"""Let autovacuum come when a fiftieth of the table is dead, not a fifth: each message leaves two dead rows."""

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


def upgrade() -> None:
    # It does not wait for who reads or writes, but for a vacuum or another change of the table.
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(f"ALTER TABLE {table()} SET (autovacuum_vacuum_scale_factor = 0.02)")


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(f"ALTER TABLE {table()} RESET (autovacuum_vacuum_scale_factor)")
