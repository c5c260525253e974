"""The layers of the package: every import points from a room to one further down, and there are no circles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import engagement

PACKAGE = Path(engagement.__file__).parent
MODULES = {
    ".".join(("engagement", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# From the table outwards. What begins with an underscore is no door for a host.
LAYERS = [
    {"_logging", "_signing", "_columns", "_catalogues"},
    {"models"},
    {"messages"},
    {"outcomes"},
    {"_claim", "_sql"},
    {"_watching"},
    {"_queueing", "_receiving", "migrations", "verification"},
    {"_sending", "pausing", "prometheus", "repository", "suppression", "telemetry"},
    {"_delivery", "policies"},
    {"_operating", "words"},
    {"admin", "receipts", "testing", "transports", "worker"},
    {"engagement"},
    {"demo"},
    {"cli"},
]


def room(module: str) -> str:
    """Return the module, or the package, right below `engagement`."""
    return module.split(".")[1] if "." in module else module


def imported(path: Path) -> set[str]:
    """Return which of our modules a file imports: anywhere in it, also for its hints only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found & set(MODULES)


IMPORTS = {module: imported(path) - {module} for module, path in MODULES.items()}


def test_every_import_points_one_way():
    """A module of one room imports those of rooms further down only."""
    height = {name: layer for layer, names in enumerate(LAYERS) for name in names}

    assert set(height) == set(map(room, MODULES))
    upwards = [
        (module, other)
        for module, others in IMPORTS.items()
        for other in others
        if room(other) != room(module) and height[room(other)] >= height[room(module)]
    ]
    assert upwards == []


def test_no_modules_import_each_other():
    """Nor do they within a room: each can be read before those that need it."""
    assert set(TopologicalSorter(IMPORTS).static_order()) == set(MODULES)


def test_no_door_is_private():
    """The pages for hosts, and the examples, name public modules only."""
    pages = [*PACKAGE.parent.glob("docs/*.md"), *PACKAGE.parent.glob("examples/*.py"), PACKAGE.parent / "README.md"]
    for page in pages:
        if page.name not in {"architecture.md", "decisions.md"}:
            assert "engagement._" not in page.read_text(), page


def test_no_file_of_tests_has_over_600_lines():
    """A file has one subject, and somebody who looks for a test reads one."""
    files = PACKAGE.parent.joinpath("tests").rglob("*.py")

    assert [path for path in files if len(path.read_text().splitlines()) > 600] == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_is_held_in_the_head(module):
    """No file has over 350 lines, and no class over 150."""
    source = MODULES[module].read_text()
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]

    assert len(source.splitlines()) <= 350
    assert [node.name for node in classes if node.end_lineno - node.lineno >= 150] == []
