"""One run: workers that kill or freeze themselves or are killed, and a database that is cut off, as a seed decides."""

import os
import random
import signal
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from sqlalchemy import text
from sqlalchemy.orm import Session

from engagement import EngagementMessageRepository, NewMessage
from engagement._operating.temporary_postgres import TemporaryPostgres

from .evidence import Death, Evidence
from .orders import Point
from .scene import Scene, is_stopped

TICK_SECONDS = 0.02
UNFINISHED = "SELECT id, status FROM engagement_message_queue WHERE status IN ('pending', 'sending')"
WATCH_SECONDS = 0.2
"""How often the queue is looked at."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is to go through. The same plan draws the same lives and blows from its seed."""

    seed: int
    messages: int = 2_000
    workers: int = 4
    kills_at_each_point: int = 4
    random_kills: int = 16
    terminations: int = 5
    restarts: int = 1
    freezes: int = 1
    idempotent: bool = False
    looks_up: bool = False
    max_retries: int = 3
    is_far_side_moody: bool = True
    """Whether it also refuses, fails and leaves in doubt, and the host cancels and lets expire."""
    people: int | None = None
    """To how many people the messages go, in order; None: each to another one."""
    message_types: tuple[str, ...] = ("reminder",)
    """Of the messages, in turn."""
    lease_seconds: float = 8.0
    longest_seconds: float = 600.0
    """A guard against hanging, and generous: the machine may be busy."""


@dataclass
class Life:
    """One worker process: its orders, and when it is killed by us rather than by itself."""

    orders: dict
    killed_after: float | None = None
    process: subprocess.Popen | None = None
    kill_at: float | None = None
    held: list[int] = field(default_factory=list)

    @property
    def point(self) -> Point | None:
        """Where it sends itself its signal."""
        return self.orders.get("signal_at")

    @property
    def is_to_freeze(self) -> bool:
        """Whether the signal stops it rather than kills it."""
        return self.orders.get("signal") == "SIGSTOP"

    @property
    def is_mortal(self) -> bool:
        """Whether it does not end before it is killed."""
        return not self.is_to_freeze and (self.point is not None or self.killed_after is not None)


class Run:
    """Plays a plan until nothing is pending or being sent, and counts what it did."""

    def __init__(self, plan: Plan, scene: Scene, server: TemporaryPostgres) -> None:
        self.plan = plan
        self.blows: Counter[str] = Counter()
        self.deaths: list[Death] = []
        self._scene = scene
        self._server = server
        self._random = random.Random(plan.seed)
        self._to_come = deque(self._lives())
        self._alive: list[Life] = []
        self._blows_to_come = self._drawn_blows()
        self._told_cancelled: set[int] = set()
        self._queued = 0
        self._watch_at = 0.0
        self._unfinished = 0

    def play(self) -> Evidence:
        """Go through the whole plan; fail if a worker ends in another way than the plan says."""
        deadline = time.monotonic() + self.plan.longest_seconds
        self._queue(self.plan.messages)
        while not self._is_over():
            assert time.monotonic() < deadline, f"{self}\n{self._scene.end_of_log()}"
            self._bury_the_dead()
            self._give_birth()
            self._strike()
            self._watch()
            time.sleep(TICK_SECONDS)
        for life in self._alive:
            self._scene.stop(life.process)
        return self._scene.evidence(deaths=self.deaths, told_cancelled=self._told_cancelled)

    def __str__(self) -> str:
        return (
            f"{self.plan}: {len(self.deaths)} deaths {dict(self.blows)}, {len(self._to_come)} lives to come, "
            f"{self._unfinished} messages unfinished"
        )

    # What the seed decides

    def _lives(self) -> list[Life]:
        draw = self._random
        orders = {
            "idempotent": self.plan.idempotent,
            "looks_up": self.plan.looks_up,
            "in_order": self.plan.people is not None,
            "max_retries": self.plan.max_retries,
            "lease_seconds": self.plan.lease_seconds,
        }
        self._immortal = orders
        lives = [
            Life(orders | {"signal_at": point, "countdown": draw.randint(1, 20), "seed": draw.getrandbits(32)})
            for point in Point
            for _ in range(self.plan.kills_at_each_point)
        ]
        lives += [
            Life(orders | {"concurrency": draw.choice([1, 2, 4])}, killed_after=draw.uniform(0, 0.6))
            for _ in range(self.plan.random_kills)
        ]
        draw.shuffle(lives)
        for _ in range(self.plan.freezes):  # Early: until it is recovered, a frozen worker takes a while.
            freeze = {"signal_at": Point.AFTER_SEND, "signal": "SIGSTOP", "countdown": draw.randint(1, 30)}
            lives.insert(draw.randint(0, len(lives) // 4), Life(orders | freeze))
        return lives

    def _drawn_blows(self) -> deque[tuple[int, Callable[[], bool]]]:
        """Return what befalls the database, each after so many deaths."""
        mortals = sum(life.is_mortal for life in self._to_come)
        blows = [(self._random.randrange(mortals), self._terminate_a_backend) for _ in range(self.plan.terminations)]
        blows += [(self._random.randrange(mortals), self._restart) for _ in range(self.plan.restarts)]
        return deque(sorted(blows, key=lambda blow: blow[0]))

    def _message(self, number: int) -> NewMessage:
        draw = self._random
        now = datetime.now(UTC)
        given = {"message_params": {}, "scheduled_for": now - timedelta(seconds=draw.uniform(1, 2))}
        if self.plan.is_far_side_moody:
            acts = [None, "refuse", "fail", "fail_first", "doubt"]
            given["message_params"] = {"act": draw.choices(acts, [85, 3, 3, 6, 3])[0]}
            if draw.random() < 0.03:
                given["expires_at"] = now + timedelta(seconds=draw.uniform(0.01, 3))
            elif draw.random() < 0.03:
                given["scheduled_for"] = now + timedelta(seconds=draw.uniform(0, 3))
        return NewMessage(
            user_id=f"user{number}",
            message_type=self.plan.message_types[number % len(self.plan.message_types)],
            message_key="reminder.text",
            destination="individual",
            destination_jid=f"55119{number % (self.plan.people or 500):08}@s.whatsapp.net",
            idempotency_key=f"chaos {number}",
            **given,
        )

    # Lives

    def _give_birth(self) -> None:
        while len(self._alive) < self.plan.workers:
            life = self._to_come.popleft() if self._to_come else Life(self._immortal)
            life.process = self._scene.start(**life.orders)
            self._alive.append(life)

    def _bury_the_dead(self) -> None:
        for life in list(self._alive):
            status = life.process.poll()
            if status is not None:
                assert life.is_mortal, f"a worker ended with status {status}:\n{self._scene.end_of_log()}"
                assert status == -signal.SIGKILL, f"a worker ended with status {status}:\n{self._scene.end_of_log()}"
                self._alive.remove(life)
                self.deaths.append(Death(life.process.pid, life.point, life.orders.get("concurrency", 1)))
                self.blows[life.point or "random"] += 1
            elif life.is_to_freeze:
                self._thaw_when_recovered(life)
            elif life.killed_after is not None:
                self._kill_in_time(life)

    def _kill_in_time(self, life: Life) -> None:
        if life.kill_at is None:
            if "started" in self._scene.notes_of(life.process.pid):
                life.kill_at = time.monotonic() + life.killed_after
        elif time.monotonic() >= life.kill_at:
            life.process.kill()
            life.process.wait()

    def _thaw_when_recovered(self, life: Life) -> None:
        if not is_stopped(life.process):
            return
        mine = {"mine": f"{life.process.pid}#%"}
        if not life.held:
            life.held = self._scene.ones(
                "SELECT id FROM engagement_message_queue WHERE status = 'sending' AND claimed_by LIKE :mine", **mine
            )
            assert len(life.held) == 1
        if self._scene.status(life.held[0]) != "sending":
            self.blows["freeze"] += 1
            life.orders = self._immortal
            os.kill(life.process.pid, signal.SIGCONT)

    # Blows to the database

    def _strike(self) -> None:
        while self._blows_to_come and len(self.deaths) >= self._blows_to_come[0][0]:
            if not self._blows_to_come[0][1]():
                return
            self._blows_to_come.popleft()

    def _terminate_a_backend(self) -> bool:
        backends = self._scene.ones(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'chaos worker' ORDER BY backend_start"
        )
        if not backends:
            return False
        (is_terminated,) = self._scene.ones("SELECT pg_terminate_backend(:pid)", pid=self._random.choice(backends))
        self.blows["termination"] += is_terminated
        return is_terminated

    def _restart(self) -> bool:
        self._server.restart("immediate")
        self.blows["restart"] += 1
        return True

    # The host's side

    def _watch(self) -> None:
        """Keep the mortals busy, cancel a message now and then, and see what is left."""
        if time.monotonic() < self._watch_at:
            return
        self._watch_at = time.monotonic() + WATCH_SECONDS
        with Session(self._scene.engine) as session, session.begin():
            unfinished = session.execute(text(UNFINISHED)).all()
            self._unfinished = len(unfinished)
            pending = [message_id for message_id, status in unfinished if status == "pending"]
            if self.plan.is_far_side_moody and pending:
                self._cancel(session, self._random.choice(pending))
        if self._is_anybody_to_die and len(pending) < 100:
            self._queue(200)

    def _queue(self, count: int) -> None:
        self._scene.queue_many(self._message(number) for number in range(self._queued, self._queued + count))
        self._queued += count
        self._unfinished += count

    def _cancel(self, session: Session, message_id: int) -> None:
        if EngagementMessageRepository(session).cancel_message(message_id).is_cancelled:
            self._told_cancelled.add(message_id)

    @property
    def _is_anybody_to_die(self) -> bool:
        return bool(self._to_come) or any(life.is_mortal or life.is_to_freeze for life in self._alive)

    def _is_over(self) -> bool:
        return not (self._is_anybody_to_die or self._blows_to_come or self._unfinished)
