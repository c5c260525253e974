"""Words from catalogues: ours, how a key and a locale find theirs, never a placeholder, and the linter."""

import re
import threading
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import outgoing
from hypothesis import given, settings
from hypothesis import strategies as st

from engagement import NotSent, words
from engagement._catalogues.catalogue import BrokenCatalogue, Problem, read_catalogues
from engagement._catalogues.lint import lint_catalogues
from engagement.transports.rendering import words_of
from engagement.words import CATALOGUES, FluentRenderer, LocaleUnknown, NoWords, fluent_id, speaking

DOCS = Path(__file__).parent.parent / "docs" / "words.md"
PARAMS = {"name": "Ana", "days": 14, "done": 2, "open": 3, "at": "19:30", "day": "2025-11-21"}
EMOJI = re.compile(r"[\u203c-\u3299\U0001f000-\U0001faff]")
MARKS = re.compile(r"[\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(name="catalogues")
def _catalogues(tmp_path):
    """Write catalogues, by locale, into a folder of their own."""

    def write(**texts):
        for locale, text in texts.items():
            folder = tmp_path / locale.replace("_", "-")
            folder.mkdir(exist_ok=True)
            (folder / "messages.ftl").write_text(text, encoding="utf-8")
        return tmp_path

    return write


# The catalogues that we ship


def shipped_keys():
    return sorted(read_catalogues(CATALOGUES)["en"].messages)


def test_the_shipped_catalogues_are_without_a_problem():
    """Each shipped message exists in each language, with the same parameters."""
    assert lint_catalogues(CATALOGUES) == []
    assert set(read_catalogues(CATALOGUES)) == {"en", "pt-BR"}


@pytest.mark.parametrize("locale", ["en", "pt-BR"])
@pytest.mark.parametrize("number", [0, 1, 2, 21, 1_000_000])
def test_shipped_messages_are_whole_and_have_at_most_one_emoji(locale, number):
    """Whatever the numbers: no braces, no variable, no invisible mark, and at most one emoji."""
    renderer = FluentRenderer()

    for key in shipped_keys():
        text = renderer(key, PARAMS | {"days": number, "done": number, "open": number}, locale)
        assert not re.search(r"[{}$]", text)
        assert not MARKS.search(text)
        assert len(EMOJI.findall(text)) <= 1


@pytest.mark.parametrize("locale", ["en", "pt-BR"])
@pytest.mark.parametrize("key", ["goodbye.14_days", "goodbye.30_days"])
def test_a_goodbye_offers_its_three_answers(locale, key):
    """The person is told that 1 keeps in touch, 2 pauses and 3 stops, each on a line of its own."""
    lines = FluentRenderer()(key, PARAMS, locale).splitlines()

    wanted = {"en": ("keep in touch", "Pause", "Stop"), "pt-BR": ("contato", "pausa", "Parar")}[locale]
    for number, word in enumerate(wanted, start=1):
        assert any(re.match(rf"{number} \W .*{word}", line) for line in lines)


@pytest.mark.parametrize(
    ("locale", "number", "said"),
    [
        ("en", 0, "Nothing got finished"),
        ("en", 1, "You finished one thing."),
        ("en", 2, "You finished 2 things."),
        ("en", 1234, "You finished 1,234 things."),
        ("pt-BR", 0, "Nada foi concluído"),
        ("pt-BR", 1, "Você concluiu uma coisa."),
        ("pt-BR", 2, "Você concluiu 2 coisas."),
        ("pt-BR", 1234, "Você concluiu 1.234 coisas."),
    ],
)
def test_plurals_and_numbers_follow_the_locale(locale, number, said):
    """None, one and many are said as one says them, with the thousands as they are written there."""
    assert said in FluentRenderer()("weekly_review.summary", PARAMS | {"done": number}, locale)


@pytest.mark.parametrize(
    ("locale", "said"), [("en", "Friday, November 21, 2025"), ("pt-BR", "sexta-feira, 21 de novembro de 2025")]
)
def test_a_date_follows_the_locale(locale, said):
    """An ISO date that the catalogue declares to be a date is written as one writes it there."""
    assert said in FluentRenderer()("reminder.day", PARAMS, locale)


# From a key to an entry, and from a locale to a catalogue


@pytest.mark.parametrize(
    ("key", "name"), [("goodbye.14_days", "goodbye-14_days"), ("goodbye-day14", "goodbye-day14"), ("a.b.C", "a-b-C")]
)
def test_a_key_is_an_id_with_hyphens_for_its_dots(key, name):
    """Dots become hyphens, and nothing else changes."""
    assert fluent_id(key) == name


@pytest.mark.parametrize("key", ["14.days", "a b", "-brand", "a/b", "saudação", "a:b", ".a", "a\n"])
def test_a_key_that_is_no_id_has_no_words(key):
    """What could not stand in a catalogue is said to be no key, and a term cannot be sent."""
    with pytest.raises(NoWords, match="no key"):
        fluent_id(key)


@pytest.mark.parametrize(
    ("locale", "said"),
    [
        ("pt-BR", "pt-BR"),
        ("pt_br", "pt-BR"),
        ("pt_BR.UTF-8", "pt-BR"),
        ("pt-BR-x-formal", "pt-BR"),
        ("pt", "pt"),
        ("pt-PT", "pt"),
        ("gl", "pt"),
        ("gl-ES-x-not-in-any-catalogue", "pt"),
        ("en-GB", "en"),
        ("de", "en"),
        ("", "en"),
    ],
)
def test_a_locale_falls_back_to_shorter_forms_and_then_to_the_default(catalogues, locale, said):
    """`pt-PT` without a catalogue is said as `pt`, what has `fallbacks` as they say, all else in the default."""
    path = catalogues(en="who = en", pt="who = pt", pt_BR="who = pt-BR")

    assert FluentRenderer(path, fallbacks={"gl": ["es", "pt"]})("who", {}, locale) == said


@pytest.mark.parametrize("part", ["-", "_", "a-", "a", "pt-BR-", "@", ".", "-\u0301"])
def test_a_locale_takes_time_and_memory_in_proportion_to_its_length(part):
    """A locale comes with the params: whatever it is, twice as much of it takes twice as long, not four times."""
    renderer = FluentRenderer()

    def seconds(length: int) -> float:
        locale = (part * length)[:length]

        def once() -> float:
            began = time.thread_time()
            assert "3" in renderer("goodbye.14_days", PARAMS | {"days": 3}, locale)
            return time.thread_time() - began

        return min(once() for _ in range(3))

    assert seconds(40_000) < 3 * seconds(20_000) + 0.05
    tracemalloc.start()
    seconds(40_000)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_a_key_falls_back_by_itself(catalogues):
    """A text that one locale lacks is taken from the next one, with the plurals and numbers of that one."""
    renderer = FluentRenderer(catalogues(en="only-en = { $n }", pt="other = x", pt_BR="other = y"))

    assert renderer("only-en", {"n": 1234.5}, "pt-BR") == "1,234.5"
    assert renderer("other", {}, "pt-BR") == "y"
    with pytest.raises(NoWords, match="no catalogue"):
        renderer("other", {}, "en")


# Never a placeholder


BROKEN = {
    "parameter": "hi = Hi { $nobody }",
    "selector": "hi = { $nobody ->\n    [one] a\n   *[other] b\n }",
    "function-argument": "hi = { NUMBER($nobody) }",
    "reference": "hi = Hi { other }",
    "attribute": "hi = Hi { hey.there }\nhey = x",
    "term": "hi = Hi { -brand }",
    "function": 'hi = { UPPER("x") }',
    "itself": "hi = Hi { hi }",
    "term-parameter": "-brand = Foo { $case }\nhi = Hi { -brand }",
    "term-parameter-of-the-message": "-brand = Foo { $name }\nhi = Hi { -brand } { $name }",
    "message-in-term": "-brand = { hey }\nhey = { $name }\nhi = Hi { -brand }",
    "term-positional": '-brand = Foo\nhi = Hi { -brand("x") }',
    "no-value": "hi =\n    .title = Hi",
    "empty": 'hi = { "" }',
    "blank": 'hi = { " " }{ "\\u200B" }',
    "a-list": "hi = { $list }",
    "an-object": "hi = { $object }",
    "null": "hi = { $null }",
    "null-in-selector": "hi = { $null ->\n    [one] a\n   *[other] b\n }",
    "too-long": "hi = Hi { $long }!",
    "date-of-text": "hi = { DATETIME($name) }",
    "date-of-number": "hi = { DATETIME($n) }",
    "date-option": 'hi = { DATETIME($day, month: "long") }',
    "time-of-date": 'hi = { DATETIME($day, timeStyle: "short") }',
    "zone": 'hi = { DATETIME($moment, timeZone: "Mars/Olympus") }',
    "number-of-text": "hi = { NUMBER($name) }",
    "number-option": 'hi = { NUMBER($n, style: "roman") }',
}
GIVEN = {
    "name": "Zoraide",
    "n": 3,
    "day": "2025-11-21",
    "moment": "2025-11-21T13:30:00-03:00",
    "list": ["Zoraide"],
    "object": {"Zoraide": 1},
    "null": None,
    "long": "Zoraide" * 1000,
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_said_whole_is_not_said(catalogues, what):
    """Missing, unresolved, empty or unfit: an error that names it and quotes no parameter, never a placeholder."""
    renderer = FluentRenderer(catalogues(en=BROKEN[what]))

    with pytest.raises(NoWords) as caught:
        renderer("hi", GIVEN, "en")

    assert "Zoraide" not in str(caught.value)
    assert str(caught.value).startswith("hi in en")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hi = Hi { $name }!", "Hi Zoraide!"),
        ("hi = { $n }", "3"),
        ("hi = { $yes ->\n    [true] a\n   *[false] b\n }", "a"),
        (
            '-brand = { $case ->\n    [gen] Foo\'s\n   *[nom] Foo\n }\nhi = { -brand } { -brand(case: "gen") }',
            "Foo Foo's",
        ),
        ('-brand = Foo { $x }\nhi = { -brand(x: "bar") }', "Foo bar"),
        ("hi = { hey.there }\nhey =\n    .there = { $name }", "Zoraide"),
        ('hi = { DATETIME($day, dateStyle: "short") }', "11/21/25"),
        ('hi = { DATETIME($moment, timeStyle: "short") }', "1:30 PM"),
        ('hi = { DATETIME($moment, timeZone: "UTC", timeStyle: "short") }', "4:30 PM"),
        ("hi = { NUMBER($n, minimumFractionDigits: 2) }", "3.00"),
        ("\ufeffhi = with a byte order mark", "with a byte order mark"),
    ],
)
def test_what_can_be_said_is_said(catalogues, text, said):
    """Parameters, variants, terms with arguments, attributes, dates, times and numbers, without isolation marks."""
    spoken = FluentRenderer(catalogues(en=text))("hi", GIVEN | {"yes": True}, "en")
    assert spoken.replace("\u202f", " ") == said  # the space before PM differs between versions of CLDR


@pytest.mark.parametrize(
    ("texts", "options", "problem"),
    [
        ({"en": "hi = Hi {"}, {}, "messages.ftl:1"),
        ({"en": "hi = Hi\nhi = again"}, {}, "twice"),
        ({"en": "hi = Hi", "zz_ZZ": "hi = Hi"}, {}, "zz-ZZ"),
        ({"en": "hi = Hi"}, {"default": "pt"}, "default"),
        ({}, {}, "default"),
    ],
)
def test_broken_catalogues_stop_the_renderer_at_its_start(catalogues, texts, options, problem):
    """What cannot be parsed, or has no default, is found when the renderer is made, not when a person is waiting."""
    with pytest.raises(ValueError, match=problem):
        FluentRenderer(catalogues(**texts), **options)


def test_only_what_is_asked_for_is_parsed(catalogues):
    """What another locale holds costs nothing before somebody needs it, broken or not; then it may be mended."""
    path = catalogues(
        en="hi = Hi\nyo = Yo",
        pt="-b = { $x }\n# Comment\nhi = Oi { -b(x: 1) }\n    .t = x\n"
        "yo = { $n ->\n[1] um\n*[other] {\nhi\n}\n}!\nno = {",
        de="hi = Hi {\nyo = { hi }",
    )
    renderer = FluentRenderer(path)

    assert renderer("hi", {}, "en") == "Hi"
    assert (renderer("yo", {"n": 2}, "pt"), renderer("yo", {"n": 1}, "pt")) == ("Oi 1!", "um!")
    for key, locale, line in [("no", "pt", 11), ("hi", "de", 2), ("yo", "de", 2)]:
        with pytest.raises(BrokenCatalogue, match=f"^{locale}: messages.ftl:{line}: cannot be parsed"):
            renderer(key, {}, locale)
    say = speaking(renderer, lambda _: "de")
    assert words_of(say, outgoing(message_key="hi")) == NotSent("render raised BrokenCatalogue")


def test_a_path_without_catalogues_is_refused_at_the_start(tmp_path):
    """A wrong path is told at once."""
    with pytest.raises(ValueError, match="no folder"):
        FluentRenderer(tmp_path / "nowhere")


def test_a_locale_that_stands_twice_is_told(tmp_path):
    """Of two folders that are one locale only one would be asked: neither is quietly left out."""
    for folder in ("en", "pt-BR", "pt-br"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "messages.ftl").write_text("hi = Hi")

    assert [str(found) for found in lint_catalogues(tmp_path)] == ["pt-br: .: is the same locale as pt-BR"]
    with pytest.raises(ValueError, match="is the same locale as pt-BR"):
        FluentRenderer(tmp_path)


def test_threads_share_a_renderer():
    """One renderer speaks to many people at once, each in their language, and mixes nothing up."""
    renderer = FluentRenderer()
    start = threading.Barrier(8)
    wrong = []

    def speak(number):
        name, locale = f"Person{number}", ("en", "pt-BR")[number % 2]
        start.wait()
        for done in range(100):
            text = renderer("weekly_review.summary", {"name": name, "done": done + 2, "open": 1}, locale)
            said = f"You finished {done + 2} things" if locale == "en" else f"Você concluiu {done + 2} coisas"
            if name not in text or said not in text:
                wrong.append(text)

    threads = [threading.Thread(target=speak, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []


# Around a transport


def test_a_host_that_only_configures_has_a_render(catalogues, monkeypatch):
    """`engagement.words:render` speaks from ENGAGEMENT_CATALOGUES; broken ones stop it before anything is claimed."""
    message = outgoing(message_key="hi", message_params={"locale": "pt-BR"})

    monkeypatch.setenv("ENGAGEMENT_CATALOGUES", str(catalogues(en="hi = Hi", pt="hi = Oi")))
    assert words.render(message) == "Oi"
    assert words.render(outgoing(message_key="hi", message_params={})) == "Hi"

    catalogues(en="hi = {")
    with pytest.raises(ValueError, match="cannot be parsed"):
        words.render  # noqa: B018 - as a command that looks it up
    monkeypatch.delenv("ENGAGEMENT_CATALOGUES")
    assert words.render(outgoing(message_params={"name": "Ana", "days": 3})).startswith("Hi Ana")
    with pytest.raises(AttributeError):
        words.nothing  # noqa: B018 - likewise
    assert isinstance(LocaleUnknown(), RuntimeError)


# The linter


@pytest.mark.parametrize(
    ("texts", "problems"),
    [
        ({"en": "hi = Hi { $a }", "pt": "hi = Oi { $a }"}, []),
        # What another catalogue of the chain answers is not missing.
        ({"en": "hi = Hi\nyo = Yo", "pt": "hi = Oi"}, []),
        ({"en": "hi = Hi", "pt": "hi = Oi\nyo = Yo"}, ["en: yo: is missing"]),
        (
            {"en": "hi = Hi", "pt": "hi = Oi\nyo = Yo", "pt_BR": "hi = Oi", "de": "hi = Ho"},
            ["de: yo: is missing", "en: yo: is missing"],
        ),
        ({"pt": "hi = Oi\nyo = Yo", "de": "hi = Ho"}, ["de: yo: is missing"]),
        # What one translator made up is told once, and not of each other locale.
        (
            {"en": "hi = { $a }", "pt": "hi = { $a } { $b }", "de": "hi = { $a }", "fr": "hi = { $a }"},
            ["en: hi: does not use $b, which another locale does"],
        ),
        ({"en": "hi = Hi { $a }", "pt": "hi = Oi"}, ["pt: hi: does not use $a, which another locale does"]),
        (
            {"en": "hi = Hi { $name }", "pt": "hi = Oi { $nome }"},
            [
                "en: hi: does not use $nome, which another locale does",
                "pt: hi: does not use $name, which another locale does",
            ],
        ),
        # Wherever a parameter is used: selector, variant, function, another message, an attribute.
        (
            {"en": "hi = { $n ->\n   *[other] x\n }", "pt": "hi = x"},
            ["pt: hi: does not use $n, which another locale does"],
        ),
        (
            {"en": "hi = { 1 ->\n   *[other] { NUMBER($n) }\n }", "pt": "hi = x"},
            ["pt: hi: does not use $n, which another locale does"],
        ),
        (
            {"en": "hi = { yo }\nyo = { $n }", "pt": "hi = x\nyo = { $n }"},
            ["pt: hi: does not use $n, which another locale does"],
        ),
        (
            {"en": "hi = x\n    .t = { $n }", "pt": "hi = x\n    .t = y"},
            ["pt: hi.t: does not use $n, which another locale does"],
        ),
        ({"en": "hi = x\n    .t = y", "pt": "hi = x"}, ["pt: hi.t: is missing"]),
        ({"en": "hi = x\n    .t = y", "pt": "hi =\n    .t = y"}, ["pt: hi: has no text"]),
        # What a term is given is the catalogue's own affair.
        ({"en": "-b = { $x }\nhi = { -b(x: 1) }", "pt": "-b = y\nhi = { -b }"}, []),
        ({"en": "-b = { $x ->\n   *[a] y\n }\nhi = { -b }"}, []),
        ({"en": "-b = y { $x }\nhi = { -b }"}, ["en: hi: would show the name of $x, which -b is not given"]),
        ({"en": "-b = { yo }\nyo = { $x }\nhi = { -b }"}, ["en: hi: would show the name of $x, which yo is not given"]),
        (
            {"en": "hi = { yo } { -b } { hi.t }"},
            [
                "en: hi: refers to -b, which has no text",
                "en: hi: refers to hi.t, which has no text",
                "en: hi: refers to yo, which has no text",
            ],
        ),
        ({"en": "hi = { hi }"}, ["en: hi: refers to itself through hi"]),
        ({"en": 'hi = { UPPER("x") }'}, ["en: hi: calls UPPER, which does not exist"]),
        (
            {"en": 'hi = { DATETIME($d, month: "long") }'},
            ["en: hi: gives DATETIME the option month, which has no effect"],
        ),
        ({"en": '-b = y\nhi = { -b("x") }'}, ["en: hi: gives -b a positional argument, which has no effect"]),
        # Empty, always or in one variant.
        ({"en": 'hi = { "" }'}, ["en: hi: can be empty"]),
        ({"en": 'hi = { $n ->\n    [0] { "" }\n   *[other] x\n }'}, ["en: hi: can be empty"]),
        ({"en": 'hi = x{ $n ->\n    [0] { "" }\n   *[other] x\n }'}, []),
        # What cannot be parsed is one problem, and the rest is read on.
        ({"en": "hi = Hi {\nyo = Yo\n"}, ['en: messages.ftl:2: cannot be parsed: Expected token: "}"']),
        ({"en": "hi = Hi\n\nyo\n", "pt": "hi = Oi"}, ['en: messages.ftl:3: cannot be parsed: Expected token: "="']),
        ({"en": "hi = Hi\nhi = Ho"}, ["en: hi: stands twice"]),
        ({"xx_YY": "hi = Hi"}, ["xx-YY: .: is no locale whose plurals, dates and numbers are known"]),
    ],
)
def test_the_linter_finds_what_is_wrong(catalogues, texts, problems):
    """Missing keys, other parameters, references to nothing, empty texts, what cannot be parsed; and nothing else."""
    found = lint_catalogues(catalogues(**texts))

    assert list(map(str, found)) == problems


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({}, ["ca", "en", "gl"]),
        ({"default": "es"}, []),
        ({"fallbacks": {"gl": ["es"]}}, ["ca", "en"]),
        ({"fallbacks": {"en": ["es"]}}, []),
        ({"default": "en", "fallbacks": {"GL": ["fr", "es_ES"], "ca": ["es"]}}, ["ca", "en", "gl"]),
    ],
)
def test_the_linter_asks_the_catalogues_that_the_renderer_asks(catalogues, options, missing):
    """Told with the renderer's default and fallbacks, what is missing is what the renderer could not say."""
    path = catalogues(en="hi = Hi", es="hi = Ola\nyo = Yo", gl="hi = Ola", ca="hi = Hola")
    options = {"fallbacks": {}} | options
    if "ca" in options["fallbacks"]:
        options["fallbacks"]["ca"] = ["fr"]
    renderer = FluentRenderer(path, **options)

    assert [(found.locale, found.problem) for found in lint_catalogues(path, **options)] == [
        (locale, "is missing") for locale in missing
    ]
    for locale in ("en", "es", "gl", "ca"):
        if locale in missing:
            with pytest.raises(NoWords):
                renderer("yo", {}, locale)
        else:
            assert renderer("yo", {}, locale) == "Yo"


def test_the_linter_finds_files_that_nobody_reads(tmp_path):
    """A file beside the folders, a folder without a file, a file that is no UTF-8, and no folder at all, are told."""
    assert [found.problem for found in lint_catalogues(tmp_path)] == ["holds no folder that is named for a locale"]

    (tmp_path / "messages.ftl").write_text("hi = Hi")
    for locale in ("en", "pt", "_drafts", ".git"):
        (tmp_path / locale).mkdir()
    (tmp_path / "pt" / "messages.ftl").write_bytes("hi = Olá".encode("latin-1"))

    assert lint_catalogues(tmp_path) == [
        Problem("", "messages.ftl", "lies outside of a locale's folder"),
        Problem("en", ".", "has no .ftl file"),
        Problem("pt", "messages.ftl", "is not UTF-8"),
    ]
    with pytest.raises(FileNotFoundError):
        lint_catalogues(tmp_path / "nowhere")


PIECES = st.sampled_from(
    [
        *("Hi ", "{ $a }", "{ NUMBER($n) }", "{ yo }", "{ yo.t }", "{ -b }", "{ -c }", "{ hi }", "{ NOPE(1) }"),
        *('{ -b(x: "v") }', '{ "" }', "{ $a ->\n   *[k] { yo }\n }"),
        "{ $n ->\n    [0] none\n    [one] { $a }\n   *[other] { -b }\n }",
    ]
)
TEXTS = st.lists(PIECES, min_size=1, max_size=3).map("".join)


@settings(max_examples=120, deadline=None)
@given(TEXTS, TEXTS, TEXTS, st.integers(0, 3))
def test_what_the_linter_passes_can_be_said_and_shows_no_name(tmp_path_factory, hi, yo, term, number):
    """A catalogue without a problem is said with its parameters, whole; one with a fault is never said."""
    path = tmp_path_factory.mktemp("catalogues")
    (path / "en").mkdir()
    (path / "en" / "m.ftl").write_text(
        f"hi = {hi}\nyo = {yo}\n    .t = title\n-b = b {'{ $x }'}{term}\n-c = c", "utf-8"
    )
    problems = [problem for problem in lint_catalogues(path) if problem.place == "hi"]
    params = {"a": "VALUE", "n": number}

    if problems and problems != [Problem("en", "hi", "can be empty")]:
        with pytest.raises(NoWords):
            FluentRenderer(path)("hi", params, "en")
        return
    try:
        text = FluentRenderer(path)("hi", params, "en")
    except NoWords as error:
        assert str(error) == "hi in en is empty"  # noqa: PT017 - the one thing that depends on references
        return
    assert not re.search(r"[{}$]|\bx\b", text)


# The page about it


def test_the_python_of_the_page_runs(engine):
    """What docs/words.md shows is what happens."""
    blocks = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    people = {"ana": SimpleNamespace(locale="pt-BR", timezone="America/Sao_Paulo", jid="5511999999999@s.whatsapp.net")}
    names = {"engine": engine, "people": people}

    for block in blocks:
        exec(block, names)

    assert len(blocks) >= 3
