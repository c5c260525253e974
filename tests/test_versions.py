"""The versions that pyproject.toml allows: none of which something bad is known, and all of them as they are tested."""

import re
import tomllib
from importlib.metadata import version

import pytest
from shell import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ROW = re.compile(r"^\| `([a-z0-9-]+)` \| ([0-9.]+) \| CVE.*? \| `([a-z]+)`", re.MULTILINE)
FREE_OF_ADVISORIES = ROW.findall((ROOT / "docs" / "operations.md").read_text())


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def bounds(extra: str) -> dict[str, str]:
    """Return the lower bound of each library that an extra names itself."""
    found = (re.fullmatch(r"([\w.-]+)(?:\[.*\])?>=([0-9.]+).*", requirement) for requirement in EXTRAS[extra])
    return {match[1]: match[2] for match in found if match}


def test_the_page_lists_advisories():
    """Those of the command and of the page are among them."""
    assert {"click", "starlette", "python-multipart", "h11"} <= {library for library, *_ in FREE_OF_ADVISORIES}


@pytest.mark.parametrize(("library", "first_free", "extra"), FREE_OF_ADVISORIES)
def test_no_extra_allows_a_version_with_a_published_advisory(library, first_free, extra):
    """The extra that brings a library names the first version that is free of what docs/operations.md lists."""
    assert numbers(bounds(extra)[library]) >= numbers(first_free)
    assert numbers(version(library)) >= numbers(first_free)


@pytest.mark.parametrize("extra", sorted(EXTRAS.keys() - {"dev", "test", "bench", "peers"}))
def test_every_library_of_an_extra_has_a_lower_bound(extra):
    """Without one an old version is as good as a new one, and the oldest that is tested is anybody's guess."""
    others = [requirement for requirement in EXTRAS[extra] if not requirement.startswith("engagement[")]

    assert len(bounds(extra)) == len(others)
