"""The commands of this project: `.venv/bin/nox -l` lists them, `.ci/run` runs them all.

Those without an environment of their own run in the one that nox is installed in (the extra `dev`).
"""

import json
import sys
import tarfile
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types"]
nox.options.default_venv_backend = "uv"

# Left out on the oldest libraries: what takes long and depends on none that has an older version. These are the
# transports (h11), what speaks of the server, and what measures or breaks the product from outside.
SAME_ON_THE_OLDEST = (
    "transports", "chaos", "test_adopting.py", "test_benchmarks.py", "test_contributing.py", "test_least_privilege.py",
    "test_planted.py", "test_settings.py", "test_standby.py", "test_temporary_postgres.py", "test_typing.py",
)  # fmt: skip
PROVE_THE_WHEEL = """
import engagement
from engagement import migrations
assert migrations.head() and "site-packages" in migrations.__file__
"""


def _run(session: nox.Session, *command: str) -> str | None:
    """Run a module of the developers' environment."""
    return session.run(sys.executable, "-m", *command, external=True)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Ask ruff about every rule, and about the format."""
    _run(session, "ruff", "check")
    _run(session, "ruff", "format", "--check")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Ask mypy about every type."""
    _run(session, "mypy")


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after `--` go to pytest."""
    _run(session, "pytest", *(session.posargs or ["-n", "auto"]))


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Build the site of the documentation in build/site, and look whether all that is public is in it."""
    build = ("sphinx", "--fail-on-warning", "--keep-going", "--quiet", "--builder=html", "--conf-dir=docs")
    _run(session, *build, ".", "build/site")
    _run(session, "pytest", "-q", "tests/test_site.py")


@nox.session
def package(session: nox.Session) -> None:
    """Build the wheel and the sdist, see the demo of the installed wheel, and the quick start of a checkout."""
    built = Path(session.create_tmp())
    for left in built.iterdir():
        left.unlink()
    _run(session, "build", "--no-isolation", "--outdir", str(built))
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with tarfile.open(sdist) as files:
        if not any("alembic/versions/eng_0001" in name for name in files.getnames()):
            session.error("the sdist has no migrations")
    session.install("--compile-bytecode", f"{wheel}[demo]")
    with session.chdir(built):
        session.run("python", "-W", "error", "-c", PROVE_THE_WHEEL)
        session.run("engagement", "demo", silent=True)
    session.env["ENGAGEMENT_TEST_INSTALL"] = "1"
    _run(session, "pytest", "-q", "-p", "no:cacheprovider", "tests/test_readme.py", "-k", "as_it_is_printed")


@nox.session(venv_backend="none")
def advisories(session: nox.Session) -> None:
    """Ask for published advisories of the oldest libraries that the extras of a host allow."""
    place = Path(session.create_tmp())
    oldest, report = place / "oldest.txt", place / "report.json"
    extras = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]
    for_hosts = [
        f"--extra={extra}" for extra in extras if extra not in {"bench", "demo", "dev", "docs", "peers", "test"}
    ]
    resolve = ("uv", "pip", "compile", "--quiet", "--resolution=lowest-direct")
    _run(session, *resolve, *for_hosts, "pyproject.toml", "--output-file", str(oldest))
    report.unlink(missing_ok=True)
    ask = ("pip_audit", "--no-deps", "--disable-pip", "--timeout=15", "--format=json", "--output", str(report))
    # It ends with 1 if there are advisories, and if it cannot reach its data.
    session.run(sys.executable, "-m", *ask, "-r", str(oldest), success_codes=[0, 1], silent=True, external=True)
    # What it could not ask about it calls skipped, and ends well.
    answers = json.loads(report.read_text())["dependencies"] if report.exists() else []
    told = sum("vulns" in answer for answer in answers)
    found = [f"{one['name']} {one['version']}: {flaw['id']}" for one in answers for flaw in one.get("vulns", ())]
    if found:
        session.error("\n".join(found))
    if not told:
        session.skip("pip-audit cannot reach its data. The bounds and their reasons are in docs/operations.md.")
    session.log(f"{told} of {len(answers)} packages asked about")


@nox.session
def oldest(session: nox.Session) -> None:
    """Run the tests on the oldest of every library that pyproject.toml allows."""
    session.install("--compile-bytecode", "--resolution=lowest-direct", "-e", ".[test]")
    left_out = [f"--ignore=tests/{path}" for path in SAME_ON_THE_OLDEST]
    session.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "auto", *left_out, *session.posargs)
