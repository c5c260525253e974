"""${message}

Revises ${down_revision | comma,n}, ${create_date}.
"""

from contextlib import contextmanager

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def schema():
    """Return where the table is, if not on the search path: what env.py gives to `context.configure`, or its engine."""
    context = op.get_context()
    options = {} if context.as_sql else context.connection.get_execution_options()
    translated = (options.get("schema_translate_map") or {}).get(None)
    return context.opts.get("engagement_schema") or translated


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
    ${upgrades if upgrades else "pass"}


@giving_up_soon()
def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
