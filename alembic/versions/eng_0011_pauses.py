"""Make the table of the pauses: of everything, of a message type, of a sender."""

from contextlib import contextmanager

import sqlalchemy as sa
from alembic import op

revision = "eng_0011"
down_revision = "eng_0010"
branch_labels = None
depends_on = None

TABLE = "engagement_pause"
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
        sa.Column("scope", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("paused_by", sa.Text),
        sa.Column("since", MOMENT, server_default=sa.text("now()"), nullable=False),
        sa.Column("until", MOMENT),
        sa.PrimaryKeyConstraint("scope", "name", name=op.f(f"{TABLE}_pkey")),
        check("scope_known", "scope IN ('everything', 'type', 'sender')"),
        check("name_fits_scope", "(scope = 'everything') = (name = '')"),
        check(
            "texts_length",
            "char_length(name) <= 200 AND char_length(reason) <= 500 AND char_length(paused_by) <= 255",
        ),
        check("times_readable", f"since {READABLE} AND until {READABLE}"),
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
