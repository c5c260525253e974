"""Our tables and history live beside a host's: no autogenerate touches those of the other."""

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Column, Engine, Integer, MetaData, Table, text

from engagement import migrations
from engagement.models import TABLE_NAMES, EngagementBase

OURS = {*TABLE_NAMES, migrations.VERSION_TABLE}


@pytest.fixture(name="hosts_metadata")
def _hosts_metadata(empty_engine):
    """The metadata of a host that has a table and a history of its own, and our table in its database."""
    metadata = MetaData()
    Table("customers", metadata, Column("id", Integer, primary_key=True))
    metadata.create_all(empty_engine)
    migrations.upgrade(empty_engine)
    return metadata


def proposals(engine: Engine, metadata: MetaData, **options) -> list:
    with engine.connect() as connection:
        return compare_metadata(MigrationContext.configure(connection, opts=options), metadata)


@pytest.mark.parametrize("include_schemas", [False, True])
def test_a_hosts_autogenerate_leaves_our_tables_alone(empty_engine, hosts_metadata, include_schemas):
    """With our `include_name` it proposes nothing, neither in the default schema nor with all schemas looked at."""
    options = {"include_name": migrations.includes_all_but_ours, "include_schemas": include_schemas}

    assert proposals(empty_engine, hosts_metadata, **options) == []
    Table("orders", hosts_metadata, Column("id", Integer, primary_key=True))
    assert [kind for kind, *_ in proposals(empty_engine, hosts_metadata, **options)] == ["add_table"]


def test_without_our_filter_a_hosts_autogenerate_would_drop_our_tables(empty_engine, hosts_metadata):
    """That is why the filter exists."""
    proposed = proposals(empty_engine, hosts_metadata)

    assert {item.name for kind, item in proposed if kind == "remove_table"} == OURS


def test_our_autogenerate_leaves_a_hosts_tables_alone(empty_engine, hosts_metadata):
    """What Alembic compares, models and migrations agree in, and the host's tables are not looked at."""
    hosts_metadata.create_all(empty_engine)
    options = {"include_name": migrations.includes_ours, "compare_type": True, "compare_server_default": True}

    found = proposals(empty_engine, EngagementBase.metadata, version_table=migrations.VERSION_TABLE, **options)

    assert found == []


def test_our_history_is_kept_apart_from_the_hosts(empty_engine):
    """Our version table has our name, and a host's `alembic_version` is neither read nor written."""
    with empty_engine.begin() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('hosts_own')"))

    migrations.upgrade(empty_engine)

    assert migrations.VERSION_TABLE == "engagement_alembic_version"
    with empty_engine.connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == ["hosts_own"]
        ours = connection.execute(text("SELECT version_num FROM engagement_alembic_version")).scalars().all()
    assert ours == [migrations.head()]
