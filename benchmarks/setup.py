"""The input of every work, and the machine and versions behind its numbers."""

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from sqlalchemy import URL

from benchmarks.server import describe


@dataclass(frozen=True)
class Setup:
    """Where to measure, how often, and how much; `small` only shows that it works."""

    url: URL
    rounds: int
    small: bool
    peers: bool
    picture: Path

    def size(self, full: int, small: int) -> int:
        """Return how much of something to do."""
        return small if self.small else full

    def seconds(self, full: float, small: float) -> float:
        """Return how long to do something."""
        return small if self.small else full


Work = Callable[[Setup], Iterator[str]]
"""A work yields tables as they are ready."""


def machine(setup: Setup) -> str:
    """Return machine and versions."""
    packages = ["sqlalchemy", "psycopg", *(["procrastinate", "pgqueuer"] if setup.peers else [])]
    return "\n".join(
        [
            f"- {platform.system()} {platform.machine()}, {_processor()}, {os.cpu_count()} cores",
            f"- {describe(setup.url)}",
            f"- Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in packages),
            f"- {setup.rounds} rounds" + (", SMALL: these numbers mean nothing" if setup.small else ""),
        ]
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
