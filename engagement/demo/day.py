"""The events of the demo, in their order: the work of a host in a day."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from zoneinfo import ZoneInfo

from rich.console import Console
from rich.text import Text
from sqlalchemy import Engine, func, select, text

from engagement import migrations
from engagement._operating.jsonl import read_messages
from engagement.demo.lost_worker import LEASE, kill_a_worker_in_a_send
from engagement.demo.provider import UNDELIVERABLE, reporting_to
from engagement.demo.queue import M, Queue
from engagement.demo.today import of_today
from engagement.demo.trouble import DemoTransport
from engagement.demo.wording import advice, changes, ends, local, name_of, reason_of, state_of, summary, table_of
from engagement.messages import NewMessage, Queued
from engagement.models import EngagementMessage
from engagement.outcomes import exponential_backoff
from engagement.worker import process_message_queue

MESSAGES = "messages.jsonl"
BACKOFF = exponential_backoff(timedelta(seconds=0.8), factor=1, jitter=0)
"""Minutes in real life, like the lease."""
DELIVERY_JOBS = 3
LEA = NewMessage(
    user_id="lea",
    message_type="reminder",
    message_key="reminder.appointment",
    message_params={"name": "Lea", "locale": "nb-NO", "at": "16:00"},
    destination="individual",
    destination_jid="100000000000015@lid",
    tz=ZoneInfo("Europe/Oslo"),
)


class Day:
    """The events of the demo, in their order."""

    def __init__(self, screen: Console, engine: Engine, before_each_step: Callable[[], object]) -> None:
        self._screen = screen
        self._before_each_step = before_each_step
        self._engine = engine
        self._queue = Queue(engine)
        self._transport = DemoTransport(screen)
        with (files("engagement.demo") / MESSAGES).open("rb") as lines:
            self._messages = of_today(list(read_messages(lines, screen.print)), datetime.now(UTC))
        self._people = {message.user_id: message for message in (*self._messages, LEA)}

    def run(self) -> None:
        """Play the day."""
        self._show_database()
        self._queue_messages()
        self._deliver()
        self._lose_a_worker()
        self._hear_the_provider()
        self._sum_up()

    def _show_database(self) -> None:
        self._title("1. A database")
        with self._engine.connect() as connection:
            version = str(connection.scalar(text("SHOW server_version"))).partition(" ")[0]
        revision = migrations.current(self._engine)
        self._say(f"PostgreSQL {version} runs in a temporary directory. Our table is at revision {revision}.")

    # The daily job

    def _queue_messages(self) -> None:
        self._title("2. The daily job queues its messages")
        first = self._daily_job()
        table = table_of("who", "when, where they are", "idempotency key", "")
        for message, queued in zip(self._messages, first, strict=True):
            state = Text("queued", "green") if queued.created else Text("duplicate", "yellow")
            table.add_row(name_of(message), local(message.scheduled_for, message.tz), message.key, state)
        self._screen.print(table)
        self._say(f"{MESSAGES}, first run: {summary(first)}.")
        second = self._daily_job()
        nothing = "" if any(queued.created for queued in second) else " Nothing was queued: each key is taken."
        self._say(f"The same job again, by mistake: {summary(second)}.[bold]{nothing}[/]")

    def _daily_job(self) -> list[Queued]:
        with self._queue.repository() as repository:
            return [repository.queue_message(message) for message in self._messages]

    # The delivery job

    def _deliver(self) -> None:
        self._title("3. The delivery job sends what is due")
        for run in range(1, DELIVERY_JOBS + 1):
            if run > 1:
                self._wait_until_due()
            self._say(f"[bold]Run {run}[/]" + (", when the retries are due" if run > 1 else ""))
            # On a slow machine a retry may be due before its run is over. It is left to the next one.
            self._delivery_job(limit=self._queue.count_due())
        self._show_history_of("gita")

    def _delivery_job(self, limit: int | None = None) -> None:
        known = {message.id: len(message.history) for message in self._queue.all()}
        process_message_queue(self._engine, self._transport, limit=limit, lease=LEASE, backoff=BACKOFF)
        table = table_of("who", "message", "what happened", "and now")
        for message in self._queue.all():
            if len(message.history) > known[message.id]:
                last = message.history[-1]
                state = state_of(message, self._people[message.user_id].tz)
                table.add_row(self._name(message), message.message_type, reason_of(last), state)
        if table.row_count:
            self._screen.print(table)

    def _wait_until_due(self) -> None:
        soon = M.next_attempt_at < func.now() + timedelta(minutes=1)
        wait = select(func.max(M.next_attempt_at) - func.clock_timestamp()).where(M.status == "pending", soon)
        self._queue.sleep(wait)

    def _show_history_of(self, user_id: str) -> None:
        message = self._queue.message(M.user_id == user_id)
        self._say(f"Everything that went wrong is kept. The history of message {message.id}, to {self._name(message)}:")
        for entry in message.history:
            at = datetime.fromisoformat(entry["at"]).astimezone(UTC)
            self._say(f"  {at:%H:%M:%S} UTC  attempt {entry['attempt']}  {entry['event']}: {entry['reason']}")

    # A worker is lost

    def _lose_a_worker(self) -> None:
        self._title("4. A worker is killed in the middle of a send")
        with self._queue.repository() as repository:
            message_id = repository.queue_message(LEA).message_id
        self._say(f"A reminder for Lea is queued, message {message_id}. A worker process takes it …")
        pid = kill_a_worker_in_a_send(self._engine)
        lost = self._queue.message(M.id == message_id)
        assert lost.lease_expires_at is not None
        self._say(f"… and is killed while it sends: kill -9 {pid}.")
        until = f"{lost.lease_expires_at.astimezone(UTC):%H:%M:%S} UTC"
        self._say(f"The row says: [bold]{lost.status}[/], attempt {lost.attempt}, lease until {until}.")
        self._queue.sleep(select(func.max(M.lease_expires_at) - func.clock_timestamp()))
        self._say("The lease has run out, and the next delivery job comes by:")
        self._delivery_job()
        if not self._transport.left[lost.idempotency_key]:
            self._say("[bold]It was not sent again[/]: it may have left, and we cannot tell.")

    # The provider tells more

    def _hear_the_provider(self) -> None:
        self._title("5. The provider reports later")
        self._say(
            "A provider takes a message first, and tells of its fate later: it calls a web address of ours (a webhook)."
        )
        before = {message.user_id: message for message in self._queue.all() if message.user_id in {"ben", "fiona"}}
        with reporting_to(self._engine) as provider:
            answers = {
                "Fiona's message was delivered": provider.report(before["fiona"], "delivered"),
                "Ben's message is undeliverable": provider.report(before["ben"], "failed", UNDELIVERABLE),
            }
        for told, status in answers.items():
            self._say(f"  signed request: {told}. We answer {status}.")
        pairs = [(message, self._queue.message(M.id == message.id)) for message in before.values()]
        self._screen.print(changes(pairs, self._name))
        self._say("[bold]The doubt about Fiona's ended without a person[/], and nothing was sent for either report.")

    # The end of the day

    def _sum_up(self) -> None:
        self._title("6. How the day ended")
        self._screen.print(ends(self._queue.all(), self._name))
        with self._queue.repository() as repository:
            counts = repository.count_by_status()
        self._say(", ".join(f"[bold]{count}[/] {status}" for status, count in counts.by_status.items() if count) + ".")
        left = self._transport.left
        twice = sum(times > 1 for times in left.values())
        self._say(f"{left.total()} messages left this terminal, {twice or 'none'} of them twice.")
        for line in advice(self._queue.all(), self._name):
            self._screen.print(line)

    # Small things

    def _title(self, title: str) -> None:
        self._before_each_step()
        self._screen.print(f"\n[bold cyan]{title}[/]")

    def _say(self, line: str) -> None:
        self._screen.print(line)

    def _name(self, message: EngagementMessage) -> str:
        return name_of(self._people[message.user_id])
