"""Pictures of a report page, as a reader with a wide screen sees its first part: docs/images is made with it.

python scripts/report_picture.py runs/digits/report.html docs/images/report.png
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    """Opens the page in a headless Chromium with no network, and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1100, help="CSS pixels")
    parser.add_argument("--height", type=int, default=1250, help="CSS pixels; 0 for the whole page")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    given = parser.parse_args()
    given.picture.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        size = {"width": given.width, "height": given.height or 900}
        page = browser.new_page(viewport=size, color_scheme=given.scheme)
        page.context.set_offline(True)
        page.goto(given.page.resolve().as_uri())
        page.wait_for_selector("html[data-ready=true]", state="attached")
        page.screenshot(path=given.picture, full_page=given.height == 0)
        browser.close()


if __name__ == "__main__":
    main()
