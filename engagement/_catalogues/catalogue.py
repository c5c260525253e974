"""The texts of one locale, unparsed.

A catalogue is a folder that is named for its locale and holds `.ftl` files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

from fluent.syntax import FluentParser, ast

from engagement._catalogues.locales import is_known_locale, tag_of


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault in the catalogue of `locale`; `place` is a key, or a file and line."""

    locale: str
    place: str
    problem: str

    def __str__(self) -> str:
        return f"{self.locale}: {self.place}: {self.problem}"


class BrokenCatalogue(RuntimeError):  # noqa: N818 - an event
    """A text that is needed cannot be parsed. Once somebody mends the catalogue, the message can be said."""


_ENTRY = re.compile(r"^(-?[a-zA-Z][a-zA-Z0-9_-]*) *=", re.MULTILINE)
"""Where a message or term begins: nothing else can stand there at the beginning of a line."""


@dataclass(frozen=True, slots=True)
class _Source:
    file: str
    text: str
    start: int = 0

    def problem_of(self, locale: str, annotation: ast.Annotation) -> Problem:
        place = self.start + (annotation.span.start if annotation.span else 0)
        line = self.text.count("\n", 0, place) + 1
        return Problem(locale, f"{self.file}:{line}", f"cannot be parsed: {annotation.message}")


class Catalogue:
    """The messages and terms (`-name`) of one locale. Of an id that stands twice the first counts.

    Each is parsed at its first use: of a project in 29 locales a process needs few, and all of them take seconds.
    See
    docs/decisions.md#2026-11-29--catalogues-are-parsed-as-they-are-asked-for-and-the-linter-asks-whom-the-renderer-asks.
    """

    def __init__(self, folder: Path) -> None:
        self.locale = folder.name
        self.problems: list[Problem] = []
        self._files: list[_Source] = []
        self._sources: dict[str, _Source] = {}
        self._parsed: dict[str, ast.Message | ast.Term] = {}
        self._fresh: list[ast.Message | ast.Term] = []
        files = sorted(folder.rglob("*.ftl"))
        if not files:
            self.problems.append(Problem(self.locale, ".", "has no .ftl file"))
        if not is_known_locale(self.locale):
            self.problems.append(Problem(self.locale, ".", "is no locale whose plurals, dates and numbers are known"))
        for file in files:
            self._read(file, str(file.relative_to(folder)))

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def entry(self, name: str) -> ast.Message | ast.Term | None:
        """Return a message or term, or None if there is none; raise `BrokenCatalogue` if it cannot be parsed."""
        if name not in self._parsed and name in self._sources:
            source = self._sources[name]
            entry = FluentParser().parse_entry(source.text[source.start :])
            if isinstance(entry, ast.Junk):
                raise BrokenCatalogue("; ".join(str(source.problem_of(self.locale, one)) for one in entry.annotations))
            self._keep(name, cast("ast.Message | ast.Term", entry))
        return self._parsed.get(name)

    def parsed_since(self) -> list[ast.Message | ast.Term]:
        """Return the texts parsed since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh

    @cached_property
    def messages(self) -> dict[str, ast.Message]:
        """All messages that can be parsed; each other one becomes a problem."""
        for source in self._files:
            self._parse(source)
        return {name: entry for name, entry in self._parsed.items() if isinstance(entry, ast.Message)}

    def _read(self, file: Path, name: str) -> None:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            self.problems.append(Problem(self.locale, name, "is not UTF-8"))
            return
        self._files.append(_Source(name, text))
        for found in _ENTRY.finditer(text):
            if found[1] in self._sources:
                self.problems.append(Problem(self.locale, found[1].removeprefix("-"), "stands twice"))
            else:
                self._sources[found[1]] = _Source(name, text, found.start())

    def _keep(self, name: str, entry: ast.Message | ast.Term) -> None:
        if name not in self._parsed:
            self._parsed[name] = entry
            self._fresh.append(entry)

    def _parse(self, source: _Source) -> None:
        junk: set[str] = set()
        for entry in FluentParser().parse(source.text).body:
            if isinstance(entry, ast.Junk):
                self.problems += [source.problem_of(self.locale, one) for one in entry.annotations]
                junk.update(_ENTRY.findall(entry.content or ""))
            elif isinstance(entry, ast.Message | ast.Term):
                name = f"-{entry.id.name}" if isinstance(entry, ast.Term) else entry.id.name
                self._keep(name, entry)
        for name in junk - self._parsed.keys():
            self._sources.pop(name, None)  # Nobody can ask for it.


def read_catalogues(path: Path | str) -> dict[str, Catalogue]:
    """Return the catalogues in `path` by locale. Folders whose names begin with `.` or `_` are none."""
    folders = sorted(folder for folder in Path(path).iterdir() if folder.is_dir() and folder.name[0] not in "._")
    catalogues = {folder.name: Catalogue(folder) for folder in folders}
    first: dict[str, str] = {}
    for locale, catalogue in catalogues.items():
        if (same := first.setdefault(tag_of(locale), locale)) != locale:  # Only one of them would be asked.
            catalogue.problems.append(Problem(locale, ".", f"is the same locale as {same}"))
    return catalogues
