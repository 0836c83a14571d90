"""The page in a real browser: Debian's chromium, driven by Playwright; nothing is fetched from another machine."""

import io
import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from safetensors.torch import save_file

from conftest import tiny_pipeline
from families import build
from pixeldecoder.files import read_made
from pixeldecoder.serve.web import mount
from serving import latents, photo, serving

expect.set_options(timeout=30_000)  # of a machine that does other work, too
SHOTS = os.environ.get("PIXELDECODER_SCREENSHOTS")
"""Folder for screenshots, to be looked at."""


@pytest.fixture(scope="module")
def pipeline():
    pipeline = tiny_pipeline()
    pipeline.register_to_config(latent_space="flux", license="Apache-2.0")
    return pipeline


@pytest.fixture(scope="module")
def client(pipeline):
    latent_model, _ = build("Z-Image")
    with serving(pipeline, mount, latent_model=latent_model) as client:
        yield client


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        if os.environ.get("CI"):
            pytest.fail("this test needs a browser: apt-get install chromium")
        pytest.skip("needs chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, client):
    """A page of that width, which must have told no error and asked no other machine for anything."""
    wrong, contexts, home = [], [], str(client.base_url)

    def open_(width: int = 1300, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 1000}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("response", lambda response: response.status >= 400 and wrong.append(response.url))
        page.on(
            "request",
            lambda request: (
                request.url.startswith((str(client.base_url), "data:", "blob:")) or wrong.append(request.url)
            ),
        )
        page.goto(home)
        expect(page.get_by_role("tab", name="Upscale")).to_be_visible(timeout=30_000)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture
def picture(tmp_path) -> Path:
    photo((40, 24)).resize((80, 48)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def give(page, label: str, *files: Path) -> None:
    named = page.get_by_test_id("block-label").filter(has_text=re.compile(rf"^\s*{label}\s*$"))
    page.locator(".block", has=named).last.locator("input[type=file]").set_input_files([str(file) for file in files])


def set_number(page, label: str, value: int | str) -> None:
    page.get_by_label(label, exact=True).first.fill(str(value))
    page.get_by_label(label, exact=True).first.blur()


def shoot(page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def download(page, to: Path) -> Path:
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download").or_(page.get_by_role("link", name="Download")).first.click()
    path = to / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def test_upscale_download_and_restore(open_page, pipeline, picture, tmp_path):
    page = open_page()
    expect(page.get_by_text("licence of its weights: Apache-2.0")).to_be_visible()
    shoot(page, "empty")
    give(page, "Picture", picture)
    expect(page.get_by_role("tabpanel")).to_contain_text(re.compile(r"320 x 192, about \d+\.\d GB, about [\d.]+ s"))
    seed = 2**63 - 5  # which a browser's numbers do not hold
    set_number(page, "Seed", seed)
    page.get_by_label("Steps", exact=True).first.fill("")  # as 0
    page.get_by_role("button", name="Upscale", exact=True).click()
    expect(page.locator("#told")).to_contain_text(f"320 x 192 px, seed {seed}", timeout=60_000)
    shoot(page, "upscale")
    path = download(page, tmp_path)
    truth = pipeline.upscale(Image.open(picture), generator=torch.Generator().manual_seed(seed)).images[0]
    assert Image.open(path).tobytes() == truth.tobytes() and read_made(path)["seed"] == seed
    expect(page.get_by_text("source_sha256")).to_be_visible()
    # Another visitor drops it back.
    page = open_page()
    hidden = page.get_by_text("A picture from here")
    while not hidden.is_visible():  # the page is shown before it listens
        page.get_by_role("button", name="Restore settings").click()
        page.wait_for_timeout(1000)
    give(page, "A picture from here", path)
    expect(page.locator("#told")).to_contain_text("Settings of")
    expect(page.get_by_label("Seed", exact=True).first).to_have_value(str(seed))
    expect(page.get_by_label("Steps", exact=True).first).to_have_value("4")
    give(page, "A picture from here", picture)
    expect(page.locator("#told [role=alert]")).to_contain_text("does not say how it was made")
    set_number(page, "Seed", "many")
    give(page, "Picture", picture)
    expect(page.get_by_role("tabpanel")).to_contain_text("seed 'many': expected a whole number from 0 to 2^63 - 1")


def test_slider_by_mouse_and_keyboard(open_page, picture):
    page = open_page()
    give(page, "Picture", picture)
    expect(page.get_by_role("tabpanel")).to_contain_text("320 x 192")
    page.get_by_role("button", name="Upscale", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.locator("#told")).to_contain_text("320 x 192 px", timeout=60_000)
    before, width = page.locator(".inner").first.bounding_box(), page.locator(".slider-wrap").bounding_box()["width"]
    page.mouse.move(before["x"] + before["width"] / 2, before["y"] + before["height"] / 2)
    page.mouse.down()
    page.mouse.move(before["x"] + 90, before["y"] + before["height"] / 2, steps=5)
    page.mouse.up()
    assert page.locator(".inner").first.bounding_box()["x"] > before["x"] + 50
    # By the keyboard, from the button before it.
    page.get_by_role("button", name="Fullscreen").focus()
    handle = page.get_by_role("slider", name="Before and after")
    page.keyboard.press("Tab")
    expect(handle).to_be_focused()
    assert handle.evaluate("one => getComputedStyle(one).outlineStyle") == "solid"
    at = handle.bounding_box()["x"]
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    assert at - 0.2 * width < handle.bounding_box()["x"] < at - 0.1 * width
    page.keyboard.press("ArrowRight")
    assert handle.bounding_box()["x"] > at - 0.12 * width and 0 < int(handle.get_attribute("aria-valuenow")) < 100
    # Zoom, by the wheel, of both pictures alike.
    images = page.get_by_test_id("imageslider-image")
    small = images.first.bounding_box()["width"]
    box = images.first.bounding_box()
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.wheel(0, -500)
    expect(images.first).to_have_attribute("style", re.compile(r"scale\(1\.[1-9]|scale\([2-9]|scale\(1\.0[1-9]"))
    page.wait_for_function(  # it moves there
        """small => {
            const images = [...document.querySelectorAll("[data-testid=imageslider-image]")]
            const [one, other] = [images[0], images.at(-1)].map(image => image.getBoundingClientRect().width)
            return small < one && one === other
        }""",
        arg=small,
    )
    assert small < images.first.bounding_box()["width"]
    shoot(page, "zoomed")


def test_decode_and_a_file_of_another_family(open_page, pipeline, tmp_path):
    save_file({"latents": latents(1, 3, 4), "sigma": torch.tensor(0.25)}, tmp_path / "mine.safetensors")
    save_file({"latents": torch.randn(4, 8, 8)}, tmp_path / "other.safetensors")
    page = open_page()
    page.get_by_role("tab", name="Decode").click()
    give(page, "Latents", tmp_path / "other.safetensors")
    told = "other.safetensors holds latents of 4 channels (sdxl), but tiny decodes those of 16 (flux)"
    expect(page.get_by_role("tabpanel")).to_contain_text(told)
    page.get_by_role("button", name="Decode", exact=True).click()
    expect(page.locator("#told [role=alert]")).to_contain_text(told)
    shoot(page, "refused")
    page.get_by_label("Remove").or_(page.get_by_label("Clear")).locator("visible=true").first.click()
    give(page, "Latents", tmp_path / "mine.safetensors")
    expect(page.get_by_role("tabpanel")).to_contain_text(
        "16 channels, 4 x 3 cells (flux or qwenimage or sd3): 128 x 96"
    )
    page.get_by_role("button", name="Decode", exact=True).click()
    expect(page.locator("#told")).to_contain_text("128 x 96 px", timeout=60_000)
    truth = pipeline(latents(1, 3, 4), sigma=0.25, generator=torch.Generator().manual_seed(0)).images[0]
    assert Image.open(download(page, tmp_path)).tobytes() == truth.tobytes()
    shoot(page, "decode")


def test_generate(open_page, tmp_path):
    page = open_page()
    page.get_by_role("tab", name="Generate").click()
    page.get_by_label("What to make").fill("a red cat")
    for label, value in ("Width", 64), ("Height", 32), ("Latent steps", 3):
        set_number(page, label, value)
    expect(page.get_by_role("tabpanel")).to_contain_text("256 x 128, about")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator("#told")).to_contain_text("256 x 128 px, seed 0", timeout=60_000)
    made = read_made(download(page, tmp_path))
    asked = dict(command="generate", description="a red cat", width=64, height=32, latent_steps=3, seed=0)
    assert made | asked == made and Image.open(download(page, tmp_path)).size == (256, 128)
    shoot(page, "generate")


def test_batch(open_page, picture, tmp_path):
    save_file({"latents": latents(1)}, tmp_path / "z.safetensors")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page = open_page()
    page.get_by_role("tab", name="Batch").click()
    give(page, "Pictures and latents", picture, tmp_path / "broken.png", tmp_path / "z.safetensors")
    panel = page.get_by_role("tabpanel")
    expect(panel).to_contain_text(re.compile(r"3 files, about \d+\.\d GB, about [\d.]+ s"))
    expect(panel).to_contain_text("broken.png: image: not a readable image")
    page.get_by_role("button", name="Do all").click()
    expect(page.locator("#told")).to_contain_text("2 of 3 made.", timeout=60_000)
    expect(page.locator("#told [role=alert]")).to_contain_text("broken.png: image: not a readable image")
    shoot(page, "batch")
    with zipfile.ZipFile(download(page, tmp_path)) as bundle:
        assert sorted(bundle.namelist()) == ["errors.txt", "photo.png", "z.png"]
        assert Image.open(io.BytesIO(bundle.read("photo.png"))).size == (320, 192)


def test_progress_and_cancel(browser, pipeline, picture):
    """The network waits for the test between its steps."""
    import threading

    tiny, allowed = tiny_pipeline(), threading.Semaphore(0)
    tiny.register_to_config(latent_space="flux")
    with serving(tiny, mount) as client:
        tiny.transformer.register_forward_pre_hook(lambda *_: allowed.acquire(timeout=60) and None)
        page = browser.new_page()
        page.goto(f"{client.base_url}/")
        give(page, "Picture", picture)
        expect(page.get_by_role("tabpanel")).to_contain_text("320 x 192")
        page.get_by_role("button", name="Upscale", exact=True).click()
        expect(page.locator("#told")).to_contain_text("Step 1 of 4")
        allowed.release()
        expect(page.locator("#told")).to_contain_text(re.compile(r"Step 2 of 4, about [\d.]+ (s|min) left"))
        expect(page.locator("#told progress")).to_have_attribute("value", "0.250")
        expect(page.locator(".slider-wrap img, .image-container img, img.fixed").first).to_be_visible()
        shoot(page, "running")
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#told")).to_contain_text("Cancelled.")
        allowed.release(100)
        page.get_by_role("button", name="Upscale", exact=True).click()
        expect(page.locator("#told")).to_contain_text("320 x 192 px", timeout=60_000)
        assert client.engine.batches == {1: 2}  # one was left
        page.close()


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1300, "dark")])
def test_phone_and_dark(open_page, picture, width, scheme):
    page = open_page(width, scheme)
    give(page, "Picture", picture)
    expect(page.get_by_role("tabpanel")).to_contain_text("320 x 192")
    page.get_by_role("button", name="Upscale", exact=True).click()
    expect(page.locator("#told")).to_contain_text("320 x 192 px", timeout=60_000)
    expect(page.locator("#told")).to_be_in_viewport()  # on a phone it is far below the button
    shoot(page, f"{scheme}-{width}")
    for tab in "Upscale", "Decode", "Generate", "Batch":
        page.get_by_role("tab", name=tab).click()
        expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing is cut off at the side
        shoot(page, f"{scheme}-{width}-{tab}")
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]]) > 128
    assert light == (scheme == "light")


def test_a_visitor_who_leaves_frees_the_place(client):
    assert client.engine.waiting == client.engine.running == 0
