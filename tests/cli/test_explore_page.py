"""The page of ``ntkdp explore``, by requests to its server and in a real browser."""

import http.client
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from ntkdp import experiment

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
CONFIG = """
name = "<b>small<b>"
data = {n_train = 60, n_test = 30}
model = {widths = [32]}
training = {learning_rate = 1.0, steps = 10, epsilon = 3.0, delta = 1e-3}
[[clipping]]
clip_norm = 0.5
"""
#: Elements by selector, in the trees that widgets keep to themselves too.
FIND = """
function all(root, wanted) {
  const found = [...root.querySelectorAll(wanted)];
  for (const element of root.querySelectorAll("*")) {
    if (element.shadowRoot) found.push(...all(element.shadowRoot, wanted));
  }
  return found;
}
"""
NAMED = "Bokeh.documents[0].get_model_by_name"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page that a process of its own serves."""
    config = tmp_path_factory.mktemp("explore") / "small.toml"
    config.write_text(CONFIG)
    program = "from ntkdp.cli import main; main()"
    command = [sys.executable, "-c", program, "explore", str(config), "--port", "0", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line.startswith("open http://127.0.0.1:"), line
            sockets = psutil.Process(server.pid).net_connections("inet")
            assert {one.laddr.ip for one in sockets if one.status == "LISTEN"} == {"127.0.0.1"}
            yield line.split()[1]
        finally:
            server.terminate()


def status(address: str, path: str, **headers: str) -> int:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    try:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def test_only_pages_of_this_machine_get_an_answer(address: str) -> None:
    own = urlsplit(address).netloc
    port = own.rpartition(":")[2]
    assert status(address, "/") == 200
    assert status(address, "/", Host=f"localhost:{port}") == 200
    assert status(address, "/", Host=f"attacker.example:{port}") == 403
    socket = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "bnRrZHAgZXhwbG9yZSAxMg==",
        "Sec-WebSocket-Protocol": "bokeh, none",
    }
    foreign = {"Origin": "http://attacker.example"}
    assert status(address, "/ws", **socket, **foreign) == 403


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """A browser without a window."""
    if BROWSER is None or DRIVER is None:
        pytest.skip(
            "a browser moves the sliders: apt-get install chromium chromium-driver, as .ci/run does"
        )
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # A proxy of the machine has no way to its loopback interface.
    service = webdriver.ChromeService(DRIVER, env={**os.environ, "no_proxy": "127.0.0.1,localhost"})
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: Any, address: str) -> Any:
    """The browser with the page, once it has a first answer."""
    driver.get(address)
    wait_for(driver, f"return window.Bokeh?.documents.length > 0 && {NAMED}('summary') !== null")
    wait_for(driver, f"return {NAMED}('summary').text.includes('answered in')")
    return driver


def wait_for(driver: Any, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 120).until(lambda own: own.execute_script(script))


def answers(driver: Any) -> tuple[str, str]:
    found: list[str] = driver.execute_script(
        f"return [{NAMED}('summary').text, {NAMED}('toml').text]"
    )
    return found[0], found[1]


def resize(driver: Any, width: int, height: int) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def is_one_width(driver: Any) -> bool:
    """Whether nothing is wider than the window."""
    wide: bool = driver.execute_script(
        "const page = document.documentElement; return page.scrollWidth <= page.clientWidth"
    )
    return wide


def test_a_slider_moves_the_prediction(page: Any, address: str) -> None:
    from selenium.webdriver.common.keys import Keys

    summary, toml = answers(page)
    config = experiment.config(**tomllib.loads(toml))
    assert config.training.epsilon == 3.0
    handles = page.execute_script(FIND + "return all(document, '.noUi-handle')")
    assert len(handles) == 6
    handles[2].send_keys(Keys.ARROW_RIGHT)
    wait_for(page, f"return !{NAMED}('toml').text.includes('epsilon = 3.0')")
    moved, toml = answers(page)
    assert moved != summary
    assert experiment.config(**tomllib.loads(toml)).training.epsilon == 5.0
    script = "return all(document, 'button').filter(b => b.textContent !== 'Copy as TOML')"
    buttons = page.execute_script(FIND + script)
    assert [button.text for button in buttons] == ["abadi", "automatic", "psac", "global"]
    buttons[2].click()
    wait_for(page, f"return {NAMED}('toml').text.includes('\"psac\"')")
    title = f"return {NAMED}('map').title.text"
    wait_for(page, f"{title} === 'Map: test accuracy'")
    # Text of the configuration is text, and everything comes from this server.
    assert page.execute_script("return document.querySelector('header b')") is None
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert loaded
    assert all(name.startswith((address, address.replace("http", "ws"))) for name in loaded)
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_run_is_copied_as_toml(page: Any) -> None:
    (button,) = page.execute_script(
        FIND + "return all(document, 'button').filter(b => b.textContent === 'Copy as TOML')"
    )
    permission = {"name": "clipboard-write"}
    page.execute_cdp_cmd("Browser.setPermission", {"permission": permission, "setting": "granted"})
    button.click()
    wait_for(page, FIND + "return all(document, 'div').some(d => d.textContent === 'Copied.')")


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_the_page_fits_its_window(page: Any, width: int, height: int, tmp_path: Path) -> None:
    resize(page, width, height)
    wait_for(page, f"return window.innerWidth === {width}")
    wait_for(page, FIND + "return all(document, 'canvas').length >= 6")
    assert is_one_width(page)
    right = page.execute_script(
        FIND
        + "return Math.max(...all(document, 'canvas').map(c => c.getBoundingClientRect().right))"
    )
    assert right <= width
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
