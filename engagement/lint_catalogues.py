"""What is wrong with catalogues of words, found before a person could read it.

A catalogue is a folder that is named for its locale and holds `.ftl` files. Which parameters a message needs, and what
is wrong with it, is read off its syntax tree, through all it refers to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from babel import Locale, UnknownLocaleError
from fluent.syntax import FluentParser, ast

FUNCTIONS = {
    "DATETIME": frozenset({"dateStyle", "timeStyle", "timeZone"}),
    "NUMBER": frozenset(
        {"style", "currency", "currencyDisplay", "useGrouping", "minimumIntegerDigits", "minimumFractionDigits"}
        | {"maximumFractionDigits", "minimumSignificantDigits", "maximumSignificantDigits"}
    ),
}
"""What a catalogue may call, and the options that have an effect."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in the catalogue of `locale`; `place` is a key, or a file and line."""

    locale: str
    place: str
    problem: str

    def __str__(self) -> str:
        return f"{self.locale}: {self.place}: {self.problem}"


@dataclass(slots=True)
class Needs:
    """What one text needs to be said: `parameters`. `faults` are why it cannot be said, whatever the parameters."""

    parameters: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)


class Catalogue:
    """The messages and terms of one locale, as they are written. Of an id that stands twice the first counts."""

    def __init__(self, folder: Path) -> None:
        self.locale = folder.name
        self.messages: dict[str, ast.Message] = {}
        self.terms: dict[str, ast.Term] = {}
        self.problems: list[Problem] = []
        files = sorted(folder.rglob("*.ftl"))
        if not files:
            self.problems.append(Problem(self.locale, ".", "has no .ftl file"))
        if not is_known_locale(self.locale):
            self.problems.append(Problem(self.locale, ".", "is no locale whose plurals, dates and numbers are known"))
        for file in files:
            self._read(file, str(file.relative_to(folder)))

    def needs(self, key: str, attribute: str | None = None) -> Needs:
        """Return what the text of a message, or of one of its attributes, needs."""
        walk = _Walk(self)
        walk.refer(self.messages.get(key), key, attribute, given=None)
        return Needs(walk.parameters, list(dict.fromkeys(walk.faults)))

    def may_be_empty(self, pattern: ast.Pattern) -> bool:
        """Whether some choice of variants leaves nothing of the text; a parameter counts as something."""
        return all(_may_be_empty(element) for element in pattern.elements)

    def _read(self, file: Path, name: str) -> None:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            self.problems.append(Problem(self.locale, name, "is not UTF-8"))
            return
        for entry in FluentParser().parse(text).body:
            if isinstance(entry, ast.Junk):
                self._report_junk(entry, text, name)
            elif isinstance(entry, ast.Message):
                self._add(self.messages, entry.id.name, entry)
            elif isinstance(entry, ast.Term):
                self._add(self.terms, entry.id.name, entry)

    def _add(self, entries: dict[str, ast.Message] | dict[str, ast.Term], name: str, entry: ast.Entry) -> None:
        if name in entries:
            self.problems.append(Problem(self.locale, name, "stands twice"))
        else:
            entries[name] = entry  # type: ignore[assignment]  # the caller pairs them

    def _report_junk(self, junk: ast.Junk, text: str, name: str) -> None:
        for annotation in junk.annotations:
            line = text.count("\n", 0, annotation.span.start if annotation.span else 0) + 1
            self.problems.append(Problem(self.locale, f"{name}:{line}", f"cannot be parsed: {annotation.message}"))


def read_catalogues(path: Path | str) -> dict[str, Catalogue]:
    """Return the catalogues in `path` by locale. Folders whose names begin with `.` or `_` are none."""
    folders = sorted(folder for folder in Path(path).iterdir() if folder.is_dir() and folder.name[0] not in "._")
    return {folder.name: Catalogue(folder) for folder in folders}


def is_known_locale(locale: str) -> bool:
    """Whether plurals, dates and numbers of a locale are known; else those of the machine's would be taken."""
    try:
        Locale.parse(locale, sep="-")
    except (UnknownLocaleError, ValueError):
        return False
    return True


def lint_catalogues(path: Path | str) -> list[Problem]:
    """Return what is wrong in the catalogues in `path`, sorted; nothing if each locale can say all that any can.

    Each key must exist in each locale, with a text that is never empty and the same parameters, and so must its
    attributes. What cannot be parsed, stands twice, refers to nothing or to itself, or would show a person the name of
    a variable, is wrong too. Raises `OSError` if `path` cannot be read.
    """
    catalogues = read_catalogues(path)
    problems = [problem for catalogue in catalogues.values() for problem in catalogue.problems]
    problems += [Problem("", file.name, "lies outside of a locale's folder") for file in Path(path).glob("*.ftl")]
    if not catalogues:
        problems.append(Problem("", str(path), "holds no folder that is named for a locale"))
    for key in {key for catalogue in catalogues.values() for key in catalogue.messages}:
        problems += _problems_of(key, catalogues)
    return sorted(problems, key=lambda problem: (problem.locale, problem.place, problem.problem))


def _problems_of(key: str, catalogues: dict[str, Catalogue]) -> Iterator[Problem]:
    having = {locale: catalogue for locale, catalogue in catalogues.items() if key in catalogue.messages}
    for locale in catalogues.keys() - having.keys():
        yield Problem(locale, key, "is missing")
    texts = {locale: _texts(catalogue.messages[key]) for locale, catalogue in having.items()}
    for attribute in {attribute for of_locale in texts.values() for attribute in of_locale}:
        place = key if attribute is None else f"{key}.{attribute}"
        needs = {locale: having[locale].needs(key, attribute) for locale in having if attribute in texts[locale]}
        wanted = set[str]().union(*(needed.parameters for needed in needs.values()))
        for locale, catalogue in having.items():
            if attribute not in texts[locale]:
                yield Problem(locale, place, "has no text" if attribute is None else "is missing")
                continue
            for fault in needs[locale].faults:
                yield Problem(locale, place, fault)
            for parameter in wanted - needs[locale].parameters:
                yield Problem(locale, place, f"does not use ${parameter}, which another locale does")
            if catalogue.may_be_empty(texts[locale][attribute]):
                yield Problem(locale, place, "can be empty")


def _texts(message: ast.Message) -> dict[str | None, ast.Pattern]:
    texts: dict[str | None, ast.Pattern] = {attribute.id.name: attribute.value for attribute in message.attributes}
    if message.value is not None:
        texts[None] = message.value
    return texts


def _may_be_empty(node: ast.SyntaxNode) -> bool:
    match node:
        case ast.TextElement():
            return not node.value.strip()
        case ast.StringLiteral():
            return not node.parse()["value"].strip()
        case ast.Placeable():
            return _may_be_empty(node.expression)
        case ast.SelectExpression():
            return any(all(map(_may_be_empty, variant.value.elements)) for variant in node.variants)
        case _:
            return False


class _Walk:
    """One reading of a text and of all that it refers to.

    `given` is None where parameters are seen. Inside a term it is what the reference to the term passes: nothing else
    is seen there, and Fluent shows the bare name of what is missing without calling it an error.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.parameters: set[str] = set()
        self.faults: list[str] = []
        self._catalogue = catalogue
        self._under_way: list[str] = []

    def refer(
        self,
        entry: ast.Message | ast.Term | None,
        name: str,
        attribute: str | None,
        given: frozenset[str] | None,
    ) -> None:
        """Read what an entry, or one of its attributes, says."""
        full_name = name if attribute is None else f"{name}.{attribute}"
        if full_name in self._under_way:
            self.faults.append(f"refers to itself through {full_name}")
            return
        pattern = None if entry is None else _pattern(entry, attribute)
        if pattern is None:
            self.faults.append(f"refers to {full_name}, which has no text" if self._under_way else "has no text")
            return
        self._under_way.append(full_name)
        self._read(pattern, given)
        self._under_way.pop()

    def _read(self, pattern: ast.Pattern, given: frozenset[str] | None) -> None:
        for element in pattern.elements:
            if isinstance(element, ast.Placeable):
                self._express(element.expression, given, is_shown=True)

    def _express(self, node: ast.SyntaxNode, given: frozenset[str] | None, *, is_shown: bool) -> None:
        match node:
            case ast.Placeable():
                self._express(node.expression, given, is_shown=is_shown)
            case ast.SelectExpression():
                self._express(node.selector, given, is_shown=False)
                for variant in node.variants:
                    self._read(variant.value, given)
            case ast.VariableReference():
                self._use(node.id.name, given, is_shown=is_shown)
            case ast.FunctionReference():
                self._call(node, given, is_shown=is_shown)
            case ast.MessageReference():
                entry = self._catalogue.messages.get(node.id.name)
                self.refer(entry, node.id.name, _name(node.attribute), given)
            case ast.TermReference():
                self._refer_to_term(node)

    def _use(self, name: str, given: frozenset[str] | None, *, is_shown: bool) -> None:
        if given is None:
            self.parameters.add(name)
        elif is_shown and name not in given:
            self.faults.append(f"would show the name of ${name}, which {self._under_way[-1]} is not given")

    def _call(self, node: ast.FunctionReference, given: frozenset[str] | None, *, is_shown: bool) -> None:
        name = node.id.name
        if name not in FUNCTIONS:
            self.faults.append(f"calls {name}, which does not exist")
        for argument in node.arguments.named:
            if name in FUNCTIONS and argument.name.name not in FUNCTIONS[name]:
                self.faults.append(f"gives {name} the option {argument.name.name}, which has no effect")
        for positional in node.arguments.positional:
            self._express(positional, given, is_shown=is_shown)

    def _refer_to_term(self, node: ast.TermReference) -> None:
        arguments = node.arguments
        if arguments and arguments.positional:
            self.faults.append(f"gives -{node.id.name} a positional argument, which has no effect")
        given = frozenset(argument.name.name for argument in arguments.named) if arguments else frozenset[str]()
        self.refer(self._catalogue.terms.get(node.id.name), f"-{node.id.name}", _name(node.attribute), given)


def _pattern(entry: ast.Message | ast.Term, attribute: str | None) -> ast.Pattern | None:
    if attribute is None:
        return entry.value
    return next((found.value for found in entry.attributes if found.id.name == attribute), None)


def _name(identifier: ast.Identifier | None) -> str | None:
    return None if identifier is None else identifier.name
