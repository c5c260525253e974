"""Let autovacuum come when a fiftieth of the table is dead, not a fifth: each message leaves two dead rows."""

import sqlalchemy as sa
from alembic import op

revision = "eng_0002"
down_revision = "eng_0001"
branch_labels = None
depends_on = None


def table():
    """Return the table's name as SQL has it."""
    schema = op.get_context().opts.get("engagement_schema")
    queue = sa.Table("engagement_message_queue", sa.MetaData(), schema=schema)
    return op.get_context().dialect.identifier_preparer.format_table(queue)


def upgrade() -> None:
    # It does not wait for who reads or writes, but for a vacuum or another change of the table.
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(f"ALTER TABLE {table()} SET (autovacuum_vacuum_scale_factor = 0.02)")


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(f"ALTER TABLE {table()} RESET (autovacuum_vacuum_scale_factor)")
