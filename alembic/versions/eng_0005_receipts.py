"""Make room for receipts: when a message was delivered, read or given up, and how its provider's id finds it."""

from contextlib import contextmanager

import sqlalchemy as sa
from alembic import op

revision = "eng_0005"
down_revision = "eng_0004"
branch_labels = None
depends_on = None

TABLE = "engagement_message_queue"
COLUMNS = ("delivered_at", "read_at", "undeliverable_at")
CHECKS = {
    "delivered_was_sent": "delivered_at IS NULL OR (status = 'sent' AND undeliverable_at IS NULL)",
    "read_was_delivered": "read_at IS NULL OR delivered_at IS NOT NULL",
    "receipts_readable": (
        "delivered_at BETWEEN '0001-01-02 00:00:00+00' AND '9999-12-30 00:00:00+00'"
        " AND read_at BETWEEN '0001-01-02 00:00:00+00' AND '9999-12-30 00:00:00+00'"
        " AND undeliverable_at BETWEEN '0001-01-02 00:00:00+00' AND '9999-12-30 00:00:00+00'"
    ),
}


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
    for name in COLUMNS:
        op.add_column(TABLE, sa.Column(name, sa.TIMESTAMP(timezone=True)), schema=schema())
    # For rows that come or change. `eng_0006` reads those that are there, which would keep everybody waiting here.
    for name, sql in CHECKS.items():
        op.execute(f"ALTER TABLE {table()} ADD CONSTRAINT {TABLE}_{name} CHECK ({sql}) NOT VALID")
    # On a large table it is made before, CONCURRENTLY: see docs/migrations.md.
    op.execute(
        f"CREATE INDEX IF NOT EXISTS {TABLE}_provider ON {table()} (provider_message_id)"
        " WHERE provider_message_id IS NOT NULL"
    )


@giving_up_soon()
def downgrade() -> None:
    op.drop_index(f"{TABLE}_provider", TABLE, schema=schema())
    for name in CHECKS:
        op.execute(f"ALTER TABLE {table()} DROP CONSTRAINT {TABLE}_{name}")
    for name in COLUMNS:
        op.drop_column(TABLE, name, schema=schema())
