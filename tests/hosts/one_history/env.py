"""The host's migrations and ours: `alembic.ini` names both folders. Autogenerate looks at the host's tables only."""

import os

from alembic import context
from one_history import Base
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from engagement import migrations

engine = create_engine(os.environ["DATABASE_URL"], poolclass=NullPool)
with engine.connect() as connection:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        include_name=migrations.includes_all_but_ours,
    )
    with context.begin_transaction():
        context.run_migrations()
