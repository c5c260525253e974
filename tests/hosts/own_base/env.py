"""The host's migrations, which create our table too: it is one of the host's."""

import os

from alembic import context
from own_base import Base
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from engagement import migrations

engine = create_engine(os.environ["DATABASE_URL"], poolclass=NullPool)
with engine.connect() as connection:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_item=migrations.render_plain_types,
    )
    with context.begin_transaction():
        context.run_migrations()
