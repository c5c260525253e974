"""The admin page in a real browser: by keyboard alone, on a phone, and with nothing from elsewhere."""

import shutil
from collections.abc import Iterator

import pytest
from admin_page import admin_of, put, put_secrets
from conftest import new_message, queue, row
from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
PATIENCE = 20
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no browser: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module", name="chromium")
def _chromium(tmp_path_factory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options, ChromeService(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture(scope="module", name="address")
def _address(shared_engine) -> Iterator[str]:
    with admin_of(shared_engine, may_reveal=True) as client:
        yield str(client.base_url)


@pytest.fixture(name="browser")
def _browser(chromium, address, engine) -> Iterator[Chrome]:
    """A browser that has seen nothing yet, whose `open` takes paths of the page."""
    chromium.delete_all_cookies()
    chromium.get_log("browser")
    chromium.open = lambda path="": chromium.get(f"{address}{path}")
    yield chromium
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def focused(browser) -> str:
    """Return the name of what has the focus, as it would be read out, after seeing that the focus is seen."""
    return browser.execute_script(
        """
        const it = document.activeElement, look = getComputedStyle(it);
        if (look.outlineStyle === 'none' || parseFloat(look.outlineWidth) < 2) return 'UNSEEN ' + it.outerHTML;
        const label = it.labels && it.labels.length ? it.labels[0].innerText : it.innerText;
        return label.trim() || 'UNNAMED ' + it.outerHTML;
        """
    )


def tab_to(browser, name: str) -> None:
    """Press Tab until `name` has the focus; each stop on the way has a name and can be seen."""
    stops = []
    while len(stops) < 60:
        ActionChains(browser).send_keys(Keys.TAB).perform()
        stops.append(focused(browser))
        assert not stops[-1].startswith(("UNSEEN", "UNNAMED")), stops[-1]
        if stops[-1] == name:
            return
    pytest.fail(f"{name} cannot be reached: {stops}")


def enter(browser) -> None:
    """Press Enter, and wait for the page that it leads to."""
    browser.execute_script("window.isOld = true")
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    is_there = "return !window.isOld && document.readyState === 'complete'"
    WebDriverWait(browser, PATIENCE, 0.05).until(lambda it: it.execute_script(is_there))


@pytest.mark.parametrize(
    ("status", "button", "confirm", "then", "sentence"),
    [
        ("pending", "Cancel", "Cancel it", "cancelled", "Cancelled. It is not sent."),
        ("pending", "Reschedule", "Reschedule it", "pending", "Rescheduled."),
        ("failed", "Retry", "Retry it", "pending", "Due again, with all its retries."),
        ("in_doubt", "It was sent", "It was sent", "sent", "Resolved: it was sent."),
        (
            "in_doubt", "It was not sent", "It was not sent: send it", "pending",
            "Resolved: it was not sent, and is due again.",
        ),
    ],
)  # fmt: skip
def test_everything_is_done_by_keyboard(browser, engine, status, button, confirm, then, sentence):  # noqa: PLR0917
    """From the overview to what came of an action with Tab and Enter alone, each stop named and visible."""
    message_id = put(engine, status)
    browser.open()
    tab_to(browser, "Messages")
    enter(browser)
    tab_to(browser, str(message_id))
    enter(browser)
    tab_to(browser, button)
    enter(browser)
    tab_to(browser, confirm)
    enter(browser)

    assert browser.find_element("css selector", ".alert[role=status]").text == sentence
    assert row(engine, message_id).status == then


def test_the_first_stop_leads_past_the_header(browser):
    """Who uses a keyboard need not walk through the navigation on every page."""
    browser.open("messages")
    tab_to(browser, "Skip to the content")

    assert browser.switch_to.active_element.get_attribute("href").endswith("#content")


@pytest.mark.parametrize("path", ["", "?span=week", "messages?reveal=1", "messages/{id}", "messages/{id}?reveal=1",
                                  "messages/{id}/resolve-not-sent", "messages/0"])  # fmt: skip
def test_a_phone_shows_the_page_without_sideways_scrolling(browser, engine, path):
    """390 pixels are enough, also for what is long and has no blanks."""
    message_id = put_secrets(engine)
    queue(engine, new_message("u" * 255, message_type="t" * 64, message_key="k" * 255))
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)

    browser.open(path.format(id=message_id))

    assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]


def test_the_browser_is_content(browser, engine):
    """No error on its console, no request to elsewhere, a style that was really loaded, and a chart that is drawn."""
    message_id = put_secrets(engine)
    for path in ("", "messages", f"messages/{message_id}", f"messages/{message_id}/resolve-sent"):
        browser.open(path)
        origin, loaded = browser.execute_script(
            "return [location.origin, performance.getEntriesByType('resource').map(it => it.name)]"
        )
        assert [name for name in loaded if not name.startswith((origin, "data:"))] == []
        assert browser.execute_script("return document.styleSheets.length") == 2
    assert browser.get_log("browser") == []

    browser.open()
    assert browser.find_element("css selector", "g:last-of-type rect.due").size["height"] > 40
