"""Seconds from a move of a slider of ``ntkdp explore`` to its answer, in Python and in a browser.

500 training and 300 test digits, ten classes, 200 steps. The browser is Chromium without a window,
if it is installed with its driver.
"""

import argparse
import itertools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ntkdp.cli._exploration.explorer import Explorer
from ntkdp.cli._exploration.setting import DIGITS, Position, Setting, setting_of

MOVES = 30
NAMED = "Bokeh.documents[0].get_model_by_name"
#: Moves a slider and waits until the summary has changed.
MOVE = f"""
const [name, value, done] = arguments;
const summary = {NAMED}("summary"), begun = performance.now();
const listen = () => {{
  if (!summary.text.includes("answered in")) return;
  summary.properties.text.change.disconnect(listen);
  requestAnimationFrame(() => done((performance.now() - begun) / 1000));
}};
summary.properties.text.change.connect(listen);
{NAMED}(name).value = value;
"""


def moves(setting: Setting) -> list[Position]:
    """Places one notch from the one before, by each slider in turn."""
    place = setting.start._replace(steps=200)
    places = []
    names = ("clip_norm", "learning_rate", "epsilon", "sample_rate", "steps")
    for number in range(MOVES):
        name = names[number % len(names)]
        offered = (150, 200) if name == "steps" else setting.choices[name]
        here, way = offered.index(getattr(place, name)), 1 if number % 2 else -1
        there = here + (way if 0 <= here + way < len(offered) else -way)
        place = place._replace(**{name: offered[there]})
        places.append(place)
    return places


def in_python(setting: Setting, draws: int) -> list[float]:
    """Seconds of each answer, programs being compiled."""
    explorer = Explorer(setting, draws)
    explorer.answer(setting.start)
    seconds = []
    for place in moves(setting):
        begun = time.perf_counter()
        explorer.answer(place)
        seconds.append(time.perf_counter() - begun)
        # As the page does while the hand rests.
        while (work := explorer.work_ahead(place)) is not None:
            work()
    return seconds


def in_browser(setting: Setting, draws: int) -> list[float]:
    """Seconds from a move until the browser has the answer and draws its next frame."""
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "digits.toml"
        config.write_text(setting.as_toml(setting.start._replace(steps=200)))
        program = "from ntkdp.cli import main; main()"
        command = [
            sys.executable, "-u", "-c", program, "explore", str(config), "--port", "0",
            "--no-browser", "--draws", str(draws),
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = server.stdout.readline().split()[1]
            options = webdriver.ChromeOptions()
            options.binary_location = shutil.which("chromium") or ""
            for argument in ("--headless=new", "--no-sandbox", "--window-size=1280,900"):
                options.add_argument(argument)
            service = webdriver.ChromeService(shutil.which("chromedriver"))
            driver = webdriver.Chrome(options, service)
            driver.set_script_timeout(60)
            try:
                driver.get(address)
                is_there = "return window.Bokeh?.documents.length > 0"
                is_ready = f"return {NAMED}('map')?.title.text.endsWith('accuracy')"
                WebDriverWait(driver, 300).until(lambda own: own.execute_script(is_there))
                WebDriverWait(driver, 300).until(lambda own: own.execute_script(is_ready))
                time.sleep(45)  # Programs of the other rules are compiled.
                return [_moved(driver, *change) for change in _changes(setting)]
            finally:
                driver.quit()
                server.terminate()


def _changes(setting: Setting) -> list[tuple[str, str]]:
    places = [setting.start._replace(steps=200), *moves(setting)]
    changes = []
    for before, after in itertools.pairwise(places):
        (name,) = [n for n in Position._fields if getattr(before, n) != getattr(after, n)]
        value = getattr(after, name)
        changes.append((name, f"{value:.12g}"))
    return changes


def _moved(driver: Any, name: str, value: str) -> float:
    seconds: float = driver.execute_async_script(MOVE, name, value)
    time.sleep(1.0)  # A hand rests, and the map follows.
    return seconds


def report(where: str, seconds: list[float]) -> None:
    """One line on the moves."""
    print(
        f"{where}: median {statistics.median(seconds):.3f} s, largest {max(seconds):.3f} s, of "
        f"{len(seconds)} moves",
        flush=True,
    )


def main() -> None:
    """Print the seconds of the moves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=24)
    draws = parser.parse_args().draws
    setting = setting_of(DIGITS)
    report("in Python", in_python(setting, draws))
    if shutil.which("chromium") and shutil.which("chromedriver"):
        report("in a browser", in_browser(setting, draws))


if __name__ == "__main__":
    main()
