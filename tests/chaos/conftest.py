"""The marker of the long runs: `-m chaos` selects them, `-m "not chaos"` leaves them out."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "chaos: kills workers and the database for up to two minutes")
