"""nano in a real browser, from a local file server, against the command."""

import functools
import http.server
import io
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from safetensors.torch import load_file, save_file

from pixeldecoder.cli import main
from pixeldecoder.presets import NANO

EXAMPLE = Path(__file__).parents[1] / "examples" / "browser"
SAMPLE = NANO / "samples" / "sign.safetensors"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A copy of the example with what `vendor.sh` brings, and the address of a server of it."""
    chromium, folder = shutil.which("chromium"), tmp_path_factory.mktemp("site")
    if chromium is None:
        if os.environ.get("CI"):
            pytest.fail("this test needs a browser: apt-get install chromium")
        pytest.skip("needs chromium")
    for name in "index.html", "decoder.js", "vendor.sh":
        shutil.copy(EXAMPLE / name, folder)
    assert main(["export", "nano", str(folder / "decoder")]) == 0
    if (EXAMPLE / "vendor").is_dir():
        shutil.copytree(EXAMPLE / "vendor", folder / "vendor")
    else:
        try:
            subprocess.run(["sh", folder / "vendor.sh"], check=True, capture_output=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"onnxruntime-web cannot be had: {error}")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield folder, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


@pytest.fixture
def page(site):
    """The page once it is ready; at the end, that it complained of nothing and asked nobody else."""
    _, address = site
    complaints, strangers = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.set_default_timeout(240_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: strangers.append(request.url))
        page.goto(address)
        page.wait_for_function("document.getElementById('status').textContent.startsWith('ready')")
        yield page
        browser.close()
    assert not complaints
    assert all(url.startswith((address, "data:", "blob:")) for url in strangers)


@pytest.mark.slow
def test_the_commands_picture(site, page, tmp_path):
    """Of the same latents and the same noise."""
    folder, _ = site
    z = (
        load_file(SAMPLE)["latents"]
        .reshape(-1, 16, *load_file(SAMPLE)["latents"].shape[-2:])[:1, :, :8, :12]
        .contiguous()
    )
    save_file({"latents": z}, tmp_path / "z.safetensors")
    given = ["--dtype", "float32", "--device", "cpu", "--seed", "3"]
    assert main(["decode", str(tmp_path / "z.safetensors"), str(tmp_path / "a.png"), *given]) == 0
    generator, shape = torch.Generator().manual_seed(3), (1, 3, 32 * z.shape[2], 32 * z.shape[3])
    noise = torch.stack([torch.randn(shape, generator=generator) for _ in range(4)])
    noise.numpy().tofile(folder / "noise.bin")
    z.numpy().tofile(folder / "z.bin")
    decoded = page.evaluate(
        """async (dims) => {
            const { Decoder, pixels, tensor } = await import("./decoder.js");
            const read = async (name) => new Float32Array(await (await fetch(name)).arrayBuffer());
            const decoder = await Decoder.load("decoder");
            const noise = await read("noise.bin");
            let used = 0;
            const normal = (length) => noise.slice(used, (used += length));
            const picture = await decoder.decode(tensor(await read("z.bin"), dims), normal);
            return Array.from(pixels(picture).data);
        }""",
        list(z.shape),
    )
    exact = np.array(Image.open(tmp_path / "a.png")).astype(int)
    image = np.array(decoded).reshape(*exact.shape[:2], 4)[..., :3]
    assert np.abs(image - exact).max() <= 2


@pytest.mark.slow
def test_a_photo_in_the_page(page, tmp_path):
    """Chosen, decoded, compared with the slider, saved."""
    with Image.open(NANO / "samples" / "sign.webp") as photo:
        photo.convert("RGB").save(tmp_path / "photo.png")
        width, height = photo.size
    page.set_input_files("#photo", tmp_path / "photo.png")
    page.fill("#side", "64")
    page.click("#run")
    page.wait_for_function("/ px in .* s, by w/.test(document.getElementById('status').textContent)")
    size = page.evaluate("[document.getElementById('after').width, document.getElementById('after').height]")
    assert min(size) == 256 and abs(size[0] / size[1] - width / height) < 0.1

    def shown(split: int) -> np.ndarray:
        page.evaluate(f"s = document.getElementById('split'); s.value = {split}; s.oninput()")
        picture = page.locator("#before").screenshot()
        return np.array(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)

    before, after = shown(100), shown(0)
    assert 2 < np.abs(before - after).mean() < 60  # the same scene, decoded
    half = shown(50)
    middle = half.shape[1] // 2
    assert (half[:, : middle - 2] == before[:, : middle - 2]).all()
    assert (half[:, middle + 2 :] == after[:, middle + 2 :]).all()
    with page.expect_download() as download:
        page.click("#save")
    saved = np.array(Image.open(download.value.path()).convert("RGB"))
    assert saved.shape == (size[1], size[0], 3)
    page.screenshot(path=os.environ.get("SCREENSHOT", tmp_path / "page.png"), full_page=True)


@pytest.mark.slow
def test_what_a_page_tells(site, page, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "small.png")
    page.set_input_files("#photo", tmp_path / "small.png")
    page.click("#run")
    page.wait_for_function("document.getElementById('status').textContent.includes('smaller than 128 px')")
    manifest = json.loads((site[0] / "decoder" / "manifest.json").read_text())
    for name, other in ("old", {"version": 9}), ("pt2", {"format": "pt2"}), ("text", {"text_embed_dim": 16}):
        (site[0] / name).mkdir()
        (site[0] / name / "manifest.json").write_text(json.dumps(manifest | other))
    for name, message in (
        ("nowhere", "no graphs there: run vendor.sh first"),
        ("old", "onnx graphs of version 9, expected onnx of version 1"),
        ("pt2", "pt2 graphs of version 1, expected onnx of version 1"),
        ("text", "this page gives a decoder no text"),
    ):
        load = f"""async () => (await import("./decoder.js")).Decoder.load("{name}").catch((error) => error.message)"""
        assert page.evaluate(load) == f"{name}: {message}"
