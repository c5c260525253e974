"""`engagement admin`: a page for the person who started it, and for nobody else."""

import re
import signal
import socket
import subprocess
import sys
import tomllib
from contextlib import contextmanager

import httpx
import pytest
from admin_page import fields_of, put, said, send
from conftest import new_message, queue, row
from shell import PATIENCE, ROOT, killed_at_the_end, program, url_of

from engagement.cli.listening import is_loopback


@contextmanager
def serving(engine, *options):
    """Start the command on a port that is free, and hand it out with the address that it prints."""
    with killed_at_the_end(program("admin", "--port", "0", *options, on=engine)) as process:
        address = process.stdout.readline().decode().strip()
        assert address.startswith("http://"), process.stderr.read()
        yield process, address


@contextmanager
def browser_on(address):
    with httpx.Client(base_url=address.partition("?")[0], trust_env=False, timeout=PATIENCE) as client:
        yield client


def ended(process):
    """Wait for the end of a command, and return its status and what it said."""
    with killed_at_the_end(process):
        out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def test_the_address_lets_in_and_nothing_else_does(engine):
    """Whoever else reaches the port, and a site whose name was pointed at it, sees and changes nothing."""
    message_id = put(engine, "pending")
    with serving(engine) as (_, address), browser_on(address) as mine, browser_on(address) as theirs:
        opened = mine.get(address, follow_redirects=True)
        assert opened.status_code == 200
        assert "token" not in str(opened.url)
        cookie = opened.history[0].headers["set-cookie"].lower()
        assert re.search(r"; httponly; max-age=28800; path=/[\w-]{20,}; samesite=strict$", cookie)

        asked = mine.get(f"messages/{message_id}/cancel")
        for path in ("", "messages", "?token=", "?token=wrong", "static/engagement.css"):
            assert theirs.get(path).status_code == 403
        assert theirs.post(f"messages/{message_id}/cancel", data={"attempt": "0"}).status_code == 403
        assert mine.get("", headers={"Cookie": ""}).status_code == 403
        assert row(engine, message_id).status == "pending"

        assert said(send(mine, message_id, "cancel", **fields_of(asked.text))) == "Cancelled. It is not sent."


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_ends_it(engine, number):
    """Also while a browser keeps its connection open; the exit status is 0, and nothing more is said."""
    with serving(engine) as (process, address), browser_on(address) as client:
        client.get(address)
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)

    assert (process.returncode, out, err) == (0, b"", b"")


def test_personal_data_is_shown_if_that_was_said(engine):
    """Not by default, whatever the address says; times are in the zone that was asked for."""
    (message_id,) = queue(engine, new_message("user-ana"))
    for options, shown in (((), False), (("--reveal", "--tz", "America/Sao_Paulo"), True)):
        with serving(engine, *options) as (_, address), browser_on(address) as client:
            client.get(address)
            page = client.get(f"messages/{message_id}?reveal=1").text
            assert ("user-ana" in page) == shown
            assert ("America/Sao_Paulo" in page) == shown


def test_what_is_done_and_revealed_is_logged(engine):
    """To standard error, one line each, without what was seen."""
    message_id = put(engine, "pending")
    with serving(engine, "--reveal") as (process, address), browser_on(address) as client:
        client.get(address)
        client.get("messages?reveal=1")
        client.get(f"messages/{message_id}?reveal=1")
        send(client, message_id, "cancel", **fields_of(client.get(f"messages/{message_id}/cancel").text))
        process.terminate()
        _, err = process.communicate(timeout=PATIENCE)

    assert [line.partition(" INFO ")[2] for line in err.decode().splitlines()] == [
        f"engagement.admin action={action} message_id={message_id} verdict={verdict} by='operator'"
        for action, verdict in (("reveal", "revealed"), ("reveal", "revealed"), ("cancel", "cancelled"))
    ]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_machines_are_kept_out_unless_that_is_meant(engine, host):
    """A host that is no loopback is refused before anything listens."""
    done = program("admin", "--host", host, on=engine)
    out, err = done.communicate(timeout=PATIENCE)

    assert (done.returncode, out) == (2, b"")
    assert (
        err == f"engagement: --host {host} can be reached by other machines. If that is meant, add --public\n".encode()
    )


def test_other_machines_may_be_let_in(engine):
    """What is meant is done, with the token all the same."""
    with serving(engine, "--host", "0.0.0.0", "--public") as (_, address):
        local = address.replace("0.0.0.0", "127.0.0.1")
        with browser_on(local) as client:
            assert client.get("").status_code == 403
            assert client.get(local, follow_redirects=True).status_code == 200


@pytest.mark.parametrize(
    ("host", "yes"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("localhost.example.org", False), ("", False)],
)  # fmt: skip
def test_what_is_loopback(host, yes):
    """Only what cannot be reached from elsewhere."""
    assert is_loopback(host) is yes


def test_a_port_that_is_taken_is_told(engine):
    """One line, and the exit status of a command that lacks something."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, out, err = ended(program("admin", "--port", port, on=engine))

    assert (status, out) == (2, b"")
    assert err.startswith(f"engagement: cannot listen on 127.0.0.1 port {port}: ".encode())


def test_a_table_that_is_missing_is_told_before_anything_is_served(empty_engine):
    """As by every command."""
    assert ended(program("admin", "--port", "0", on=empty_engine)) == (
        3,
        b"",
        b"engagement: the queue's table is missing or old. Run: engagement upgrade\n",
    )


@pytest.mark.parametrize("missing", ["starlette_admin", "uvicorn"])
def test_without_the_extra_one_line_says_what_to_install(engine, missing):
    """The command is there, and says what it needs."""
    code = f"import sys; sys.modules['{missing}'] = None\nfrom engagement.cli import main; main()"
    command = [sys.executable, "-c", code, "admin", "--database-url", url_of(engine)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    expected = f"engagement: {missing} is missing. Run: pip install 'engagement[admin]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_the_extra_brings_all_that_the_command_needs():
    """Whoever installs `engagement[admin]` alone has the command, too."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "engagement[cli]" in extras["admin"]
    brought = {re.match(r"[\w-]+", requirement)[0] for requirement in extras["admin"] + extras["cli"]}

    assert brought >= {"click", "rich", "tzdata", "starlette-admin", "uvicorn"}


def test_a_host_pays_nothing_for_the_page():
    """`import engagement` and the command's help load neither the page nor what it is made with."""
    heavy = {"starlette", "starlette_admin", "jinja2", "uvicorn", "engagement.admin"}
    code = (
        "import sys, engagement\nfrom engagement.cli import main\nsys.argv[1:] = ['--help']\n"
        f"try: main()\nexcept SystemExit: print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)

    assert done.stdout.splitlines()[-1] == "[]"
