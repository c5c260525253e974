"""Make the table in which each worker says that it is alive."""

from contextlib import contextmanager

import sqlalchemy as sa
from alembic import op

revision = "eng_0010"
down_revision = "eng_0009"
branch_labels = None
depends_on = None

TABLE = "engagement_worker"
MOMENT = sa.TIMESTAMP(timezone=True)
TEXTS = ("name", "host", "version", "transport", "not_ready")
MOMENTS = ("in_hand_since", "started_at", "last_seen_at", "gone_at")
READABLE = "BETWEEN '0001-01-02 00:00:00+00' AND '9999-12-30 00:00:00+00'"


def schema():
    """Return where the table is, if not on the search path: what env.py gives to `context.configure`, or its engine."""
    context = op.get_context()
    options = {} if context.as_sql else context.connection.get_execution_options()
    translated = (options.get("schema_translate_map") or {}).get(None)
    return context.opts.get("engagement_schema") or translated


def qualified(name):
    """Return a table's name as `op.execute` reads it: it doubles a %, and takes a colon for a parameter."""
    return name if schema() is None else '"{}".{}'.format(schema().replace('"', '""').replace(":", "\\:"), name)


def check(name, sql):
    return sa.CheckConstraint(sql, name=op.f(f"{TABLE}_{name}"))


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
    op.create_table(
        TABLE,
        sa.Column("run", sa.Text(collation="C"), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("process_id", sa.BigInteger, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("transport", sa.Text, nullable=False),
        sa.Column("concurrency", sa.BigInteger, nullable=False),
        sa.Column("in_hand", sa.Integer, nullable=False),
        sa.Column("in_hand_since", MOMENT),
        sa.Column("sent", sa.BigInteger, nullable=False),
        sa.Column("failed", sa.BigInteger, nullable=False),
        sa.Column("started_at", MOMENT, nullable=False),
        sa.Column("last_seen_at", MOMENT, nullable=False),
        sa.Column("gone_at", MOMENT, nullable=False),
        sa.Column("not_ready", sa.Text),
        sa.PrimaryKeyConstraint("run", name=op.f(f"{TABLE}_pkey")),
        check("run_form", "run ~ '^[0-9a-f]{8}$'"),
        check("texts_length", " AND ".join(f"char_length({text}) <= 500" for text in TEXTS)),
        check("counts", "concurrency >= 1 AND in_hand >= 0 AND sent >= 0 AND failed >= 0"),
        check("times_readable", " AND ".join(f"{moment} {READABLE}" for moment in MOMENTS)),
        schema=schema(),
    )
    # A host that closed the queue to others, who may have rights on every new table, wants this one closed too.
    queue = qualified("engagement_message_queue").replace("'", "''")
    op.execute(
        "DO $engagement$ BEGIN IF (SELECT relrowsecurity FROM pg_catalog.pg_class"  # noqa: S608 - our own names
        f" WHERE oid = CAST('{queue}' AS pg_catalog.regclass))"
        f" THEN ALTER TABLE {qualified(TABLE)} ENABLE ROW LEVEL SECURITY; END IF; END $engagement$"
    )


@giving_up_soon()
def downgrade() -> None:
    op.drop_table(TABLE, schema=schema())
