"""A proxy that loses commits, real workers that freeze, and a check of the table's promises after each test."""

import pytest
from chaos.proxy import proxied
from chaos.scene import Scene
from sqlalchemy.orm import Session

from crashes.accidents import an_engine
from engagement.verification import verify


@pytest.fixture(name="scene")
def _scene(request, empty_engine, tmp_path):
    url, prepares = empty_engine.url.render_as_string(hide_password=False), not request.config.getoption("--pgbouncer")
    with Scene(url, tmp_path, prepares=prepares) as scene:
        yield scene


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
