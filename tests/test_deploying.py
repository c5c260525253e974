"""docs/deploying.md and docs/tutorial.md are true: files are read as their programs do, and what they call is run."""

import configparser
import re
import shlex
import socket
import sys
from pathlib import Path

import pytest
import yaml
from shell import ROOT
from test_readme import as_one_program, run_in

from engagement._delivery.options import WorkerOptions
from engagement.cli import cli
from engagement.transports.cloud import WhatsAppCloud
from engagement.transports.gateway import WhatsAppGateway
from engagement.transports.webhook import Webhook
from engagement.worker import Worker

PAGE = (ROOT / "docs" / "deploying.md").read_text()
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()


@pytest.fixture(autouse=True)
def _myapp(tmp_path, monkeypatch):
    """The transport that the page calls is there."""
    (tmp_path / "myapp").mkdir()
    (tmp_path / "myapp" / "__init__.py").touch()
    (tmp_path / "myapp" / "whatsapp.py").write_text("def send(message): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("myapp", "myapp.whatsapp"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def block(heading: str) -> str:
    """Return the block of code below a heading."""
    return re.search(rf"^## {heading}$.*?^```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1]


def assert_understood(words: list[str]) -> str:
    """Let the real command read the words, without running it, and return its name."""
    program, name, *rest = words
    assert Path(program).name == "engagement"
    assert name in cli.list_commands(None), name
    command = cli.get_command(None, name)
    command.make_context(name, [*rest, "--database-url", "postgresql+psycopg:///none"]).close()
    return name


def test_compose():
    """The file is YAML, migrates before it works, and gives a worker time to finish."""
    compose = yaml.safe_load(block("Docker Compose"))
    services = compose["services"]

    assert assert_understood(services["migrate"]["command"]) == "upgrade"
    assert assert_understood(services["worker"]["command"]) == "work"
    assert services["worker"]["depends_on"] == {"migrate": {"condition": "service_completed_successfully"}}
    assert services["migrate"]["depends_on"] == {"database": {"condition": "service_healthy"}}
    assert services["worker"]["environment"] == services["migrate"]["environment"]
    assert services["worker"]["stop_grace_period"] == "1m"
    assert set(compose["volumes"]) == {volume.split(":")[0] for volume in services["database"]["volumes"]}


def test_systemd():
    """The unit is an ini file; it migrates, works, and is ended by the signal that a worker obeys."""
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str
    unit.read_string(block("systemd"))
    service = unit["Service"]

    assert set(unit) - {"DEFAULT"} == {"Unit", "Service", "Install"}
    assert assert_understood(shlex.split(service["ExecStartPre"])) == "upgrade"
    assert assert_understood(shlex.split(service["ExecStart"])) == "work"
    assert (service["KillSignal"], service["Restart"]) == ("SIGTERM", "always")
    assert int(service["TimeoutStopSec"]) >= 60


def test_cron():
    """Each line has five fields of time, a user, and a command that there is."""
    called = []
    for line in block("cron").splitlines():
        *times, user, command = line.split(" ", 6)[:7]
        assert len(times) == 5
        assert all(re.fullmatch(r"\*|\d+", time) for time in times)
        assert user == "myapp"
        command = command.partition("&& ")[2]
        assert command.endswith(" >/dev/null")
        called.append(assert_understood(shlex.split(command.removesuffix(" >/dev/null"))))

    assert called == ["process", "prune", "verify"]


def test_kubernetes():
    """Two documents: a Job that migrates, and a Deployment whose selector finds its own pods."""
    job, deployment = yaml.safe_load_all(block("Kubernetes"))

    assert (job["kind"], job["apiVersion"]) == ("Job", "batch/v1")
    (upgrade,) = job["spec"]["template"]["spec"]["containers"]
    assert assert_understood(upgrade["command"]) == "upgrade"
    assert (deployment["kind"], deployment["apiVersion"]) == ("Deployment", "apps/v1")
    template = deployment["spec"]["template"]
    (worker,) = template["spec"]["containers"]
    assert assert_understood(worker["command"]) == "work"
    assert deployment["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
    assert template["spec"]["terminationGracePeriodSeconds"] >= 60
    assert worker["envFrom"] == upgrade["envFrom"]


def test_a_word_that_the_command_does_not_know_is_found():
    """The check above can fail: an option of another name is refused."""
    with pytest.raises(Exception, match="--concurency"):
        assert_understood(["engagement", "work", "--transport", "myapp:send", "--concurency", "8"])


def test_the_tutorial_runs(empty_engine, tmp_path):
    """Its blocks, pasted in their order into an empty folder, send both messages. Here with the installed package."""
    for name in ("fastapi_host.py", "flask_host.py"):
        (tmp_path / name).write_text((ROOT / "examples" / name).read_text())
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = str(listening.getsockname()[1])
    bin_of_this = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    program = as_one_program(TUTORIAL, without="pip install")

    printed = run_in(tmp_path, program, empty_engine, PATH=bin_of_this, PORT=port, NO_PROXY="*")

    assert '{"welcome":true}' in printed
    assert '{"detail":"There is such a member."}' in printed
    assert '{"reminder":true}' in printed
    assert "welcome.member to 5511999990000@s.whatsapp.net" in printed
    assert "reminder.appointment to 5511999990000@s.whatsapp.net" in printed
    assert "processed=1, succeeded=1" in printed


# The reference is made of docstrings, so they must have all of it.


def test_every_option_of_a_worker_is_explained():
    """The docstring of Worker has a line for each of its options."""
    explained = re.findall(r"^ *- `(\w+)[`(]", Worker.__doc__, re.MULTILINE)

    assert set(explained) == WorkerOptions.__required_keys__ | WorkerOptions.__optional_keys__


@pytest.mark.parametrize("transport", [WhatsAppGateway, WhatsAppCloud, Webhook])
def test_every_setting_of_a_transport_is_explained(transport):
    """`from_environment` names each variable that it reads."""
    source = Path(sys.modules[transport.__module__].__file__).read_text()
    read = set(re.findall(r"settings\.\w+\(\s*\"([A-Z_]+)\"", source))

    assert len(read) >= 3
    explained = transport.from_environment.__doc__
    assert [name for name in read if name not in explained] == []


def test_every_variable_is_on_a_page():
    """Each variable of the environment that the package reads by its whole name stands in the documentation."""
    pages = "\n".join(page.read_text() for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    code = "\n".join(file.read_text() for file in (ROOT / "engagement").rglob("*.py"))
    variables = set(re.findall(r"\bENGAGEMENT_[A-Z_]*[A-Z]\b", code))

    assert len(variables) >= 5
    assert [name for name in variables if name not in pages] == []
