"""Make the table of receipts that come before the provider's id of their message is known."""

from contextlib import contextmanager

import sqlalchemy as sa
from alembic import op

revision = "eng_0009"
down_revision = "eng_0008"
branch_labels = None
depends_on = None

TABLE = "engagement_receipt"
MOMENT = sa.TIMESTAMP(timezone=True)
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
        sa.Column("provider_message_id", sa.Text, nullable=False),
        sa.Column("event", sa.Text, nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("code", sa.Text),
        sa.Column("unreachable", sa.Boolean, nullable=False),
        sa.Column("kept_at", MOMENT, server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("provider_message_id", "event", "at", name=op.f(f"{TABLE}_pkey")),
        check("event_known", "event IN ('accepted', 'delivered', 'read', 'undeliverable')"),
        check(
            "names_length",
            "char_length(provider_message_id) BETWEEN 1 AND 512 AND char_length(provider) BETWEEN 1 AND 255",
        ),
        check("texts_length", "char_length(reason) <= 1000 AND char_length(code) <= 1000"),
        check("unreachable_is_undeliverable", "NOT unreachable OR event = 'undeliverable'"),
        check("times_readable", f"at {READABLE} AND kept_at {READABLE}"),
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
