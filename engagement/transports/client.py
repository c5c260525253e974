"""The client through which the transports speak HTTP.

A request is made once. Nothing is retried and no redirect is followed: only the queue knows whether a message may be
sent again. A provider's words are recognised and never quoted: they may repeat the message, the number or the key.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import assert_never
from weakref import WeakSet

from engagement._sending.call import checked_lease
from engagement.messages import OutgoingMessage
from engagement.outcomes import InDoubt, NotSent, Outcome, Postpone, Refused, Sent
from engagement.transports.exchange import Connections
from engagement.transports.http import Answer, Proof, Silence, what_it_proves
from engagement.transports.trouble import Trouble

IDLE_CONNECTION_SECONDS = 1.5
"""Servers close idle connections (gunicorn after 2 s, Node after 5 s). A request written to a connection that is being
closed would be in doubt for nothing, so ours are given up well before."""
FIRST_STOP, LONGEST_STOP = timedelta(minutes=1), timedelta(hours=1)
"""How long a message is postponed for the sender's trouble (an expired token): a minute first, doubled at each attempt.
The attempts are in the row, while a cron job's process remembers no pause.
docs/decisions.md#2026-11-24--what-http-transports-call-postpone"""
STOPPED_ATTEMPTS = 50
"""After so many attempts (two days) a status counts against the message. Otherwise a message that a firewall refuses
for its words (403) would be postponed for ever."""
PROBE_TIMEOUT = timedelta(seconds=5)
LONGEST_EXCHANGE = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Finding:
    """The proof of a failure, in our own words. `wait` holds if the answer names no wait of its own."""

    proof: Proof
    reason: str
    wait: timedelta | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Prepared:
    """A request that only has to be sent. It holds personal data, so its `repr` is empty."""

    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class ProviderClient:
    """A pooled client for one provider, with one deadline. Thread-safe, also after a fork; no error leaves it.

    After `trouble` the client pauses, until a message gets through.

    `headers` are sent with every request and may hold the key. `verify` is True or an `ssl.SSLContext`. Proxies are
    those of the environment. `answer_within` bounds the whole request, from connecting to the last byte of the answer.
    `connect_within` bounds the connecting: a request without a connection by then was not sent.
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
        self.trouble = Trouble()
        _clients.add(self)

    def close(self) -> None:
        """Close the connections."""
        self._connections.close()

    def begin_anew(self) -> None:
        """In a forked process, share nothing with the parent: one of its threads may have held a lock."""
        self.trouble.begin_anew()
        self._connections.begin_anew()

    def deliver(
        self,
        message: OutgoingMessage,
        prepared: Prepared,
        read: Callable[[Answer], Sent | Finding | None],
        *,
        statuses: Mapping[int, Proof] | None = None,
    ) -> Outcome:
        """Send once, and return the outcome. During a pause, postpone the message instead.

        `read` recognises the provider's words in an answer. If it returns None the status counts, by `statuses` first
        and by `what_it_proves` otherwise.
        """
        if not self.trouble.may_try():
            # The message was claimed together with the one that met the trouble, before `ready` was asked again.
            return Postpone(
                _from_now(timedelta(seconds=self.trouble.seconds_paused)), f"{self._provider}: paused after trouble"
            )
        with checked_lease():  # Rendering, or waiting out a pause, may have taken longer than the lease.
            result = self.request("POST", prepared.path, prepared.body, headers=prepared.headers)
        found = self._read(result, read) or self._finding(result, statuses or {}, message)
        if isinstance(found, Sent):
            self.trouble.note_success()
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

    def _read(self, result: Answer | Silence, read: Callable[[Answer], Sent | Finding | None]) -> Sent | Finding | None:
        try:
            return read(result) if isinstance(result, Answer) else None
        except Exception as error:  # noqa: BLE001 - an answer that we fail to read proves nothing, least of all an unsent message
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
                self.trouble.note_success()  # A provider that refuses works.
                return Refused(reason)
            case Proof.WAIT:
                self.trouble.note_trouble(wait, reason=reason)
                return NotSent(reason, wait)
            case Proof.IN_DOUBT:
                self.trouble.note_trouble(wait, reason=reason)
                return InDoubt(reason)
            case Proof.STOPPED | Proof.LATER:
                wait = max(wait or FIRST_STOP, FIRST_STOP)
                if proof is Proof.STOPPED:
                    self.trouble.note_trouble(wait, reason=reason)
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
