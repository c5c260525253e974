"""docs/receipts.md is true: its Python runs as it stands, and its tables are those of the code."""

import hashlib
import hmac
import json
import re
from pathlib import Path
from time import time

import pytest
from commands import messages
from conftest import row
from test_examples import served_by_uvicorn, served_by_werkzeug

from engagement.cli.receiving import PREFIX, PROVIDERS
from engagement.messages import delivery_id, reference
from engagement.receipts import endpoint

PAGE = (Path(__file__).parents[2] / "docs" / "receipts.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
SECRET = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("block", "app", "serve"),
    [(0, "app", served_by_uvicorn), (1, "site", served_by_werkzeug)],
    ids=["FastAPI", "Flask"],
)
def test_the_lines_that_a_host_adds_are_enough(engine, monkeypatch, block, app, serve):
    """Meta finds the endpoint where the page says, and its status resolves a doubt."""
    monkeypatch.setenv("META_APP_SECRET", SECRET)
    monkeypatch.setenv("META_VERIFY_TOKEN", "open sesame")
    host = {"__name__": "host", "engine": engine}
    exec(compile(BLOCKS[block], "receipts.md", "exec"), host)
    (message_id,) = messages(engine, "in_doubt")
    named = reference(message_id, delivery_id(row(engine, message_id).idempotency_key))
    body = json.dumps(status_of(named)).encode()

    with serve(host[app]) as client:
        asked = {"hub.mode": "subscribe", "hub.verify_token": "open sesame", "hub.challenge": "17"}
        assert client.get("/receipts/", params=asked).text == "17"
        signature = f"sha256={hmac.digest(SECRET.encode(), body, hashlib.sha256).hex()}"
        answer = client.post("/receipts/", content=body, headers={"X-Hub-Signature-256": signature})

    assert answer.status_code == 200
    assert row(engine, message_id).status == "sent"


def status_of(named: str) -> dict:
    status = {
        "id": "wamid.1",
        "status": "delivered",
        "timestamp": str(int(time())),
        "recipient_id": "5511999990000",
        "biz_opaque_callback_data": named,
    }
    change = {"field": "messages", "value": {"messaging_product": "whatsapp", "statuses": [status]}}
    return {"object": "whatsapp_business_account", "entry": [{"id": "1", "changes": [change]}]}


def test_the_answers_are_those_of_the_code():
    """Line for line."""
    lines = [line for line in endpoint.__doc__.splitlines() if line.startswith("|")]

    assert re.search(r"<!-- table: answers -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)[1].splitlines() == lines


def test_the_page_names_every_provider_and_variable():
    """As `engagement receive` reads them."""
    for provider, (place, variables) in PROVIDERS.items():
        assert f"`engagement.receipts.{place}`" in PAGE
        for variable in variables.values():
            assert re.search(rf"^\| `{PREFIX}{variable}` \|.*`{provider}`", PAGE, re.MULTILINE), (provider, variable)
