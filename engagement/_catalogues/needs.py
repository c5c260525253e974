"""The parameters and faults of a text, read off its syntax tree and those of its references."""

from __future__ import annotations

from dataclasses import dataclass, field

from fluent.syntax import ast

from engagement._catalogues.catalogue import Catalogue

FUNCTIONS = {
    "DATETIME": frozenset({"dateStyle", "timeStyle", "timeZone"}),
    "NUMBER": frozenset(
        {"style", "currency", "currencyDisplay", "useGrouping", "minimumIntegerDigits", "minimumFractionDigits"}
        | {"maximumFractionDigits", "minimumSignificantDigits", "maximumSignificantDigits"}
    ),
}
"""The functions that a catalogue may call, and their options with an effect."""


@dataclass(slots=True)
class Needs:
    """The `parameters` that a text needs. With `faults` it cannot be said with any parameters."""

    parameters: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)


def needs_of(catalogue: Catalogue, key: str, attribute: str | None = None) -> Needs:
    """Return the needs of a message's text, or of one of its attributes."""
    walk = _Walk(catalogue)
    walk.refer(key, attribute, given=None)
    return Needs(walk.parameters, list(dict.fromkeys(walk.faults)))


def may_be_empty(pattern: ast.Pattern) -> bool:
    """Whether some choice of variants leaves nothing of the text; a parameter counts as something."""
    return all(map(_may_be_empty, pattern.elements))


def _may_be_empty(node: ast.SyntaxNode) -> bool:
    match node:
        case ast.TextElement():
            return not node.value.strip()
        case ast.StringLiteral():
            return not node.parse()["value"].strip()
        case ast.Placeable():
            return _may_be_empty(node.expression)
        case ast.SelectExpression():
            return any(may_be_empty(variant.value) for variant in node.variants)
        case _:
            return False


class _Walk:
    """One reading of a text and of its references.

    `given` is None where parameters are seen. Inside a term it holds the arguments of the reference: a term sees
    nothing else, and Fluent shows the bare name of a missing argument without calling it an error.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.parameters: set[str] = set()
        self.faults: list[str] = []
        self._catalogue = catalogue
        self._under_way: list[str] = []

    def refer(self, name: str, attribute: str | None, given: frozenset[str] | None) -> None:
        """Read the text of an entry, or of one of its attributes."""
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
