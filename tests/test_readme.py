"""The README is true: its Python runs as it stands, in its order."""

import ast
import asyncio
import hashlib
import hmac
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from datetime import datetime, timedelta
from pathlib import Path
from time import time
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import pytest
from commands import messages
from conftest import row
from sqlalchemy import MetaData, Text, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool
from test_examples import served_by_uvicorn
from test_prose import anchor

from engagement._operating import temporary_postgres
from engagement.messages import delivery_id, reference

README = Path(__file__).parent.parent / "README.md"
SECRET = "0123456789abcdef0123456789abcdef"


def run(block: str, namespace: dict) -> None:
    """Run a block as it stands; one with `await` at its top runs in an event loop."""
    code = compile(block, str(README), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, namespace)
    if inspect.iscoroutine(result):
        asyncio.run(result)


def test_the_readmes_python_runs(engine, tmp_path, monkeypatch):
    """Each block of Python in the README runs, and does what it says."""

    class Base(DeclarativeBase):
        metadata = MetaData()

    class Visit(Base):
        __tablename__ = "visits"
        user_id: Mapped[str] = mapped_column(Text, primary_key=True)
        goodbye_sent_at: Mapped[datetime | None]

    Base.metadata.create_all(engine)
    answer = SimpleNamespace(status=200, id="wamid.1")
    namespace = {
        "engine": engine,
        "async_engine": create_async_engine(engine.url, poolclass=NullPool),
        "Session": Session,
        "AsyncSession": AsyncSession,
        "Visit": Visit,
        "ZoneInfo": ZoneInfo,
        "timedelta": timedelta,
        "provider": SimpleNamespace(post=lambda **_: answer),
        "message_id": 1,
    }
    text_below = README.read_text().partition("## When to use it")[2]
    blocks = re.findall(r"^```python\n(.*?)^```", text_below, re.DOTALL | re.MULTILINE)
    for locale in ("en", "pt-BR"):
        shutil.copytree(README.parent / "engagement" / "catalogues" / locale, tmp_path / "locales" / locale)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("META_APP_SECRET", SECRET)
    monkeypatch.setenv("META_VERIFY_TOKEN", "open sesame")
    try:
        for block in blocks:
            if "resolve_message" in block:
                with engine.begin() as connection:
                    connection.execute(text("UPDATE engagement_message_queue SET status = 'in_doubt', sent_at = NULL"))
            run(block, namespace)
    finally:
        Base.metadata.drop_all(engine)

    assert len(blocks) == 7
    assert row(engine, 1).status == "sent"
    assert row(engine, 1).history[-1]["event"] == "resolved"
    assert row(engine, 2).status == "in_doubt"


@pytest.mark.parametrize(
    ("before", "told", "after"),
    [("in_doubt", "delivered", "sent"), ("sent", "failed", "failed")],
    ids=["a doubt resolves itself", "undeliverable becomes failed"],
)
def test_the_lines_that_hear_from_a_provider_have_the_effect_beside_them(engine, monkeypatch, before, told, after):
    """A signed status of Meta, over HTTP to the app of the README, settles its message. A forged one does not."""
    monkeypatch.setenv("META_APP_SECRET", SECRET)
    monkeypatch.setenv("META_VERIFY_TOKEN", "open sesame")
    section = README.read_text().partition("\n## Receipts\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    host = {"engine": engine}
    run(block, host)
    (message_id,) = messages(engine, before)
    named = reference(message_id, delivery_id(row(engine, message_id).idempotency_key))
    status = {"id": "wamid.1", "status": told, "timestamp": str(int(time())), "biz_opaque_callback_data": named}
    status |= {"recipient_id": "5511999990000"}
    status |= {"errors": [{"code": 131026, "title": "Message undeliverable"}]} if told == "failed" else {}
    change = {"field": "messages", "value": {"messaging_product": "whatsapp", "statuses": [status]}}
    body = json.dumps({"object": "whatsapp_business_account", "entry": [{"id": "1", "changes": [change]}]}).encode()

    with served_by_uvicorn(host["app"]) as client:
        for secret, code, then in ((SECRET[::-1], 401, before), (SECRET, 200, after)):
            signature = f"sha256={hmac.digest(secret.encode(), body, hashlib.sha256).hex()}"
            answer = client.post("/receipts/", content=body, headers={"X-Hub-Signature-256": signature})
            assert (answer.status_code, row(engine, message_id).status) == (code, then)


QUICK_START = README.read_text().partition("## Quick start")[2].partition("\n## ")[0]
IS_ASKED_FOR = "ENGAGEMENT_TEST_INSTALL" in os.environ


def as_one_program(text: str, *, without: str = "") -> str:
    """Return the blocks of a page as one program of the shell. A block of Python is a file, named in its first line."""
    program = ["set -euo pipefail"]
    for language, block in re.findall(r"^```(sh|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language == "python":
            name = re.match(r"# (\S+)\n", block)[1]
            program.append(f"cat > {name} <<'END'\n{block}END")
        elif not without or without not in block:
            program.append(block)
    return "\n".join(program)


def run_in(folder: Path, program: str, engine, **variables: str) -> str:
    """Run a program on an empty database, and return what it prints."""
    url = engine.url.render_as_string(hide_password=False)
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    environment |= {"ENGAGEMENT_DATABASE_URL": url} | variables
    done = subprocess.run(
        ["bash", "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_as_the_readme_says(printed: str) -> None:
    (wanted,) = re.findall(r"^```text\n(.*?)^```", QUICK_START, re.DOTALL | re.MULTILINE)
    assert wanted in printed
    (listed,) = [line for line in printed.partition(wanted)[2].splitlines() if "welcome" in line]
    assert "sent" in listed


def test_the_quick_start_runs_in_an_empty_folder(empty_engine, tmp_path):
    """Its blocks, pasted in their order, print the text beside them. Here with the installed package."""
    bin_of_this = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = as_one_program(QUICK_START, without="pip install")
    assert_as_the_readme_says(run_in(tmp_path, program, empty_engine, PATH=bin_of_this))


@pytest.mark.skipif(not IS_ASKED_FOR, reason="installs the package: nox -s package asks for it")
def test_the_quick_start_runs_as_it_is_printed(empty_engine, tmp_path):
    """Its blocks, with the one that installs, run from a checkout that has nothing else."""
    checkout = tmp_path / "checkout"
    for folder in ("alembic", "engagement"):
        shutil.copytree(README.parent / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(README.parent / name, checkout)
    assert_as_the_readme_says(run_in(checkout, as_one_program(QUICK_START), empty_engine))


def test_the_links_of_the_readme_lead_somewhere():
    """Each link and picture is a file of the repository, or an address that is not ours; anchors are headings there."""
    targets = re.findall(r"\]\(([^)]+)\)", README.read_text())

    assert len(targets) > 20
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        assert (README.parent / path).is_file(), target
        headings = re.findall(r"^#+ (.*)$", (README.parent / path).read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in map(anchor, headings), target


def test_the_readme_names_the_commands_that_ci_runs():
    """The demo and the tests stand in the README as CI takes them from there."""
    commands = re.findall(r"^```sh\n(.*?)\n```", README.read_text(), re.DOTALL | re.MULTILINE)

    assert commands[0].endswith("/engagement demo")
    assert commands[-1].endswith("/pytest -n auto")


def test_the_requirements_are_those_of_the_package():
    """The line of the README, what pip is told, and the oldest server that is looked for are one."""
    project = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]
    (line,) = re.findall(r"^\*\*Needs\*\* (.*?)\n", README.read_text(), re.MULTILINE)
    postgresql, python, sqlalchemy = re.findall(r"[\d.]+\d", line)

    assert int(postgresql) == temporary_postgres._OLDEST_VERSION  # noqa: SLF001
    assert project["requires-python"] == f">={python}"
    assert f"sqlalchemy>={sqlalchemy},<3" in project["dependencies"]


def test_the_tests_that_security_names_are_there():
    """A promise in SECURITY.md without its test is a wish."""
    named = re.findall(r"(test_\w+(?:\*)?\.py)", (README.parent / "SECURITY.md").read_text())

    assert len(named) >= 10
    assert not [name for name in named if not list((README.parent / "tests").rglob(name))]
