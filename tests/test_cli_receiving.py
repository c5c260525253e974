"""`engagement receive`: an endpoint of its own, with secrets from the environment, that ends at a signal."""

import base64
import hashlib
import hmac
import json
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime

import httpx
import pytest
from commands import messages
from conftest import execute, row
from shell import PATIENCE, ROOT, killed_at_the_end, program, url_of

from engagement.cli.problems import Problem
from engagement.cli.receiving import PROVIDERS, source_of
from engagement.messages import delivery_id, reference

BYTES = b"the secret of this test is long"
SECRET = f"whsec_{base64.b64encode(BYTES).decode()}"
PLAIN = "0123456789abcdef0123456789abcdef"
OF_PROVIDER = {
    "cloud": {"SECRET": PLAIN, "VERIFY_TOKEN": "open sesame"},
    "webhook": {"SECRET": SECRET},
    "evolution": {"AUTHORIZATION": f"Bearer {PLAIN}"},
    "waha": {"SECRET": PLAIN},
    "wuzapi": {"SECRET": PLAIN},
}


def variables(**given: str) -> dict[str, str]:
    return {f"ENGAGEMENT_RECEIPTS_{name}": value for name, value in given.items()}


@contextmanager
def receiving(engine, provider, *options, **given):
    """Start the command on a port that is free, and hand it out with the address that it prints."""
    environment = variables(**given or OF_PROVIDER[provider])
    command = ("receive", "--provider", provider, "--port", "0", *options)
    with killed_at_the_end(program(*command, on=engine, environment=environment)) as process:
        address = process.stdout.readline().decode().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address), process.stderr.read()
        yield process, address


def signed(body: bytes, key: bytes = BYTES) -> dict[str, str]:
    """Return the headers of Standard Webhooks."""
    now = int(time.time())
    digest = hmac.digest(key, f"msg_1.{now}.".encode() + body, hashlib.sha256)
    signature = f"v1,{base64.b64encode(digest).decode()}"
    return {"webhook-id": "msg_1", "webhook-timestamp": str(now), "webhook-signature": signature}


def about(engine, message_id: int, event: str = "delivered") -> bytes:
    named = reference(message_id, delivery_id(row(engine, message_id).idempotency_key))
    return json.dumps({"event": event, "at": datetime.now(UTC).isoformat(), "reference": named}).encode()


def post(address: str, body: bytes, **headers: str) -> int:
    with httpx.Client(trust_env=False, timeout=PATIENCE) as client:
        return client.post(address, content=body, headers=headers).status_code


def ended(process):
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out.decode(), err.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_receipt_is_recorded_and_the_first_signal_ends_it(engine, number):
    """The log says how many, and nothing of the request."""
    (message_id,) = messages(engine, "in_doubt")
    body = about(engine, message_id)
    with receiving(engine, "webhook", "--verbose") as (process, address):
        assert post(address, body) == 401
        assert post(address, body, **signed(body, b"another")) == 401
        assert row(engine, message_id).status == "in_doubt"
        assert post(address, body, **signed(body)) == 200
        assert row(engine, message_id).status == "sent"
        process.send_signal(number)
        status, out, err = ended(process)

    assert (status, out) == (0, "")
    told = [line.split(" ", 3)[2:] for line in err.splitlines()]
    assert [level for level, _ in told] == ["WARNING", "WARNING", "INFO", "INFO"]
    assert told[-1][1] == "engagement.receipts_received provider=webhook receipts=1 recorded=1"
    assert reference(message_id, delivery_id(row(engine, message_id).idempotency_key)) not in err


HOOKS = """
from sqlalchemy import text
def note(connection, message, status):
    connection.execute(text("INSERT INTO noted VALUES (:id, :status)"), {"id": message.id, "status": status})
number = 5
"""


@pytest.fixture(name="hooks")
def _hooks(engine, tmp_path, monkeypatch):
    """A host's module beside which the command is run, and its table."""
    (tmp_path / "hooks.py").write_text(HOOKS)
    monkeypatch.chdir(tmp_path)
    execute(engine, "CREATE TABLE noted (id bigint, status text, wrote xid8 DEFAULT pg_current_xact_id())")
    yield
    execute(engine, "DROP TABLE noted")


@pytest.mark.usefixtures("hooks")
def test_a_function_is_called_in_the_transaction_of_the_receipt(engine):
    """Once, though the receipt comes twice."""
    (message_id,) = messages(engine, "in_doubt")
    with receiving(engine, "webhook", "--on-settled", "hooks:note") as (_, address):
        body = about(engine, message_id)
        assert [post(address, body, **signed(body)) for _ in range(2)] == [200, 200]

    both = (
        "SELECT noted.id, noted.status FROM noted JOIN engagement_message_queue AS queue USING (id)"
        " WHERE queue.xmin::text::bigint = wrote::text::bigint & 4294967295"
    )
    assert execute(engine, both).all() == [(message_id, "sent")]
    assert execute(engine, "SELECT count(*) FROM noted").scalar_one() == 1


@pytest.mark.usefixtures("hooks")
def test_a_function_that_cannot_be_called_is_told_on_one_line(engine):
    """Before anything listens."""
    status, out, err = refused(engine, "--on-settled", "hooks:number", SECRET=SECRET)

    assert (status, out) == (2, "")
    assert "Invalid value for '--on-settled': hooks:number must be a function, not int." in err


@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_provider_has_a_source_that_refuses_others(engine, provider):
    """One that nobody has signed is refused, and told without --verbose too."""
    with receiving(engine, provider) as (process, address):
        assert post(address, b"{}") == 401
        process.terminate()
        status, _, err = ended(process)

    assert status == 0
    assert f"WARNING engagement.receipts_refused provider={provider} status=401 error=Unsigned" in err


def test_metas_handshake_is_answered(engine):
    """With the token of the environment."""
    asked = "?hub.mode=subscribe&hub.challenge=1158201444&hub.verify_token="
    with receiving(engine, "cloud") as (_, address), httpx.Client(trust_env=False, timeout=PATIENCE) as client:
        assert client.get(f"{address}{asked}open%20sesame").text == "1158201444"
        assert client.get(f"{address}{asked}wrong").status_code == 403


def test_a_secret_may_be_in_a_file_and_be_changed_without_a_gap(engine, tmp_path):
    """All of several are taken."""
    (tmp_path / "secrets").write_text(f"whsec_{base64.b64encode(b'n' * 24).decode()}\n{SECRET}\n")
    with receiving(engine, "webhook", SECRET_FILE=str(tmp_path / "secrets")) as (_, address):
        body = b'{"receipts": []}'
        assert post(address, body, **signed(body)) == 200
        assert post(address, body, **signed(body, b"n" * 24)) == 200


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_secret_that_is_missing_or_bad_is_told_by_its_variable(provider):
    """And not by its value."""
    needed = next(name for name in OF_PROVIDER[provider] if name != "VERIFY_TOKEN")
    for given in ({}, {needed: ""}, {"VERIFY_TOKEN": "open sesame"}):
        with pytest.raises(Problem, match=f"^ENGAGEMENT_RECEIPTS_{needed}( or .*)? is not set"):
            source_of(provider, variables(**given))
    with pytest.raises(Problem, match=f"^ENGAGEMENT_RECEIPTS_{needed}: must be ") as raised:
        source_of(provider, variables(**{needed: "2short"}))
    assert "2short" not in str(raised.value)


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    """By the name of its variable."""
    with pytest.raises(Problem, match=r"^ENGAGEMENT_RECEIPTS_SECRET_FILE: cannot be read: FileNotFoundError$"):
        source_of("waha", variables(SECRET_FILE=str(tmp_path / "none")))


def test_a_header_has_blanks_and_other_secrets_have_none():
    """Several of it stand on a line each; the source would refuse a part of one as too short."""
    source_of("evolution", variables(AUTHORIZATION=f"Bearer {PLAIN}\nBearer {PLAIN[::-1]}"))
    source_of("evolution", variables(JWT_KEY=f"{PLAIN} {PLAIN[::-1]}"))
    with pytest.raises(Problem, match=r"^ENGAGEMENT_RECEIPTS_JWT_KEY: "):
        source_of("evolution", variables(JWT_KEY=f"{PLAIN} short"))


def refused(engine, *options, **given):
    return ended(program("receive", "--provider", "webhook", *options, on=engine, environment=variables(**given)))


def test_what_keeps_it_from_listening_is_one_line(engine, empty_engine):
    """Before anything listens, and with the exit status of its kind."""
    assert refused(engine, "--host", "0.0.0.0", SECRET=SECRET) == (
        2,
        "",
        "engagement: --host 0.0.0.0 can be reached by other machines. If that is meant, add --public\n",
    )
    assert refused(empty_engine, SECRET=SECRET) == (
        3,
        "",
        "engagement: the queue's table is missing or old. Run: engagement upgrade\n",
    )
    status, out, err = refused(engine)
    assert (status, out) == (2, "")
    assert err.startswith("engagement: ENGAGEMENT_RECEIPTS_SECRET is not set: ")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, out, err = refused(engine, "--port", port, SECRET=SECRET)
    assert (status, out) == (2, "")
    assert err.startswith(f"engagement: cannot listen on 127.0.0.1 port {port}: ")


def test_without_the_extra_one_line_says_what_to_install(engine):
    """The command is there, and says what it needs."""
    code = "import sys; sys.modules['uvicorn'] = None\nfrom engagement.cli import main; main()"
    command = [sys.executable, "-c", code, "receive", "--provider", "waha", "--database-url", url_of(engine)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    expected = "engagement: uvicorn is missing. Run: pip install 'engagement[receipts]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)
