"""${message}

Revises ${down_revision | comma,n}, ${create_date}.
"""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def schema():
    """Return where the table is, if not on the search path: what env.py gives to `context.configure`."""
    return op.get_context().opts.get("engagement_schema")


def upgrade() -> None:
    # Give up rather than queue behind a long transaction and make everybody wait behind us.
    op.execute("SET LOCAL lock_timeout = '5s'")
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    ${downgrades if downgrades else "pass"}
