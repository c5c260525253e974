"""The contract test kit: green for good transports that talk real HTTP, red for each way to be a bad one."""

# ruff: noqa: D102 - a bad transport's name says what it does

import json
import logging
import subprocess
import sys
import threading
import time
import unittest
from collections import Counter
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from engagement import InDoubt, NotSent, Refused, Sent
from engagement.testing import TransportContract

TOKEN = "secret-token-1234"


class Server(ThreadingHTTPServer):
    """One whose backlog takes all that the test sends at once."""

    request_queue_size = 128
    daemon_threads = True


class FarSide:
    """A gateway on loopback that recognises a key it has seen, and does as it is told."""

    def __init__(self):
        self.does = "accept"
        self.acted = Counter()
        self.ids = {}
        self.is_over = threading.Event()
        self._lock = threading.Lock()
        self._server = Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def act(self, delivery_id, key):
        """Act on a message unless its key was seen, and return its id."""
        with self._lock:
            if key is None or key not in self.ids:
                self.acted[delivery_id] += 1
                self.ids[key or object()] = f"far-{len(self.ids)}"
            return self.ids.get(key) or f"far-{len(self.ids) - 1}"

    def stop_listening(self):
        """Refuse connections from now on."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def close(self):
        """Let go of whoever waits for an answer, and end."""
        self.is_over.set()
        self.stop_listening()

    def _handler(far_side):  # noqa: N805 - `self` is the handler's
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if far_side.does == "refuse":
                    return self._answer(422, {"error": f"{body['to']} is not on WhatsApp"})
                provider_id = far_side.act(body["id"], self.headers["Idempotency-Key"])
                if far_side.does == "silence":
                    far_side.is_over.wait()
                if far_side.does in {"silence", "break off"}:
                    self.close_connection = True
                    return None
                return self._answer(200, {"id": provider_id})

            def do_GET(self):
                if self.path == "/ready":
                    return self._answer(200, {})
                found = far_side.acted[self.path.rpartition("/")[2]]
                return self._answer(200 if found else 404, {"id": "far"})

            def _answer(self, status, answer):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, *_):
                pass

        return Handler


class Good:
    """A transport as it should be: one client, a time-out, a key, and nothing tried twice."""

    idempotent = True

    def __init__(self, url, timeout=10.0):
        self.url = url
        self.client = httpx.Client(timeout=timeout, verify=False, headers={"Authorization": TOKEN})

    def send(self, message):
        """Post once."""
        return self.read(self.post(message))

    def post(self, message):
        """Post, and return the response."""
        body = {"id": str(message.delivery_id), "to": message.destination_jid, "text": message.text}
        return self.client.post(f"{self.url}/messages", json=body, headers=self.headers(message))

    def headers(self, message):
        """Let the far side recognise a repeat."""
        return {"Idempotency-Key": str(message.delivery_id)}

    def read(self, response):
        """Say what the answer means."""
        return Refused("not on WhatsApp") if response.status_code == 422 else Sent(response.json()["id"])

    def look_up(self, message):
        """Ask what became of it."""
        return Sent() if self.client.get(f"{self.url}/messages/{message.delivery_id}").status_code == 200 else None

    def ready(self):
        """Ask whether the far side is there."""
        return self.client.get(f"{self.url}/ready").status_code == 200

    def close(self):
        """Close the client."""
        self.client.close()


class GatewayContract(TransportContract):
    """The contract of a transport that speaks to the far side above."""

    transport = Good
    answers_within = timedelta(seconds=15)
    secrets = (TOKEN,)

    @pytest.fixture(autouse=True)
    def _far_side(self):
        self.far_side = FarSide()
        yield
        self.far_side.close()

    def make_transport(self):
        """Make one for the far side's address."""
        return self.transport(self.far_side.url, self.timeout)

    @property
    def timeout(self):
        """Wait for a busy machine, and not for a far side that is known to be silent."""
        return 0.3 if self.far_side.does == "silence" else 10.0

    def far_side_accepts(self):
        """Take messages."""
        self.far_side.does = "accept"

    def far_side_refuses(self):
        """Refuse them."""
        self.far_side.does = "refuse"

    def far_side_times_out(self):
        """Act, and be silent."""
        self.far_side.does = "silence"

    def far_side_breaks_off(self):
        """Act, and cut the connection."""
        self.far_side.does = "break off"

    def far_side_unreachable(self):
        """Stop listening."""
        self.far_side.stop_listening()

    def effects_of(self, message):
        """Count what it acted on."""
        return self.far_side.acted[str(message.delivery_id)]


# Green


class TestGood(GatewayContract):
    """A transport object with everything optional keeps the contract."""


class TestAsyncFunction(GatewayContract):
    """So does a plain `async def`, without anything optional."""

    def make_transport(self):
        """Make a function."""
        url, timeout = self.far_side.url, self.timeout

        async def send(message):
            async with httpx.AsyncClient(timeout=timeout, verify=False) as client:
                body = {"id": str(message.delivery_id), "to": message.destination_jid}
                return Good.read(None, await client.post(f"{url}/messages", json=body))

        return send


class Batch(Good):
    """Takes many at once."""

    idempotent = False

    def send_many(self, messages):
        """Post each."""
        return [self.send(message) for message in messages]


class TestBatch(GatewayContract):
    """So does one that takes batches."""

    transport = Batch


# Red


class RaisesOnRefusal(Good):
    def read(self, response):
        response.raise_for_status()
        return Sent(response.json()["id"])


class CallsRefusalNotSent(Good):
    def read(self, response):
        return NotSent("no") if response.status_code == 422 else Sent()


class CallsATimeoutNotSent(Good):
    def send(self, message):
        try:
            return super().send(message)
        except httpx.HTTPError:
            return NotSent("it timed out")


class CallsEverythingADoubt(Good):
    def send(self, message):
        try:
            return super().send(message)
        except httpx.HTTPError:
            return InDoubt("something is wrong")


class HasNoTimeout(Good):
    def __init__(self, url, _timeout):
        super().__init__(url, None)


class TriesAgain(Good):
    idempotent = False

    def headers(self, _message):
        return {}

    def send(self, message):
        try:
            return super().send(message)
        except httpx.HTTPError:
            return super().send(message)


class SendsAnotherKeyEachTime(Good):
    def headers(self, message):
        return {"Idempotency-Key": f"{message.delivery_id}-{message.attempt}"}


class CallsARepeatRefused(Good):
    def send(self, message):
        return Refused("a repeat") if message.attempt > 1 else super().send(message)


class FindsNothingWithoutAnAnswer(Good):
    def look_up(self, message):
        try:
            return super().look_up(message)
        except httpx.HTTPError:
            return NotSent("not found")


class FindsNothing(Good):
    def look_up(self, _message):
        return NotSent("not found")


class FindsEverything(Good):
    def look_up(self, _message):
        return Sent()


class AnswersALookUpWithText(Good):
    def look_up(self, _message):
        return "far-1"


class IsAlwaysReady(Good):
    def ready(self):
        return True


class AnswersReadyWithText(Good):
    def ready(self):
        return "yes"


class NeverSaysWhetherItIsReady(Good):
    def ready(self):
        threading.Event().wait(3)


class SharesAMessage(Good):
    idempotent = False

    def send(self, message):
        self.current = message
        time.sleep(0.005)
        return super().send(self.current)


class AnswersAllButOne(Good):
    def send(self, message):
        if not hasattr(self, "kept"):
            self.kept = message
            threading.Event().wait(3)
        return super().send(message)


class SharesAnId(Good):
    def read(self, _response):
        return Sent("the-same")


class AnswersTrue(Good):
    def read(self, response):
        return response.status_code == 200 or Refused("no")


class ShowsItsToken(Good):
    def __repr__(self):
        return f"ShowsItsToken({self.client.headers['Authorization']})"


class TellsTheNumber(Good):
    def read(self, response):
        return Refused(response.json()["error"]) if response.status_code == 422 else Sent()


class LogsTheText(Good):
    def send(self, message):
        logging.getLogger("gateway").info("sending %s", message.text)
        return super().send(message)


class LogsTheToken(Good):
    def ready(self):
        logging.getLogger("gateway").warning("asking with %s", TOKEN)
        return super().ready()


class SendsWhatItRefuses(Good):
    def send(self, message):
        super().send(message)
        return Refused("no")


BAD = [
    (RaisesOnRefusal, "test_what_is_refused_is_refused", "raised HTTPStatusError"),
    (CallsRefusalNotSent, "test_what_is_refused_is_refused", "is Refused, not NotSent"),
    (CallsATimeoutNotSent, "test_silence_is_a_doubt", "NotSent, and the far side acted"),
    (CallsATimeoutNotSent, "test_a_broken_connection_is_a_doubt", "NotSent, and the far side acted"),
    (CallsEverythingADoubt, "test_what_cannot_be_reached_was_not_sent", "is NotSent, not InDoubt"),
    (HasNoTimeout, "test_silence_is_a_doubt", "no answer came within"),
    (TriesAgain, "test_a_broken_connection_is_a_doubt", "acted 2 times"),
    (TriesAgain, "test_silence_is_a_doubt", "acted 2 times"),
    (SendsAnotherKeyEachTime, "test_an_idempotent_transport_has_one_effect", "acted 2 times"),
    (SendsAnotherKeyEachTime, "test_sending_again_resolves_a_doubt", "acted 2 times"),
    (CallsARepeatRefused, "test_an_idempotent_transport_has_one_effect", "Refused, and the far side acted"),
    (FindsNothingWithoutAnAnswer, "test_look_up_without_an_answer_knows_nothing", "NotSent without an answer"),
    (FindsNothing, "test_look_up_finds_what_was_sent", "is Sent, not NotSent"),
    (FindsNothing, "test_look_up_does_not_deny_what_timed_out", "NotSent of what has had an effect"),
    (FindsEverything, "test_look_up_finds_what_was_sent", "Sent of a message that was never sent"),
    (AnswersALookUpWithText, "test_look_up_finds_what_was_sent", "is Sent, not InDoubt"),
    (IsAlwaysReady, "test_ready_is_false_without_a_far_side", "ready answered True"),
    (AnswersReadyWithText, "test_ready_tells_whether_it_can_send", "ready answered 'yes'"),
    (NeverSaysWhetherItIsReady, "test_ready_tells_whether_it_can_send", "did not answer within"),
    (SharesAMessage, "test_threads_do_not_mix_messages", "the far side acted"),
    (AnswersAllButOne, "test_threads_do_not_mix_messages", "no answer came within"),
    (SharesAnId, "test_threads_do_not_mix_messages", "one provider id"),
    (AnswersTrue, "test_what_is_accepted_is_sent", "is Sent, not InDoubt"),
    (ShowsItsToken, "test_what_is_accepted_is_sent", "a secret is in the repr"),
    (TellsTheNumber, "test_what_is_refused_is_refused", "address, params or text is in the reason"),
    (LogsTheText, "test_what_is_accepted_is_sent", "address, params or text is in the log"),
    (LogsTheToken, "test_ready_tells_whether_it_can_send", "a secret is in the log"),
    (SendsWhatItRefuses, "test_what_is_accepted_is_sent", "Refused, and the far side acted"),
]


@pytest.fixture(name="contract_of")
def _contract_of():
    """Make contracts outside of pytest's collection, so that a test can watch them fail."""
    made = []

    def make(transport, **attributes):
        contract = type("Contract", (GatewayContract,), {"transport": transport, **attributes})()
        contract.far_side = FarSide()
        made.append(contract)
        return contract

    yield make
    for contract in made:
        contract.far_side.close()


@pytest.mark.parametrize(("transport", "test", "problem"), BAD)
def test_a_bad_transport_is_told_what_is_wrong(contract_of, transport, test, problem):
    """Each way to break the contract makes a test red, which says what was broken."""
    hangs = transport in {HasNoTimeout, NeverSaysWhetherItIsReady, AnswersAllButOne}
    contract = contract_of(transport, answers_within=timedelta(seconds=0.5 if hangs else 15))

    with pytest.raises(AssertionError, match=problem):
        getattr(contract, test)()


def test_the_list_of_bad_transports_covers_the_contract():
    """There is no test in the kit that was never seen red."""
    assert {test for _, test, _ in BAD} == {name for name in dir(TransportContract) if name.startswith("test_")}


def test_idempotence_that_cannot_be_checked_is_not_believed(contract_of):
    """Who says `idempotent` must say how often the far side acted."""
    contract = contract_of(Good, effects_of=lambda _self, _message: None)

    with pytest.raises(AssertionError, match="effects_of"):
        contract.test_an_idempotent_transport_has_one_effect()
    contract.test_what_is_accepted_is_sent()


def test_what_a_transport_does_not_have_is_skipped(contract_of):
    """Optional parts are skipped when they are not there, and not passed."""

    class Bare:
        def __init__(self, url, timeout):
            self.send = Good(url, timeout).send

    contract = contract_of(Bare)

    for test in (
        "test_an_idempotent_transport_has_one_effect",
        "test_look_up_finds_what_was_sent",
        "test_ready_tells_whether_it_can_send",
    ):
        with pytest.raises(unittest.SkipTest):
            getattr(contract, test)()
    with pytest.raises(unittest.SkipTest):
        TransportContract().far_side_breaks_off()


@pytest.mark.parametrize(
    "hook",
    ["make_transport", "far_side_accepts", "far_side_refuses", "far_side_times_out", "far_side_unreachable"],
)
def test_a_missing_hook_is_named(hook):
    """What a host has not told is told to the host."""
    with pytest.raises(NotImplementedError, match=hook):
        getattr(TransportContract(), hook)()


def test_a_hosts_own_rule_for_exceptions_counts(contract_of):
    """With `classify` the contract judges what the host's worker would make of an exception."""
    contract = contract_of(CallsEverythingADoubt, classify=lambda _self, _error: NotSent("by the host's rule"))
    contract.transport = Good

    with pytest.raises(AssertionError, match="NotSent"):
        contract.test_a_broken_connection_is_a_doubt()


def test_a_host_runs_it_with_pytest(tmp_path):
    """A subclass in a host's test file is collected: red where the transport is bad, green and skipped elsewhere."""
    (tmp_path / "test_host.py").write_text(
        "from engagement import NotSent, Sent\n"
        "from engagement.testing import TransportContract\n"
        "class TestMine(TransportContract):\n"
        "    def make_transport(self):\n"
        "        return lambda _: self.outcome\n"
        "    def far_side_accepts(self):\n"
        "        self.outcome = Sent()\n"
        "    far_side_refuses = far_side_times_out = far_side_accepts\n"
        "    def far_side_unreachable(self):\n"
        "        self.outcome = NotSent('down')\n"
    )
    root = Path(__file__).parent.parent

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rfs", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert "2 failed, 3 passed, 8 skipped" in done.stdout
    assert "that is InDoubt, not Sent" in done.stdout
    assert "that is Refused, not Sent" in done.stdout
