"""Comments and docstrings: read once by a stranger, and their links lead somewhere."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"decisions\.md#([\w-]+)")
CLAUSE = re.compile(r"\b(?:what|whatever|who|whoever|whom)\b", re.IGNORECASE)
MOST_IN_A_THOUSAND = 0.8
"""A little above the rate that was reached, so that a comment may also go. Lower it when the prose got better."""


def prose(file: Path) -> Iterator[str]:
    """Yield the comments and docstrings of a file, the help of a command among them."""
    source = file.read_text()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield str(node.value.value)


def package() -> list[Path]:
    return sorted((ROOT / "engagement").rglob("*.py"))


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_links_to_decisions_lead_to_a_heading():
    """Each `decisions.md#...` in the package and the benchmarks names a heading that is there."""
    headings = re.findall(r"^##+ (.*)$", (ROOT / "docs" / "decisions.md").read_text(), re.MULTILINE)
    anchors = {anchor(heading) for heading in headings}
    files = [*package(), *(ROOT / "benchmarks").rglob("*.py")]
    links = {(file, link) for file in files for link in LINK.findall(file.read_text())}
    assert links
    assert {f"{file.relative_to(ROOT)}: {link}" for file, link in links if link not in anchors} == set()


def test_a_noun_stands_where_a_clause_would():
    """A clause with "what" or "who" makes a stranger read twice ("what goes to a destination in hand")."""
    texts = {file: " ".join(LINK.sub("", text) for text in prose(file)) for file in package()}
    words = sum(len(text.split()) for text in texts.values())
    clauses = {file: len(CLAUSE.findall(text)) for file, text in texts.items()}
    rate = 1000 * sum(clauses.values()) / words
    worst = sorted(clauses, key=clauses.__getitem__, reverse=True)[:5]
    most = ", ".join(f"{file.relative_to(ROOT)} {clauses[file]}" for file in worst)
    assert rate <= MOST_IN_A_THOUSAND, (
        f"{rate:.1f} of a thousand words in comments and docstrings are what, whatever, who, whoever or whom, where "
        f"{MOST_IN_A_THOUSAND} was reached before. Write a noun instead (a message whose destination is busy). "
        f"Most are in {most}."
    )
