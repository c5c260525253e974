"""Vacuum by what a queue leaves behind: each message leaves two dead rows, and as many dead entries in each index.

A message that was settled needs no more than a fiftieth of the table to follow it.
"""

import sqlalchemy as sa
from alembic import op

revision = "eng_0002"
down_revision = "eng_0001"
branch_labels = None
depends_on = None

SETTINGS = {
    "autovacuum_vacuum_scale_factor": "0.02",
    "autovacuum_vacuum_threshold": "1000",
    "autovacuum_analyze_scale_factor": "0.02",
    "autovacuum_analyze_threshold": "1000",
}


def table():
    """Return the table's name as SQL has it."""
    schema = op.get_context().opts.get("engagement_schema")
    queue = sa.Table("engagement_message_queue", sa.MetaData(), schema=schema)
    return op.get_context().dialect.identifier_preparer.format_table(queue)


def upgrade() -> None:
    # It does not wait for who reads or writes, but for a vacuum or another change of the table.
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(f"ALTER TABLE {table()} SET ({', '.join(f'{name} = {value}' for name, value in SETTINGS.items())})")


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(f"ALTER TABLE {table()} RESET ({', '.join(SETTINGS)})")
