"""What a host's type checker sees of us, and of the Python in README and docs."""

import re
import subprocess
import sys
from pathlib import Path
from textwrap import indent

ROOT = Path(__file__).parent.parent
HOSTS = Path(__file__).parent / "hosts" / "typed"

# What the words around the blocks of a page leave to the host.
GIVEN = """
from collections.abc import Mapping
from typing import Any
from zoneinfo import ZoneInfo
from datetime import datetime, timedelta
from fastapi import FastAPI
from alembic import context
from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from engagement import EngagementMessageRepository, NewMessage, NotSent, OutgoingMessage, Sent, migrations
from engagement._sending.protocols import Transport
from engagement.transports.cloud import Template

class Base(DeclarativeBase): ...

class Visit(Base):
    __tablename__ = "visits"
    user_id: Mapped[str] = mapped_column(primary_key=True)
    goodbye_sent_at: Mapped[datetime | None]

class Reply(Base):
    __tablename__ = "replies"
    id: Mapped[int] = mapped_column(primary_key=True)

async_engine: AsyncEngine
connection: Connection
engine: Engine
message: NewMessage
messages_engine: Engine
message_id: int
name_of: Any
people: Mapping[str, Any]
provider: Any
send: Any
session: Session
text_of: Any
transport: Transport
url: str
PASSWORD: str
"""
# Documentation shows functions without types, says a name again on a page, and wraps `wsgi_app` as Flask's own does.
LENIENT = ["--allow-untyped-defs", "--allow-incomplete-defs", "--allow-untyped-calls"]
LENIENT += ["--disable-error-code=no-redef", "--disable-error-code=method-assign"]


def blocks_of(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def as_module(page):
    """Return the blocks of a page as one module; one with `await` at its top becomes a function."""
    parts = [GIVEN]
    for number, block in enumerate(blocks_of(page)):
        if re.search(r"^(async |.*\bawait )(?!def)", block, re.MULTILINE) and "async def" not in block:
            imports = re.findall(r"^(?:from|import) .*\n", block, re.MULTILINE)
            body = indent(re.sub(r"^(?:from|import) .*\n", "", block, flags=re.MULTILINE), "    ")
            block = f"{''.join(imports)}async def block_{number}() -> None:\n{body}"  # noqa: PLW2901
        parts.append(block)
    return "\n".join(parts)


def mypy(folder, *arguments):
    # Not from the repository, where it would find our sources: a host finds what is installed.
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.strip()


def test_a_host_with_types_passes_the_strict_checker(tmp_path):
    """Sync and async, what a host imports from us has its types, and not `Any`."""
    hosts = sorted([*HOSTS.glob("*.py"), *(ROOT / "examples").glob("*.py")])

    assert len(hosts) == 4
    assert mypy(tmp_path, *map(str, hosts)) == "Success: no issues found in 4 source files"


def test_the_python_of_readme_and_docs_has_the_right_types(tmp_path):
    """Each block calls what is there, with what it takes."""
    pages = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if blocks_of(page)]
    for page in pages:
        (tmp_path / f"page_{page.stem.lower()}.py").write_text(as_module(page))

    assert len(pages) >= 8
    assert mypy(tmp_path, *LENIENT, ".") == f"Success: no issues found in {len(pages)} source files"
