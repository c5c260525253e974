"""The tables of docs/transports.md are those of the code. Run this file as a script to write them anew."""

import inspect
import re
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import pytest

from engagement.transports import cloud, gateway, settings, webhook
from engagement.transports.cloud_codes import CODES
from engagement.transports.dialects import DIALECTS
from engagement.transports.http import Proof, what_it_proves

DOCS = Path(__file__).parents[2] / "docs" / "transports.md"


def http_table() -> str:
    lines = inspect.cleandoc(what_it_proves.__doc__).splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


_OTHERWISE = {
    Proof.IN_DOUBT: "its other meanings there are not known",
    Proof.STOPPED: "it always speaks of the session there",
}


def gateways_table() -> str:
    rows = ["| gateway | answers | it proves | because |", "|---|---|---|---|"]
    for dialect in DIALECTS.values():
        for (status, proof, because), alike in groupby(dialect.words, attrgetter("status", "proof", "because")):
            texts = ", ".join(f"`{words.text}`" for words in alike)
            rows.append(f"| {dialect.name} | {status}, {texts} | {proof} | {because} |")
        rows += [
            f"| {dialect.name} | {status}, anything else | {proof} | {_OTHERWISE[proof]} |"
            for status, proof in dialect.statuses.items()
        ]
    return "\n".join(rows)


def cloud_table() -> str:
    rows = ["| code | means | it proves | listed under | wait |", "|---|---|---|---|---|"]
    for code in CODES:
        number = f"{code.code}–{code.last}" if code.last else f"{code.code}"  # noqa: RUF001 - a range
        wait = f"{code.wait.total_seconds():g} s" if code.wait else ""
        rows.append(f"| {number} | {code.means} | {code.proof} | {code.section} | {wait} |")
    return "\n".join(rows)


TABLES = {"http": http_table, "gateways": gateways_table, "cloud": cloud_table}
PLACE = re.compile(r"<!-- table: (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_the_documented_table_is_the_one_of_the_code(name):
    """Each table in the docs says what the code does, line for line."""
    documented = dict(PLACE.findall(DOCS.read_text()))

    assert documented[name].strip() == TABLES[name]()


def test_each_variable_is_documented():
    """Each variable that a `from_environment` reads is in the docs, and each in the docs is read."""
    read = {settings.RENDER}
    for module in (cloud, gateway, webhook):
        source = inspect.getsource(module)
        prefix = re.search(r'Settings\("(\w+)"', source)[1]
        read |= {prefix + name for name in re.findall(r'settings\.\w+\(\s*"([A-Z_]+)"', source)}
    documented = set()
    for line in re.findall(r"^\| (`(?:ENGAGEMENT|…)_.*?) \|", DOCS.read_text(), re.MULTILINE):
        first, *others = re.findall(r"`([…A-Z_]+)`", line)
        documented |= {first} | {re.match(r"(ENGAGEMENT_[A-Z]+)", first)[1] + other for other in others}
    common = {name for name in documented if name.startswith("…")}
    prefixes = ("ENGAGEMENT_GATEWAY", "ENGAGEMENT_CLOUD", "ENGAGEMENT_WEBHOOK")
    documented = (documented - common) | {name.replace("…", prefix) for name in common for prefix in prefixes}

    assert documented == read


def write() -> None:
    text = DOCS.read_text()
    DOCS.write_text(PLACE.sub(lambda found: f"<!-- table: {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->", text))


if __name__ == "__main__":
    write()
