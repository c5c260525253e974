"""A PgBouncer in transaction mode to test through: each transaction may get another connection of the server."""

import os
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL

NO_PGBOUNCER = "there is no pgbouncer on this machine: install the package of that name"
PATIENCE = 20
PORT = 6432

CONFIGURATION = """
[databases]
* = host={host} port={port} user={user}{password} connect_query='{connect_query}'
[pgbouncer]
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 500
query_wait_timeout = 20
listen_addr =
listen_port = {own_port}
unix_socket_dir = {place}
auth_type = any
{more}
"""
# It ends when our end of the pipe is closed, also if we are killed.
KEEPER = """trap '' INT; "$0" -q "$1" & read -r _; kill -KILL $!; wait"""


class PgBouncer:
    """A pooler in front of a server, which can be restarted."""

    def __init__(self, program: str, place: Path, user: dict[str, Any]) -> None:
        self._command = ["/bin/sh", "-c", KEEPER, program, str(place / "pgbouncer.ini")]
        self._place = place
        self._user = user

    def url(self, database: str) -> URL:
        """Return how to reach a database of the server through the pooler."""
        query = {"host": str(self._place), "port": str(PORT)}
        return URL.create("postgresql+psycopg", username="anybody", database=database, query=query)

    def start(self) -> None:
        """Return when it takes connections."""
        with (self._place / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd="/", **self._user
            )
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            assert time.monotonic() < deadline, (self._place / "log").read_text()
            time.sleep(0.01)

    def stop(self) -> None:
        """Cut all connections, and return when it is gone."""
        self._process.stdin.close()
        self._process.wait(PATIENCE)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self._place / f".s.PGSQL.{PORT}")) == 0


def pgbouncer_program() -> str | None:
    """Return where PgBouncer is, or None."""
    return shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


@contextmanager
def pgbouncer(server, *, pool_size: int, connect_query: str = "SELECT 1") -> Iterator[PgBouncer]:
    """Run a PgBouncer in transaction mode in front of `server`. Skips the test if there is none to run."""
    program = pgbouncer_program()
    if program is None:
        pytest.skip(NO_PGBOUNCER)
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = map(int, re.search(r"(\d+)\.(\d+)", version).groups())
    # Since 1.21 it can follow prepared statements. What holds for all is what holds without.
    more = "max_prepared_statements = 0" if (major, minor) >= (1, 21) else ""
    with tempfile.TemporaryDirectory(prefix="engagement-pooler-", dir="/tmp") as directory:
        place = Path(directory)
        configuration = CONFIGURATION.format(
            host=server.host,
            port=server.port,
            user=server.user,
            password=f" password={_quoted(server.password)}" if server.password else "",
            pool_size=pool_size,
            connect_query=connect_query,
            own_port=PORT,
            place=place,
            more=more,
        )
        (place / "pgbouncer.ini").write_text(configuration)
        user = _user_to_run_as(str(server.host))
        if user:
            os.chown(place, user["user"], user["group"])
        pooler = PgBouncer(program, place, user)
        pooler.start()
        try:
            yield pooler
        finally:
            pooler.stop()


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _user_to_run_as(host: str) -> dict[str, Any]:
    # It refuses to run as root, and the server's socket may be closed to all but the server's user.
    if os.geteuid() != 0:
        return {}
    owner = Path(host).stat() if host.startswith("/") else None
    user, group = (owner.st_uid, owner.st_gid) if owner else pwd.getpwnam("nobody")[2:4]
    return {"user": user, "group": group, "extra_groups": []}
