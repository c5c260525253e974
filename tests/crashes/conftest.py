"""A proxy that loses commits, real workers that freeze, and a check of the table's promises after each test."""

import pytest
from chaos.proxy import proxied
from chaos.scene import _scene  # noqa: F401 - the fixture
from sqlalchemy.orm import Session

from crashes.accidents import an_engine
from engagement.verification import verify


@pytest.fixture(name="proxy")
def _proxy(engine):
    with proxied(engine.url) as proxy:
        yield proxy


@pytest.fixture(name="through_proxy")
def _through_proxy(proxy):
    with an_engine(proxy.url) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _no_promise_is_broken(request):
    """Whatever a test does to a delivery, the table keeps its promises."""
    engine = request.getfixturevalue("engine") if "engine" in request.fixturenames else None
    yield
    if engine is not None:
        with Session(engine) as session:
            assert verify(session) == []
