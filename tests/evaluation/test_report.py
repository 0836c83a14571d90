"""Reports in a real browser: Debian's chromium, driven by Playwright."""

import io
import os
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from pixeldecoder.cli import main

SIDE = 128


@contextmanager
def opened(path):
    """The page; on leaving, that it complained of nothing and asked for nothing but itself."""
    chromium = shutil.which("chromium")
    if chromium is None:
        if os.environ.get("CI"):
            pytest.fail("this test needs a browser: apt-get install chromium")
        pytest.skip("needs chromium")
    complaints, requests = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        yield page
        browser.close()
    assert not complaints
    assert requests[0] == path.as_uri() and all(url.startswith("data:") for url in requests[1:])


def seen(element) -> np.ndarray:
    """What the element shows, (H, W, 3)."""
    return np.array(Image.open(io.BytesIO(element.screenshot())).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A dark one and a bright one, so that what is seen of each is plain."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, value in (("dark", 40), ("bright", 220)):
        noise = np.random.RandomState(0).randint(-20, 20, (SIDE, SIDE, 3))
        Image.fromarray((value + noise).astype("uint8")).save(folder / f"{name}.png")
    return folder


def test_slider_and_zoom(pictures, tmp_path):
    path = tmp_path / "page.html"
    assert main(["compare", str(pictures / "dark.png"), str(pictures / "bright.png"), "--output", str(path)]) == 0
    with opened(path) as page:
        stage = page.locator(".stage")
        stage.scroll_into_view_if_needed()
        zoom = stage.bounding_box()["width"] / SIDE
        assert zoom == 3

        def bright_share() -> float:
            return (seen(stage).mean(axis=2) > 130).mean()

        assert bright_share() == pytest.approx(0.5, abs=0.02)
        page.locator(".split").fill("20")
        assert bright_share() == pytest.approx(0.8, abs=0.02)
        box = stage.bounding_box()
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 50)
        assert bright_share() == pytest.approx(0.8, abs=0.02)  # nothing moves without a button held
        page.mouse.down()
        page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 50)
        page.mouse.up()
        assert bright_share() == pytest.approx(0.1, abs=0.02)
        page.locator("select.left").select_option("bright.png")
        assert bright_share() > 0.98  # all but the line
        page.locator(".zoom").fill("1")
        assert stage.bounding_box()["width"] == SIDE
        page.locator(".zoom").fill("8")
        assert stage.bounding_box()["width"] == 8 * SIDE and "8x" in page.locator(".controls").inner_text()
        block = seen(stage)[402:407, 202:207]  # inside of one pixel of the picture, enlarged without blur
        assert (block == block[0, 0]).all()


def test_report_of_an_evaluation(pictures, tmp_path):
    output = tmp_path / "out"
    arguments = ["--decoders", "--baselines", "bicubic", "lanczos", "--device", "cpu"]
    assert main(["evaluate", str(pictures), "--output", str(output), *arguments]) == 0
    with opened(output / "report.html") as page:
        assert page.locator(".case").count() == 2 and page.locator("svg").count() == 1
        page.wait_for_function("[...document.images].every((image) => image.complete && image.naturalWidth)")
        names = page.locator("select.right").first.locator("option").all_inner_texts()
        assert names == ["original", "bicubic", "lanczos", "texture of bicubic"]
        for width in (1280, 400):  # nothing sticks out of a telephone's screen
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
