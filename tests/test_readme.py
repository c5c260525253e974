"""The README is true: its Python runs as it stands, in its order."""

import ast
import asyncio
import inspect
import re
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from zoneinfo import ZoneInfo

from conftest import row
from sqlalchemy import MetaData, Text, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool

README = Path(__file__).parent.parent / "README.md"


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
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    for locale in ("en", "pt-BR"):
        shutil.copytree(README.parent / "engagement" / "catalogues" / locale, tmp_path / "locales" / locale)
    monkeypatch.chdir(tmp_path)
    try:
        for block in blocks:
            if "resolve_message" in block:
                with engine.begin() as connection:
                    connection.execute(text("UPDATE engagement_message_queue SET status = 'in_doubt', sent_at = NULL"))
            run(block, namespace)
    finally:
        Base.metadata.drop_all(engine)

    assert len(blocks) == 6
    assert row(engine, 1).status == "sent"
    assert row(engine, 1).history[-1]["event"] == "resolved"
    assert row(engine, 2).status == "in_doubt"


def test_the_readme_names_every_command_that_ci_runs():
    """The two commands stand in the README as CI takes them from there."""
    commands = re.findall(r"^```sh\n(.*?)\n```", README.read_text(), re.DOTALL | re.MULTILINE)

    assert [command.rsplit("/", 1)[-1] for command in commands] == ["engagement demo", "pytest -n auto"]


def test_the_tests_that_security_names_are_there():
    """A promise in SECURITY.md without its test is a wish."""
    named = re.findall(r"(test_\w+(?:\*)?\.py)", (README.parent / "SECURITY.md").read_text())

    assert len(named) >= 10
    assert not [name for name in named if not list((README.parent / "tests").rglob(name))]
