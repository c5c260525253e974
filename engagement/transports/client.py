"""The client through which the transports speak HTTP.

A request is made once: nothing is retried and no redirect is followed here, since only the queue knows what may be
sent again. What a provider says is recognised, never quoted: it may repeat the message, the number or the key.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from time import monotonic, sleep
from typing import assert_never
from weakref import WeakSet

from engagement._sending.call import checked_lease
from engagement.messages import OutgoingMessage
from engagement.outcomes import InDoubt, NotSent, Outcome, Postpone, Refused, Sent
from engagement.transports.exchange import Connections
from engagement.transports.http import Answer, Proof, Silence, what_it_proves

IDLE_CONNECTION_SECONDS = 1.5
"""Well below the 2 s after which gunicorn closes an idle connection, and the 5 s of Node: a request that is written to
one that is just being closed would be in doubt for nothing."""
FIRST_PAUSE, LONGEST_PAUSE = timedelta(seconds=1), timedelta(minutes=15)
PATIENCE_SECONDS = 4.0
"""A pause that is over so soon is waited out by `ready()`: a run for a cron job ends when it hears no."""
FIRST_STOP, LONGEST_STOP = timedelta(minutes=1), timedelta(hours=1)
"""How long a message is postponed for the sender's trouble, doubled at each attempt: runs of a cron job remember no
pause."""
STOPPED_ATTEMPTS = 50
"""After so many attempts, two days, a status alone no longer blames the sender: a message that a firewall refuses for
its words would be postponed for ever."""
PROBE_TIMEOUT = timedelta(seconds=5)
LONGEST_EXCHANGE = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a failure proves, in our own words; `wait` is how long to wait if the answer does not say."""

    proof: Proof
    reason: str
    wait: timedelta | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Prepared:
    """A request that only has to be sent. Holds what is personal, and shows none of it."""

    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class ProviderClient:
    """A pooled client for one provider, with one deadline. Thread-safe, also after a fork; no error leaves it.

    It remembers trouble: it pauses after it, each time twice as long, until a message gets through. It is `is_suspect`
    after trouble, and at the beginning, until something gets through.

    `headers` are sent with every request and may hold the key. `verify` is True or an `ssl.SSLContext`. Proxies are
    those of the environment. `answer_within` bounds all of a request, from connecting to the last byte of its answer;
    what was not written within `connect_within` was not sent.
    """

    def __init__(
        self,
        provider: str,
        base_url: str,
        *,
        headers: Mapping[str, str],
        answer_within: timedelta,
        connect_within: timedelta = timedelta(seconds=5),
        connections: int = 1000,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self._provider = provider
        self._answer_within = answer_within.total_seconds()
        for name, given in (("answer_within", answer_within), ("connect_within", connect_within)):
            if not timedelta(0) < given <= LONGEST_EXCHANGE:
                raise ValueError(f"{name}: must be positive, and at most a day")
        if connections < 1:
            raise ValueError("connections: must be at least 1")
        self._connections = Connections(
            base_url,
            headers=headers,
            connect_within=connect_within.total_seconds(),
            idle_seconds=IDLE_CONNECTION_SECONDS,
            limit=connections,
            verify=verify,
        )
        self._lock = threading.Lock()
        self._troubles = 0
        self._paused_until = 0.0
        self.trouble: str | None = None
        """What the last trouble was, until a message gets through."""
        self._is_suspect = True  # A cron job's process may have been started into an outage.
        _clients.add(self)

    def close(self) -> None:
        """Close the connections."""
        self._connections.close()

    def begin_anew(self) -> None:
        """Share nothing with the parent, in a process that was forked: it may have been in the middle of anything."""
        self._lock = threading.Lock()
        self._connections.begin_anew()

    def deliver(
        self,
        message: OutgoingMessage,
        prepared: Prepared,
        read: Callable[[Answer], Sent | Finding | None],
        *,
        statuses: Mapping[int, Proof] | None = None,
    ) -> Outcome:
        """Send once, and return what is known of the message then. During a pause, postpone it instead.

        `read` recognises the provider's words in an answer, or returns None; then the status counts, by `statuses`
        and by `what_it_proves`.
        """
        if not self.may_try():
            # Claimed with the one that met the trouble, or before `ready` was asked again.
            return Postpone(
                _from_now(timedelta(seconds=self.seconds_paused)), f"{self._provider}: paused after trouble"
            )
        with checked_lease():  # To put the message into words, or to wait out a pause, may have taken longer.
            result = self.request("POST", prepared.path, prepared.body, headers=prepared.headers)
        found = self._read(result, read) or self._finding(result, statuses or {}, message)
        if isinstance(found, Sent):
            self.note_success()
            return found
        retry_after = result.retry_after if isinstance(result, Answer) else None
        return self._outcome(found, retry_after or found.wait, message)

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        within: timedelta | None = None,
    ) -> Answer | Silence:
        """Make one request, as `Connections.exchange` does. `within` bounds it, else `answer_within`."""
        seconds = within.total_seconds() if within else self._answer_within
        return self._connections.exchange(method, path, body, headers or {}, within=seconds)

    def may_try(self) -> bool:
        """Whether there is no pause; a short one is waited out."""
        left = self.seconds_paused
        if 0 < left <= PATIENCE_SECONDS:
            sleep(left)
        return left <= PATIENCE_SECONDS

    @property
    def seconds_paused(self) -> float:
        """How long nothing should be tried yet."""
        with self._lock:
            return max(self._paused_until - monotonic(), 0.0)

    @property
    def is_suspect(self) -> bool:
        """Whether it should be asked whether it works, before a message is risked."""
        with self._lock:
            return self._is_suspect

    def note_trouble(self, wait: timedelta | None = None, *, reason: str | None = None) -> None:
        """Pause for `wait`, and at least twice as long as the last time if the pause before is over."""
        now = monotonic()
        with self._lock:
            if now >= self._paused_until:  # The failures of one pause, in twenty threads, are one trouble.
                self._troubles += 1
            pause = max(FIRST_PAUSE * 2 ** min(self._troubles - 1, 10), wait or timedelta(0))
            self._paused_until = max(self._paused_until, now + min(pause, LONGEST_PAUSE).total_seconds())
            self._is_suspect = True
            self.trouble = reason or self.trouble

    def note_answer(self) -> None:
        """Believe that it works: it was asked. Whether messages get through is still to be seen."""
        with self._lock:
            self._is_suspect = False

    def note_success(self) -> None:
        """Forget all trouble."""
        with self._lock:
            self._troubles, self._paused_until, self._is_suspect = 0, 0.0, False
            self.trouble = None

    def _read(self, result: Answer | Silence, read: Callable[[Answer], Sent | Finding | None]) -> Sent | Finding | None:
        try:
            return read(result) if isinstance(result, Answer) else None
        except Exception as error:  # noqa: BLE001 - an answer that is not understood must not look like one unsent
            return Finding(Proof.IN_DOUBT, f"{self._provider}: the answer could not be read, {type(error).__name__}")

    def _finding(self, failure: Answer | Silence, statuses: Mapping[int, Proof], message: OutgoingMessage) -> Finding:
        if isinstance(failure, Silence):
            return Finding(what_it_proves(failure), f"{self._provider}: {failure.error.__name__}")
        proof = statuses.get(failure.status) or what_it_proves(failure)
        if proof is Proof.STOPPED and message.attempt > STOPPED_ATTEMPTS:
            proof = Proof.NOT_SENT
        return Finding(proof, f"{self._provider}: HTTP {failure.status}")

    def _outcome(self, finding: Finding, wait: timedelta | None, message: OutgoingMessage) -> Outcome:
        reason = finding.reason
        proof = finding.proof
        if proof is Proof.LATER and message.attempt > STOPPED_ATTEMPTS:
            proof = Proof.NOT_SENT
        match proof:
            case Proof.NOT_SENT:
                return NotSent(reason, wait)
            case Proof.REFUSED:
                self.note_success()  # It works, and says no.
                return Refused(reason)
            case Proof.WAIT:
                self.note_trouble(wait, reason=reason)
                return NotSent(reason, wait)
            case Proof.IN_DOUBT:
                self.note_trouble(wait, reason=reason)
                return InDoubt(reason)
            case Proof.STOPPED | Proof.LATER:
                wait = max(wait or FIRST_STOP, FIRST_STOP)
                if proof is Proof.STOPPED:
                    self.note_trouble(wait, reason=reason)
                longer = min(FIRST_STOP * 2 ** min(message.attempt - 1, 10), LONGEST_STOP)
                return Postpone(_from_now(max(wait, longer)), reason)
            case _:
                assert_never(proof)


def _from_now(wait: timedelta) -> datetime:
    return datetime.now(UTC) + wait


_clients: WeakSet[ProviderClient] = WeakSet()


def _begin_anew() -> None:
    for client in _clients:
        client.begin_anew()


os.register_at_fork(after_in_child=_begin_anew)
