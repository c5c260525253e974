"""docs/operations.md is true: each case is brought about with real workers, and what the page says is done."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import new_message, queue, row, until
from crashes.accidents import Running
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from engagement import EngagementMessageRepository, MessageStatus, Sent, migrations, process_message_queue
from engagement._operating.temporary_postgres import find_binaries
from engagement.cli import cli
from engagement.messages import delivery_id
from engagement.verification import verify

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "operations.md").read_text()
PATIENCE_SECONDS = 30
WORK = "engagement work --transport myapp.whatsapp:send --concurrency 20"
DAY = timedelta(days=1)

PROVIDER = '''
"""Sends by a provider whose state is in the file `provider`; `sent` is what has really arrived."""
import socket
import time
from pathlib import Path

def send(message):
    while (state := Path("provider").read_text()) == "hangs":
        Path(f"begun-{message.id}").touch()
        time.sleep(0.01)
    if state == "refuses":
        socket.create_connection(("127.0.0.1", 1))
    if state == "is silent":
        raise TimeoutError
    if state == "was deployed badly":
        raise KeyError("name")
    with Path("sent").open("a") as sent:
        sent.write(f"{message.idempotency_key}\\n")
    return f"wamid.{message.id}"

class Idempotent:
    idempotent = True

    def send(self, message):
        return send(message)
'''


def section(heading: str) -> str:
    """Return what stands below a heading, to the next one of its level."""
    level, title = heading.split(" ", 1)
    return re.search(rf"^{level} {re.escape(title)}$(.*?)(?=^#{{1,{len(level)}}} |\Z)", PAGE, re.DOTALL | re.MULTILINE)[
        1
    ]


def blocks(heading: str, language: str) -> list[str]:
    """Return the blocks of code below a heading of the page."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", section(heading), re.DOTALL | re.MULTILINE)


def commands(heading: str) -> list[str]:
    """Return the commands below a heading, in their order."""
    return [line for block in blocks(heading, "sh") for line in block.splitlines()]


class Operator:
    """Does what the page says, in a directory with a transport in it, on one database."""

    def __init__(self, engine, directory: Path, monkeypatch, capfd) -> None:
        self.directory = directory
        self._monkeypatch = monkeypatch
        self._capfd = capfd
        self.uses(engine)

    def uses(self, engine) -> None:
        """Let the commands that follow speak of this database."""
        self.engine = engine
        self._monkeypatch.setenv("ENGAGEMENT_DATABASE_URL", engine.url.render_as_string(hide_password=False))

    def run(self, command: str, *, status: int = 0, **replaced: object) -> str:
        """Run a command, and return what it prints."""
        with pytest.raises(SystemExit) as leaving:
            cli.main(args=_words(command, replaced), prog_name="engagement")
        printed = self._capfd.readouterr()
        assert leaving.value.code == status, printed.err
        return printed.out

    @contextmanager
    def working(self, command: str, *, ends: int = 0, **replaced: object):
        """Run a worker in a process of its own, which is told to stop at the end."""
        words = [sys.executable, "-m", "engagement.cli", *_words(command, replaced)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            told = process.communicate(timeout=PATIENCE_SECONDS)[1]
            assert process.returncode == ends, told
        finally:
            process.kill()
            process.communicate()

    def provider(self, state: str) -> None:
        """Set what the provider does from now on."""
        (self.directory / "new").write_text(state)
        (self.directory / "new").rename(self.directory / "provider")

    @property
    def sent(self) -> list[str]:
        """The keys of what has arrived, in no order."""
        path = self.directory / "sent"
        return sorted(path.read_text().split()) if path.exists() else []

    def statuses(self) -> list[str]:
        """Return the status of each message, in the order of ids."""
        return self.ask("SELECT status FROM engagement_message_queue ORDER BY id")

    def ask(self, sql: str) -> list:
        """Return the first column of what a query finds."""
        with self.engine.begin() as connection:
            return list(connection.scalars(text(sql)))

    def do(self, sql: str) -> None:
        """Execute and commit."""
        with self.engine.begin() as connection:
            connection.execute(text(sql))


def _words(command: str, replaced: dict[str, object]) -> list[str]:
    program, *words = shlex.split(command)
    assert program == "engagement"
    return [str(replaced.get(f"_{word}", word)) for word in words]


@pytest.fixture(name="operator")
def _operator(engine, tmp_path, monkeypatch, capfd) -> Operator:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "myapp").mkdir()
    (tmp_path / "myapp" / "__init__.py").touch()
    (tmp_path / "myapp" / "whatsapp.py").write_text(PROVIDER)
    operator = Operator(engine, tmp_path, monkeypatch, capfd)
    operator.provider("is up")
    return operator


def ago(**length) -> datetime:
    return datetime.now(UTC) - timedelta(**length)


def test_all_that_can_be_run_is_run():
    """The tests below take what they run from these sections; no other has anything to run."""
    run = {"What to watch", "Disk and vacuum", "Pausing", "A backlog", "Messages in doubt after a crash"}
    run |= {
        "The provider was down for a day",
        "A user asks to be erased",
        "Moving to another host, or another database",
    }
    run |= {"A backup was restored", "A bad deploy", "One at a time for each person"}
    parts = re.split(r"^#+ (.*)$", PAGE, flags=re.MULTILINE)

    assert {title for title, body in zip(parts[1::2], parts[2::2], strict=True) if "```" in body} == run


def test_the_figures_and_states_are_those_that_there_are(operator):
    """`status` tells every figure that the page watches, and the page explains every state."""
    facts = json.loads(operator.run("engagement status --json"))
    watched = re.findall(r"^\| `(\w+)`", section("## What to watch"), re.MULTILINE)

    assert watched
    assert set(watched) <= set(facts)
    assert "sent_in_1_min" in facts
    assert re.findall(r"^\| `(\w+)`", section("## What each state means"), re.MULTILINE) == list(MessageStatus)


def test_a_worker_keeps_house(operator):
    """The worker of the page logs each broken promise; here it looks for them every second."""
    (message_id,) = queue(operator.engine, new_message())
    operator.do("UPDATE engagement_message_queue SET status = 'sent', sent_at = now()")
    (command,) = commands("## What to watch")

    with operator.working(command, _1d="1s") as worker:
        told = worker.stderr.readline()

    assert told.endswith(f"ERROR engagement.violation promise=claim_counts message_id={message_id}\n")


def test_one_at_a_time_for_each_person(operator):
    """Two workers have a message in hand for one person each, and the next ones follow."""
    (work,) = commands("### One at a time for each person")
    queue(
        operator.engine, *(new_message(user, idempotency_key=f"{user}{n}") for n in range(3) for user in ("ana", "bia"))
    )
    operator.provider("hangs")
    with operator.working(work, _20=1), operator.working(work, _20=1):
        until(lambda: len(list(operator.directory.glob("begun-*"))) == 2)
        assert sorted(operator.statuses()) == ["pending"] * 4 + ["sending"] * 2
        operator.provider("is up")
        until(lambda: operator.statuses() == ["sent"] * 6)


def test_who_keeps_an_old_snapshot_is_found(operator):
    """The query names the session whose snapshot vacuum waits for; `prune` blanks, and deletes nothing."""
    (query,) = blocks("### Disk and vacuum", "sql")
    query = query.replace("10 minutes", "0 minutes")
    queue(operator.engine, new_message(scheduled_for=ago(days=91)), new_message("young"))
    process_message_queue(operator.engine, lambda _: Sent())
    reports = create_engine(operator.engine.url, connect_args={"application_name": "report"})
    with reports.connect() as report, operator.engine.connect() as connection:
        report.execution_options(isolation_level="REPEATABLE READ").execute(text("SELECT 1"))
        others = [found.application_name for found in connection.execute(text(query)) if found.application_name]
    reports.dispose()
    (prune,) = commands("### Disk and vacuum")

    assert others == ["report"]
    assert "pruned=1\n" in operator.run(prune)
    assert operator.ask("SELECT destination_jid IS NULL FROM engagement_message_queue ORDER BY id") == [True, False]


def test_a_pause(operator):
    """The type is held back until it is resumed, and the page's command shows it meanwhile."""
    queue(operator.engine, new_message("a", message_type="campaign"), new_message("b"))
    pause, status, resume, _ = commands("## Pausing")
    assert operator.run(pause).startswith("paused: type campaign since ")
    assert "paused=type campaign since " in operator.run(status)
    process_message_queue(operator.engine, lambda _: None)
    assert operator.statuses() == ["pending", "sent"]
    assert operator.run(resume) == "resumed: type campaign\n"
    process_message_queue(operator.engine, lambda _: None)
    assert operator.statuses() == ["sent", "sent"]


def test_pausing(operator):
    """Stopped workers finish what is in hand and take nothing more; a switch holds claims; a kind can be put off."""
    queue(operator.engine, *(new_message(user) for user in "ab"))
    (who,) = blocks("## Pausing", "sql")
    operator.provider("hangs")
    with operator.working(WORK, _20=1):
        until((operator.directory / "begun-1").exists)
        with operator.engine.connect() as connection:
            ((worker, count),) = connection.execute(text(who)).all()
        assert count == 1
        assert re.fullmatch(r".+:\d+", worker)
        operator.provider("is up")
    sent = len(operator.sent)
    assert operator.statuses().count("sent") == sent >= 1

    (code,) = blocks("## Pausing", "python")
    namespace = {"send": lambda message: f"wamid.{message.id}"}
    exec(code, namespace)
    Path("unplugged").touch()
    (later,) = queue(operator.engine, new_message("c"))
    switched = namespace["Switched"]()
    assert process_message_queue(operator.engine, switched).processed == 0
    assert row(operator.engine, later).attempt == 0
    with Running(operator.engine, switched):
        Path("unplugged").unlink()
        until(lambda: row(operator.engine, later).status == "sent")

    queue(
        operator.engine,
        new_message("d", message_type="weekly_review"),
        new_message("e", message_type="weekly_review", expires_at=datetime.now(UTC) + timedelta(hours=1)),
        new_message("f"),
    )
    *_, command = commands("## Pausing")
    assert "rescheduled=1\nunchanged=1\n" in operator.run(command, status=1)
    due = (
        "SELECT user_id FROM engagement_message_queue WHERE status = 'pending' AND next_attempt_at <= now() ORDER BY id"
    )
    assert operator.ask(due) == ["e", "f"]


def test_a_backlog(operator):
    """`status` tells of it; what has become pointless is cancelled, and another worker sends the rest."""
    queue(operator.engine, *(new_message(f"late-{number}", scheduled_for=ago(hours=13)) for number in range(3)))
    queue(operator.engine, *(new_message(f"due-{number}", scheduled_for=ago(hours=1)) for number in range(30)))
    assert json.loads(operator.run("engagement status --json"))["oldest_due_seconds"] > 12 * 3600
    work, codes, rest, dry, cancel = commands("## A backlog")
    assert work == WORK

    assert operator.run(dry) == "found=3\n"
    assert "cancelled=3\n" in operator.run(cancel)
    code = new_message("code", message_type="otp", scheduled_for=ago(hours=1))
    queue(operator.engine, code)
    with operator.working(codes):
        until(lambda: operator.statuses()[-1] == "sent")
    assert operator.sent == [code.key]
    operator.provider("hangs")
    with operator.working(rest), operator.working(work), operator.working(work):
        until(lambda: len(list(operator.directory.glob("begun-*"))) == 30)
        operator.provider("is up")
        until(lambda: "pending" not in operator.statuses() and "sending" not in operator.statuses())

    assert operator.statuses() == ["cancelled"] * 3 + ["sent"] * 31
    due = [new_message(f"due-{number}", scheduled_for=ago(hours=1)) for number in range(30)]
    assert operator.sent == sorted(message.key for message in [code, *due])


def test_in_doubt_after_a_crash(operator):
    """A killed worker's messages are parked, found, looked at and resolved; only what did not leave is sent again."""
    queue(operator.engine, *(new_message(user) for user in "abc"))
    operator.provider("hangs")
    with operator.working(f"{WORK} --lease 1s", ends=-signal.SIGKILL) as worker:
        until(lambda: len(list(operator.directory.glob("begun-*"))) == 3)
        worker.kill()
    operator.provider("is up")
    operator.do("UPDATE engagement_message_queue SET created_at = now() - interval '3 days' WHERE id = 3")
    until(lambda: operator.ask("SELECT max(lease_expires_at) < now() FROM engagement_message_queue") == [True])
    operator.run("engagement process --transport myapp.whatsapp:send", status=1)
    list_, show, sent, not_sent, rest = commands("## Messages in doubt after a crash")

    assert len(operator.run(list_).splitlines()) == 1 + 3
    told = operator.run(show, _4711=1)
    assert str(delivery_id(new_message("a").key)) in told
    operator.run(sent, _4711=1)
    operator.run(not_sent, _4712=2)
    operator.run(rest)
    assert operator.statuses() == ["sent", "pending", "sent"]
    operator.run("engagement process --transport myapp.whatsapp:send")

    assert operator.sent == [new_message("b").key]
    assert operator.statuses() == ["sent"] * 3


def test_a_provider_that_was_down(operator):
    """Refused connections fail in the end, silence is in doubt, and not ready waits; a retry sends each once."""
    refused = queue(operator.engine, *(new_message(user) for user in "ab"))
    operator.provider("refuses")
    waits = []
    for status in (0, 0, 1):
        operator.run("engagement process --transport myapp.whatsapp:send --concurrency 2", status=status)
        waits += operator.ask("SELECT extract(epoch FROM max(next_attempt_at) - now()) FROM engagement_message_queue")
        operator.do("UPDATE engagement_message_queue SET next_attempt_at = now() WHERE status = 'pending'")
    assert operator.statuses() == ["failed"] * 2
    assert 4 * 60 < sum(waits[:2]) < 8 * 60
    queue(operator.engine, new_message("c"))
    operator.provider("is silent")
    operator.run("engagement process --transport myapp.whatsapp:send", status=1)
    queue(operator.engine, new_message("d"))
    down = SimpleNamespace(ready=lambda: False, send=lambda _: pytest.fail("it is not ready"))
    assert process_message_queue(operator.engine, down).processed == 0
    assert operator.statuses() == ["failed", "failed", "in_doubt", "pending"]

    operator.provider("is up")
    dry, retry = commands("## The provider was down for a day")
    assert operator.run(dry) == "found=2\n"
    assert "retried=2\n" in operator.run(retry)
    operator.run("engagement process --transport myapp.whatsapp:send")

    assert operator.statuses() == ["sent", "sent", "in_doubt", "sent"]
    assert operator.sent == [new_message(user).key for user in "abd"]
    assert row(operator.engine, refused[0]).attempt == 4


def test_a_user_is_erased(operator):
    """What is pending is cancelled, all is blanked, a send in hand is not tried again; user id and keys stay."""
    in_hand, other = queue(operator.engine, new_message("user123"), new_message("other", scheduled_for=ago(hours=-1)))
    operator.provider("hangs")
    dry, forget = commands("## A user asks to be erased")
    with operator.working(WORK):
        until((operator.directory / f"begun-{in_hand}").exists)
        queue(operator.engine, new_message("user123", message_type="weekly_review", scheduled_for=ago(hours=-1)))
        assert operator.run(dry) == "found=2\n"
        assert "found=2\ncancelled=1\nblanked=2\n" in operator.run(forget)
        operator.provider("refuses")
        until(lambda: "sending" not in operator.statuses())

    assert operator.statuses() == ["cancelled", "pending", "cancelled"]
    assert row(operator.engine, other).destination_jid is not None
    personal = "message_params <> '{}' OR coalesce(destination_jid, error_message, provider_message_id) IS NOT NULL"
    assert operator.ask(f"SELECT user_id FROM engagement_message_queue WHERE {personal}") == ["other"]
    with Session(operator.engine) as session:
        assert EngagementMessageRepository(session).queue_message(new_message("user123")).created is False


# Another database


def shell(line: str, **urls) -> None:
    """Run a line of shell with PostgreSQL's programs, and with these URLs as libpq reads them."""
    if not all((find_binaries() / name).exists() for name in ("pg_dump", "psql")):
        pytest.skip("PostgreSQL's client programs are not installed")
    variables = {
        name: engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        for name, engine in urls.items()
    }
    environment = os.environ | variables | {"PATH": f"{find_binaries()}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-o", "pipefail", "-c", line]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


def test_moving_to_another_database(operator, engine, empty_engine):
    """All comes along, with ids that go on; and a worker that was forgotten cannot send from the old copy."""
    queue(engine, *(new_message(user) for user in "abc"))
    operator.run("engagement process --transport myapp.whatsapp:send --limit 1")
    copy, current, check = commands("## Moving to another host, or another database")
    (rename,) = blocks("## Moving to another host, or another database", "sql")

    shell(copy, OLD_DATABASE_URL=engine, NEW_DATABASE_URL=empty_engine)
    try:
        operator.do(rename)
        operator.run("engagement process --transport myapp.whatsapp:send", status=3)
    finally:
        operator.do("ALTER TABLE IF EXISTS engagement_message_queue_moved RENAME TO engagement_message_queue")
    operator.uses(empty_engine)
    assert f"revision={migrations.head()}\n" in operator.run(current)
    assert "no broken promise" in operator.run(check)
    assert queue(empty_engine, new_message("d")) == [4]
    with operator.working(WORK):
        until(lambda: operator.statuses() == ["sent"] * 4)

    assert operator.sent == [new_message(user).key for user in "abcd"]


@pytest.mark.parametrize("obeys", [True, False], ids=["as the page says", "workers are started at once"])
@pytest.mark.parametrize("transport", ["send", "Idempotent"])
def test_a_backup_was_restored(operator, engine, empty_engine, obeys, transport):
    """Nothing that may have left in the lost time is sent again, unless under one delivery id with one effect."""
    (step,) = blocks("## A backup was restored", "sql")
    messages = {user: new_message(user) for user in ("before", "lost", "queued_again")}
    later = new_message("later", scheduled_for=datetime.now(UTC) + DAY)
    process = f"engagement process --transport myapp.whatsapp:{transport}"
    queue(engine, messages["before"])
    operator.run(process)
    queue(engine, messages["lost"], later)
    shell("""pg_dump --no-owner --table 'engagement_*' "$DATABASE_URL" > backup.sql""", DATABASE_URL=engine)
    queue(engine, messages["queued_again"])
    operator.run(process)
    crashed_at = datetime.now(UTC)
    assert operator.sent == sorted(message.key for message in messages.values())

    operator.uses(empty_engine)
    shell("""psql --set ON_ERROR_STOP=1 "$DATABASE_URL" < backup.sql""", DATABASE_URL=empty_engine)
    queue(empty_engine, messages["queued_again"])
    if obeys:
        operator.do(step.replace("2026-11-24 09:00Z", crashed_at.isoformat()))
    with operator.working(f"engagement work --transport myapp.whatsapp:{transport} --poll-interval 50ms"):
        until(lambda: not operator.ask(f"SELECT 1 FROM engagement_message_queue WHERE {DUE_OR_IN_HAND}"))
        if obeys and transport == "Idempotent":
            until(lambda: operator.statuses().count("pending") == 3)  # A doubt is tried again after the backoff.
            operator.do("UPDATE engagement_message_queue SET next_attempt_at = now() WHERE has_doubt")
            until(lambda: operator.statuses().count("sent") == 3)

    twice = {key for key in operator.sent if operator.sent.count(key) > 1}
    again = {messages["lost"].key, messages["queued_again"].key}
    assert twice == (set() if obeys and transport == "send" else again)
    ended = "in_doubt" if obeys and transport == "send" else "sent"
    assert operator.statuses() == ["sent", ended, "pending", ended]
    assert row(empty_engine, 3).user_id == "later"
    with Session(empty_engine) as session:
        assert verify(session) == []


DUE_OR_IN_HAND = "status = 'sending' OR (status = 'pending' AND next_attempt_at <= now())"


def test_a_bad_deploy(operator):
    """What failed meanwhile is tried again; wrong words are cancelled, and the right ones take another key."""
    queue(operator.engine, new_message("user123"))
    operator.provider("was deployed badly")
    operator.run("engagement process --transport myapp.whatsapp:send --max-retries 1", status=1)
    operator.provider("is up")
    retry, cancel = commands("## A bad deploy")
    assert "retried=1\n" in operator.run(retry)
    operator.run("engagement process --transport myapp.whatsapp:send")
    assert operator.statuses() == ["sent"]

    queue(operator.engine, new_message("wrong"))
    assert len(operator.run("engagement list --status sent --type goodbye --created-since 2h").splitlines()) == 1 + 1
    assert "cancelled=1\n" in operator.run(cancel)
    (key,) = re.findall(r'idempotency_key="(.*)"', section("## A bad deploy"))
    with Session(operator.engine) as session:
        repository = EngagementMessageRepository(session)
        assert repository.queue_message(new_message("wrong")).created is False
        assert repository.queue_message(new_message("wrong", idempotency_key=key)).created is True
