"""Take the picture of the server's page that the docs show: a finished race of the bundled pair (docs/use/page.png)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

PICTURE = Path(__file__).parents[1] / "docs" / "use" / "page.png"
MILLISECONDS = 120_000
RACES = 20


@contextmanager
def server(*options: str) -> Iterator[str]:
    """The URL of a server of the bundled pair on a free port."""
    command = [sys.executable, "-m", "gemma_mtp", "serve", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            found = re.search(r"http://[\d.:]+\d", process.stdout.readline())
            if found is None:
                raise SystemExit("the server did not start; see why with: gemma-mtp serve --port 0")
            yield found.group()
        finally:
            process.terminate()


def take(url: str) -> None:
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.goto(url)
        expect(page.locator("#model")).to_have_text("gemma-mtp-bundled")
        for _ in range(RACES):  # of the first sample, until other work does not disturb it
            page.click("#race")
            expect(page.locator("#status")).to_have_text(re.compile("^Race finished"), timeout=MILLISECONDS)
            if "differ" not in (page.text_content("#verdict-note") or ""):
                break
        page.keyboard.press("Escape")  # the end of the replay
        page.mouse.move(0, 0)
        page.screenshot(path=PICTURE, full_page=True)
        browser.close()


if __name__ == "__main__":
    with server(*sys.argv[1:]) as url:
        take(url)
