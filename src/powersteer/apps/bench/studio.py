"""What the studio takes from a stroke's end to its picture, in a real browser."""

from __future__ import annotations

import math
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from powersteer.adapters.load import EMBEDDED_ADAPTERS
from powersteer.apps.studio.serve import served
from powersteer.backbones.load import EMBEDDED_BASE
from powersteer.conditions.extractor import optional_module
from powersteer.core.errors import PowersteerError
from powersteer.core.hardware import machine

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Notes when a stroke ended, when the first preview after it was shown, and when its picture was.
_WATCH = """
window.strokes = [];
const sheet = document.querySelector("#canvas-0 canvas");
let source = null, busy = false;
sheet.addEventListener("pointerup", () => window.strokes.push({ up: performance.now() }), true);
new MutationObserver(() => {
  const stroke = window.strokes.at(-1), now = performance.now();
  if (!stroke) return;
  const shown = document.querySelector("#steered img")?.src;
  if (shown && shown !== source && !stroke.first && busy) stroke.first = now - stroke.up;
  source = shown;
  const told = document.querySelector("#status")?.innerText ?? "";
  if (told.includes("Denoising")) busy = true;
  else if (busy && told.includes("picture in")) { busy = false; stroke.whole = now - stroke.up; }
}).observe(document.body, { subtree: true, childList: true, characterData: true, attributes: true });
"""


@dataclass(frozen=True)
class StudioBench:
    """Seconds from the end of a stroke, in the browser."""

    preview: list[float]
    """Seconds to the first preview, for each stroke."""
    picture: list[float]
    """Seconds to the picture, for each stroke."""
    machine: str

    @property
    def median(self) -> tuple[float, float]:
        """The median of both: seconds to the first preview, and to the picture."""
        return statistics.median(self.preview), statistics.median(self.picture)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def bench_studio(strokes: int = 12, chromium: Path = CHROMIUM) -> StudioBench:
    """Draw in a headless Chromium, stroke by stroke, and wait for each picture.

    Args:
        strokes: How many are counted; one before them warms everything up.
        chromium: The browser.

    Raises:
        PowersteerError: There is no such browser, or Playwright is not installed.
    """
    if not chromium.exists():
        raise PowersteerError(f"there is no browser at {chromium}: install Chromium, or give --chromium")
    playwright = optional_module("playwright.sync_api", "the bench of the studio", "pip install playwright")
    with (
        tempfile.TemporaryDirectory() as folder,
        served(EMBEDDED_BASE, list(EMBEDDED_ADAPTERS), Path(folder)) as address,
        playwright.sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(executable_path=str(chromium), args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(address)
        page.fill("#prompt textarea", "a red house")
        page.wait_for_selector("#canvas-0 canvas")
        page.evaluate(_WATCH)
        for i in range(strokes + 1):
            _stroke(page, i)
            page.wait_for_function(f"window.strokes[{i}]?.whole", timeout=60_000)
        found = page.evaluate("window.strokes")[1:]
        browser.close()
    return StudioBench(
        [stroke.get("first", stroke["whole"]) / 1000 for stroke in found],
        [stroke["whole"] / 1000 for stroke in found],
        machine("cpu"),
    )


def _stroke(page: Any, number: int) -> None:
    """A bow, each further out than the last."""
    box = page.locator("#canvas-0 canvas").bounding_box()
    radius = 0.1 + 0.03 * (number % 10)
    for turn in range(13):
        angle = number + turn / 12 * math.pi
        x = box["x"] + box["width"] * (0.5 + radius * math.cos(angle))
        y = box["y"] + box["height"] * (0.5 + radius * math.sin(angle))
        page.mouse.move(x, y)
        if turn == 0:
            page.mouse.down()
    page.mouse.up()
