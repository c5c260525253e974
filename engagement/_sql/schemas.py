"""Finds our tables: in the schema that is named, or on the search path."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, Engine, text

from engagement.models import TABLE_NAME, TABLE_NAMES, checked_schema

OUR_SCHEMA = "engagement_schema"
"""The execution option that says where our own transactions have found the table; None if they have not yet."""

# Every name is PostgreSQL's own, also if others are planted: no function is called that takes more than one type.
_FIND_TABLE = text("""
SELECT nspname FROM pg_catalog.pg_namespace
JOIN pg_catalog.pg_class ON pg_namespace.oid OPERATOR(pg_catalog.=) relnamespace
WHERE pg_class.oid OPERATOR(pg_catalog.=) pg_catalog.to_regclass(CAST(:table AS pg_catalog.text))
""")
# FOR UPDATE OF takes no schema.
_TABLE = re.compile(rf"(?<![.\w])(?<!OF )(?:{'|'.join(TABLE_NAMES)})\b")


def in_schema(schema: str | None) -> dict[str, Any]:
    """Return the execution options with which a statement finds the table there; None is the search path.

    See docs/decisions.md#2026-11-24--the-repository-takes-a-schema-and-statements-are-translated-one-by-one.
    """
    return {} if checked_schema(schema) is None else {"schema_translate_map": {None: schema}}


def schema_in_force(schema: str | None, bind: Engine | Connection) -> str | None:
    """Return where a statement finds the table: in `schema`, or where the host's `bind` looks without one."""
    options = bind.get_execution_options()
    translated = options.get("schema_translate_map") or {}
    return checked_schema(schema) or options.get(OUR_SCHEMA) or translated.get(None)


def find_schema(connection: Connection, table: str = TABLE_NAME) -> str | None:
    """Return the schema in which the search path finds a table of ours, or None."""
    found: str | None = connection.execute(_FIND_TABLE, {"table": table}).scalar()
    return found


def with_schema(statement: str, schema: str, connection: Connection) -> str:
    """Return the text of a statement that names our tables with their schema."""
    return _with_schema(statement, connection.dialect.identifier_preparer.quote_schema(schema))


@lru_cache(maxsize=1_000)
def _with_schema(statement: str, schema: str) -> str:
    # SQLAlchemy's translation does so anew for each column, each time: a tenth of a claim.
    return _TABLE.sub(lambda name: f"{schema}.{name[0]}", statement)
