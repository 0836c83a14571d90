"""The command on real files, good and bad."""

import functools
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, FlowMatchLCMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import TINY, Golden, tiny_model, tiny_pipeline
from families import save_gemma, z_image
from pixeldecoder import PixelDecoderPipeline, cli, execution
from pixeldecoder.cli import comparison as demo
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


def test_images_beyond_the_memory_are_not_read(run, capsys, monkeypatch):
    Image.new("1", (8000, 8000)).save("in.png")
    monkeypatch.setattr("pixeldecoder.pictures.read", lambda path: pytest.fail("was read"))
    less = ["--max-memory", "1GB"]
    for code in run("upscale", "in.png", "a.png", *less), main(["encode", "in.png", "a.safetensors", *less]):
        assert code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "but 1.00 GB may be used" in line]
    assert len(said) == 2 and all(line.startswith("pixeldecoder: in.png: ") for line in said)


def test_images_that_a_format_cannot_hold(run, capsys):
    """Told before hours of decoding."""
    Image.new("1", (4100, 16)).save("in.png")
    torch.save(torch.zeros(1).expand(16, 2, 600), "in.pt")
    for command, source, size in ("upscale", "in.png", "16400 x 64"), ("decode", "in.pt", "19200 x 64"):
        assert run(command, source, "out.webp") == 2
        assert f"out.webp: .webp holds at most 16383 px a side, not {size}: use .png" in capsys.readouterr().err


def test_out_of_memory_while_a_decoder_loads(run, capsys, monkeypatch):
    torch.save(LATENTS, "z.pt")

    def from_pretrained(name, **kwargs):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(PixelDecoderPipeline, "from_pretrained", from_pretrained)
    assert run("decode", "z.pt", "a.png") == 2
    assert capsys.readouterr().err.startswith("pixeldecoder: out of memory: try --max-memory")


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
    for name in "broken", "other":
        tiny_pipeline().save_pretrained(name)
    Path("broken/transformer/config.json").write_text('{"num_layers": "x"}')
    shutil.rmtree("other/transformer")
    AutoencoderTiny().save_pretrained("other/transformer")
    index = json.loads(Path("other/model_index.json").read_text()) | {"transformer": ["diffusers", "AutoencoderTiny"]}
    Path("other/model_index.json").write_text(json.dumps(index))
    for name, message in (
        ("broken", "num_layers is 'x': expected a whole number"),
        ("other", "other: expected a decoder, got a pipeline with AutoencoderTiny"),
    ):
        assert main(["decode", "good.pt", "out.png", "--decoder", name, "--dtype", "float32"]) == 2
        assert message in capsys.readouterr().err
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
    assert "1024 x 768 px, 6 tiles of" in text and "4 steps on cpu in" in text and "GB of memory, of it 0.05" in text
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


# Every option by what it does


def differ(*names):
    """Whether the images are all unlike each other."""
    found = [pixels(name).tobytes() for name in names]
    return len(set(found)) == len(found)


def test_seed_sigma_and_steps_of_decode(run):
    torch.save(LATENTS, "z.pt")
    for name, *options in (
        ("zero",), ("one", "--seed", "1"), ("noisy", "--sigma", "0.5"), ("short", "--steps", "2"),
        ("again", "--seed", "0", "--sigma", "0", "--steps", "4"),
    ):  # fmt: skip
        assert run("decode", "z.pt", f"{name}.png", *options) == 0
    assert differ("zero.png", "one.png", "noisy.png", "short.png")
    assert (pixels("again.png") == pixels("zero.png")).all()


def test_decode_takes_the_sigma_of_the_file(run, capsys):
    save_file({"latents": LATENTS, "sigma": torch.tensor(0.5)}, "told.safetensors")
    save_file({"latents": torch.stack([LATENTS, LATENTS]), "sigma": torch.tensor([0.5, 0.25])}, "two.safetensors")
    save_file({"latents": LATENTS}, "plain.safetensors")
    assert run("decode", "told.safetensors", "stored.png") == 0
    assert "told.safetensors: decoded at sigma 0.5, which the file says\n" in capsys.readouterr().err
    for level in "0", "0.25", "0.5":
        assert run("decode", "told.safetensors", f"{level}.png", "--sigma", level) == 0
        assert "which the file says" not in capsys.readouterr().err
    assert run("decode", "plain.safetensors", "plain.png") == 0
    assert run("decode", "two.safetensors", "two") == 0
    assert "sigma 0.5, 0.25, which" in capsys.readouterr().err
    assert differ("0.png", "0.25.png", "0.5.png")
    for name, same in ("stored", "0.5"), ("plain", "0"), ("two/two_000", "0.5"), ("two/two_001", "0.25"):
        assert np.abs(pixels(f"{name}.png").astype(int) - pixels(f"{same}.png")).max() <= 1


def test_what_is_written_is_told(run, capsys):
    os.makedirs("in")
    os.makedirs("v1.5")
    for name in "a", "b":
        Image.effect_noise((32, 16), 60).convert("RGB").save(f"in/{name}.png")
    fast = ["--steps", "1"]
    for args, told in (
        (["encode", "in", "z", "--device", "cpu"], ["z/a.safetensors", "z/b.safetensors"]),
        (["encode", "in/a.png", "v1.5", "--device", "cpu"], ["v1.5/a.safetensors"]),
    ):
        assert main(args) == 0
        assert capsys.readouterr().out.splitlines() == told and all(map(os.path.isfile, told))
    for args, told in (
        (["upscale", "in", "out", *fast], ["out/a.png", "out/b.png"]),
        (["upscale", "in/a.png", "v1.5", *fast], ["v1.5/a.png"]),
        (["upscale", "in/a.png", "new", "--format", "jpg", *fast], ["new/a.jpg"]),
        (["decode", "z/a.safetensors", "new/", "--format", "webp", *fast], ["new/a_000.webp"]),
        (["decode", "z/a.safetensors", "deep/a.png", *fast], ["deep/a.png"]),
    ):
        if args[0] == "decode":
            torch.save(LATENTS, "z/a.pt")
            args[1], told = "z/a.pt", [name.replace("_000", "") for name in told]
        assert run(*args) == 0
        assert capsys.readouterr().out.splitlines() == told and all(map(os.path.isfile, told))
    assert run("upscale", "in", "all.png", *fast) == 2
    assert "all.png: a folder of inputs needs a folder as output" in capsys.readouterr().err


@pytest.fixture
def called(monkeypatch):
    """What the pipeline's `upscale` and call were given."""
    found = []
    for name in "upscale", "__call__":
        original = getattr(PixelDecoderPipeline, name)

        def spy(self, *args, original=original, **kwargs):
            found.append(inspect.signature(original).bind(self, *args, **kwargs).arguments)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(PixelDecoderPipeline, name, functools.wraps(original)(spy))
    return found


def test_seed_and_sigma_of_upscale(run, called):
    """The seed is also that of the noise in the latents, which is not the sampler's."""
    Image.effect_noise((32, 16), 60).convert("RGB").save("a.png")
    for name, *options in ("0",), ("1", "--seed", "1"), ("2", "--sigma", "0.2"), ("3", "--sigma", "0.2", "--seed", "1"):
        assert run("upscale", "a.png", f"out{name}.png", *options, "--steps", "1") == 0
    assert differ("out0.png", "out1.png", "out2.png", "out3.png")
    draws = [
        torch.randn(4, generator=torch.Generator().manual_seed(generator.initial_seed())).tolist()
        for given in called[::2]
        for generator in (given["kwargs"]["generator"], given["noise_generator"])
    ]
    sampler, noise = draws[::2], draws[1::2]
    assert sampler[0] == sampler[2] != sampler[1] == sampler[3]  # sigma leaves it alone
    assert noise[0] == noise[2] != noise[1] == noise[3]
    assert all(a != b for a, b in zip(sampler, noise, strict=True))


def own_encoder(image):
    """Latents that name themselves."""
    return torch.full((1, 16, image.shape[-2] // 8, image.shape[-1] // 8), 0.5)


def test_encoders_of_ones_own(run, called):
    Image.effect_noise((32, 16), 60).convert("RGB").save("a.png")
    own = ["--encoder", "test_cli:own_encoder"]
    assert run("upscale", "a.png", "b.png", "--steps", "1", *own) == 0
    assert (called[1]["latents"] == 0.5).all()
    assert main(["encode", "a.png", "z.safetensors", "--device", "cpu", *own]) == 0
    assert (load_file("z.safetensors")["latents"] == 0.5).all()


def test_encoders_of_ones_own_that_fail(run, capsys):
    Image.effect_noise((32, 16), 60).convert("RGB").save("a.png")
    for name, message in (
        ("os:path", "TypeError: 'module' object is not callable"),
        ("math:sqrt", "only one element tensors can be converted"),
        ("builtins:len", "expected latents (B, C, h, w), got int"),
    ):
        for args in ["encode", "a.png", "z.safetensors", "--device", "cpu"], ["upscale", "a.png", "b.png"]:
            command = main if args[0] == "encode" else lambda args: run(*args)
            assert command([*args, "--encoder", name]) == 2
            assert f'a.png: encoder "{name}": {message}' in capsys.readouterr().err


def test_layout_and_execution_reach_the_decoder(run, called, capsys, monkeypatch):
    torch.save(LATENTS, "z.pt")
    compiled = []
    monkeypatch.setattr("pixeldecoder.execution.compile_blocks", compiled.append)
    common = ["decode", "z.pt", "a.png", "--steps", "1", "--overwrite"]
    assert run(*common, "--tile", "32", "--tile-overlap", "0", "--chunk", "3", "--max-memory", "6GB") == 0
    assert "6 tiles of 32 x 32 px, 3 patches at a time" in capsys.readouterr().err
    assert run(*common, "--tile", "none", "--max-memory", "6000000000") == 0
    assert run(*common) == 0
    names = "tile_size", "tile_overlap", "chunk_size", "max_memory"
    assert [[given[name] for name in names] for given in called] == [
        [32, 0, 3, "6GB"], [None, None, None, 6_000_000_000], ["auto", None, None, None]
    ]  # fmt: skip
    assert compiled == []
    assert run(*common, "--compile", "--dtype", "float32") == 0
    assert run(*common, "--dtype", "bfloat16", "--quantize", "float8-storage") == 0
    first, second = (given["self"].transformer for given in called[-2:])
    assert compiled == [first] and first.dtype == torch.float32
    assert second.patch_blocks[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn and second.dtype != torch.float32
    assert run(*common, "--attention", "_native_efficient") == 2  # for GPUs alone, which shows when it is run
    assert "--attention _native_efficient cannot be used here: No viable backend" in capsys.readouterr().err


def test_device_and_dtype_of_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    PixelDecoderPipeline(tiny_model(**TINY), FlowMatchLCMScheduler(shift=1.0)).save_pretrained("reads")
    torch.save(LATENTS, "z.pt")
    made = []

    class Encoder:
        def __init__(self, *args):
            made.append(args)

        def __call__(self, prompts, device):
            made.append(prompts)
            return torch.zeros(1, 12, 20)

        def unload(self):
            made.append("unloaded")

    monkeypatch.setattr("pixeldecoder.text.PromptEncoder", Encoder)
    monkeypatch.setattr("pixeldecoder.pipeline.PromptEncoder", lambda: None)
    common = ["decode", "z.pt", "a.png", "--decoder", "reads", "--device", "cpu", "--steps", "1", "--overwrite"]
    options = [
        "--text-encoder",
        "some/gemma",
        "--text-device",
        "cpu",
        "--text-quantization",
        "4bit",
        "--prompt",
        "a cat",
    ]
    assert main([*common, *options]) == 0
    assert made[0][:3] == ("some/gemma", "cpu", "4bit") and made[1:] == [["a cat"], "unloaded"]
    if not torch.cuda.is_available():
        assert main([*common, "--text-device", "cuda"]) == 2
        assert "--text-device cuda: this machine has none" in capsys.readouterr().err
    save_file({"prompt_embeds": torch.zeros(1, 5, 7)}, "other.safetensors")
    assert main([*common, "--prompt-embeds", "other.safetensors"]) == 2
    assert "other.safetensors: expected (1, T, 20), got (1, 5, 7)" in capsys.readouterr().err
    assert main([*common[:2], "b.png", "--save-prompt-embeds", "p.safetensors", "--device", "cpu"]) == 2
    assert "--save-prompt-embeds: this decoder reads no text" in capsys.readouterr().err


def test_steps_are_blamed_before_the_latents(run, capsys):
    torch.save(LATENTS[:4], "z.pt")  # of another space, which comes later
    assert run("decode", "z.pt", "a.png", "--steps", "8") == 2
    assert "pixeldecoder: --steps 8: a distilled decoder takes 1 to 4 steps, got 8" in capsys.readouterr().err
    name = "PiD_res2k_sr4x_official_flux_distill_4step"
    assert main(["plan", "512", "512", "--steps", "8", "--decoder", name, "--device", "cpu"]) == 2
    assert "--steps 8: a distilled decoder" in capsys.readouterr().err


def lora(path, seed, change=lambda name, tensor: (name, tensor)):
    """A LoRA of the tiny decoder, as training exports it."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(seed)
    pipeline = tiny_pipeline()
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_qkv", "to_out"], init_lora_weights=False)
    pipeline.transformer.add_adapter(config)
    pipeline.save_lora_weights(path, get_peft_model_state_dict(pipeline.transformer))
    file = Path(path) / "pytorch_lora_weights.safetensors"
    save_file(dict(change(*item) for item in load_file(file).items()), file)
    return str(file)


def test_loras_of_the_decoder(run, decoder):
    torch.save(LATENTS, "z.pt")
    first, second = lora("first", 1), lora("second", 2)
    common = ["decode", "z.pt"]
    fast = ["--steps", "1", "--dtype", "float32"]
    for name, *options in (
        ("none",), ("whole", "--lora", "first"), ("half", "--lora", f"{first}:0.5"), ("zero", "--lora", "first:0"),
        ("both", "--lora", "first:0.5", "--lora", f"{second}:-1"), ("int8", "--lora", "first", "--quantize", "int8"),
    ):  # fmt: skip
        assert run(*common, f"{name}.png", *fast, *options) == 0
    assert differ("none.png", "whole.png", "half.png", "both.png", "int8.png")
    shutil.copytree("first", "called:0.5")  # a path may have a colon
    assert run(*common, "colon.png", *fast, "--lora", "called:0.5") == 0
    assert (pixels("colon.png") == pixels("whole.png")).all()
    assert (pixels("zero.png") == pixels("none.png")).all()
    # As in Python.
    pipeline = PixelDecoderPipeline.from_pretrained(decoder)
    pipeline.load_lora_weights("first", adapter_name="a")
    pipeline.load_lora_weights("second", adapter_name="b")
    for names, strengths, image in (["a"], [1.0], "whole"), (["a"], [0.5], "half"), (["a", "b"], [0.5, -1.0], "both"):
        pipeline.set_adapters(names, strengths)
        generator = torch.Generator().manual_seed(0)
        expected = np.array(pipeline(LATENTS, num_inference_steps=1, generator=generator).images[0])
        assert np.abs(pixels(f"{image}.png").astype(int) - expected).max() <= 1
    Image.effect_noise((32, 16), 60).convert("RGB").save("a.png")
    assert run("upscale", "a.png", "u0.png", *fast) == run("upscale", "a.png", "u1.png", *fast, "--lora", "first") == 0
    assert differ("u0.png", "u1.png")


def test_loras_of_something_else(run, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.save(LATENTS, "z.pt")
    lora("wide", 1, lambda name, tensor: (name, tensor.repeat(1, 2) if "lora_A" in name else tensor))
    lora("named", 1, lambda name, tensor: (name.replace("patch_blocks", "blocks"), tensor))
    save_file({"x": torch.zeros(3)}, "junk.safetensors")
    Path("text.safetensors").write_text("no tensors")
    os.mkdir("empty")
    os.mkdir("two")
    for name in "a", "b":
        save_file({"x": torch.zeros(3)}, f"two/{name}.safetensors")
    for name, message in (
        ("wide", "--lora wide: not of this decoder, which is (32, 32) there: transformer.patch_blocks.0.attn"),
        ("named", "--lora named: not of this decoder, which has no such layer: transformer.blocks.0.attn"),
        ("junk.safetensors", "not of this decoder, which has no such layer: x (3,)"),
        ("text.safetensors", "not a readable file of tensors"),
        ("empty", "--lora empty: expected one .safetensors file, found none"),
        ("two", "--lora two: expected one .safetensors file, found a.safetensors, b.safetensors"),
        ("wide:nan", "--lora wide:nan: expected a number as strength, got nan"),
        ("no/where", "no/where could not be loaded from https://huggingface.co"),
    ):
        assert run("decode", "z.pt", "a.png", "--lora", name) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setitem(sys.modules, "peft", None)
    assert run("decode", "z.pt", "a.png", "--lora", "wide") == 2
    assert "pip install 'pixeldecoder[lora]'" in capsys.readouterr().err
    assert not Path("a.png").exists()


@pytest.fixture
def latent_calls(monkeypatch):
    """What the latent model's call was given."""
    from diffusers import ZImagePipeline

    found, original = [], ZImagePipeline.__call__

    @functools.wraps(original)
    def spy(self, **kwargs):
        found.append(kwargs)
        return original(self, **kwargs)

    monkeypatch.setattr(ZImagePipeline, "__call__", spy)
    return found


def test_options_of_generate(run, model, latent_calls, called, monkeypatch, capsys):
    options = {
        "--height": 32, "--width": 48, "--latent-steps": 4, "--latent-guidance-scale": 2.5,
        "--negative-prompt": "a dog", "--pipeline-args": '{"max_sequence_length": 16}',
        "--stop-at": 0.5, "--seed": 5, "--steps": 3,
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    assert run("generate", "a cat", "a.png", "--model", model, *words) == 0
    assert "2 of 4 steps" in capsys.readouterr().err
    given = latent_calls[0]
    assert given["prompt"] == "a cat" and given["negative_prompt"] == "a dog" and given["guidance_scale"] == 2.5
    assert (given["height"], given["width"], given["num_inference_steps"]) == (32, 48, 4)
    assert given["max_sequence_length"] == 16 and pixels("a.png").shape == (128, 192, 3)
    assert called[0]["num_inference_steps"] == 3
    from pixeldecoder import ldm

    generated = []
    monkeypatch.setattr(ldm, "generate", lambda *args, **kwargs: generated.append(kwargs) or exit(7))
    assert run("generate", "a cat", "b.png", "--model", model, "--offload", "--compare") == 7
    assert run("generate", "a cat", "b.png", "--model", model, "--latent-space", "flux") == 7
    assert [kwargs["offload"] for kwargs in generated] == [kwargs["compare"] for kwargs in generated] == [True, False]
    assert [kwargs["latent_space"] for kwargs in generated] == [None, "flux"]


def test_prompts_of_generate(model, latent_calls, tmp_path, monkeypatch):
    """The decoder reads the latent model's, or one of its own."""
    monkeypatch.chdir(tmp_path)
    PixelDecoderPipeline(tiny_model(**TINY), FlowMatchLCMScheduler(shift=1.0)).save_pretrained("reads")
    read = []

    def encode_prompt(self, prompt, *args):
        read.append(prompt)
        return torch.zeros(1, 12, 20), None

    monkeypatch.setattr(PixelDecoderPipeline, "encode_prompt", encode_prompt)
    common = ["generate", "a cat", "a.png", "--model", model, "--decoder", "reads", "--device", "cpu", "--steps", "1"]
    assert main([*common, *GENERATE]) == main([*common, *GENERATE, "--prompt", "a dog", "--overwrite"]) == 0
    assert read == ["a cat", "a dog"] and [given["prompt"] for given in latent_calls] == ["a cat", "a cat"]


def test_seeds_of_generate_count_on(run, model):
    fast = ["--model", model, *GENERATE, "--steps", "1"]
    assert run("generate", "a cat", "several", *fast, "--images", "2", "--seed", "5") == 0
    assert run("generate", "a cat", "six.png", *fast, "--seed", "6") == 0
    assert differ("several/5.png", "several/6.png")
    assert np.abs(pixels("several/6.png").astype(int) - pixels("six.png")).max() <= 1


def test_lora_of_the_latent_model(run, model, capsys):
    from diffusers import ZImagePipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = ZImagePipeline.from_pretrained(model)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights("lora", get_peft_model_state_dict(pipe.transformer))
    fast = ["--model", model, *GENERATE, "--steps", "1"]
    assert run("generate", "a cat", "a.png", *fast) == run("generate", "a cat", "b.png", *fast, "--lora", "lora") == 0
    assert differ("a.png", "b.png")
    save_file({"x": torch.zeros(3)}, "junk.safetensors")
    assert run("generate", "a cat", "c.png", *fast, "--lora", "junk.safetensors") == 2
    assert "--lora junk.safetensors: not a LoRA of ZImagePipeline" in capsys.readouterr().err


def test_arguments_that_a_pipeline_does_not_take(run, model, capsys):
    for given, message in (
        ('{"cfg_trunc": 1}', "--pipeline-args: ZImagePipeline has no cfg_trunc: expected prompt, height, width"),
        ('{"sigmas": 3}', '--pipeline-args {"sigmas": 3}: ZImagePipeline: '),
    ):
        assert run("generate", "a cat", "a.png", "--model", model, *GENERATE, "--pipeline-args", given) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error


def test_options_of_convert(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    preset = "PiD_v1pt5_res2kto4k_sr4x_official_flux_distill_4step"
    torch.save({f"net.{name}": tensor for name, tensor in Golden("v15_flux").state.items()}, "model.pth")
    options = ["--rope-reference-size", "1024", "--adapter-padding-mode", "zeros", "--latent-downscale-factor", "16"]
    options += ["--scale", "4", "--latent-channels", "16", "--no-unpack-latents", "--preset", preset]
    assert main(["convert", "model.pth", "folder", *options]) == 0
    assert capsys.readouterr().out == "folder\n"
    config = json.loads(Path("folder/transformer/config.json").read_text())
    expected = dict(rope_reference_size=1024, adapter_padding_mode="zeros", latent_downscale_factor=16, scale=4)
    assert config | expected | dict(latent_channels=16, unpack_latents=False) == config
    readable = Path("folder/model_index.json").stat().st_mode
    assert Path("folder/transformer/diffusion_pytorch_model.safetensors").stat().st_mode == readable
    before = {path: path.read_bytes() for path in Path("folder").rglob("*.*")}
    assert main(["convert", "model.pth", "folder", "--preset", preset]) == 2
    assert "folder exists: give a new folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("folder").rglob("*.*")} == before


def test_convert_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({f"net.{name}": tensor for name, tensor in Golden("v15_flux").state.items()}, "model.pth")

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "model_index.json").write_text("half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PixelDecoderPipeline, "save_pretrained", save_pretrained)
    preset = "PiD_v1pt5_res2kto4k_sr4x_official_flux_distill_4step"
    assert main(["convert", "model.pth", "folder", "--preset", preset]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert os.listdir() == ["model.pth"]


def test_options_of_plan(decoder, capsys, monkeypatch):
    monkeypatch.setattr("pixeldecoder.plan.measure_rates", lambda *_: (1e9, 1e9))  # seconds each
    common = ["plan", "1000", "500", "--decoder", decoder, "--device", "cpu", "--dtype", "float32"]

    def told(*options):
        assert main([*common, *options]) == 0
        return capsys.readouterr().out

    text = told()
    assert text.startswith(
        "1000 x 500 px: rounded up to multiples of 32 px, whole latents and patches\n1024 x 512 px, "
    )
    assert re.search(r"4 steps on cpu in float32: about [\d.]+ (s|min|h)\n$", text)

    def memory(text):
        return float(re.search(r"([\d.]+) GB of memory", text)[1])

    assert memory(told("--batch", "40")) > memory(text) + 1
    assert "2 tiles of" in told("--tile", "544") and "3 tiles of" in told("--tile", "544", "--tile-overlap", "256")
    assert " 7 patches at a time" in told("--chunk", "7") and "2 steps on" in told("--steps", "2")
    assert "in bfloat16: about" in told("--dtype", "bfloat16")
    assert main([*common, "--max-memory", "1MB"]) == 2
    assert "0.00 GB may be used" in capsys.readouterr().err
    weights = [
        float(re.search(r"([\d.]+) GB weights", told("--decoder", "nano", *options))[1])
        for options in ([], ["--quantize", "float8-storage"])
    ]
    assert weights[1] < weights[0]


def test_a_plan_is_told_once_for_a_size(run, capsys, monkeypatch):
    """Though its memory moves from call to call."""
    import pixeldecoder.plan

    monkeypatch.setattr("pixeldecoder.pipeline._TOLD", set())
    held = iter(range(0, 10**12, 10**9))
    monkeypatch.setattr(pixeldecoder.plan, "held_memory", lambda device: next(held))
    os.mkdir("in")
    for name, latents in ("a", LATENTS), ("b", LATENTS), ("c", LATENTS[:, :, :2]):
        torch.save(latents, f"in/{name}.pt")
    assert run("decode", "in", "out", "--steps", "1") == 0
    assert re.findall(r"\d+ x \d+ px(?=, whole)", capsys.readouterr().err) == ["96 x 64 px", "64 x 64 px"]


def test_demo_does_what_its_help_says():
    assert f"noise of sigma {demo.SIGMA}" in " ".join(str(cli.demo.Demo.__doc__).split())


def test_demo_tells_noise_from_noise(monkeypatch, tmp_path):
    """Another sigma in the demo's latents leaves the sampler's noise as it is, which is the same for both decodes."""
    from pixeldecoder.cli import comparison as demo

    monkeypatch.chdir(tmp_path)
    draws, latents = [], []

    class Pipeline:
        def __call__(self, z, sigma, generator, **kwargs):
            draws.append(torch.randn(4, generator=generator).tolist())
            latents.append(z)
            return SimpleNamespace(images=torch.zeros(1, 3, *(32 * side for side in z.shape[-2:])))

    monkeypatch.setattr(cli.demo.Demo, "load", lambda self: Pipeline())
    for seed, sigma in ("0", 0.3), ("0", 0.6), ("1", 0.3):
        monkeypatch.setattr(demo, "SIGMA", sigma)
        assert main(["demo", "--seed", seed, "--output", "there", "--overwrite", "--no-metadata"]) == 0
    assert os.listdir("there") == ["comparison.png"]
    each = len(draws) // 3
    assert draws[0] == draws[1] and draws[: 2 * each] == [draws[0]] * 2 * each and draws[-1] != draws[0]
    clean, noisy = latents[0], [latents[1 + run * each] for run in range(3)]
    noise = [(z - (1 - sigma) * clean) / sigma for z, sigma in zip(noisy, (0.3, 0.6, 0.3), strict=True)]
    torch.testing.assert_close(noise[0], noise[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(noise[0], noise[2], atol=0.1)
    sampler = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    assert abs(torch.corrcoef(torch.stack([noise[0].flatten(), sampler.flatten()]))[0, 1]) < 0.05


def test_a_prompt_encoder_that_is_nowhere_is_asked_for_once(monkeypatch):
    """Not file by file, each with retries and pauses."""
    from pixeldecoder import text

    asked = []

    def snapshot_download(name, **kwargs):
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(text.AutoTokenizer, "from_pretrained", lambda name: asked.append("tokenizer"))
    with pytest.raises(ValueError, match=r"some/gemma could not be loaded from https://huggingface.co \(no network\)"):
        text.PromptEncoder("some/gemma")(["a cat"])
    assert asked == ["some/gemma"]


def test_passes_that_a_plan_counts(decoder, tmp_path, monkeypatch):
    """One a step, two where the decoder is guided; of an image and its longest prompt."""
    from pixeldecoder import plan

    passes, planned, original = [], [], plan.plan
    monkeypatch.setattr(plan, "measure_rates", lambda *_: (1e9, 1e9))
    monkeypatch.setattr(plan, "estimate_seconds", lambda chosen, rates, count: passes.append(count) or 1.0)
    monkeypatch.setattr(
        plan, "plan", lambda *args, **kwargs: planned.append((args, kwargs)) or original(*args, **kwargs)
    )
    guided = tmp_path / "guided"
    PixelDecoderPipeline(
        tiny_model(**TINY), FlowMatchLCMScheduler(shift=1.0), default_guidance_scale=3.0, trained_size=96
    ).save_pretrained(guided)
    common = ["plan", "100", "60", "--device", "cpu", "--batch", "2"]
    for name, *options in (decoder,), (decoder, "--steps", "3"), (guided,), (guided, "--steps", "1"), ("nano",):
        assert main([*common, "--decoder", str(name), *options]) == 0
    assert passes == [4, 3, 8, 2, 4]
    assert [args[1:5] for args, _ in planned] == [(64, 128, 2, length) for length in (0, 0, 12, 12, 0)]
    assert [kwargs["trained_size"] for _, kwargs in planned] == [None, None, 96, 96, 512]


def test_weights_that_take_turns(run, monkeypatch, capsys):
    torch.save(LATENTS, "z.pt")
    asked = []
    assert run("decode", "z.pt", "whole.png", "--steps", "1", "--dtype", "float32") == 0
    assert "take turns" not in capsys.readouterr().err
    monkeypatch.setattr("pixeldecoder.execution.must_offload", lambda *args: asked.append(args[1:]) or True)
    assert run("decode", "z.pt", "turns.png", "--steps", "1", "--dtype", "float32", "--max-memory", "6GB") == 0
    assert asked == [(torch.device("cpu"), "6GB")]
    assert "the weights take turns on the device: slower, but they fit\n" in capsys.readouterr().err
    assert np.abs(pixels("turns.png").astype(int) - pixels("whole.png")).max() <= 1


def test_where_an_encoder_comes_from(monkeypatch):
    monkeypatch.setattr(execution, "load_encoder", lambda name, device: (name, device))

    def encoder(name="auto", own=None, **config):
        config = SimpleNamespace(**{"encoder_name": None, "latent_space": None} | config)
        return execution.image_encoder(name, SimpleNamespace(encoder=own, config=config, device="there"))

    assert encoder(own="its") is None and encoder("flux", own="its") == ("flux", "there")
    assert encoder(encoder_name="some/name", latent_space="flux") == ("some/name", "there")
    assert encoder(latent_space="flux2") == ("flux2", "there")
    for config, message in (
        ({}, "does not tell its latent space: give --encoder"),
        ({"latent_space": "mine"}, "does not tell its latent space"),
        ({"encoder_name": "os:system"}, "trained with the encoder os:system: give --encoder os:system"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder(**config)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_embeddings_of_a_guided_decoder(guidance, tmp_path, monkeypatch):
    """With a prompt's own it still needs those of the negative prompt."""
    pipeline = PixelDecoderPipeline(
        tiny_model(**TINY), FlowMatchLCMScheduler(shift=1.0), default_guidance_scale=guidance,
        default_negative_prompt="blurry",
    )  # fmt: skip
    monkeypatch.setattr(
        PixelDecoderPipeline, "encode_prompt", lambda self, *args: (torch.full((1, 12, 20), float(len(args[0]))), None)
    )
    path = tmp_path / "p.safetensors"
    save_file({"prompt_embeds": torch.full((1, 5, 20), 3.0)}, path)
    text = cli.options.FilesToImages(source=Path("a"), output=Path("b"), prompt_embeds=path)
    found = text.text_kwargs(pipeline)
    assert (found["prompt_embeds"] == 3).all() and found["prompt_embeds"].shape == (1, 5, 20)
    assert ("negative_prompt_embeds" in found) == (guidance != 1)
    if guidance != 1:
        assert (found["negative_prompt_embeds"] == 6).all()
    for shape, message in (
        ((5, 20), r"expected prompt embeddings \(B, T, Dt\), got .*\(5, 20\)"),
        (
            (2, 5, 20),
            r"expected \(1, T, 20\), got ",
        ),
    ):
        save_file({"prompt_embeds": torch.zeros(shape)}, path)
        with pytest.raises(ValueError, match=message):
            text.text_kwargs(pipeline)
