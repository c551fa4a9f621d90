"""The page in a real, headless Chromium: what a person does, and what they then see."""

import json
import math
import re
import tempfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from conftest import draw_pairs
from powersteer.apps.bench.studio import ARGUMENTS, CHROMIUM
from powersteer.apps.studio.folders import PREFIX
from powersteer.apps.studio.serve import served
from powersteer.denoising.sampling.metadata import read_metadata

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no Chromium at {CHROMIUM}"),
]
PATIENCE = 60_000
# Dark pixels on the canvas.
INK = """() => { const sheet = document.querySelector("#canvas-0 canvas");
const seen = sheet.getContext("2d").getImageData(0, 0, sheet.width, sheet.height).data;
let dark = 0; for (let i = 0; i < seen.length; i += 4) dark += seen[i] < 128; return dark; }"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with served(adapters_dir=tmp_path_factory.mktemp("runs")) as address:
        yield address


@pytest.fixture
def page(browser, address):
    """A page that asks nobody else for anything, and has no error of its own."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    elsewhere, faults = [], []
    page.on("request", lambda one: one.url.startswith((address, "data:", "blob:")) or elsewhere.append(one.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    settle(page, "#canvas-0 canvas")
    yield page
    context.close()
    assert elsewhere == []
    assert faults == []


def settle(page, part: str) -> None:
    """Wait for a part, and then until nothing on the page has changed for twenty frames.

    Gradio writes the first values of what it shows once more a frame later, over what a script typed at once.
    """
    page.wait_for_selector(part)
    page.evaluate("window.still = 0")
    page.wait_for_function(
        """() => { const now = document.body.innerHTML;
        window.still = now === window.seen ? window.still + 1 : 0; window.seen = now; return window.still >= 20; }""",
        timeout=PATIENCE,
    )


def draw(page, radius: float = 0.3) -> None:
    """A circle."""
    canvas = page.locator("#canvas-0 canvas")
    canvas.hover()  # which waits until it stands still and nothing lies over it
    box = canvas.bounding_box()
    for turn in range(25):
        angle = 2 * math.pi * turn / 24
        x = box["x"] + box["width"] * (0.5 + radius * math.cos(angle))
        y = box["y"] + box["height"] * (0.5 + radius * math.sin(angle))
        page.mouse.move(x, y)
        if turn == 0:
            page.mouse.down()
    page.mouse.up()


def say(page, words: str) -> None:
    page.fill("#prompt textarea", words)


def wait_for(page, words: str, where: str = "#status") -> str:
    try:
        page.wait_for_function(
            "([where, words]) => document.querySelector(where)?.innerText.includes(words)",
            arg=[where, words],
            timeout=PATIENCE,
        )
    except playwright.TimeoutError:
        pytest.fail(f"no '{words}': the page says '{page.inner_text(where)}', and {ink(page)} pixels are drawn")
    return page.inner_text(where)


def unfold(page, section: str) -> None:
    page.locator(f"#{section} button").first.click()
    settle(page, f"#{section} :is(input, textarea, .cm-content)")


def few_steps(page, count: int = 2) -> None:
    unfold(page, "settings")
    page.fill("#steps input[type=number]", "6")
    page.fill("#count input[type=number]", str(count))
    page.keyboard.press("Tab")


def download(page, tmp_path, index: int = 0) -> Path:
    with page.expect_download() as info:
        page.locator("#downloads a[download]").nth(index).click()
    file = tmp_path / info.value.suggested_filename
    info.value.save_as(file)
    return file


def ink(page) -> int:
    return page.evaluate(INK)


def pixels(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        return picture.convert("RGB")


def test_a_stroke_becomes_a_picture_that_follows_it(page, tmp_path):
    say(page, "a red house")
    draw(page)
    told = wait_for(page, "1 picture in")
    steered, prior = (float(value) for value in re.findall(r"lines ([\d.]+) \(the prior's: ([\d.]+)\)", told)[0])
    assert steered > 0.8 > prior
    file = download(page, tmp_path)
    settings = read_metadata(file).settings
    assert (settings["prompt"], settings["num_inference_steps"], settings["scheduler"]) == ("a red house", 6, "unipc")
    assert pixels(file).size == (64, 64)


def test_generate_shows_seeds_their_spread_and_how_to_make_them_again(page):
    page.uncheck("#live input")
    say(page, "a fox")
    draw(page)
    few_steps(page, 3)
    page.click("#go")
    told = wait_for(page, "3 pictures in")
    assert "spread over the seeds 0." in told
    page.locator("#strip img").nth(2).wait_for()
    page.locator("#spread img").wait_for()
    assert page.locator("#strip img").count() == 3
    assert page.locator("#spread img").count() == page.locator("#prior img").count() == 1
    unfold(page, "recipe")
    assert "--prompt 'a fox' --seed 0" in page.inner_text("#command .cm-content").replace("\n", " ")
    assert "num_inference_steps=6" in page.inner_text("#snippet .cm-content")
    first = page.get_attribute("#steered img", "src")
    page.locator("#strip button").nth(2).click()
    page.wait_for_function("first => document.querySelector('#steered img').src !== first", arg=first)
    wait_for(page, "--seed 2", "#command .cm-content")


def test_another_seed_is_another_picture_of_the_same_drawing(page, tmp_path):
    say(page, "a fox")
    draw(page)
    wait_for(page, "1 picture in")
    first = download(page, tmp_path)
    page.click("#again")
    page.wait_for_function("document.querySelector('#downloads').innerText.includes('seed1')", timeout=PATIENCE)
    second = download(page, tmp_path)
    assert (first.name, second.name) == ("seed0.png", "seed1.png")
    assert ImageChops.difference(pixels(first), pixels(second)).getbbox() is not None
    assert read_metadata(first).conditions == read_metadata(second).conditions


def test_a_downloaded_picture_brings_its_drawing_and_settings_back(page, tmp_path):
    say(page, "a cat face")
    draw(page, 0.35)
    wait_for(page, "1 picture in")
    file = download(page, tmp_path)
    drawn = ink(page)
    page.reload()
    settle(page, "#canvas-0 canvas")
    assert ink(page) == 0
    with page.expect_file_chooser() as info:
        page.click("#reload")
    info.value.set_files(str(file))
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a cat face'", timeout=PATIENCE)
    page.wait_for_function(f"drawn => ({INK})() === drawn", arg=drawn, timeout=PATIENCE)
    unfold(page, "settings")
    assert page.input_value("#steps input[type=number]") == "6"
    page.fill("#count input[type=number]", "1")
    page.click("#go")
    wait_for(page, "1 picture in")
    assert ImageChops.difference(pixels(download(page, tmp_path / "again")), pixels(file)).getbbox() is None


def test_pen_eraser_undo_and_clear(page):
    page.uncheck("#live input")
    draw(page)
    circle = ink(page)
    assert circle > 1000
    draw(page, 0.15)
    both = ink(page)
    assert both > circle
    page.click('#canvas-0 [data-do="undo"]')
    assert ink(page) == circle
    page.click('#canvas-0 [data-do="eraser"]')
    draw(page)
    assert ink(page) == 0
    page.keyboard.press("Control+z")
    assert ink(page) == circle
    page.click('#canvas-0 [data-do="clear"]')
    assert ink(page) == 0


def test_a_picture_can_be_drawn_and_made_with_the_keyboard_alone(page):
    page.focus("#prompt textarea")
    page.keyboard.type("a fox")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "CANVAS"
    page.keyboard.press("Space")
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        for _ in range(4):
            page.keyboard.press(f"Shift+{key}")
    page.keyboard.press("Space")
    assert ink(page) > 1000
    wait_for(page, "1 picture in")
    names = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        names.add(page.evaluate("document.activeElement.innerText || document.activeElement.ariaLabel || ''").strip())
    assert {"Pen", "Eraser", "Undo", "Clear", "Generate", "Stop", "New seed"} <= names


def test_stop_ends_a_long_picture(page):
    page.uncheck("#live input")
    say(page, "a fox")
    draw(page)
    unfold(page, "settings")
    page.fill("#steps input[type=number]", "100")
    page.fill("#count input[type=number]", "8")
    page.keyboard.press("Tab")
    page.click("#go")
    wait_for(page, "Denoising")
    page.click("#halt")
    wait_for(page, "Stopped")


def test_errors_are_messages(page, tmp_path):
    page.click("#go")
    toast = page.wait_for_selector('[data-testid="toast-body"]', timeout=PATIENCE)
    assert "the prompt is empty" in toast.inner_text()
    (tmp_path / "it.png").write_bytes(b"<script>alert(1)</script>")
    unfold(page, "from-picture-0")
    page.set_input_files("#picture-0 input[type=file]", str(tmp_path / "it.png"))
    page.wait_for_function(
        "[...document.querySelectorAll('[data-testid=toast-body]')].some(x => x.innerText.includes('not a readable'))",
        timeout=PATIENCE,
    )
    assert "Traceback" not in page.content()


ATTACKS = """async address => {
  const form = new FormData();
  form.append("files", new File(["x"], "attack-of-another-page.txt"));
  const tried = [
    fetch(address + "gradio_api/upload", { method: "POST", mode: "no-cors", body: form }),
    fetch(address + "gradio_api/upload", { method: "POST", body: form }),
    fetch(address + "config"),
    fetch(address + "gradio_api/queue/join", { method: "POST", mode: "no-cors", body: "{}" }),
    new Promise((ok, no) => Object.assign(new Image(), { onload: ok, onerror: no, src: address + "favicon.ico" })),
    new Promise((ok, no) => {
      const stream = new EventSource(address + "gradio_api/heartbeat/x");
      Object.assign(stream, { onopen: ok, onerror: no });
    }),
  ];
  return (await Promise.allSettled(tried)).map(one => one.value?.type === "opaque" ? "opaque" : one.status);
}"""


def test_another_page_can_link_to_the_studio_but_neither_send_nor_read(browser, address, tmp_path):
    (tmp_path / "index.html").write_text(f"<a href='{address}'>the studio</a>")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = list(Path(tempfile.gettempdir()).glob(f"{PREFIX}*/gradio/*/attack*"))
    context = browser.new_context()
    page, statuses = context.new_page(), {}
    page.on("response", lambda one: one.url.startswith(address) and statuses.update({one.url: one.status}))
    page.goto(f"http://localhost:{server.server_port}/")  # to a browser another site than 127.0.0.1
    assert page.evaluate(ATTACKS, address) == ["opaque", "rejected", "rejected", "opaque", "rejected", "rejected"]
    assert {f"{address}gradio_api/{path}" for path in ("upload", "queue/join")} <= statuses.keys()
    assert set(statuses.values()) == {403}
    assert list(Path(tempfile.gettempdir()).glob(f"{PREFIX}*/gradio/*/attack*")) == before == []
    page.click("a")
    page.wait_for_selector("#canvas-0 canvas")
    context.close()
    server.shutdown()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_telephone_in_light_and_dark(browser, address, scheme):
    context = browser.new_context(viewport={"width": 375, "height": 740}, color_scheme=scheme, has_touch=True)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#canvas-0 canvas")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.locator("#canvas-0 canvas").bounding_box()["width"] > 280
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(value) for value in re.findall(r"\d+", ground)[:3]) / 3
    assert (brightness < 100) is (scheme == "dark")
    page.get_by_role("tab", name="Train").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    context.close()


def test_train_on_a_small_zip_and_draw_with_what_came_of_it(page, tmp_path):
    pairs = draw_pairs(tmp_path / "pairs", 12, size=64)
    with zipfile.ZipFile(tmp_path / "pairs.zip", "w") as archive:
        for file in pairs.rglob("*.*"):
            archive.write(file, file.relative_to(tmp_path))
    page.get_by_role("tab", name="Train").click()
    page.set_input_files("#archive input[type=file]", str(tmp_path / "pairs.zip"))
    wait_for(page, "12 pairs", "#report")
    page.locator("#pairs img").nth(11).wait_for()
    page.fill("#updates input[type=number]", "10")
    page.locator("#name").get_by_role("textbox").fill("boxes")
    page.click("#begin")
    wait_for(page, "Running", "#training-status")
    page.wait_for_selector("#curves svg", timeout=3 * PATIENCE)
    page.wait_for_selector("#validation img", timeout=3 * PATIENCE)
    page.wait_for_function(
        "document.querySelector('#training-status').innerText.includes('Finished')", timeout=4 * PATIENCE
    )
    page.click("#use")
    page.wait_for_selector("#canvas-0 canvas", state="visible")
    say(page, "a fox")
    draw(page)
    wait_for(page, "1 picture in")
    adapter = read_metadata(download(page, tmp_path)).settings["adapter"]
    assert [Path(name).name for name in adapter] == ["boxes"]
    assert json.loads(Path(adapter[0], "config.json").read_text())["_class_name"] == "BPSModel"
