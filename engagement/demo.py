"""`engagement demo`: a day of the queue, on a PostgreSQL that is gone afterwards.

The messages are in `demo_messages.jsonl`, and who has which trouble is in `TROUBLE`; the rest is what a host would
do. Run as a program, this module is the worker that the demo kills in the middle of a send.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta, tzinfo
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn
from zoneinfo import ZoneInfo

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from sqlalchemy import ColumnElement, Engine, Select, create_engine, func, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from engagement import migrations
from engagement.jsonl import read_messages
from engagement.messages import NewMessage, OutgoingMessage, Queued
from engagement.models import EngagementMessage, MessageStatus
from engagement.outcomes import NotSent, Outcome, Postpone, Refused, Withdraw, exponential_backoff
from engagement.repository import EngagementMessageRepository
from engagement.tally import ProcessResult
from engagement.temporary_postgres import temporary_postgres
from engagement.transports import console
from engagement.words import FluentRenderer, speaking
from engagement.worker import process_message_queue

MESSAGES = "demo_messages.jsonl"
LEASE = timedelta(seconds=1.5)
"""As the backoff, minutes in real life: the demo has less time."""
BACKOFF = exponential_backoff(timedelta(seconds=0.8), factor=1, jitter=0)
DELIVERY_JOBS = 3
WIDTH_WHEN_PIPED = 110

M = EngagementMessage


def _busy_at_first(message: OutgoingMessage) -> Outcome | None:
    return NotSent("provider busy (429)") if message.attempt == 1 else None


def _always_down(_: OutgoingMessage) -> Outcome:
    return NotSent("provider down (503)")


def _is_asleep(_: OutgoingMessage) -> Outcome:
    tomorrow = datetime.now(ZoneInfo("Europe/Istanbul")) + timedelta(days=1)
    return Postpone(tomorrow.replace(hour=8, minute=0, second=0, microsecond=0), "quiet hours")


def _breaks_the_connection(_: OutgoingMessage) -> NoReturn:
    raise ConnectionResetError("no answer")


def _has_no_account(_: OutgoingMessage) -> Outcome:
    return Refused("not on WhatsApp")


def _has_opted_out(_: OutgoingMessage) -> Outcome:
    return Withdraw("has opted out")


TROUBLE: dict[str, Callable[[OutgoingMessage], Outcome | None]] = {
    "chidi": _busy_at_first,
    "dana": _busy_at_first,
    "emre": _is_asleep,
    "fiona": _breaks_the_connection,
    "gita": _always_down,
    "hugo": _has_no_account,
    "ines": _has_opted_out,
}
"""What happens in the place of a send; None lets it through."""


class DemoTransport:
    """Prints what is sent in the person's language, lets `TROUBLE` happen, and counts what left by key."""

    def __init__(self, screen: Console) -> None:
        render = speaking(FluentRenderer(fallbacks={"pt": ["pt-BR"]}), lambda message: message.message_params["locale"])
        self._console = console.Console(_Lines(screen), reveal=True, render=render)
        self.left: Counter[str] = Counter()

    def send(self, message: OutgoingMessage) -> Outcome:
        """Send, unless there is trouble."""
        trouble = TROUBLE.get(message.user_id)
        outcome = trouble and trouble(message)
        if outcome:
            return outcome
        self.left[message.idempotency_key] += 1
        return self._console.send(message)


class _Lines:
    """A stream that shows each message on a line, on a terminal cut where that ends, and its words below."""

    def __init__(self, screen: Console) -> None:
        self._screen = screen

    def write(self, line: str) -> None:
        if line.startswith(" "):
            self._screen.print(Padding(Text(line.strip(), "italic"), (0, 0, 0, 8)))
            return
        shown = Text(f"  > {line.rstrip()}", "green")
        if self._screen.is_terminal:
            shown.truncate(self._screen.width, overflow="ellipsis")
        self._screen.print(shown, soft_wrap=True)

    def flush(self) -> None:
        """Nothing is held back."""


def run_demo() -> None:
    """Run the demo on standard output. It leaves no process and no file, also when it is interrupted."""
    screen = Console(highlight=False)
    if not screen.is_terminal:
        screen = Console(highlight=False, width=WIDTH_WHEN_PIPED)
    with _unwinding_on_signals(), ExitStack() as stack:
        screen.print("[bold]A day of the queue.[/] Everybody here is made up, and nothing leaves this terminal.")
        with screen.status("starting a PostgreSQL"):
            server = stack.enter_context(temporary_postgres())
            engine = create_engine(server.url)
            stack.callback(engine.dispose)
            migrations.upgrade(engine)
        _Day(screen, engine).run()
    screen.print("\nThe PostgreSQL of this demo is stopped, and its files are gone.", style="dim")


@contextmanager
def _unwinding_on_signals() -> Iterator[None]:
    """Let SIGTERM unwind as SIGINT does, and both also if they were ignored, as they are for a script's `demo &`."""

    def leave(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    wanted = {signal.SIGTERM: leave, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Day:
    """What happens in the demo, in its order."""

    def __init__(self, screen: Console, engine: Engine) -> None:
        self._screen = screen
        self._engine = engine
        self._transport = DemoTransport(screen)
        with (files("engagement") / MESSAGES).open("rb") as lines:
            self._messages = list(read_messages(lines, screen.print))
        self._people = {message.user_id: message for message in self._messages}

    def run(self) -> None:
        self._show_database()
        self._queue()
        self._deliver()
        self._lose_a_worker()
        self._sum_up()

    def _show_database(self) -> None:
        self._title("1. A database")
        with self._engine.connect() as connection:
            version = str(connection.scalar(text("SHOW server_version"))).partition(" ")[0]
        revision = migrations.current(self._engine)
        self._say(f"PostgreSQL {version} runs in a temporary directory. Our table is at revision {revision}.")

    # The daily job

    def _queue(self) -> None:
        self._title("2. The daily job queues its messages")
        first = self._daily_job()
        table = _table("who", "when, where they are", "idempotency key", "")
        for message, queued in zip(self._messages, first, strict=True):
            state = Text("queued", "green") if queued.created else Text("duplicate", "yellow")
            table.add_row(_name(message), _local(message.scheduled_for, message.tz), message.key, state)
        self._screen.print(table)
        self._say(f"{MESSAGES}, first run: {_summary(first)}.")
        second = self._daily_job()
        nothing = "" if any(queued.created for queued in second) else " Nothing was queued: each key is taken."
        self._say(f"The same job again, by mistake: {_summary(second)}.[bold]{nothing}[/]")

    def _daily_job(self) -> list[Queued]:
        with self._repository() as repository:
            return [repository.queue_message(message) for message in self._messages]

    # The delivery job

    def _deliver(self) -> None:
        self._title("3. The delivery job sends what is due")
        for run in range(1, DELIVERY_JOBS + 1):
            if run > 1:
                self._wait_until_due()
            self._say(f"[bold]Run {run}[/]" + (", when the retries are due" if run > 1 else ""))
            self._delivery_job()
        self._show_history_of("gita")

    def _delivery_job(self) -> ProcessResult:
        known = {message.id: len(message.history) for message in self._all()}
        result = process_message_queue(self._engine, self._transport, lease=LEASE, backoff=BACKOFF)
        table = _table("who", "message", "what happened", "and now")
        for message in self._all():
            if len(message.history) > known[message.id]:
                last = message.history[-1]
                table.add_row(self._name(message), message.message_type, _reason(last), self._state(message))
        if table.row_count:
            self._screen.print(table)
        return result

    def _wait_until_due(self) -> None:
        soon = M.next_attempt_at < func.now() + timedelta(minutes=1)
        wait = select(func.max(M.next_attempt_at) - func.clock_timestamp()).where(M.status == "pending", soon)
        self._sleep(wait)

    def _show_history_of(self, user_id: str) -> None:
        message = self._message(M.user_id == user_id)
        self._say(f"Everything that went wrong is kept. The history of message {message.id}, to {self._name(message)}:")
        for entry in message.history:
            at = datetime.fromisoformat(entry["at"]).astimezone(UTC)
            self._say(f"  {at:%H:%M:%S} UTC  attempt {entry['attempt']}  {entry['event']}: {entry['reason']}")

    # A worker is lost

    def _lose_a_worker(self) -> None:
        self._title("4. A worker is killed in the middle of a send")
        message_id = self._queue_for_lea()
        self._say(f"A reminder for Lea is queued, message {message_id}. A worker process takes it …")
        pid = _kill_a_worker_in_a_send(self._engine)
        lost = self._message(M.id == message_id)
        assert lost.lease_expires_at is not None
        self._say(f"… and is killed while it sends: kill -9 {pid}.")
        until = f"{lost.lease_expires_at.astimezone(UTC):%H:%M:%S} UTC"
        self._say(f"The row says: [bold]{lost.status}[/], attempt {lost.attempt}, lease until {until}.")
        self._sleep(select(func.max(M.lease_expires_at) - func.clock_timestamp()))
        self._say("The lease has run out, and the next delivery job comes by:")
        self._delivery_job()
        if not self._transport.left[lost.idempotency_key]:
            self._say("[bold]It was not sent again[/]: it may have left, and nobody but a person can tell.")

    def _queue_for_lea(self) -> int | None:
        lea = NewMessage(
            user_id="lea",
            message_type="reminder",
            message_key="reminder.appointment",
            message_params={"name": "Lea", "locale": "nb-NO", "at": "16:00"},
            destination="individual",
            destination_jid="100000000000015@lid",
            tz=ZoneInfo("Europe/Oslo"),
        )
        self._people["lea"] = lea
        with self._repository() as repository:
            return repository.queue_message(lea).message_id

    # The end of the day

    def _sum_up(self) -> None:
        self._title("5. How the day ended")
        table = _table("", "who", "message", "attempts", "status", "why")
        for message in self._all():
            state = Text(str(message.status), _COLOURS[message.status])
            why = _reason(message.history[-1]) if message.history and message.status != "sent" else ""
            table.add_row(str(message.id), self._name(message), message.message_type, str(message.attempt), state, why)
        self._screen.print(table)
        with self._repository() as repository:
            counts = repository.count_by_status()
        self._say(", ".join(f"[bold]{count}[/] {status}" for status, count in counts.by_status.items() if count) + ".")
        left = self._transport.left
        twice = sum(times > 1 for times in left.values())
        self._say(f"{left.total()} messages left this terminal, {twice or 'none'} of them twice.")
        self._show_what_a_person_can_do()

    def _show_what_a_person_can_do(self) -> None:
        in_doubt = [message for message in self._all() if message.status == MessageStatus.IN_DOUBT]
        failed = [message for message in self._all() if message.status == MessageStatus.FAILED]
        self._say(
            "\nWhat is in doubt is not sent again by itself. Look at the phone, or ask; then say what became of it:"
        )
        for message in in_doubt:
            self._code(f"repository.resolve_message({message.id}, sent=True)", f"{self._name(message)} has it")
        for message in in_doubt[-1:]:
            self._code(f"repository.resolve_message({message.id}, sent=False)", "it never came: send it")
        self._say("What failed can be tried again, under the same key:")
        for message in failed[:1]:
            self._code(f"repository.retry_message({message.id})", f"the provider is up: send {self._name(message)}'s")

    # Small things

    def _title(self, title: str) -> None:
        self._screen.print(f"\n[bold cyan]{title}[/]")

    def _say(self, line: str) -> None:
        self._screen.print(line)

    def _code(self, code: str, comment: str) -> None:
        self._screen.print(Text.assemble(f"  {code}".ljust(46), (f"# {comment}", "dim")))

    @contextmanager
    def _repository(self) -> Iterator[EngagementMessageRepository]:
        with Session(self._engine) as session, session.begin():
            yield EngagementMessageRepository(session)

    def _all(self) -> list[EngagementMessage]:
        with Session(self._engine) as session:
            return list(session.scalars(select(M).order_by(M.id)))

    def _message(self, which: ColumnElement[bool]) -> EngagementMessage:
        with Session(self._engine) as session:
            return session.scalars(select(M).where(which)).one()

    def _sleep(self, wait: Select[Any]) -> None:
        """Wait as the database says: due times and leases are by its clock."""
        with self._engine.connect() as connection:
            left: timedelta = connection.scalar(wait) or timedelta(0)
        time.sleep(max(left.total_seconds(), 0) + 0.01)

    def _name(self, message: EngagementMessage) -> str:
        return _name(self._people[message.user_id])

    def _state(self, message: EngagementMessage) -> Text:
        match message.status:
            case MessageStatus.PENDING:
                zone = self._people[message.user_id].tz
                words = f"again {_when(message.next_attempt_at, zone)}"
            case MessageStatus.IN_DOUBT:
                words = "in doubt"
            case MessageStatus.FAILED:
                words = "failed" if message.retry_count else "failed at once"
            case status:
                words = str(status)
        return Text(words, _COLOURS[message.status])


_COLOURS = {
    MessageStatus.PENDING: "yellow",
    MessageStatus.SENDING: "yellow",
    MessageStatus.SENT: "green",
    MessageStatus.FAILED: "red",
    MessageStatus.CANCELLED: "dim",
    MessageStatus.EXPIRED: "dim",
    MessageStatus.IN_DOUBT: "magenta",
}
_WORDS = {"expired": "its time was over"}


def _reason(entry: Mapping[str, Any]) -> str:
    return str(entry["reason"] or _WORDS.get(entry["event"], entry["event"]))


def _name(message: NewMessage) -> str:
    return str(message.message_params["name"])


def _local(moment: datetime | None, zone: tzinfo) -> str:
    return f"{moment.astimezone(zone):%a %d %b %H:%M}" if moment else "now"


def _when(moment: datetime, zone: tzinfo) -> str:
    wait = moment - datetime.now(UTC)
    if wait > timedelta(hours=1):
        return f"{moment.astimezone(zone):%a %H:%M} in {str(zone).rpartition('/')[2]}"
    return f"at {moment.astimezone(UTC):%H:%M:%S} (in {max(wait.total_seconds(), 0):.1f} s)"


def _summary(all_queued: list[Queued]) -> str:
    created = sum(queued.created for queued in all_queued)
    duplicates = len(all_queued) - created
    return f"{created} queued, {duplicates} duplicate{'s' if duplicates != 1 else ''}"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=name not in {"what happened", "why"})
    return table


def _kill_a_worker_in_a_send(engine: Engine) -> int:
    """Start a worker, wait until it is in the middle of a send, kill it, and return what its process id was."""
    url = engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "engagement.demo", url]
    with subprocess.Popen(  # noqa: S603 - ourselves
        command,
        cwd=Path(__file__).parents[1],  # where the package is found, wherever we were started
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,  # not the terminal's: Ctrl-C is for the demo to obey
    ) as worker:
        assert worker.stdout is not None
        try:
            worker.stdout.readline()  # It is in a send, or it has ended.
        finally:
            worker.kill()
    if worker.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the worker of the demo was not killed in a send: it ended with {worker.returncode}")
    return worker.pid


def _send_without_end(_: OutgoingMessage) -> NoReturn:
    os.write(sys.stdout.fileno(), b"sending\n")
    sys.stdin.read()  # It ends if the demo is no more; whatever happened to that, nothing is left.
    os._exit(1)


if __name__ == "__main__":
    with suppress(OperationalError):  # the demo, and its database, were ended first
        process_message_queue(create_engine(sys.argv[1]), _send_without_end, lease=LEASE)
