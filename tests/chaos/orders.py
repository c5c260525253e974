"""What a worker process is told: where it works, and where it is to die or freeze."""

import dataclasses
import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Self


class Point(StrEnum):
    """A moment in the life of a message, at which its worker may end."""

    BEFORE_CLAIM_COMMIT = "before_claim_commit"
    AFTER_CLAIM_COMMIT = "after_claim_commit"
    BEFORE_SEND = "before_send"
    IN_SEND = "in_send"
    AFTER_SEND = "after_send"
    BEFORE_SETTLE_COMMIT = "before_settle_commit"
    AFTER_SETTLE_COMMIT = "after_settle_commit"


Sabotage = Literal["claim_after_send", "no_fence", "resend_doubt"]


@dataclass(frozen=True, kw_only=True)
class Orders:
    """The one argument of a worker process."""

    url: str
    ledger: str
    notes: str
    prepares: bool = True
    """Whether statements are prepared, which a pooler does not take."""
    idempotent: bool = False
    looks_up: bool = False
    in_order: bool = False
    concurrency: int = 1
    lease_seconds: float = 8.0
    max_retries: int = 3
    signal_at: Point | None = None
    signal: Literal["SIGKILL", "SIGSTOP"] = "SIGKILL"
    countdown: int = 1
    """The signal comes when the point is passed for the so-manieth time."""
    seed: int = 0
    sabotage: Sabotage | None = None
    gateway: str | None = None
    """The address of a WhatsApp gateway to send through; else the transport writes into the ledger itself."""
    providers: dict[str, str] | None = None
    """By message type, the addresses of the providers to send through."""

    def dumps(self) -> str:
        """Return the argument."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def loads(cls, text: str) -> Self:
        """Read the argument."""
        return cls(**json.loads(text))
