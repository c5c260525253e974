"""Bound what is reckoned with: a row by hand with the largest attempt stopped every claim that came to it."""

from contextlib import contextmanager

from alembic import op

revision = "eng_0003"
down_revision = "eng_0002"
branch_labels = None
depends_on = None

TABLE = "engagement_message_queue"
CHECKS = {
    "counters_bounded": "attempt <= 1000000000 AND retry_count <= 1000000000",
    "claimed_by_form": "char_length(claimed_by) <= 3000 AND claimed_by !~ '/recovery/[0-9]{7,}$'",
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
    # For rows that come or change. `eng_0004` reads those that are there, which would keep everybody waiting here.
    for name, sql in CHECKS.items():
        op.execute(f"ALTER TABLE {table()} ADD CONSTRAINT {TABLE}_{name} CHECK ({sql}) NOT VALID")


@giving_up_soon()
def downgrade() -> None:
    for name in CHECKS:
        op.execute(f"ALTER TABLE {table()} DROP CONSTRAINT {TABLE}_{name}")
