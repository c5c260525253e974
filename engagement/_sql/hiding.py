"""Whether row-level security hides a table of ours: without a policy for its role, a session finds it empty.

PostgreSQL raises no error for that. A list that looks empty says yes to everything.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, and_, any_, exists, func, not_, or_
from sqlalchemy.dialects.postgresql import OID

from engagement._sql.parameters import text_of
from engagement._sql.table import catalog, number, word


class ListIsHidden(RuntimeError):  # noqa: N818 - what happened
    """Row-level security hides the suppression list, and so nobody can say whether an address is on it."""

    def __init__(self) -> None:
        super().__init__(
            "row-level security hides the suppression list from this role: it needs a policy, see docs/roles.md"
        )


def is_hidden(parameter: str) -> ColumnElement[bool]:
    """Return the condition that this session may read no row of the table that a parameter names.

    Row-level security is on for it, and no policy lets its role read. The conditions of policies are their owner's.
    """
    table = func.to_regclass(text_of(parameter)).cast(OID)
    policies = catalog("pg_policy", "polrelid", "polpermissive", "polcmd", "polroles")
    roles = catalog("pg_roles", "oid")
    everybody = number(0)
    is_for_this_role = or_(
        everybody == any_(policies.c.polroles),
        exists().where(roles.c.oid == any_(policies.c.polroles), func.pg_has_role(roles.c.oid, word("USAGE"))),
    )
    lets_read: ColumnElement[Any] = exists().where(
        policies.c.polrelid == table,
        policies.c.polpermissive,
        policies.c.polcmd.in_([word("r"), word("*")]),
        is_for_this_role,
    )
    return and_(func.coalesce(func.row_security_active(table), False), not_(lets_read))
