"""CONTRIBUTING.md and the pages beside it are true: what they name is there, and what they break goes red."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest
from shell import ROOT

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
FILE = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|md|toml|yaml)|\.ci/run|[\w-]+/[\w/-]+)`")
PLACE = re.compile(r"`([\w/]+\.py):([\w.]+)`")


def defined_in(source: str) -> set[str]:
    """Return the names that a module defines, those of classes as `Class.name`."""
    names = set()

    def add(node: ast.AST, within: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(within + child.name)
                add(child, f"{within}{child.name}.")
            elif isinstance(child, ast.Assign | ast.AnnAssign):
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                names.update(within + target.id for target in targets if isinstance(target, ast.Name))

    add(ast.parse(source), "")
    return names


def test_the_architecture_names_what_is_there():
    """Each `file:name` is a definition in that file of the package, so the page cannot outlive what it describes."""
    places = PLACE.findall(ARCHITECTURE)

    assert len(places) >= 30
    for path, name in places:
        assert name in defined_in((ROOT / "engagement" / path).read_text()), (path, name)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md", "docs/glossary.md"])
def test_every_file_that_a_page_names_is_there(page):
    """A path is one from the top or below `engagement/`; a name alone may be of any folder there."""
    text = (ROOT / page).read_text()
    named = {path for path in FILE.findall(text) if "{" not in path}
    linked = {target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text)}

    assert not [path for path in named if not found(path)]
    assert not [target for target in linked if not (ROOT / page).parent.joinpath(target).exists()]


def found(path: str) -> bool:
    below = ROOT / "engagement"
    return (ROOT / path).exists() or (below / path).exists() or ("/" not in path and any(below.rglob(path)))


def test_every_room_is_on_the_map():
    """The table of the layers has each module and package at the top level of the package."""
    table = ARCHITECTURE.partition("## The layers")[2].partition("Inside `_delivery`")[0]
    named = {name.removesuffix(".py") for name in re.findall(r"`(\w+(?:\.py)?)`", table)}
    rooms = {
        path.stem for path in (ROOT / "engagement").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }

    assert rooms - {"__init__", "_logging", "_catalogues"} <= named


def test_the_glossary_names_what_is_there():
    """What stands in the last column is a word of the code."""
    code = "\n".join(path.read_text() for path in (ROOT / "engagement").rglob("*.py"))
    rows = [line.split("|") for line in GLOSSARY.splitlines() if line.startswith("| ")]
    words = [word for row in rows for word in re.findall(r"`([\w.]+)[^`]*`", row[3])]

    assert len(rows) >= 30
    assert not [word for word in words if word.rpartition(".")[2] not in code]


def test_the_commands_are_those_of_the_runner():
    """The targets that the page, CI and the hooks call are those of noxfile.py, and the page explains each."""
    noxfile = ast.parse((ROOT / "noxfile.py").read_text())
    targets = {node.name for node in noxfile.body if isinstance(node, ast.FunctionDef) and node.decorator_list}

    def called(path: str) -> set[str]:
        calls = re.findall(r"/nox\"? (?:-s|--sessions) ([a-z ]+)", (ROOT / path).read_text())
        return {target for call in calls for target in call.split()}

    assert called("CONTRIBUTING.md") == targets
    assert called(".ci/run") == targets - {"tests"}  # for which it takes the README's command
    assert called(".pre-commit-config.yaml") < targets


def test_the_promise_that_is_broken_goes_red(tmp_path):
    """Whoever follows the page, takes the fence out and runs the test, sees it fail."""
    (path,) = re.findall(r"the fence in `([\w/.]+)`", CONTRIBUTING)
    ((before, after),) = re.findall(r"```diff\n-(.*)\n\+(.*)\n```", CONTRIBUTING)
    (name,) = re.findall(r"bin/pytest -k (\w+)\n```", CONTRIBUTING)
    for folder in ("alembic", "engagement", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    fenced = (tmp_path / path).read_text()
    assert fenced.count(before) == 1
    (tmp_path / path).write_text(fenced.replace(before, after))
    is_there = re.compile(rf"^def test_\w*{name}", re.MULTILINE)
    (file,) = [file for file in (tmp_path / "tests").rglob("test_*.py") if is_there.search(file.read_text())]

    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file, "-k", name]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "ENGAGEMENT_"))}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert "assert row(engine, message_id) == held" in done.stdout
