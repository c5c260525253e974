"""Workers that take some types of message only."""

import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from conftest import PATIENCE, execute, new_message, queue, row, until
from sqlalchemy import create_engine, event

from engagement import NotSent, Sent, Worker, process_message_queue

TYPES = ("otp", "campaign", "reminder")
ONLY_OTP = {"message_types": ["otp"]}
NO_CAMPAIGN = {"excluding": ["campaign"]}


@pytest.fixture(name="of_each_type")
def _of_each_type(engine):
    """The ids of two due messages of each type, the campaign's first."""
    order = sorted(TYPES) * 2
    ids = queue(engine, *(new_message(f"u{n}", message_type=kind) for n, kind in enumerate(order)))
    return {kind: [id_ for id_, its in zip(ids, order, strict=True) if its == kind] for kind in TYPES}


def statuses(engine, ids) -> set[str]:
    return {row(engine, message_id).status for message_id in ids}


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, {*TYPES}),
        (ONLY_OTP, {"otp"}),
        ({"message_types": {"otp", "reminder"}}, {"otp", "reminder"}),
        (NO_CAMPAIGN, {"otp", "reminder"}),
        ({"excluding": ("campaign", "otp")}, {"reminder"}),
        ({"message_types": ["otp", "campaign"], "excluding": ["campaign"]}, {"otp"}),
        ({"message_types": ["unheard_of"]}, set()),
    ],
)
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_worker_sends_its_types_and_leaves_the_others(engine, of_each_type, options, taken, concurrency):
    """A run ends when nothing of its types is due, and the others are untouched."""
    sent = []

    process_message_queue(engine, lambda message: sent.append(message.message_type), concurrency=concurrency, **options)

    assert sorted(sent) == sorted([*taken] * 2)
    for kind, ids in of_each_type.items():
        assert statuses(engine, ids) == {"sent" if kind in taken else "pending"}
        assert {row(engine, message_id).attempt for message_id in ids} == {int(kind in taken)}


def test_a_message_of_another_type_does_not_expire_here(engine):
    """Its end is for a worker that takes it."""
    now = datetime.now(UTC)
    fields = {"scheduled_for": now - timedelta(hours=2), "expires_at": now + timedelta(hours=1)}
    otp, campaign = queue(engine, *(new_message(kind, message_type=kind, **fields) for kind in ("otp", "campaign")))
    execute(engine, "UPDATE engagement_message_queue SET expires_at = now() - interval '1 hour'")

    assert process_message_queue(engine, lambda _: None, **NO_CAMPAIGN).expired == 1
    assert (row(engine, otp).status, row(engine, campaign).status) == ("expired", "pending")


class LooksUp:
    """A transport that denies every send that it is asked about."""

    def __init__(self):
        self.asked_about = []

    def look_up(self, message):  # noqa: D102
        self.asked_about.append(message.message_type)
        return NotSent("unknown")

    def send(self, _message):  # noqa: D102
        return Sent()


@pytest.mark.parametrize("options", [ONLY_OTP, {"excluding": ["campaign", "reminder"]}])
def test_a_worker_recovers_its_types_only(engine, of_each_type, options):
    """Another provider's messages may have left: this transport would deny them all, and they would be sent twice."""
    execute(
        engine,
        "UPDATE engagement_message_queue SET status = 'sending', attempt = 1, claimed_by = 'lost/1',"
        " lease_expires_at = now() - interval '1 second'",
    )
    transport = LooksUp()

    process_message_queue(engine, transport, **options)

    assert set(transport.asked_about) == {"otp"}
    assert statuses(engine, of_each_type["campaign"] + of_each_type["reminder"]) == {"sending"}
    assert statuses(engine, of_each_type["otp"]) != {"sending"}


@contextmanager
def working(engine, send, **options):
    stop = threading.Event()
    worker = Worker(engine, send, poll_interval=timedelta(milliseconds=20), **options)
    thread = threading.Thread(target=worker.run, args=[stop])
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(PATIENCE)


def test_two_workers_share_the_types(engine, of_each_type):
    """What one leaves the other takes: everything is sent, each by its own."""
    sent = {"otp": [], "others": []}
    with (
        working(engine, lambda message: sent["otp"].append(message.message_type), **ONLY_OTP),
        working(engine, lambda message: sent["others"].append(message.message_type), excluding=["otp"]),
    ):
        until(lambda: all(statuses(engine, ids) == {"sent"} for ids in of_each_type.values()))

    assert sent["otp"] == ["otp", "otp"]
    assert sorted(sent["others"]) == ["campaign", "campaign", "reminder", "reminder"]


def test_a_worker_sleeps_beside_what_others_take(engine, of_each_type):
    """That a campaign is due wakes nobody who leaves it: one question a poll, and no claim."""
    other, questions, asked = create_engine(engine.url), [], threading.Event()

    @event.listens_for(other, "after_cursor_execute")
    def _note(_connection, _cursor, statement, *_):
        questions.append(statement)
        if len(questions) == 6:
            asked.set()

    stop, sent = threading.Event(), []
    worker = Worker(other, sent.append, poll_interval=timedelta(milliseconds=20), message_types=["unheard_of"])
    thread = threading.Thread(target=worker.run, args=[stop])
    thread.start()
    assert asked.wait(PATIENCE)
    stop.set()
    thread.join(PATIENCE)
    other.dispose()

    assert not sent
    assert [statement for statement in questions if "FOR " in statement or "UPDATE" in statement][3:] == []


def test_why_a_worker_waits_stands_on_a_message_that_it_takes(engine, of_each_type):
    """The oldest of all is another's, and waits for another reason."""

    class NotReady(LooksUp):
        why_not_ready = "no line"

        def ready(self):
            return False

    process_message_queue(engine, NotReady(), **ONLY_OTP)

    first, second = (row(engine, message_id).history for message_id in of_each_type["otp"])
    assert [entry["reason"] for entry in first] == ["no line"]
    assert second == []
    assert not any(row(engine, message_id).history for message_id in of_each_type["campaign"])


def test_a_broken_row_of_another_type_is_left_alone(engine, of_each_type):
    """Also message by message, when the data of one makes a claim fail."""
    execute(
        engine,
        "CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION USING ERRCODE = '22000'; END $$;"
        " CREATE TRIGGER refuse BEFORE UPDATE ON engagement_message_queue FOR EACH ROW"
        f" WHEN (NEW.id = {of_each_type['otp'][0]} AND NEW.status = 'sending') EXECUTE FUNCTION public.refuse()",
    )

    try:
        assert process_message_queue(engine, lambda _: None, concurrency=4, **NO_CAMPAIGN).succeeded == 3
    finally:
        execute(engine, "DROP FUNCTION public.refuse() CASCADE")
    assert statuses(engine, of_each_type["campaign"]) == {"pending"}


@pytest.mark.parametrize(
    ("options", "taken"),
    [(["--type=otp", "--type=reminder"], {"otp", "reminder"}), (["--excluding=otp"], {"campaign", "reminder"})],
)
def test_the_command_takes_types(run, engine, of_each_type, options, taken):
    """`--type` and `--excluding`, as often as there are types."""
    ran = run("process", "--transport", "engagement.transports.console:Console", *options, on=engine)

    assert ran.status == 0, ran.err
    for kind, ids in of_each_type.items():
        assert statuses(engine, ids) == {"sent" if kind in taken else "pending"}


@pytest.mark.parametrize("option", ["--type", "--excluding"])
def test_the_command_refuses_what_is_no_type(run, engine, option):
    """A usage error that names the option."""
    ran = run("process", "--transport", "engagement.transports.console:Console", option, "Otp", on=engine)

    assert ran.status == 2
    assert option in ran.err
