"""What is wrong with catalogues of words, found before a person could read it.

A catalogue is a folder that is named for its locale and holds `.ftl` files. Which parameters a message needs, and what
is wrong with it, is read off its syntax tree, through all it refers to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import cast

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


class BrokenCatalogue(RuntimeError):  # noqa: N818 - what happened
    """A text that was asked for cannot be parsed. The message can be said when its catalogue is mended."""


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
    """The messages and terms (`-name`) of one locale, as they are written. Of an id that stands twice the first counts.

    Each is parsed when it is asked for: of a project in 29 locales a process needs few, and all of them take seconds.
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
        """Return what was parsed since this was asked."""
        fresh, self._fresh = self._fresh, []
        return fresh

    @cached_property
    def messages(self) -> dict[str, ast.Message]:
        """All messages that can be parsed; what cannot becomes a problem."""
        for source in self._files:
            self._parse(source)
        return {name: entry for name, entry in self._parsed.items() if isinstance(entry, ast.Message)}

    def needs(self, key: str, attribute: str | None = None) -> Needs:
        """Return what the text of a message, or of one of its attributes, needs."""
        walk = _Walk(self)
        walk.refer(key, attribute, given=None)
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


class Chain:
    """Which catalogues are asked for a text, one after the other.

    The locale, its shorter forms, then the default and its, each followed by what `fallbacks` says of it. They are told
    by tags: `pt_BR.UTF-8` is `pt-br`.
    """

    def __init__(self, known: Iterable[str], default: str, fallbacks: Mapping[str, Sequence[str]] | None) -> None:
        self._known = set(map(tag_of, known))
        self._fallbacks = {tag_of(locale): list(map(tag_of, others)) for locale, others in (fallbacks or {}).items()}
        self._longest = max(map(len, (*self._known, *self._fallbacks)), default=0)
        self._default = tag_of(default)

    def of(self, locale: str) -> list[str]:
        """Return the tags of the catalogues that there are, in their order."""
        tags: list[str] = []
        # What is longer than any tag is none: each form of a locale of 65,000 dashes takes as much memory as the last.
        for tag in (*_shorter_forms(tag_of(locale)[: self._longest + 1]), *_shorter_forms(self._default)):
            tags += [tag, *self._fallbacks.get(tag, ())]
        return [tag for tag in dict.fromkeys(tags) if tag in self._known]


def tag_of(locale: str) -> str:
    """Return the tag by which a locale is known, however it is written."""
    return re.split(r"[.@]", locale, maxsplit=1)[0].replace("_", "-").lower()


def _shorter_forms(tag: str) -> list[str]:
    parts = tag.split("-")
    return ["-".join(parts[:length]) for length in range(len(parts), 0, -1)]


def is_known_locale(locale: str) -> bool:
    """Whether plurals, dates and numbers of a locale are known; else those of the machine's would be taken."""
    try:
        Locale.parse(locale, sep="-")
    except (UnknownLocaleError, ValueError):
        return False
    return True


def lint_catalogues(
    path: Path | str, *, default: str = "en", fallbacks: Mapping[str, Sequence[str]] | None = None
) -> list[Problem]:
    """Return what is wrong in the catalogues in `path`, sorted; nothing if in each locale all can be said that any can.

    `default` and `fallbacks` are those of the `FluentRenderer`: a key that another catalogue of a locale's chain has is
    not missing. Each text is never empty, has the same parameters in each locale, and so have its attributes. What
    cannot be parsed, stands twice, refers to nothing or to itself, or would show a person the name of a variable, is
    wrong too. Raises `OSError` if `path` cannot be read.
    """
    catalogues = read_catalogues(path)
    messages = {locale: catalogue.messages for locale, catalogue in catalogues.items()}
    problems = [problem for catalogue in catalogues.values() for problem in catalogue.problems]
    problems += [Problem("", file.name, "lies outside of a locale's folder") for file in Path(path).glob("*.ftl")]
    if not catalogues:
        problems.append(Problem("", str(path), "holds no folder that is named for a locale"))
    chain = Chain(catalogues, default, fallbacks)
    asked = {locale: chain.of(locale) for locale in catalogues}
    for key in dict.fromkeys(key for of_locale in messages.values() for key in of_locale):
        having = {locale: catalogue for locale, catalogue in catalogues.items() if key in messages[locale]}
        tags = set(map(tag_of, having))
        problems += [Problem(locale, key, "is missing") for locale in catalogues if tags.isdisjoint(asked[locale])]
        problems += _problems_of(key, having, next((one for one in having if tag_of(one) == tag_of(default)), None))
    return sorted(problems, key=lambda problem: (problem.locale, problem.place, problem.problem))


def _problems_of(key: str, having: dict[str, Catalogue], default: str | None) -> Iterator[Problem]:
    texts = {locale: _texts(catalogue.messages[key]) for locale, catalogue in having.items()}
    for attribute in {attribute for of_locale in texts.values() for attribute in of_locale}:
        place = key if attribute is None else f"{key}.{attribute}"
        needs = {locale: having[locale].needs(key, attribute) for locale in having if attribute in texts[locale]}
        wanted = set[str]().union(*(needed.parameters for needed in needs.values()))
        # What the default does not use is told of the default, and not of each other locale that does not either.
        usual = needs[default].parameters if default in needs else wanted
        for locale, catalogue in having.items():
            if attribute not in texts[locale]:
                yield Problem(locale, place, "has no text" if attribute is None else "is missing")
                continue
            for fault in needs[locale].faults:
                yield Problem(locale, place, fault)
            for parameter in (wanted if locale == default else usual) - needs[locale].parameters:
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

    def refer(self, name: str, attribute: str | None, given: frozenset[str] | None) -> None:
        """Read what an entry, or one of its attributes, says."""
        entry = self._catalogue.entry(name)
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
                self.refer(node.id.name, _name(node.attribute), given)
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
        self.refer(f"-{node.id.name}", _name(node.attribute), given)


def _pattern(entry: ast.Message | ast.Term, attribute: str | None) -> ast.Pattern | None:
    if attribute is None:
        return entry.value
    return next((found.value for found in entry.attributes if found.id.name == attribute), None)


def _name(identifier: ast.Identifier | None) -> str | None:
    return None if identifier is None else identifier.name
