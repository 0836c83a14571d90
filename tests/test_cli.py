"""The command on real files, good and bad."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchLCMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import TINY, Golden, tiny_model, tiny_pipeline
from families import save_gemma, z_image
from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.cli import main
from pixeldecoder.ldm import decoder_seed

LATENTS = torch.randn(16, 2, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(decoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(command, *args):
        return main([command, *args, "--decoder", decoder, "--device", "cpu"])

    return run


def pixels(path):
    return np.array(Image.open(path))


def test_decode_every_kind_of_file(run, tmp_path):
    save_file({"latents": LATENTS}, "a.safetensors")
    torch.save(LATENTS[None], "b.pt")
    np.save("c.npy", LATENTS.numpy())
    for source, target in ("a.safetensors", "a.png"), ("b.pt", "b.png"), ("c.npy", "deep/c.png"):
        assert run("decode", source, target) == 0
    assert pixels("a.png").shape == (64, 96, 3)
    assert (pixels("a.png") == pixels("b.png")).all() and (pixels("a.png") == pixels("deep/c.png")).all()
    assert run("decode", "a.safetensors", "a.webp", "--seed", "1") == 0
    assert run("decode", "a.safetensors", "noisy.jpg", "--sigma", "0.5", "--steps", "2") == 0
    assert Image.open("noisy.jpg").format == "JPEG"
    assert not [name for name in os.listdir() if name.startswith(".")]


def test_decode_folder_and_batch(run):
    os.mkdir("in")
    torch.save(torch.stack([LATENTS, -LATENTS]), "in/two.pt")
    np.save("in/one.npy", LATENTS.numpy())
    assert run("decode", "in", "out", "--format", "webp") == 0
    assert sorted(os.listdir("out")) == ["one.webp", "two_000.webp", "two_001.webp"]
    assert run("decode", "in/two.pt", "png") == 0
    assert run("decode", "in/one.npy", "alone.png") == 0
    # A seed gives one image, wherever the latents stand.
    assert np.abs(pixels("png/two_000.png").astype(int) - pixels("alone.png")).max() <= 1
    assert run("decode", "in/two.pt", "two.png") == 2


def test_upscale_file_and_folder(run):
    os.mkdir("in")
    for name in "a.jpg", "b.png":
        Image.effect_noise((40, 24), 60).convert("RGB").save(f"in/{name}")
    assert run("upscale", "in", "out", "--sigma", "0.2") == 0
    assert sorted(os.listdir("out")) == ["a.png", "b.png"]
    assert Image.open("out/a.png").size == (160, 96)
    assert run("upscale", "in/a.jpg", "again.png", "--sigma", "0.2") == 0
    assert (pixels("again.png") == pixels("out/a.png")).all()


def test_convert_there_and_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    golden = Golden("v15_flux")
    state = {f"net.{name}": tensor.bfloat16() for name, tensor in golden.state.items()}
    torch.save(state, "model.pth")
    preset = ["--preset", "PiD_v1pt5_res2kto4k_sr4x_official_flux_distill_4step"]
    assert main(["convert", "model.pth", "folder", *preset]) == 0
    assert PixelDecoderPipeline.from_pretrained("folder").transformer.config.rope_reference_size == 2048
    for target, read in ("back.pth", torch.load), ("back.safetensors", load_file):
        assert main(["convert", "folder", target]) == 0
        back = read(target)
        assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    assert main(["convert", "model.pth", "folder", *preset]) == 2  # it exists
    assert main(["convert", "model.pth", "other"]) == 2  # of no released width
    assert sorted(os.listdir()) == ["back.pth", "back.safetensors", "folder", "model.pth"]


def make_bad(kind):
    if kind == "nan.pt":
        torch.save(LATENTS * float("nan"), kind)
    elif kind == "channels.pt":
        torch.save(LATENTS[:4], kind)
    elif kind == "flat.npy":
        np.save(kind, np.zeros(5))
    elif kind == "objects.npy":
        np.save(kind, np.array([{}], dtype=object), allow_pickle=True)
    elif kind == "many.safetensors":
        save_file({"a": LATENTS, "b": -LATENTS}, kind)
    elif kind == "truncated.safetensors":
        save_file({"latents": LATENTS}, "whole.safetensors")
        with open("whole.safetensors", "rb") as file, open(kind, "wb") as cut:
            cut.write(file.read()[:-50])
        os.remove("whole.safetensors")
    elif kind == "huge.pt":
        torch.save(torch.zeros(1).expand(16, 200, 200), kind)
    elif kind == "good.pt":
        torch.save(LATENTS, kind)
    elif kind == "empty":
        os.mkdir(kind)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("nan.pt", [], "nan.pt: expected finite latents, 96 of 96"),
        ("channels.pt", [], "channels.pt: expected latents of shape (B, 16, h, w), got (1, 4, 2, 3)"),
        ("flat.npy", [], "got (5,)"),
        ("objects.npy", [], "not a readable array"),
        ("many.safetensors", [], "expected one tensor, or one called"),
        ("truncated.safetensors", [], "not a readable file"),
        ("huge.pt", ["--max-memory", "1GB"], "huge.pt: 6400 x 6400 px would take"),
        ("empty", [], "found none"),
        ("absent.pt", [], "no such file"),
        ("good.pt", ["--sigma", "1.5"], "--sigma 1.5: expected a noise level in [0, 1]"),
        ("good.pt", ["--steps", "9"], "1 to 4 steps, got 9"),
    ],
)
def test_bad_latents(run, capsys, kind, options, message):
    make_bad(kind)
    before = sorted(os.listdir())
    assert run("decode", kind, "out.png", *options) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert [line for line in error.splitlines() if line.startswith("pixeldecoder: ")] == error.splitlines()[-1:]
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1, 1), "at least 16 x 16 pixels, got 1 x 1"),
        ((30000, 30000), "too large"),
        ((5000, 3000), "20000 x 12000 px would take"),
    ],
)
def test_bad_image_sizes(run, capsys, size, message):
    Image.new("1", size).save("in.png")
    assert run("upscale", "in.png", "out.png", "--max-memory", "2GB") == 2
    assert message in capsys.readouterr().err
    assert os.listdir() == ["in.png"]


def test_bad_images(run, capsys):
    with open("text.png", "w") as file:
        file.write("no picture")
    assert run("upscale", "text.png", "out.png") == 2
    assert "not a readable image" in capsys.readouterr().err
    Image.effect_noise((64, 64), 60).save("whole.png")
    with open("whole.png", "rb") as file, open("cut.png", "wb") as cut:
        cut.write(file.read()[:900])
    assert run("upscale", "cut.png", "out.png") == 2
    assert "cut.png: not a readable image" in capsys.readouterr().err
    assert run("upscale", "whole.png", "out.gif") == 2
    assert "expected an image ending in" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["cut.png", "text.png", "whole.png"]


def test_bad_decoder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(LATENTS, "good.pt")
    (tmp_path / "page.pth").write_text("<html>")
    (tmp_path / "empty").mkdir()
    for name, message in ("nanoo", 'no decoder "nanoo"'), ("page.pth", "page.pth"), ("empty", "empty"):
        assert main(["decode", "good.pt", "out.png", "--decoder", name]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()
    if not torch.cuda.is_available():
        assert main(["decode", "good.pt", "out.png", "--device", "cuda"]) == 2
        assert "this machine has none; available: cpu" in capsys.readouterr().err


def test_decoder_that_reads_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(LATENTS, "good.pt")
    PixelDecoderPipeline(tiny_model(**TINY), FlowMatchLCMScheduler(shift=1.0)).save_pretrained("text")
    assert main(["decode", "good.pt", "out.png", "--decoder", "text", "--text-encoder", "gone/gemma"]) == 2
    assert "gone/gemma could not be loaded" in capsys.readouterr().err
    assert main(["decode", "good.pt", "out.png", "--decoder", "text", "--prompt-embeds", "gone.safetensors"]) == 2
    assert 'expected a .safetensors file with "prompt_embeds"' in capsys.readouterr().err


def test_the_installed_command():
    result = subprocess.run([sys.executable, "-m", "pixeldecoder", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and all(
        command in result.stdout for command in ("demo", "decode", "encode", "upscale", "generate", "convert")
    )
    result = subprocess.run(
        [sys.executable, "-m", "pixeldecoder", "decode", "--nonsense"], capture_output=True, text=True
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("z-image")
    torch.manual_seed(0)
    z_image().save_pretrained(folder)
    return str(folder)


GENERATE = ["--height", "32", "--width", "64", "--latent-steps", "3", "--stop-at", "2", "--latent-guidance-scale", "0"]


def test_generate_and_decode_again(run, model, capsys):
    """The image; beside it the VAE's; and the same image from the saved latents."""
    assert run("generate", "a cat", "a.png", "--model", model, *GENERATE, "--save-latents", "z.safetensors") == 0
    assert "ZImagePipeline: 2 of 3 steps, sigma 0." in capsys.readouterr().err
    assert pixels("a.png").shape == (128, 256, 3)
    assert run("generate", "a cat", "both.png", "--model", model, *GENERATE, "--compare") == 0
    assert pixels("both.png").shape == (128, 512, 3)
    assert (pixels("both.png")[:, 256:] == pixels("a.png")).all()
    sigma = load_file("z.safetensors")["sigma"].item()
    seed = str(decoder_seed(0))  # of the decoder alone
    assert run("decode", "z.safetensors", "again.png", "--sigma", str(sigma), "--seed", seed) == 0
    assert np.abs(pixels("again.png").astype(int) - pixels("a.png")).max() <= 1
    assert run("generate", "a cat", "several", "--model", model, *GENERATE, "--images", "2", "--seed", "5") == 0
    assert sorted(os.listdir("several")) == ["5.png", "6.png"]
    extra = ["--pipeline-args", '{"cfg_truncation": 0.5}', "--negative-prompt", "dog"]
    assert run("generate", "a cat", "b.png", "--model", model, *GENERATE, *extra) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--stop-at", "soon"], "stop_at='soon': expected a step"),
        (["--stop-at", "9", "--latent-steps", "3"], "makes only 3 steps"),
        (["--pipeline-args", "3"], "expected a JSON object"),
        (["--images", "2"], "for several a folder"),
        (["--model", "nobody/nothing"], "could not be loaded from https://huggingface.co"),
        (["--latent-space", "sd2"], 'no latent space "sd2"'),
        (["--latent-space", "sdxl"], "16 channels at 1/8 size, but the latents are of the sdxl space"),
    ],
)
def test_bad_generate(run, model, args, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("generate", "a cat", "a.png", "--model", model, *args) == 2
    assert message in capsys.readouterr().err
    assert not os.path.exists("a.png")


def test_generate_asks_for_the_familys_decoder(model, capsys, monkeypatch):
    """By its released name, which without a network is a clear error."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["generate", "a cat", "a.png", "--model", model, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "PiD_v1pt5_res2kto4k_sr4x_official_flux_distill_4step" in error and "Without a network" in error


def test_encode_then_decode_is_upscale(run):
    Image.effect_noise((40, 24), 60).convert("RGB").save("small.png")
    assert main(["encode", "small.png", "z.safetensors", "--device", "cpu"]) == 0
    assert load_file("z.safetensors")["latents"].shape == (1, 16, 4, 6)
    assert main(["encode", "small.png", "z.png"]) == 2
    assert main(["encode", "none.png", "z.safetensors"]) == 2
    os.makedirs("folder")
    Image.open("small.png").save("folder/a.png")
    assert main(["encode", "folder", "latents", "--encoder", "nano", "--device", "cpu"]) == 0
    assert torch.equal(load_file("latents/a.safetensors")["latents"], load_file("z.safetensors")["latents"])
    Image.effect_noise((48, 32), 60).convert("RGB").save("even.png")
    assert main(["encode", "even.png", "even.safetensors", "--device", "cpu"]) == 0
    nano = ["--decoder", "nano", "--device", "cpu", "--steps", "1", "--dtype", "float32"]
    assert main(["decode", "even.safetensors", "decoded.png", *nano]) == 0
    assert main(["upscale", "even.png", "upscaled.png", *nano]) == 0
    assert (pixels("decoded.png") == pixels("upscaled.png")).all()


def test_prompts(tmp_path, monkeypatch):
    """The prompt is encoded once, kept on the disk, and can be handed over without the encoder."""
    monkeypatch.chdir(tmp_path)
    PixelDecoderPipeline(tiny_model(**TINY), FlowMatchLCMScheduler(shift=1.0)).save_pretrained("reads")
    save_gemma("gemma")
    save_file({"latents": LATENTS}, "z.safetensors")
    common = ["--decoder", "reads", "--device", "cpu"]
    encode = ["--prompt", "a cat", "--text-encoder", "gemma"]
    assert main(["decode", "z.safetensors", "a.png", *common, *encode, "--save-prompt-embeds", "p.safetensors"]) == 0
    os.rename("gemma", "gone")
    assert main(["decode", "z.safetensors", "b.png", *common, *encode]) == 0
    assert main(["decode", "z.safetensors", "c.png", *common, "--prompt-embeds", "p.safetensors"]) == 0
    assert (pixels("a.png") == pixels("b.png")).all() and (pixels("a.png") == pixels("c.png")).all()
    assert main(["decode", "z.safetensors", "d.png", *common, "--prompt", "a dog", "--text-encoder", "gemma"]) == 2


def test_plan(capsys):
    single = ["--device", "cpu", "--dtype", "float32"]  # by default it depends on the CPU
    assert main(["plan", "1024", "768", *single]) == 0
    text = capsys.readouterr().out
    assert "1024 x 768 px, 6 tiles of" in text and "4 steps on cpu in" in text and "GB of memory, of it 0.04" in text
    assert main(["plan", "1024", "768", "--device", "cpu", "--tile", "none", "--steps", "1"]) == 0
    assert "1024 x 768 px, whole" in (text := capsys.readouterr().out) and "1 steps on" in text
    name = "PiD_res2k_sr4x_official_flux_distill_4step"  # not fetched
    assert main(["plan", "2048", "2048", *single, "--decoder", name, "--max-memory", "64GB"]) == 0
    assert "5.45 GB weights" in capsys.readouterr().out


def test_layout_options(run, capsys):
    Image.effect_noise((48, 32), 60).convert("RGB").save("small.png")
    nano = ["--steps", "1", "--dtype", "float32"]
    assert run("upscale", "small.png", "whole.png", *nano) == 0
    assert run("upscale", "small.png", "chunks.png", *nano, "--chunk", "5", "--attention", "_native_math") == 0
    assert run("upscale", "small.png", "tiles.png", *nano, "--tile", "64", "--tile-overlap", "16") == 0
    assert "192 x 128 px, 12 tiles of 64 x 64 px" in capsys.readouterr().err  # the plan is told
    whole, chunks, tiles = (pixels(f"{name}.png").astype(int) for name in ("whole", "chunks", "tiles"))
    assert abs(whole - chunks).max() <= 1 and (whole != tiles).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tile", "big"], '--tile big: expected "auto", "none" or a side in pixels'),
        (["--tile", "0"], "tile size 0: expected at least 32 pixels"),
        (["--tile", "64", "--tile-overlap", "64"], "tile overlap 64: expected less than the tile size, 64 pixels"),
        (["--chunk", "0"], "expected a chunk size of at least 1 patch"),
        (["--max-memory", "10MB"], "GB may be used: allow more memory"),
        (["--max-memory", "much"], 'expected bytes, or a size such as "6GB"'),
        (["--attention", "flash"], "flash-attn"),
        (["--attention", "quick"], 'no attention backend "quick"'),
        (["--quantize", "float8"], "compute capability 8.9"),
    ],
)
def test_bad_layout(run, arguments, message, capsys):
    Image.new("RGB", (48, 32)).save("small.png")
    assert run("upscale", "small.png", "large.png", *arguments) == 2
    assert message in capsys.readouterr().err and not Path("large.png").exists()


def test_plan_of_nothing(capsys):
    assert main(["plan", "0", "100", "--device", "cpu"]) == 2
    assert "0 x 100 px, batch 1: expected at least 1" in capsys.readouterr().err
