"""The site of the documentation has every public name, command and option. `nox -s docs` builds it first."""

import html
import re
import zlib
from importlib import import_module

import pytest
from shell import ROOT

from engagement.cli import cli

SITE = ROOT / "build" / "site"
PUBLIC = [f"engagement{name}" for name in ("", ".admin", ".policies", ".receipts", ".testing")]

pytestmark = pytest.mark.skipif(not SITE.exists(), reason="the site is not built: nox -s docs")


def described() -> set[str]:
    """Return the names of Python that the site describes, from the inventory that other sites link by."""
    inventory = (SITE / "objects.inv").read_bytes()
    body = inventory.split(b"\n", 4)[4]
    return set(re.findall(r"^(\S+) py:", zlib.decompress(body).decode(), re.MULTILINE))


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_described(module):
    """Whatever a module offers to hosts is in the reference, from its docstring."""
    offered = {f"{module}.{name}" for name in import_module(module).__all__}

    assert offered
    assert offered - described() == set()


def test_every_transport_and_source_of_receipts_is_described():
    """What the pages tell to name on the command line (`module:name`) is in the reference."""
    pages = "\n".join(page.read_text() for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    named = {
        f"{module}.{name}" for module, name in re.findall(r"(engagement\.(?:transports|receipts)\.\w+):(\w+)", pages)
    }

    assert len(named) >= 8
    assert named - described() == set()


def test_every_command_and_option_is_described():
    """Each command has its heading and each of its options, as its help has them."""
    page = html.unescape(re.sub(r"<[^>]*>", "", (SITE / "docs" / "reference" / "command.html").read_text()))

    assert len(cli.list_commands(None)) >= 15
    for name in cli.list_commands(None):
        part = re.search(rf"^{name}¶?$.*?Usage|^{name}\W*$", page, re.MULTILINE | re.DOTALL)
        assert part, name
        for option in cli.get_command(None, name).params:
            assert all(spelling in page for spelling in option.opts if spelling.startswith("--")), option.name


def test_every_page_is_built_and_the_address_alone_leads_to_the_first():
    """No page of the repository is missing on the site."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]

    assert [page for page in pages if not (SITE / page.relative_to(ROOT)).with_suffix(".html").exists()] == []
    assert "url=docs/index.html" in (SITE / "index.html").read_text()
