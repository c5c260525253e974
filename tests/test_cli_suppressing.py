"""`suppress`, `unsuppress`, `suppressed`: the suppression list as a person at a shell has it."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from commands import facts
from conftest import execute
from sqlalchemy.orm import Session

from engagement import SuppressionList
from engagement.messages import address_hash

ANA, BOB = "5511999990001@s.whatsapp.net", "5511999990002@s.whatsapp.net"
MASKED = "***01@s.whatsapp.net"
NOT_ON_IT = "engagement: the address is not on the suppression list\n"


def found(engine, address: str):
    with Session(engine) as session:
        return SuppressionList(session).find(address)


def suppress_at(engine, address: str, since: str, reason: str = "answered STOP") -> None:
    with Session(engine) as session, session.begin():
        SuppressionList(session).suppress(address, reason)
    execute(
        engine,
        "UPDATE engagement_suppression SET since = :since WHERE address_hash = :hash",
        since=since,
        hash=address_hash(address),
    )


def test_an_address_is_put_on_the_list_and_taken_off(run, engine):
    """At once, since it is one; what is told hides the address."""
    put = run("suppress", ANA, "--reason", "answered STOP", on=engine)
    assert (put.status, put.err) == (0, "")
    assert facts(put.out) | {"since": ""} == {"address": MASKED, "since": "", "until": "", "reason": "answered STOP"}
    assert found(engine, ANA).reason == "answered STOP"

    taken = run("unsuppress", ANA)
    assert (taken.status, facts(taken.out)) == (0, {"address": MASKED, "was_suppressed": "True"})
    assert found(engine, ANA) is None


def test_it_is_told_which_end_counts(run, engine):
    """The later of both: what is told is what is on the list, not what was typed."""
    run("suppress", ANA, "--reason", "away", "--until", "14d", on=engine)
    again = json.loads(run("suppress", ANA, "--reason", "away", "--until", "1d", "--json").out)

    ahead = datetime.fromisoformat(again["until"]) - datetime.now(UTC)
    assert timedelta(days=13) < ahead <= timedelta(days=14)
    assert found(engine, ANA).until == datetime.fromisoformat(again["until"])


def test_an_end_that_is_over_is_refused(run, engine):
    """It would suppress nothing; what is on the list stays as it is."""
    ran = run("suppress", ANA, "--reason", "away", "--until", "2020-01-01T00:00Z", on=engine)

    assert (ran.status, ran.out, ran.err) == (2, "", "engagement: until: is over already\n")
    assert execute(engine, "SELECT count(*) FROM engagement_suppression").scalar_one() == 0


def test_an_address_that_is_not_on_the_list_needs_attention(run, engine):
    """A slip in the number does not look like a success."""
    run("suppress", ANA, "--reason", "answered STOP", on=engine)

    looked, taken = run("suppressed", BOB), run("unsuppress", BOB, "--json")

    assert (looked.status, looked.out, looked.err) == (1, "", NOT_ON_IT)
    assert (taken.status, json.loads(taken.out)["was_suppressed"], taken.err) == (1, False, NOT_ON_IT)
    assert found(engine, ANA) is not None


def test_one_address_is_looked_up(run, engine):
    """With since, until and reason; the address and a number in the reason only if they are to be revealed."""
    suppress_at(engine, ANA, "2026-11-21 09:00Z", "wrote from 5511988887777")

    hidden, shown = (json.loads(run("suppressed", ANA, "--json", *more, on=engine).out) for more in ([], ["--reveal"]))

    assert hidden["since"] == "2026-11-21T09:00:00+00:00"
    assert hidden == {"address": MASKED, "since": hidden["since"], "until": None, "reason": "wrote from ***"}
    assert shown == hidden | {"address": ANA, "reason": "wrote from 5511988887777"}


def test_the_newest_entries_are_listed_and_counted(run, engine):
    """A page of those in force, the newest first; the count is of all pages."""
    for day in range(1, 6):
        suppress_at(engine, f"551199999000{day}@s.whatsapp.net", f"2026-11-0{day} 09:00Z", f"reason {day}")
    execute(engine, "UPDATE engagement_suppression SET until = now() WHERE reason = 'reason 4'")

    first = json.loads(run("suppressed", "--limit", 2, "--json", on=engine).out)
    second = json.loads(run("suppressed", "--limit", 2, "--skip", 2, "--json").out)
    as_text = run("suppressed", "--limit", 1)

    assert [each["reason"] for each in first["suppressed"]] == ["reason 5", "reason 3"]
    assert [each["reason"] for each in second["suppressed"]] == ["reason 2", "reason 1"]
    assert first["count"] == second["count"] == 4
    assert as_text.out.splitlines()[0] == "entry\tsince\tuntil\treason"
    assert as_text.out.splitlines()[1].split("\t")[1:] == ["2026-11-05T09:00:00+00:00", "", "reason 5"]


def test_the_list_reveals_hashes_on_demand_only(run, engine):
    """All numbers can be tried against a hash: unless asked for, an entry has a pseudonym and a masked reason."""
    suppress_at(engine, ANA, "2026-11-21 09:00Z", "wrote from 5511988887777")

    hidden, shown = run("suppressed", on=engine), run("suppressed", "--reveal")

    assert address_hash(ANA) in shown.out
    assert "5511988887777" in shown.out
    assert address_hash(ANA)[:8] not in hidden.out
    assert "5511988887777" not in hidden.out


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (["suppress", "+55 11 99999-0001", "--reason", "x"], "address: "),
        (["unsuppress", "5511999990001"], "address: "),
        (["suppressed", "5511999990001"], "address: "),
        (["suppress", ANA, "--reason", "x" * 501], "reason: "),
        (["suppress", ANA], "'--reason'"),
        (["suppress", ANA, "--reason", "x", "--until", "tomorrow"], "'--until'"),
        (["suppressed", "--skip", "-1"], "'--skip'"),
        (["suppressed", "--limit", "0"], "'--limit'"),
    ],
)
def test_bad_input_names_the_field(run, engine, command, problem):
    """On one line, without the number, and nothing is done."""
    ran = run(*command, on=engine)

    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert problem in ran.err
    assert "99999" not in ran.err
    assert execute(engine, "SELECT count(*) FROM engagement_suppression").scalar_one() == 0
