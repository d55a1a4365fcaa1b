"""Check in a browser that nothing on a page of the documentation is wider than its column.

``python docs/check_widths.py docs/_build/html`` opens every page in Chromium, at the widths of a
desktop and of a phone. A page fails if it scrolls sideways, or if code is cut off: wide tables and
formulas scroll in boxes of their own. Prints what sticks out, and ends with 1 if anything does.
"""

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTHS = (1280, 390)
#: Pages in one call of the browser, and the milliseconds that they get.
AT_ONCE, MILLISECONDS = 12, 30_000

#: Loads pages one after the other into a frame of the asked width, and tells what is too wide.
PROBE = """<!doctype html><meta charset="utf-8"><title>waiting</title>
<iframe style="border:0;width:{width}px;height:900px"></iframe>
<script>
const pages = {pages}, frame = document.querySelector("iframe"), found = [];
function wide(page) {{
  const root = page.documentElement, told = [];
  if (root.scrollWidth > root.clientWidth + 1) told.push(["page", root.scrollWidth, ""]);
  for (const block of page.querySelectorAll("div.highlight pre")) {{
    if (block.scrollWidth > block.clientWidth + 1)
      told.push(["code", block.scrollWidth, block.textContent.slice(0, 60)]);
  }}
  for (const code of page.querySelectorAll("td code")) {{
    if (code.getClientRects().length > 1 + code.textContent.trim().split(/[\\s/.,=_-]+/).length)
      told.push(["broken word", code.clientWidth, code.textContent.slice(0, 60)]);
  }}
  return told;
}}
function next(number) {{
  if (number === pages.length) {{ document.title = JSON.stringify(found); return; }}
  frame.onload = () => setTimeout(() => {{
    for (const one of wide(frame.contentDocument)) found.push([pages[number], ...one]);
    next(number + 1);
  }}, 50);
  frame.src = pages[number];
}}
next(0);
</script>"""


def check(folder: Path, pages: list[Path], width: int, browser: str) -> list[list[object]]:
    """What is too wide on some pages: page, kind, its width, and how it begins."""
    probe = PROBE.format(width=width, pages=json.dumps([page.as_uri() for page in pages]))
    with tempfile.TemporaryDirectory() as profile:
        written = Path(profile) / "probe.html"
        written.write_text(probe, encoding="utf-8")
        done = subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                "--allow-file-access-from-files", f"--window-size={width + 20},1000",
                f"--user-data-dir={profile}", f"--virtual-time-budget={MILLISECONDS}",
                "--dump-dom", written.as_uri(),
            ],
            capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    if title is None or title[1] == "waiting":
        raise RuntimeError(f"the browser did not finish {pages[0]}: {done.stderr[-500:]}")
    found: list[list[object]] = json.loads(html.unescape(title[1]))
    return [[str(one[0]).removeprefix(folder.as_uri() + "/"), *one[1:]] for one in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the built pages")
    folder = parser.parse_args().folder.resolve()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("no Chromium is installed: apt-get install chromium")
        return 1
    pages = sorted(page for page in folder.rglob("*.html") if "_static" not in page.parts)
    n_wide = 0
    for width in WIDTHS:
        for first in range(0, len(pages), AT_ONCE):
            for page, kind, size, text in check(
                folder, pages[first : first + AT_ONCE], width, browser
            ):
                print(f"{width} px: {page}: {kind} of {size} px: {text!r}")
                n_wide += 1
    print(f"{len(pages)} pages at {WIDTHS[0]} and {WIDTHS[1]} px: {n_wide} too wide")
    return 1 if n_wide else 0


if __name__ == "__main__":
    sys.exit(main())
