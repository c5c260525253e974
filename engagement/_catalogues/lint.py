"""The faults of catalogues, found before a person could read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fluent.syntax import ast

from engagement._catalogues.catalogue import Catalogue, Problem, read_catalogues
from engagement._catalogues.locales import Chain, tag_of
from engagement._catalogues.needs import may_be_empty, needs_of


def lint_catalogues(
    path: Path | str, *, default: str = "en", fallbacks: Mapping[str, Sequence[str]] | None = None
) -> list[Problem]:
    """Return the faults of the catalogues in `path`, sorted; none if each locale can say all that any locale can.

    `default` and `fallbacks` are those of the `FluentRenderer`: a key that another catalogue of a locale's chain has is
    not missing. A text is at fault if it can be empty, or if it or its attributes have other parameters in another
    locale. So is one that cannot be parsed, stands twice, refers to nothing or to itself, or would show a person the
    name of a variable. Raises `OSError` if `path` cannot be read.
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
        needs = {locale: needs_of(having[locale], key, attribute) for locale in having if attribute in texts[locale]}
        wanted = set[str]().union(*(needed.parameters for needed in needs.values()))
        # A parameter that the default lacks is reported there only, and not for each other locale that lacks it too.
        usual = needs[default].parameters if default in needs else wanted
        for locale in having:
            if attribute not in texts[locale]:
                yield Problem(locale, place, "has no text" if attribute is None else "is missing")
                continue
            for fault in needs[locale].faults:
                yield Problem(locale, place, fault)
            for parameter in (wanted if locale == default else usual) - needs[locale].parameters:
                yield Problem(locale, place, f"does not use ${parameter}, which another locale does")
            if may_be_empty(texts[locale][attribute]):
                yield Problem(locale, place, "can be empty")


def _texts(message: ast.Message) -> dict[str | None, ast.Pattern]:
    texts: dict[str | None, ast.Pattern] = {attribute.id.name: attribute.value for attribute in message.attributes}
    if message.value is not None:
        texts[None] = message.value
    return texts
