"""Baileys' own contract: the real npm package, as far as it goes without an account."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

import pytest
from conftest import new_message

from engagement import Destination, InvalidMessage
from engagement.messages import whatsapp_message_id

HERE = Path(__file__).parent / "baileys"
INSTALL_SECONDS, RUN_SECONDS = 120, 60
NODE = 20

INDIVIDUALS = [
    "5511987654321@s.whatsapp.net",
    "1234567@s.whatsapp.net",
    "999999999999999@s.whatsapp.net",
    "12345@lid",
    "98765432101234@lid",
    "12345678901234567890@lid",
]
GROUPS = ["120363025246125486@g.us", "123456789012345@g.us", "5511987654321-1612345678@g.us"]
OTHERS = [
    "5511987654321:12@s.whatsapp.net",
    "5511987654321_1:12@s.whatsapp.net",
    "98765432101234:3@lid",
    "5511987654321@c.us",
    "status@broadcast",
    "120363025246125486@newsletter",
    "13135550002@bot",
    "5511987654321@hosted",
    "98765432101234@hosted.lid",
]
IDS = [whatsapp_message_id(number, uuid.uuid5(uuid.NAMESPACE_URL, str(number))) for number in range(50)]


@pytest.fixture(scope="module", name="baileys")
def _baileys():
    """What Baileys says to our ids and JIDs."""
    folder = _installed()
    asked = {"ids": IDS, "jids": INDIVIDUALS + GROUPS + OTHERS, "text": "Olá 💛"}
    done = subprocess.run(
        ["node", "contract.mjs"],
        cwd=folder,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _installed() -> Path:
    """Return the folder in which the package is installed, once for all runs on this machine."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("node and npm are not installed")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    if int(version.lstrip("v").split(".")[0]) < NODE:
        pytest.skip(f"Baileys needs Node {NODE} or later, and this is {version.strip()}")
    package = (HERE / "package.json").read_text()
    release = json.loads(package)["dependencies"]["@whiskeysockets/baileys"]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "engagement-tests"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"baileys-{release}"
    if not (folder / "node_modules").is_dir():
        _install(package, folder)
    shutil.copy(HERE / "contract.mjs", folder)
    return folder


def _install(package: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="npm-", dir=folder.parent) as made:
        (Path(made) / "package.json").write_text(package)
        options = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock", "--legacy-peer-deps"]
        try:
            done = subprocess.run(
                ["npm", "install", *options],
                cwd=made,
                capture_output=True,
                text=True,
                timeout=INSTALL_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm did not install Baileys within {INSTALL_SECONDS} s")
        if done.returncode:
            pytest.skip(f"npm cannot install Baileys here: exit code {done.returncode}")
        with contextlib.suppress(OSError):  # Another run was faster.
            Path(made).rename(folder)
        Path(made).mkdir(exist_ok=True)  # For the context manager to remove.


def test_our_message_id_has_the_form_of_baileys_own(baileys):
    """It looks like what Baileys generates: its prefix, its length and its alphabet."""
    form = re.compile(r"3EB0[0-9A-F]{18}")

    assert all(form.fullmatch(own) for own in baileys["own"])
    assert all(form.fullmatch(ours) for ours in IDS)
    assert len(set(IDS)) == len(IDS)


def test_our_message_id_is_taken_as_it_is(baileys):
    """A message that is generated with our id keeps it, and its text, for every kind of destination."""
    made = [(message["id"], message["to"], message["text"]) for message in baileys["messages"]]

    assert made == [(each, jid, "Olá 💛") for each in IDS for jid in INDIVIDUALS + GROUPS + OTHERS]


def test_id_and_destination_survive_the_wire(baileys):
    """What Baileys writes to WhatsApp's socket reads back as our id and our JID, letter for letter."""
    expected = [(each, jid) for each in IDS for jid in INDIVIDUALS + GROUPS]
    written = {(message["wire"]["id"], message["wire"]["to"]) for message in baileys["messages"]}

    assert set(expected) <= written


def test_baileys_reads_our_jids_as_we_do(baileys):
    """An individual of ours is a user of Baileys', a group a group, and each is already in its normal form."""
    for jid in INDIVIDUALS + GROUPS:
        reading = baileys["readings"][jid]
        assert reading["isNormal"], jid
        assert not reading["isOther"], jid
        assert reading["isJidGroup"] is (jid in GROUPS), jid
        assert (reading["isPnUser"], reading["isLidUser"]) == (jid.endswith("@s.whatsapp.net"), jid.endswith("@lid")), (
            jid
        )


def test_what_is_queued_is_what_baileys_knows_as_one_chat(baileys):
    """`NewMessage` takes the JIDs that Baileys sends to as they are, and refuses all others for either destination."""
    for jid in INDIVIDUALS + GROUPS:
        destination = Destination.GROUP if jid in GROUPS else Destination.INDIVIDUAL
        assert new_message(destination_jid=jid, destination=destination).destination_jid == jid
    for jid in OTHERS:
        reading = baileys["readings"][jid]
        is_plain = reading["isNormal"] and (reading["isPnUser"] or reading["isLidUser"] or reading["isJidGroup"])
        assert not is_plain, jid
        for destination in Destination:
            with pytest.raises(InvalidMessage, match="destination_jid"):
                new_message(destination_jid=jid, destination=destination)
