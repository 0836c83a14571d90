"""The nodes' logic without ComfyUI; and in a graph, by the executor of the ComfyUI that COMFYUI_PATH names."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from websockets.sync.client import connect

from conftest import GOLDEN, TINY_NANO, tiny_pipeline
from pixeldecoder.cli import main
from pixeldecoder.latents import SPACES, normalise

NODES = Path(__file__).parents[1] / "integrations" / "comfyui"
COMFYUI = os.environ.get("COMFYUI_PATH")
SMALL = TINY_NANO | dict(num_layers=1, num_pixel_layers=1)
FAMILIES = {
    "flux": dict(latent_channels=16),
    "sdxl": dict(latent_channels=4),
    "flux2": dict(latent_channels=128, latent_downscale_factor=16),
}
"""By latent space, what a network of it has."""

spec = importlib.util.spec_from_file_location("comfyui_logic", NODES / "logic.py")
logic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(logic)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decoder(space: str):
    torch.manual_seed(0)
    pipeline = tiny_pipeline(**SMALL | FAMILIES[space])
    pipeline.register_to_config(latent_space=space)
    pipeline.register_modules(encoder=pipeline.encoder if space == "flux" else None)
    return pipeline


def latents(space: str, batch: int = 1) -> torch.Tensor:
    return 3 * torch.randn(batch, FAMILIES[space]["latent_channels"], 2, 3, generator=seeded(1))


def golden() -> dict:
    """What ComfyUI 0.33's `process_in` makes of 2 x - 1, x = 0, 1 / C, ... by channel, in each family."""
    return json.loads((GOLDEN / "comfyui_latents.json").read_text())


@pytest.mark.parametrize("space", ["flux", "flux2", "qwenimage", "sd3", "sdxl"])
def test_latents_are_normalised_as_comfyui_does(space):
    """Golden values: only FLUX.2's are normalised already."""
    channels = SPACES[space].channels
    z = (2 * torch.arange(channels) / channels - 1).reshape(1, channels, 1, 1)
    expected = torch.tensor(golden()[space]).reshape(1, channels, 1, 1)
    if space == "flux2":
        assert torch.equal(expected, z)
    else:
        torch.testing.assert_close(normalise(z, SPACES[space]), expected, atol=1e-6, rtol=1e-5)
        assert (expected - z).abs().max() > 0.2


def test_a_latent_as_the_decoder_takes_it():
    pipeline, z = decoder("flux"), latents("flux", 2)
    taken, sigma = logic.normalised({"samples": z, "noise_mask": torch.ones(2, 1, 16, 24)}, pipeline, -1.0)
    torch.testing.assert_close(taken, (z - 0.1159) * 0.3611)
    assert sigma == 0
    taken, sigma = logic.normalised({"samples": z[:, :, None]}, pipeline, 0.25)  # one frame
    assert taken.shape == z.shape and sigma == 0.25
    taken, _ = logic.normalised({"samples": latents("flux2")}, decoder("flux2"), 0.0)
    assert torch.equal(taken, latents("flux2"))


@pytest.mark.parametrize(
    ("signal", "noise", "space", "sigma"),
    [(0.7, 0.3, "flux", 0.3), (1.0, 1.0, "sdxl", 0.5**0.5), (1.0, 0.0, "sdxl", 0.0), (0.35, 0.15, "flux", 0.3)],
)
def test_captured_latents(signal, noise, space, sigma):
    """Back through the decoder's normalisation they are the sampler's, scaled to the decoder's frame."""
    z, n = latents(space), torch.randn(latents(space).shape, generator=seeded(2))
    scale, shift = {"flux": (0.3611, 0.1159), "sdxl": (0.13025, 0.0)}[space]
    frame = SPACES[space].frame
    latent = logic.captured(signal * z + noise * n, signal, noise, SPACES[space], lambda x: x / scale + shift)
    taken, told = logic.normalised(latent, decoder(space), -1.0)
    keep = 1 - sigma if frame == "flow" else (1 - sigma**2) ** 0.5
    torch.testing.assert_close(taken, keep * z + sigma * n, atol=1e-5, rtol=1e-5)
    assert told == pytest.approx(sigma)
    assert logic.normalised(latent, decoder(space), 0.1)[1] == 0.1  # what is set counts
    with pytest.raises(ValueError, match=rf"captured with noise of sigma {sigma:.4g} and have been changed since"):
        logic.normalised(latent | {"samples": latent["samples"][:1] * 1}, decoder(space), -1.0)
    other = decoder(space)
    other.register_to_config(latent_space={"flux": "sd3", "sdxl": "my own"}[space])  # as many channels
    with pytest.raises(ValueError, match=f"captured from a model of {space}, and this decoder decodes those of"):
        logic.normalised(latent, other, -1.0)


def test_images_are_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline, z = decoder("flux"), latents("flux", 2)
    pipeline.save_pretrained("decoder")
    save_file({"latents": (z - 0.1159) * 0.3611}, "z.safetensors")
    given = ["--decoder", "decoder", "--dtype", "float32", "--device", "cpu", "--seed", "5"]
    assert main(["decode", "z.safetensors", "out", "--sigma", "0.2", *given]) == 0
    seen = []
    images, plan = logic.decode(
        pipeline, logic.normalised({"samples": z}, pipeline, -1.0)[0], 0.2, 5, lambda *x: seen.append(x[:2])
    )
    assert images.shape == (2, 64, 96, 3) and "96 x 64 px, whole" in plan
    assert seen == [(made, 8) for made in range(1, 9)]
    for image, path in zip(images, sorted(Path("out").iterdir()), strict=True):
        # Latents that were normalised in another order differ by a rounding.
        assert np.abs((image * 255).round().numpy() - np.array(Image.open(path))).max() <= 1

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8))
    picture.save("photo.png")
    assert main(["upscale", "photo.png", "large.png", "--sigma", "0.2", *given]) == 0
    image = torch.from_numpy(np.array(picture))[None] / 255
    larger, _ = logic.upscale(pipeline, image, 0.2, 5, lambda *x: None)
    assert np.abs((larger[0] * 255).round().numpy() - np.array(Image.open("large.png"))).max() <= 1


@pytest.mark.parametrize(
    ("latent", "sigma", "message"),
    [
        (
            {"samples": torch.zeros(1, 4, 2, 3)},
            0,
            r"expected latents \(B, 16, h, w\), got \(1, 4, 2, 3\): they are of a",
        ),
        ({"samples": torch.zeros(1, 16, 5, 2, 3)}, 0, r"got \(1, 16, 5, 2, 3\)"),
        ({"samples": torch.zeros(1, 16, 2, 3), "type": "audio"}, 0, "expected the latents of images"),
        ({"samples": torch.zeros(1, 16, 2, 3)}, 1.5, r"expected sigma in \[0, 1\], or -1 for what the latents say"),
    ],
)
def test_bad_latents(latent, sigma, message):
    with pytest.raises(ValueError, match=message):
        logic.normalised(latent, decoder("flux"), sigma)


def test_what_has_no_decoder():
    with pytest.raises(ValueError, match="no decoder is known for the latents of this model, of 4 channels"):
        logic.find_space(lambda x: x * 0.18215, 4)
    for space in FAMILIES:
        process_in = (lambda x: x) if space == "flux2" else (lambda x, s=space: normalise(x, SPACES[s]))
        assert logic.find_space(process_in, SPACES[space].channels) == space
    for x, signal in (
        (torch.zeros(1, 16, 3, 2, 2), 0.5),
        (torch.zeros(1, 4, 2, 2), 0.5),
        (torch.zeros(1, 16, 2, 2), -1.0),
    ):
        with pytest.raises(ValueError, match=r"expected latents of one image|no sum of image and noise"):
            logic.captured(x, signal, 0.5, SPACES["flux"], lambda x: x)


# In ComfyUI


TINY_FLUX = f"""
import sys

sys.path.append({str(Path(__file__).parent)!r})
from comfyui_capture import tiny


class TinyFlux:
    FUNCTION, CATEGORY, RETURN_TYPES = "make", "tests", ("MODEL", "CONDITIONING")
    INPUT_TYPES = classmethod(lambda cls: {{"required": {{}}}})

    def make(self):
        return tiny("flux")


NODE_CLASS_MAPPINGS = {{"TinyFlux": TinyFlux}}
"""


class Server:
    """ComfyUI's own, on the CPU, with the nodes in its `custom_nodes`."""

    def __init__(self, base: Path):
        for folder in "custom_nodes", "input", "output", "temp", "user", "models/pixeldecoder":
            (base / folder).mkdir(parents=True)
        (base / "custom_nodes" / "pixeldecoder").symlink_to(NODES)
        (base / "custom_nodes" / "tiny_flux.py").write_text(TINY_FLUX)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        port = self.address.rpartition(":")[2]
        self.base, self.log = base, (base / "log").open("w")
        self.process = subprocess.Popen(
            [
                sys.executable, "main.py", "--cpu", "--port", port, "--base-directory", base, "--disable-api-nodes",
                "--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--preview-method", "none",
            ],
            cwd=COMFYUI, stdout=self.log, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def ask(self, path: str, body: dict | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or "null")

    def wait(self, seconds: int = 400) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                return self.ask("/system_stats") and None
            except urllib.error.URLError:
                assert self.process.poll() is None, (self.base / "log").read_text()[-3000:]
                time.sleep(0.5)
        raise AssertionError((self.base / "log").read_text()[-3000:])

    def run(self, graph: dict) -> dict:
        """The graph's outputs by node."""
        number = self.ask("/prompt", {"prompt": graph})["prompt_id"]
        until = time.monotonic() + 300
        while time.monotonic() < until:
            if done := self.ask(f"/history/{number}").get(number):
                failed = [told["exception_message"] for kind, told in done["status"]["messages"] if "error" in kind]
                assert not failed, failed[0]
                return done["outputs"]
            time.sleep(0.2)
        raise AssertionError("the graph did not end")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not COMFYUI:
        pytest.skip("COMFYUI_PATH names no ComfyUI")
    server = Server(tmp_path_factory.mktemp("comfyui"))
    for space in FAMILIES:
        decoder(space).save_pretrained(server.base / "models" / "pixeldecoder" / space)
        content = {"latent_tensor": latents(space, 2), "latent_format_version_0": torch.tensor([])}
        save_file(content, server.base / "input" / f"{space}.latent")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8)).save(server.base / "input/a.png")
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()
        server.process.wait(30)


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


SETTINGS = dict(seed=5, steps=0, tile=0, prompt="")


def pictures(server, outputs: dict, name: str) -> list[np.ndarray]:
    return [np.array(Image.open(server.base / "output" / x["filename"])).astype(int) for x in outputs[name]["images"]]


@pytest.mark.slow
@pytest.mark.parametrize("space", FAMILIES)
def test_a_graph_gives_the_commands_image(space, server, tmp_path):
    graph = json.loads((NODES / "workflows" / "decode.json").read_text())
    graph["1"]["inputs"] |= {"decoder": space, "dtype": "float32"}
    graph["2"]["inputs"]["latent"] = f"{space}.latent"
    graph["3"]["inputs"] |= {"sigma": 0.2, "seed": 5}
    outputs = server.run(graph)
    assert "px, whole" in str(outputs["5"])
    folder = str(server.base / "models" / "pixeldecoder" / space)
    given = ["--decoder", folder, "--dtype", "float32", "--device", "cpu", "--seed", "5", "--sigma", "0.2"]
    assert main(["decode", str(server.base / "input" / f"{space}.latent"), str(tmp_path), *given]) == 0
    images = pictures(server, outputs, "4")
    assert len(images) == 2
    for image, path in zip(images, sorted(tmp_path.glob("*.png")), strict=True):
        # ComfyUI cuts the rest off where we round.
        assert np.abs(image - np.array(Image.open(path))).max() <= 1
        assert image.std() > 10


@pytest.mark.slow
def test_upscale_in_a_graph(server, tmp_path):
    graph = json.loads((NODES / "workflows" / "upscale.json").read_text())
    graph["1"]["inputs"] |= {"decoder": "flux", "dtype": "float32"}
    graph["2"]["inputs"]["image"] = "a.png"
    graph["3"]["inputs"] |= {"sigma": 0.2, "seed": 5}
    (image,) = pictures(server, server.run(graph), "4")
    folder = str(server.base / "models" / "pixeldecoder" / "flux")
    given = ["--decoder", folder, "--dtype", "float32", "--device", "cpu", "--seed", "5", "--sigma", "0.2"]
    assert main(["upscale", str(server.base / "input" / "a.png"), str(tmp_path / "a.png"), *given]) == 0
    assert np.abs(image - np.array(Image.open(tmp_path / "a.png"))).max() <= 2


@pytest.mark.slow
def test_a_sampler_stopped_early_in_a_graph(server, tmp_path):
    """The workflow with a tiny FLUX.1 in place of the real one: its captured latents and their sigma reach the node."""
    graph = json.loads((NODES / "workflows" / "flux_stopped_early.json").read_text())
    del graph["2"], graph["3"]
    graph["1"] = node("TinyFlux")
    graph["4"]["inputs"]["conditioning"] = ["1", 1]
    graph["9"]["inputs"] |= {"width": 64, "height": 32}
    graph["11"]["inputs"] |= {"decoder": "flux", "dtype": "float32"}
    graph["sigma"] = node("PreviewAny", source=["10", 1])
    graph["latents"] = node("SaveLatent", samples=["10", 0], filename_prefix="captured")
    outputs = server.run(graph)
    (sigma,) = outputs["sigma"]["text"]
    assert 0.05 < float(sigma) < 0.5
    (image,) = pictures(server, outputs, "13")
    (saved,) = (server.base / "output").glob("captured*.latent")
    folder = str(server.base / "models" / "pixeldecoder" / "flux")
    given = ["--decoder", folder, "--dtype", "float32", "--device", "cpu", "--seed", "1", "--sigma", sigma]
    assert main(["decode", str(saved), str(tmp_path / "a.png"), *given]) == 0
    assert image.shape == (128, 256, 3) and image.std() > 10
    assert np.abs(image - np.array(Image.open(tmp_path / "a.png"))).max() <= 1


@pytest.mark.slow
def test_bar_preview_and_button(server):
    """ComfyUI's own: told of each step with a picture; and once it is asked to stop, no more of them."""
    save_file(
        {"latent_tensor": torch.zeros(8, 16, 6, 8), "latent_format_version_0": torch.tensor([])},
        server.base / "input" / "many.latent",
    )
    graph = json.loads((NODES / "workflows" / "decode.json").read_text())
    graph["1"]["inputs"] |= {"decoder": "flux", "dtype": "float32"}

    def heard(latents: str, seed: int, stop: bool) -> tuple[list[tuple[int, int]], int, str]:
        graph["2"]["inputs"]["latent"] = latents
        graph["3"]["inputs"]["seed"] = seed
        steps, previews = [], 0
        with connect(f"ws{server.address[4:]}/ws?clientId=test", max_size=None) as events:
            server.ask("/prompt", {"prompt": graph, "client_id": "test"})
            while True:
                event = events.recv(timeout=300)
                if isinstance(event, bytes):
                    previews += b"\xff\xd8\xff" in event[:64]  # a JPEG
                    continue
                event = json.loads(event)
                if event["type"] == "progress" and event["data"]["node"] == "3":
                    steps.append((event["data"]["value"], event["data"]["max"]))
                    if stop and len(steps) == 1:
                        server.ask("/interrupt", {})
                if event["type"] in ("execution_success", "execution_interrupted", "execution_error"):
                    return steps, previews, event["type"]

    assert heard("flux.latent", 11, stop=False) == ([(step, 8) for step in range(1, 9)], 8, "execution_success")
    steps, _, end = heard("many.latent", 12, stop=True)
    assert end == "execution_interrupted" and len(steps) < 32


@pytest.mark.slow
def test_capture_from_comfyuis_samplers():
    """What its model was given at that step, and its noise in the decoder's frame; the golden values are its own."""
    if not COMFYUI:
        pytest.skip("COMFYUI_PATH names no ComfyUI")
    script = Path(__file__).with_name("comfyui_capture.py")
    done = subprocess.run([sys.executable, script], cwd=COMFYUI, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    families = results.pop("latents")
    assert families.keys() == golden().keys()
    for space, found in families.items():
        for name, numbers in found.items():
            assert numbers == pytest.approx(golden()[space], abs=1e-6), name
    told = {name: results.pop(name) for name in [*results] if name.startswith("bad ")}
    assert len(results) == 10
    for name, found in results.items():
        assert found["difference"] < 1e-5 and abs(found["sigma"]) < 1e-6 and found["told"] == 0, (name, found)
        assert found["fewer"], name
    assert "does not tell its latents after each of these steps" in told["bad dpm_adaptive 2"]
    assert told["bad uni_pc 2"].startswith("sample_unipc does not tell")
    assert told["bad euler 9"] == "step 9: the sampler makes only 5 steps: give 1 to 5"


@pytest.mark.slow
def test_the_nodes_are_described(server):
    """By ids that never change."""
    told = server.ask("/object_info")
    for name in "PixelDecoderLoad", "PixelDecode", "PixelDecoderCapture", "PixelUpscale":
        assert told[name]["category"] == "pixeldecoder"
    for path in (NODES / "workflows").iterdir():  # what they are given is what the nodes take
        for one in json.loads(path.read_text()).values():
            inputs = told[one["class_type"]]["input"]
            assert set(inputs["required"]) <= set(one["inputs"]) <= {*inputs["required"], *inputs.get("optional", {})}
    assert told["PixelDecoderLoad"]["input"]["required"]["decoder"][1]["options"][:4] == [
        "nano",
        "flux",
        "flux2",
        "sdxl",
    ]


@pytest.mark.slow
def test_wrong_latents_in_a_graph(server):
    graph = {
        "load": node("PixelDecoderLoad", decoder="flux", dtype="float32"),
        "latent": node("LoadLatent", latent="sdxl.latent"),
        "decode": node("PixelDecode", decoder=["load", 0], latent=["latent", 0], sigma=-1.0, **SETTINGS),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="wrong"),
    }
    with pytest.raises(
        AssertionError, match="they are of another family than the decoder, which decodes those of flux"
    ):
        server.run(graph)
