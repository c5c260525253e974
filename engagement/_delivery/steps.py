"""The steps of a worker, and the result of one transaction."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from engagement._claim import Claim, Position
from engagement.messages import OutgoingMessage
from engagement.models import MessageStatus
from engagement.outcomes import Verdict


@dataclass(frozen=True, slots=True)
class Transact:
    """Settle the verdicts. Then claim up to `wanted`, or give back claims that nobody will start. One transaction."""

    verdicts: Sequence[tuple[Claim, Verdict]]
    wanted: int = 0
    takes_over: bool = False
    starts: Sequence[Position] = ()
    """Where to claim from, and where else if nothing is there."""
    busy: Collection[str] = ()
    """Destinations that nothing is claimed for."""
    gives_back: bool = False
    """Whether claims of unacknowledged commits are given back: nothing was claimed that could have adopted them."""


@dataclass(frozen=True, slots=True)
class Peek:
    """Ask the database when a message behind a place is due, or a lease runs out."""

    after: Position


@dataclass(frozen=True, slots=True)
class Extend:
    """Extend the leases of these claims."""

    claims: Sequence[Claim]


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Wait no longer for answers that outlasted `send_timeout`."""

    claims: Sequence[Claim]


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the transport whether it is ready."""


@dataclass(frozen=True, slots=True)
class Tell:
    """Write on the oldest due message why nothing is claimed: `status` and the page are other processes."""

    why: str


@dataclass(frozen=True, slots=True)
class Beat:
    """Say that the worker is alive, though there is nothing else to say to the database."""


@dataclass(frozen=True, slots=True)
class Collect:
    """Wait for news of the sender, until then at the latest."""

    until: float


@dataclass(frozen=True, slots=True)
class Nap:
    """Wait for a stop, until then at the latest."""

    until: float


@dataclass(frozen=True, slots=True)
class Over:
    """Return, or raise `error`."""

    error: Exception | None = None


Step = Transact | Peek | Extend | GiveUp | Ask | Tell | Beat | Collect | Nap


@dataclass(slots=True)
class Taken:
    """The result of a transaction, which counts once it is committed."""

    name: str = ""
    """The name under which it claimed; empty if it did not."""
    started_at: int = field(default_factory=time.time_ns)
    recorded: dict[Claim, MessageStatus] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    ended: dict[OutgoingMessage, MessageStatus] = field(default_factory=dict)
    position: Position | None = None
    restart_took: float | None = None
    recovered_all: bool = False

    @property
    def any(self) -> bool:
        """Whether there may be more."""
        return bool(self.claims or self.ended)
