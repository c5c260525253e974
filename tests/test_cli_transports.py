"""How a command finds a transport."""

import sys

import pytest

from engagement.transports import TransportNotFound, load_transport

FORMS = """
from engagement import Sent
made = []
def function(message): return None
def with_default(message=None): return None
def factory():
    made.append("factory")
    return function
class Class:
    def __init__(self): made.append("class")
    def send(self, message): return Sent()
class Batches:
    def send_many(self, messages): return Sent()
class Callable:
    def __call__(self, message): return None
object_ = Class()
callable_object = Callable()
class Space:
    inner = Class()
number = 3
def broken(): raise RuntimeError("no token\\nis set")
class Needs:
    def __init__(self, token): ...
"""


@pytest.fixture(name="forms")
def _forms(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "forms.py").write_text(FORMS)
    (tmp_path / "needs.py").write_text("import a_package_that_is_not_there")
    (tmp_path / "oops.py").write_text("def (:")
    yield
    for name in ("forms", "needs", "oops"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("function", []),
        ("with_default", []),
        ("object_", ["class"]),
        ("callable_object", []),
        ("Space.inner", ["class"]),
        ("factory", ["factory"]),
        ("Class", ["class"]),
        ("Batches", []),
        ("Callable", []),
    ],
)
def test_a_transport_may_have_any_of_these_forms(name, made):
    """Functions and objects are taken as they are; classes and callables without arguments make one."""
    found = load_transport(f"forms:{name}")
    module = sys.modules["forms"]

    assert not isinstance(found, type)
    assert found is not module.factory
    assert module.made[2:] == made if name in {"Class", "factory"} else module.made[:2] == ["class", "class"]


def test_a_class_that_is_configured_by_the_environment_is_made_by_that(tmp_path, monkeypatch):
    """A class with `from_environment` needs no wrapper to be used from the command line."""
    (tmp_path / "configured.py").write_text(
        "class Gateway:\n"
        "    def __init__(self, url): self.url = url\n"
        "    @classmethod\n"
        "    def from_environment(cls): return cls('http://gateway')\n"
        "    def send(self, message): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    assert load_transport("configured:Gateway").url == "http://gateway"


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("forms", "write it as package.module:name"),
        ("forms:", "write it as package.module:name"),
        (":send", "write it as package.module:name"),
        ("no_such.module:send", "there is no module no_such here or in this Python's packages"),
        ("engagement.no_such:send", "there is no module engagement.no_such here or in this Python's packages"),
        ("forms:no_such", "forms has no no_such"),
        ("forms:number", "forms:number is a int, not a function or an object with send or send_many"),
        ("forms:broken", "forms:broken() failed: RuntimeError: no token is set"),
        ("forms:Needs", "forms:Needs() failed: TypeError: "),
        ("needs:send", "needs cannot be imported: ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("oops:send", "oops cannot be imported: SyntaxError: "),
    ],
)
def test_what_is_no_transport_is_told_on_one_line(run, engine, name, problem):
    """Whatever is wrong with --transport is one line with status 2, and no traceback."""
    ran = run("process", "--transport", name, on=engine)

    assert (ran.status, ran.out) == (2, "")
    assert f"Invalid value for '--transport': {problem}" in ran.err
    assert ran.err.count("\n") == 1
    with pytest.raises(TransportNotFound):
        load_transport(name)
