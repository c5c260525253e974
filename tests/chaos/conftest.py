"""The marker of the long runs: `-m chaos` selects them, `-m "not chaos"` leaves them out."""

import os
import secrets
import sys
from pathlib import Path

import pytest

# Where the loopback providers are. That directory is no package.
sys.path.append(str(Path(__file__).parents[1] / "transports"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "chaos: kills workers and the database for up to two minutes")


@pytest.fixture(name="seed")
def _seed():
    seed = int(os.environ.get("ENGAGEMENT_CHAOS_SEED", secrets.randbits(32)))
    print(f"this run is replayed by ENGAGEMENT_CHAOS_SEED={seed}")  # noqa: T201 - pytest shows it if the test fails
    return seed
