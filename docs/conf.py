"""The site of the documentation: `.venv/bin/nox -s docs` builds it, and every warning is an error.

The pages are those that the repository shows, at their places, so that a link leads to the same page in both.
`index.md` lists them; its headings and links are the navigation.
"""

from __future__ import annotations

import re
from importlib.metadata import version as version_of
from typing import TYPE_CHECKING

from pygments.lexers.special import TextLexer

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "engagement"
release = version = version_of("engagement")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_click", "sphinxcontrib.mermaid"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/reference/*.md"]
exclude_patterns = [".*", "build"]
html_theme = "furo"
html_title = f"engagement {release}"
html_additional_pages = {"index": "to-the-first-page.html"}
html_copy_source = False
templates_path = ["_templates"]

myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}

suppress_warnings = ["ref.python"]  # a class that is public under two names (`engagement.Destination`)

PART = re.compile(r"^## (.*)$|^- \[.*?\]\((?:\.\./)?([\w/.-]+?)\.md\)", re.MULTILINE)


def add_navigation(_: Sphinx, page: str, source: list[str]) -> None:
    """Make the navigation of the list of pages, which a reader of the repository sees as a list."""
    if page != root_doc:
        return
    text = source[0]
    for heading, target in PART.findall(text):
        if heading:
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {heading}\n```\n"
        else:
            up = target if f"(../{target}.md)" in text else f"docs/{target}"
            source[0] = source[0].removesuffix("```\n") + f"/{up}\n```\n"


def as_rst(_app: Sphinx, kind: str, _name: str, _thing: object, _options: object, lines: list[str]) -> None:
    """Turn the Markdown of our docstrings into reStructuredText where they differ: tables, and a final underscore."""
    if kind == "data" and lines[:1] == ["Represent a PEP 604 union type"]:
        lines.clear()  # Python's word about unions, not ours about this one
    converted: list[str] = []
    for line in lines:
        if not line.startswith("| ") and not line.startswith("|-"):
            converted.append(re.sub(r"(?<=[A-Z])_(?=[\s`,.;:)]|$)", r"\_", line) if "`" not in line else line)
        elif line.startswith("| "):
            if not converted or not converted[-1].startswith("   "):
                converted += ["", ".. list-table::", "   :header-rows: 1", ""]
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            converted += [f"   {' ' if number else '*'} - {cell}" for number, cell in enumerate(cells)]
    lines[:] = [*converted, ""]


def setup(app: Sphinx) -> None:
    """Let Sphinx ask us."""
    app.connect("source-read", add_navigation)
    app.connect("autodoc-process-docstring", as_rst)
    app.add_lexer("ftl", TextLexer)
