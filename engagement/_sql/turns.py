"""Locks by name, for work of one process at a time, such as a migration."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Select, cast, func, select

from engagement._sql.table import catalog, number, word


def take_turn(name: str) -> Select[Any]:
    """Take the lock of that name until the end of the transaction, and return whether it was free."""
    return select(func.pg_try_advisory_xact_lock(func.hashtextextended(name, 0)))


def who_has_turn(name: str) -> Select[Any]:
    """Return process id and transaction of the sessions that hold the lock: any role that may connect can."""
    columns = ("pid", "virtualtransaction", "locktype", "database", "classid", "objid", "objsubid", "granted")
    lock, database = catalog("pg_locks", *columns).c, catalog("pg_database", "oid", "datname").c
    key = cast(lock.classid, BigInteger).op("<<")(number(32)).op("|")(cast(lock.objid, BigInteger))
    return (
        select(lock.pid, lock.virtualtransaction)
        .where(lock.locktype == word("advisory"), lock.granted, lock.objsubid == number(1))
        .where(lock.database == database.oid, database.datname == func.current_database())
        .where(key == func.hashtextextended(name, 0))
        .order_by(lock.pid)
    )
