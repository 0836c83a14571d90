"""Graphs against the network that they are of: ONNX by onnxruntime and numpy, torch.export's archives; the command."""

import json
import logging
import re
import shutil
import subprocess
import sys
from logging.handlers import BufferingHandler
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file

from conftest import CASES, TINY_NANO, Golden, tiny_pipeline
from pixeldecoder import PixelDecoderPipeline
from pixeldecoder import export as exporting
from pixeldecoder.cli import main
from pixeldecoder.export import export, onnx_pipeline, providers, run_onnx, tensors
from pixeldecoder.sampler import teacher_scheduler

SMALL = TINY_NANO | dict(num_layers=1, num_pixel_layers=1)
"""Traced in seconds."""
SIZES = [(1, 2, 3), (2, 4, 4), (3, 5, 2)]
"""Images, and cells of their latents: none is that of the example that graphs are traced from."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", autouse=True)
def _untraced():
    """pytest keeps what torch writes of every tensor while it traces, which takes longer than tracing."""
    logging.getLogger("torch.__trace").disabled = True
    yield
    logging.getLogger("torch.__trace").disabled = False


def normal(seed: int = 0):
    """A pipeline's noise from that seed."""
    generator = seeded(seed)
    return lambda shape: torch.randn(shape, generator=generator).numpy()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny decoder's pipeline and its graphs."""
    torch.manual_seed(0)
    pipeline, folder = tiny_pipeline(**SMALL), tmp_path_factory.mktemp("graphs") / "float32"
    pipeline.register_to_config(latent_space="flux", trained_size=64)
    pipeline.save_pretrained(folder.parent / "decoder")
    heard = BufferingHandler(100)
    logging.getLogger("torch").addHandler(heard)
    assert main(["export", str(folder.parent / "decoder"), str(folder)]) == 0
    logging.getLogger("torch").removeHandler(heard)
    assert not [record.getMessage() for record in heard.buffer if record.levelno >= logging.WARNING]
    return pipeline, folder


def check(pipeline, folder, sizes=SIZES, text=None, tolerance=1e-4, steps_tolerance=None):
    """Velocity and whole decode, at sizes that the graphs were not traced at; how many of each were compared."""
    velocities = 0
    model, config = pipeline.transformer, pipeline.transformer.config
    cell, sessions = config.scale * config.latent_downscale_factor, onnx_pipeline(folder, "cpu").transformer.sessions
    manifest = json.loads((folder / "manifest.json").read_text())
    for batch, height, width in sizes:
        z = torch.randn(batch, config.latent_channels, height, width, generator=seeded(1))
        embeds = None if text is None else torch.randn(batch, text, config.text_embed_dim, generator=seeded(2))
        sigma = torch.linspace(0, 0.6, batch)
        noise = {} if config.base_dim is None else {"sigma": sigma.numpy()}
        if height % manifest["cells"] == width % manifest["cells"] == 0:
            size = height * cell, width * cell
            image, t = torch.randn(batch, 3, *size, generator=seeded(3)), torch.linspace(0.3, 0.999, batch)
            with torch.no_grad():
                features = model.encode_latents(z, *size, sigma=sigma)
                exact = model(image, 1000 * t, embeds, sigma=sigma, latent_features=features).sample
            leaves = sessions["encode_latents"].run(None, {"latents": z.numpy()} | noise)
            for leaf, one in zip(leaves, tensors(features), strict=True):
                largest = max(1, one.abs().max().item())
                torch.testing.assert_close(torch.from_numpy(leaf), one, atol=tolerance * largest, rtol=tolerance)
            told = {"image": image, "t": t, "sigma": sigma}
            if embeds is not None:
                told["prompt_embeds"] = embeds[:, : config.max_text_length]
            told = {name: x.numpy() for name, x in told.items()}
            names = (output.name for output in sessions["encode_latents"].get_outputs())
            (v,) = sessions["velocity"].run(None, told | dict(zip(names, leaves, strict=True)))
            largest = max(1, exact.abs().max().item())
            torch.testing.assert_close(torch.from_numpy(v), exact, atol=tolerance * largest, rtol=tolerance)
            velocities += 1
        exact = pipeline(
            z, prompt_embeds=embeds, sigma=sigma, generator=seeded(), output_type="latent", tile_size=None
        ).images
        numpy_embeds = None if embeds is None else embeds.numpy()
        image = run_onnx(folder, z.numpy(), normal(), sigma.tolist(), numpy_embeds)
        assert image.shape == exact.shape
        # Four steps of a network of random weights make rounding larger, those of a trained one do not.
        np.testing.assert_allclose(image, exact.clamp(-1, 1).numpy(), atol=steps_tolerance or 4 * tolerance)
    return velocities, len(sizes)


def test_graphs_are_the_network(exported):
    assert check(*exported) == (3, 3)


@pytest.mark.slow
def test_a_network_with_text_and_eulers_steps(tmp_path):
    pipeline = tiny_pipeline(**SMALL | dict(text_embed_dim=20, injection_interval=1, base_dim=None))
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), encoder=None)
    export(pipeline, tmp_path / "graphs")
    assert sorted(path.name for path in (tmp_path / "graphs").iterdir()) == [
        "encode_latents.onnx", "manifest.json", "velocity.onnx",
    ]  # fmt: skip
    check(pipeline, tmp_path / "graphs", text=5)
    with pytest.raises(ValueError, match=r"reads text: expected prompt_embeds \(B, T, 20\)"):
        run_onnx(tmp_path / "graphs", np.zeros((1, 16, 2, 2)), normal())


@pytest.mark.slow
def test_several_cells_to_a_patch(tmp_path):
    """Latents of a size that does not fill them are padded, and the image is cut again."""
    pipeline = tiny_pipeline(**SMALL | dict(patch_size=16, scale=1, aux_rgb=False, base_dim=None))
    export(pipeline, tmp_path / "graphs")
    assert check(pipeline, tmp_path / "graphs", [(1, 4, 6), (2, 3, 5)]) == (1, 2)


@pytest.mark.slow
def test_nano(tmp_path):
    pipeline = PixelDecoderPipeline.from_pretrained("nano")
    export(pipeline, tmp_path / "graphs")
    sizes = [(1, 4, 6), (2, 4, 6), (1, 8, 5), (2, 8, 5), (1, 16, 16), (2, 16, 16)]
    assert check(pipeline, tmp_path / "graphs", sizes, steps_tolerance=1e-4) == (6, 6)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_network(case, tmp_path):
    golden = Golden(case)
    pipeline = tiny_pipeline()
    pipeline.register_modules(transformer=golden.model, encoder=None)
    export(pipeline, tmp_path / "graphs")
    sizes = [(1, 2, 4), (2, 4, 4)]
    assert check(pipeline, tmp_path / "graphs", sizes, text=golden.text.shape[1], tolerance=1e-3)[1] == 2


def test_the_encoder_comes_with_it(exported):
    pipeline, folder = exported
    session = onnxruntime.InferenceSession(folder / "encode_image.onnx", providers=["CPUExecutionProvider"])
    for shape in (1, 3, 40, 64), (3, 3, 24, 24):
        image = torch.rand(shape, generator=seeded()) * 2 - 1
        (latents,) = session.run(None, {"image": image.numpy()})
        torch.testing.assert_close(torch.from_numpy(latents), pipeline.encode_image(image), atol=1e-4, rtol=1e-4)


def test_without_torch(exported, tmp_path):
    """Nor diffusers, nor anything that brings them."""
    pipeline, folder = exported
    z = torch.randn(2, 16, 2, 3, generator=seeded())
    np.save(tmp_path / "z.npy", z.numpy())
    code = f"""
import sys
for name in "torch", "diffusers", "transformers", "onnx", "PIL":
    sys.modules[name] = None  # an import of it fails
import numpy as np
from pixeldecoder.portable import run_onnx
normal = np.random.default_rng(0).standard_normal
np.save("image.npy", run_onnx({str(folder)!r}, np.load("z.npy"), normal, 0.25))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    draw = np.random.default_rng(0).standard_normal
    noises = [torch.from_numpy(draw((2, 3, 64, 96))).float() for _ in range(4)]
    steps = iter(noises[1:])

    def renoise(pipe, step, timestep, tensors):
        """In place of the pipeline's own noise, which was added after the step."""
        after = pipe_times[step + 1]
        return {"image": tensors["image"] + after * (next(steps) - torch_noise.pop(0)) if after else tensors["image"]}

    pipe_times = json.loads((folder / "manifest.json").read_text())["times"] + [0.0]
    generator = seeded(7)
    torch_noise = [torch.randn(noises[0].shape, generator=generator) for _ in range(3)]
    exact = pipeline(
        z, sigma=0.25, noise=noises[0], generator=seeded(7), output_type="latent", callback_on_step_end=renoise,
        tile_size=None,
    ).images  # fmt: skip
    np.testing.assert_allclose(np.load(tmp_path / "image.npy"), exact.clamp(-1, 1), atol=4e-4)


def test_the_pipeline_by_onnxruntime(exported):
    """In tiles, too: all but the network is the same."""
    pipeline, folder = exported
    other = onnx_pipeline(folder)
    other.set_progress_bar_config(disable=True)
    z = torch.randn(2, 16, 4, 5, generator=seeded())
    for settings in dict(tile_size=None), dict(tile_size=64, tile_overlap=16):
        call = dict(sigma=[0.1, 0.5], generator=seeded(), output_type="pt") | settings
        exact = pipeline(z, **call).images
        call["generator"] = seeded()
        torch.testing.assert_close(other(z, **call).images, exact, atol=4e-4, rtol=0)
    assert other.layout.tiles.count > 1 and other.config.latent_space == "flux"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_small_weights(precision, exported, tmp_path, monkeypatch):
    _pipeline, folder = exported
    other = tiny_pipeline(**SMALL)
    export(other, tmp_path / "graphs", precision=precision)
    files = [path / "velocity.onnx" for path in (folder, tmp_path / "graphs")]
    assert files[1].stat().st_size < 0.9 * files[0].stat().st_size
    z = torch.randn(1, 16, 3, 4, generator=seeded()).numpy()
    exact, image = (run_onnx(path, z, normal()) for path in (folder, tmp_path / "graphs"))
    assert 40 < 10 * np.log10(4 / np.square(exact - image).mean()) < 100
    onnx_pipeline(tmp_path / "graphs")(torch.from_numpy(z))
    if precision == "int8":
        monkeypatch.setattr(exporting, "ENOUGH", 99.0)
        with pytest.raises(ValueError, match=r"int8 weights keep [4-9]\d\.\d dB of this decoder's image, expected 99"):
            export(tiny_pipeline(**SMALL), tmp_path / "refused", precision=precision)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["graphs"]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float16", 1e-2)])
def test_torch_archives(precision, tolerance, tmp_path):
    pipeline = tiny_pipeline(**SMALL)
    export(pipeline, tmp_path / "graphs", "pt2", precision)
    encode, velocity = (
        torch.export.load(tmp_path / "graphs" / f"{name}.pt2").module() for name in ("encode_latents", "velocity")
    )
    for batch, height, width in [*SIZES, (1, 17, 2)]:  # the last larger than a base's band
        generator = seeded(height)
        z = torch.randn(batch, 16, height, width, generator=generator)
        image = torch.randn(batch, 3, 32 * height, 32 * width, generator=generator)
        t, sigma = torch.rand(2, batch, generator=generator)
        with torch.no_grad():
            v = velocity(image=image, t=t, sigma=sigma, features=list(encode(latents=z, sigma=sigma)))
            exact = pipeline.transformer(image, 1000 * t, latents=z, sigma=sigma).sample
        largest = max(1, exact.abs().max().item())  # a velocity at a small time is large
        torch.testing.assert_close(v, exact, atol=tolerance * largest, rtol=tolerance)
    with pytest.raises(ValueError, match="pt2 graphs of version 1, expected onnx of version 1: export them again"):
        onnx_pipeline(tmp_path / "graphs")


@pytest.mark.slow
def test_the_table_of_the_docs(exported):
    recipe = Path(__file__).parents[1] / "recipes" / "export.py"
    given = [str(exported[1].parent / "decoder"), "--sizes", "64", "96", "--precisions", "float16", "--repeats", "1"]
    done = subprocess.run([sys.executable, recipe, *given], capture_output=True, text=True, check=True)
    files, *rows = done.stdout.splitlines()
    names = "encode_image", "encode_latents", "velocity"
    float32 = [(exported[1] / f"{name}.onnx").stat().st_size / 1e6 for name in names]
    found = {name: float(size) for name, size in re.findall(r"(\w+)\.onnx (\d+\.\d) MB", files)}
    assert tuple(found) == names and all(x < y + 0.1 for x, y in zip(found.values(), float32, strict=True))
    assert [row.split(":")[0] for row in rows] == [
        f"{s} px, {n}" for s in (64, 96) for n in ("PyTorch", "ONNX, float16")
    ]
    decibels = [float(row.split()[-2]) for row in rows]
    assert decibels[0] == decibels[2] == 120 and all(40 < x < 100 for x in decibels[1::2])


def test_the_command(exported, tmp_path, monkeypatch, capsys):
    _, folder = exported
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(folder.parent / "decoder"), str(folder)]) == 2
    assert "exists: give a new folder" in capsys.readouterr().err
    shutil.copytree(folder, "graphs")
    latents = {"latents": torch.randn(2, 16, 3, 4, generator=seeded()), "sigma": torch.tensor([0.0, 0.4])}
    save_file(latents, "z.safetensors")
    decoder = str(folder.parent / "decoder")
    assert main(["decode", "z.safetensors", "torch", "--decoder", decoder, "--dtype", "float32"]) == 0
    assert main(["decode", "z.safetensors", "onnx", "--decoder", "graphs", "--backend", "onnx"]) == 0
    for name in "z_000.png", "z_001.png":
        exact, image = (np.array(Image.open(Path(folder) / name)).astype(int) for folder in ("torch", "onnx"))
        assert np.abs(exact - image).max() <= 1
    assert main(["redo", "onnx/z_001.png", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("onnx/z_001.png").read_bytes()
    graph = Path("graphs/velocity.onnx")
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0\0")
    capsys.readouterr()
    assert main(["redo", "onnx/z_001.png", "more.png"]) == 2
    assert "made by another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--decoder nano", "nano: expected a folder that `pixeldecoder export` wrote, with manifest.json"),
        ("--quantize int8", "--quantize is PyTorch's: leave it out with --backend onnx"),
        ("--lora some/lora", "--lora is PyTorch's: leave it out with --backend onnx"),
        ("--dtype bfloat16", "holds graphs in float32: export others"),
        ("--device cuda", "this onnxruntime has no CUDAExecutionProvider, only"),
        ("--steps 9", "--steps 9: a distilled decoder takes 1 to 4 steps, got 9"),
    ],
)
def test_bad_options(args, message, exported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("z.npy", np.zeros((16, 2, 2), np.float32))
    given = ["decode", "z.npy", "a.png", "--decoder", str(exported[1]), "--backend", "onnx", *args.split()]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["z.npy"]


def test_bad_graphs(exported, tmp_path):
    _pipeline, folder = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    for text, message in (
        ("{}", "expected a folder that `pixeldecoder export` wrote"),
        (
            json.dumps(manifest | {"version": 9}),
            "onnx graphs of version 9, expected onnx of version 1: export them again",
        ),
        (json.dumps(manifest), r"encode_latents.onnx: not a readable graph: .*"),
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            run_onnx(tmp_path, np.zeros((1, 16, 2, 2)), normal())
    with pytest.raises(ValueError, match=r"expected latents \(B, 16, h, w\), got \(1, 4, 2, 2\)"):
        run_onnx(folder, np.zeros((1, 4, 2, 2)), normal())
    for sigma in [0.1, 0.5, 0.2], [[0.1], [0.5]], 1.5, [0.1, float("nan")]:
        with pytest.raises(ValueError, match=r"expected sigma in \[0, 1\], one or one for each of 2 images, got"):
            run_onnx(folder, np.zeros((2, 16, 2, 2)), normal(), sigma)
    with pytest.raises(ValueError, match="onnxruntime has no CUDAExecutionProvider here: expected some of"):
        run_onnx(folder, np.zeros((1, 16, 2, 2)), normal(), providers=["CUDAExecutionProvider"])


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_providers(exported, monkeypatch):
    assert providers()[-1] == "CPUExecutionProvider"
    there = ["CPUExecutionProvider", "CoreMLExecutionProvider", "DmlExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    assert providers() == ["DmlExecutionProvider", "CoreMLExecutionProvider", "CPUExecutionProvider"]
    assert providers("mps") == ["CoreMLExecutionProvider", "CPUExecutionProvider"]
    assert providers("cpu") == ["CPUExecutionProvider"]
    with pytest.raises(ValueError, match="--device cuda: this onnxruntime has no CUDAExecutionProvider, only CPUExec"):
        providers("cuda")
    # Where the package has the provider and the machine not its libraries, onnxruntime goes on with the next.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", *there])
    with pytest.raises(ValueError, match="CUDAExecutionProvider does not work here: a library that it needs"):
        onnx_pipeline(exported[1])


def test_what_is_not_exported(tmp_path):
    from peft import LoraConfig

    pipeline = tiny_pipeline(**SMALL)
    with pytest.raises(ValueError, match="int8 weights are made by onnxruntime's quantiser: expected format onnx"):
        export(pipeline, tmp_path / "graphs", "pt2", "int8")
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"expected plain weights, got .*lora_A.*: fuse LoRAs first"):
        export(pipeline, tmp_path / "graphs")
    pipeline = PixelDecoderPipeline(tiny_pipeline(**SMALL).transformer, teacher_scheduler())
    with pytest.raises(ValueError, match="sampled by DPMSolverMultistepScheduler is not exported: expected a student"):
        export(pipeline, tmp_path / "graphs")
    prior = dict(latent_channels=None, aux_rgb=False, base_dim=None, inject_pixels=False)
    pipeline = tiny_pipeline(**SMALL | prior)
    with pytest.raises(ValueError, match="a text-to-image prior decodes no latents"):
        export(pipeline, tmp_path / "graphs")
    assert not list(tmp_path.iterdir())
