"""The message queue: its table, and the indexes that keep a claim fast."""

from contextlib import contextmanager

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP

revision = "eng_0001"
down_revision = None
branch_labels = ("engagement",)
depends_on = None

TABLE = "engagement_message_queue"
MOMENT = TIMESTAMP(timezone=True)
READABLE = "BETWEEN '0001-01-02 00:00:00+00' AND '9999-12-30 00:00:00+00'"


def schema():
    """Return where the table is, if not on the search path: what env.py gives to `context.configure`, or its engine."""
    context = op.get_context()
    options = {} if context.as_sql else context.connection.get_execution_options()
    translated = (options.get("schema_translate_map") or {}).get(None)
    return context.opts.get("engagement_schema") or translated


def check(name, sql):
    return sa.CheckConstraint(sql, name=op.f(f"{TABLE}_{name}"))


def index(name, *columns, where=None):
    where = None if where is None else sa.text(where)
    op.create_index(op.f(f"{TABLE}_{name}"), TABLE, columns, schema=schema(), postgresql_where=where)


@contextmanager
def giving_up_soon():
    """Give up rather than queue behind a long transaction and make everybody wait behind us; then wait as before."""
    # Kept by the server: Python may only be writing SQL for a person.
    op.execute("SELECT set_config('engagement.lock_timeout', current_setting('lock_timeout'), true)")
    op.execute("SET LOCAL lock_timeout = '5s'")
    yield
    op.execute("SELECT set_config('lock_timeout', current_setting('engagement.lock_timeout'), true)")


def upgrade() -> None:
    op.create_table(
        TABLE,
        sa.Column("id", sa.BigInteger, autoincrement=True, nullable=False),
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("message_type", sa.Text, nullable=False),
        sa.Column("message_key", sa.Text, nullable=False),
        sa.Column("message_params", JSONB, server_default=sa.text("'{}'"), nullable=False),
        sa.Column("destination", sa.Text, nullable=False),
        sa.Column("destination_jid", sa.Text),
        sa.Column("scheduled_for", MOMENT, server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", MOMENT),
        sa.Column("next_attempt_at", MOMENT, server_default=sa.text("now()"), nullable=False),
        sa.Column("status", sa.Text, server_default=sa.text("'pending'"), nullable=False),
        sa.Column("attempt", sa.Integer, server_default=sa.text("0"), nullable=False),
        sa.Column("retry_count", sa.Integer, server_default=sa.text("0"), nullable=False),
        sa.Column("has_doubt", sa.Boolean, server_default=sa.text("false"), nullable=False),
        sa.Column("lease_expires_at", MOMENT),
        sa.Column("claimed_by", sa.Text),
        sa.Column("sent_at", MOMENT),
        sa.Column("provider_message_id", sa.Text),
        sa.Column("error_message", sa.Text),
        sa.Column("history", JSONB, server_default=sa.text("'[]'"), nullable=False),
        sa.Column("idempotency_key", sa.Text(collation="C"), nullable=False),
        sa.Column("created_at", MOMENT, server_default=sa.text("now()"), nullable=False),
        sa.Column("trace_context", sa.Text),
        sa.PrimaryKeyConstraint("id", name=op.f(f"{TABLE}_pkey")),
        sa.UniqueConstraint("idempotency_key", name=op.f(f"{TABLE}_idempotency_key_key")),
        check(
            "status_known",
            "status IN ('pending', 'sending', 'sent', 'failed', 'cancelled', 'expired', 'in_doubt')",
        ),
        check("destination_known", "destination IN ('individual', 'group')"),
        check("message_type_format", "message_type ~ '^[a-z][a-z0-9_]*$'"),
        check("message_params_is_object", "jsonb_typeof(message_params) = 'object'"),
        check("history_is_array", "jsonb_typeof(history) = 'array'"),
        check("counters_not_negative", "attempt >= 0 AND retry_count >= 0"),
        check("sent_iff_sent_at", "(status = 'sent') = (sent_at IS NOT NULL)"),
        check("sending_iff_lease", "(status = 'sending') = (lease_expires_at IS NOT NULL)"),
        check("ended_without_doubt", "NOT (has_doubt AND status IN ('sent', 'failed', 'cancelled', 'expired'))"),
        check("pending_has_destination", "status <> 'pending' OR destination_jid IS NOT NULL"),
        check("jid_fits_destination", "(destination = 'group') = (right(destination_jid, 5) = '@g.us')"),
        check("expires_after_scheduled", "expires_at > scheduled_for"),
        check(
            "times_readable",
            f"scheduled_for {READABLE} AND next_attempt_at {READABLE} AND expires_at {READABLE}",
        ),
        schema=schema(),
    )
    index("due", "next_attempt_at", "id", where="status = 'pending'")
    index("lease", "lease_expires_at", where="status = 'sending'")
    index("user", "user_id", "status")
    index("attention", "status", "next_attempt_at", where="status IN ('failed', 'in_doubt')")
    index(
        "prunable",
        "next_attempt_at",
        where="status IN ('sent', 'failed', 'cancelled', 'expired') AND destination_jid IS NOT NULL",
    )


@giving_up_soon()
def downgrade() -> None:
    op.drop_table(TABLE, schema=schema())
