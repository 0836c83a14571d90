"""Pictures that say how they were made; made again from that, and folders of them that are cut short."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from conftest import tiny_pipeline
from families import z_image
from pixeldecoder import __version__, files, provenance
from pixeldecoder.cli import main

LATENTS = torch.randn(16, 2, 3, generator=torch.Generator().manual_seed(0))
FAST = ["--decoder", "decoder", "--device", "cpu", "--steps", "1"]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A decoder and a latent model."""
    folder = tmp_path_factory.mktemp("there")
    tiny_pipeline().save_pretrained(folder / "decoder")
    torch.manual_seed(0)
    z_image().save_pretrained(folder / "z-image")
    return folder


@pytest.fixture(autouse=True)
def _here(there, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "decoder", "z-image":
        os.symlink(there / name, name)


def photo(name, width=20, height=17, value=None):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    image = Image.effect_noise((width, height), 60) if value is None else Image.new("L", (width, height), value)
    image.convert("RGB").save(name)


def same(a, b):
    return Path(a).read_bytes() == Path(b).read_bytes()


GENERATE = [
    "--model", "z-image", "--height", "32", "--width", "48", "--latent-steps", "2", "--latent-guidance-scale", "0",
    "--stop-at", "1",
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
@pytest.mark.parametrize("command", ["decode", "upscale", "generate"])
def test_the_same_bytes_again(command, suffix, capsys):
    photo("a.png")
    save_file({"latents": LATENTS, "sigma": torch.tensor(0.3)}, "z.safetensors")
    source = {"decode": "z.safetensors", "upscale": "a.png", "generate": "a “café”, -- lit"}[command]
    options = {
        "decode": ["--tile", "32", "--tile-overlap", "8", "--prompt", "ignored"],
        "upscale": ["--sigma", "0.2", "--chunk", "7"],
        "generate": [*GENERATE, "--compare", "--negative-prompt", "fog"],
    }[command]
    picture, again = f"b.{suffix}", f"b_redo.{suffix}"
    assert main([command, source, picture, "--seed", "3", *FAST, *options]) == 0
    assert main(["redo", picture]) == 0 and same(picture, again)
    assert main(["redo", again, f"deep/c.{suffix}"]) == 0 and same(picture, f"deep/c.{suffix}")
    assert main([command, source, f"d.{suffix}", "--seed", "4", *FAST, *options]) == 0
    assert not same(picture, f"d.{suffix}")
    capsys.readouterr()
    assert main(["info", picture]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == [f"software: pixeldecoder {__version__}", f"command: {command}"] and "seed: 3" in told
    assert f"decoder_sha256: {provenance.weights_hash('decoder')}" in told and "decoder: decoder" in told
    width, height = Image.open(picture).size
    assert f"size: [{width}, {height}]" in told and "steps: 1" in told and "device: cpu" in told
    expected = {
        "decode": ["sigma: 0.30000001192092896", "tile: 32", "tile_overlap: 8", "source: z.safetensors",
                   f"source_sha256: {provenance.file_hash(Path('z.safetensors'))}"],
        "upscale": ["sigma: 0.2", "chunk: 7", "tile: none", "source: a.png"],
        "generate": ["model: z-image", "stop_at: 1", "latent_steps: 2", "negative_prompt: fog",
                     r'description: a “café”, -- lit'],
    }[command]  # fmt: skip
    assert set(expected) <= set(told), told


def test_the_demo_again(monkeypatch):
    """One photo of its four."""
    monkeypatch.setattr("pixeldecoder.cli.comparison.NANO", Path("few"))
    from pixeldecoder.presets import NANO

    os.makedirs("few/samples")
    for suffix in "webp", "taef1.webp", "safetensors":
        os.symlink(NANO / f"samples/sign.{suffix}", f"few/samples/sign.{suffix}")
    assert main(["demo", "--output", "out", "--steps", "1", "--device", "cpu", "--tile", "256"]) == 0
    assert main(["redo", "out/comparison.png", "again.png"]) == 0 and same("out/comparison.png", "again.png")
    assert main(["demo", "--output", "out", "--steps", "1"]) == 2  # it is there


def test_one_of_a_batch_again():
    torch.save(torch.stack([LATENTS, -LATENTS]), "two.pt")
    assert main(["decode", "two.pt", "out", *FAST]) == 0
    assert main(["redo", "out/two_001.png", "b.png"]) == 0 and same("out/two_001.png", "b.png")
    assert main(["generate", "a cat", "several", *GENERATE, *FAST, "--images", "2"]) == 0
    assert main(["redo", "several/1.png", "c.png"]) == 0 and same("several/1.png", "c.png")
    assert sorted(os.listdir()) == ["b.png", "c.png", "decoder", "out", "several", "two.pt", "z-image"]


def test_from_another_folder(tmp_path, monkeypatch):
    photo("a.png")
    assert main(["upscale", "a.png", "b.png", *FAST]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["redo", "../b.png", "c.png"]) == 0 and same("../b.png", "c.png")


def test_what_is_no_longer_what_it_was(there, capsys):
    photo("a.png")
    assert main(["upscale", "a.png", "b.png", *FAST]) == 0
    os.rename("a.png", "moved.png")
    assert main(["redo", "b.png"]) == 2
    assert "b.png: its source, a.png, is not there: give --source, where it is now\n" in capsys.readouterr().err
    assert main(["redo", "b.png", "c.png", "--source", "moved.png"]) == 0 and same("b.png", "c.png")
    photo("a.png")
    assert main(["redo", "b.png"]) == 2
    assert "b.png: made from another a.png: SHA-256 " in capsys.readouterr().err.splitlines()[-1]
    os.rename("moved.png", "a.png")
    os.remove("decoder")
    other = tiny_pipeline()
    next(other.transformer.parameters()).data += 1
    other.save_pretrained("decoder")
    assert main(["redo", "b.png"]) == 2
    assert "b.png: made by another decoder: SHA-256 " in capsys.readouterr().err.splitlines()[-1]
    assert not Path("b_redo.png").exists()


def test_redo_loses_nothing(capsys):
    photo("a.png")
    assert main(["upscale", "a.png", "b.png", *FAST]) == 0
    before = {name: Path(name).read_bytes() for name in ("a.png", "b.png")}
    for target in "a.png", "b.png":
        assert main(["redo", "b.png", target]) == 2
        assert main(["redo", "b.png", target, "--overwrite"]) == 2
        assert f"{target} would overwrite its input" in capsys.readouterr().err.splitlines()[-1]
    assert {name: Path(name).read_bytes() for name in before} == before


def test_another_version_is_told(monkeypatch, capsys):
    photo("a.png")
    assert main(["upscale", "a.png", "b.png", *FAST]) == 0
    monkeypatch.setattr("pixeldecoder.cli.redo.__version__", "9.9")
    assert main(["redo", "b.png"]) == 0
    assert f"made by pixeldecoder {__version__}, now by 9.9: it may differ\n" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_pictures_that_say_nothing(suffix, capsys):
    photo("a.png")
    assert main(["upscale", "a.png", f"b.{suffix}", "--no-metadata", *FAST]) == 0
    image = Image.open(f"b.{suffix}")
    assert "pixeldecoder" not in image.info and not image.getexif()
    for command in "info", "redo":
        assert main([command, f"b.{suffix}"]) == 2
        assert f"b.{suffix} does not say how it was made" in capsys.readouterr().err.splitlines()[-1]


def saying(made, name="x.png"):
    info = PngImagePlugin.PngInfo()
    info.add_text("pixeldecoder", made if isinstance(made, str) else json.dumps(made))
    Image.new("RGB", (8, 8)).save(name, pnginfo=info)


OURS = {"software": "pixeldecoder 0", "command": "upscale", "source": "a.png"}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("{", "does not say how it was made"),
        ("[" * 100_000, "does not say how it was made"),
        ([1], "does not say how it was made"),
        ({"command": "upscale"}, "does not say how it was made"),
        (OURS | {"command": "train"}, "made by 'train': expected one of decode, upscale, generate, demo"),
        (OURS | {"encoder": "os:system"}, "its encoder, os:system, is code: no picture has code run"),
        (OURS | {"index": -1}, "index -1: expected a whole number"),
        (OURS | {"steps": "many"}, "Error parsing --steps"),
        (OURS | {"tile": [1, 2], "seed": {"a": 1}}, "--seed"),
        ({"software": "x", "command": "upscale"}, "Missing from pixeldecoder upscale"),
        (OURS, "made from another a.png: SHA-256 None, not "),
    ],
)
def test_what_strangers_write_into_pictures(made, message, capsys, monkeypatch):
    photo("a.png")
    saying(made)
    monkeypatch.setattr(os, "system", lambda *args: pytest.fail("code was run"))
    before = sorted(os.listdir())
    assert main(["redo", "x.png"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pixeldecoder: x.png") and message in error and error.count("\n") == 1
    assert sorted(os.listdir()) == before


def test_outputs_that_strangers_name_are_not_written():
    photo("a.png")
    assert main(["upscale", "a.png", "b.png", *FAST]) == 0
    saying(files.read_made(Path("b.png")) | {"output": "evil.png", "save_prompt_embeds": "evil.safetensors"})
    assert main(["redo", "x.png"]) == 0
    assert not [name for name in os.listdir() if "evil" in name]


def test_a_terminal_is_not_steered(capsys):
    saying(OURS | {"prompt": "\x1b[2J", "\x1b[1m": 1})
    assert main(["info", "x.png"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_what_latents_are(capsys):
    photo("a.png")
    assert main(["encode", "a.png", "z.safetensors", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["info", "z.safetensors"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "latents: 1 of 16 channels, 4 x 4 cells", "family: flux", "normalised: yes", "sigma: not told, so 0",
        "size: 20 x 17 px",
    ]  # fmt: skip
    save_file({"latent_tensor": torch.zeros(2, 4, 3, 5), "sigma": torch.tensor([0.5, 0.25])}, "c.latent")
    assert main(["info", "c.latent"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == [
        "latents: 2 of 4 channels, 5 x 3 cells",
        "family: sdxl",
        "normalised: no, as ComfyUI stores them",
    ]
    assert told[3] == "sigma: 0.5, 0.25"


def test_info_is_light():
    photo("a.png")
    assert main(["upscale", "a.png", "b.png", *FAST]) == 0
    code = "import sys; from pixeldecoder.cli import main; main(['info', 'b.png']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


# What is stored with latents


def test_padding_is_cropped_again(capsys):
    photo("a.png", 100, 75)
    assert main(["encode", "a.png", "z.safetensors", "--device", "cpu"]) == 0
    held = load_file("z.safetensors")
    assert held["latents"].shape == (1, 16, 10, 14) and held["size"].tolist() == [75, 100]
    assert main(["decode", "z.safetensors", "b.png", *FAST]) == 0
    assert Image.open("b.png").size == (400, 300)
    save_file(held | {"size": torch.tensor([75, 113])}, "z.safetensors")
    assert main(["decode", "z.safetensors", "c.png", *FAST]) == 2
    assert '"size" is 113 x 75 px, but its latents are those of 112 x 80 px' in capsys.readouterr().err
    for size in torch.tensor([75]), torch.tensor([0, 5]), torch.zeros(2, 2):
        save_file(held | {"size": size}, "z.safetensors")
        assert main(["decode", "z.safetensors", "c.png", *FAST]) == 2
        assert 'z.safetensors: expected "size" to be a height and a width' in capsys.readouterr().err


def test_latents_as_comfyui_stores_them(capsys):
    """As the VAE decodes them: FLUX.1's are (z - 0.1159) * 0.3611 when normalised."""
    raw = LATENTS[None] / 0.3611 + 0.1159
    save_file({"latent_tensor": raw, "latent_format_version_0": torch.tensor([])}, "new.latent")
    save_file({"latent_tensor": raw * 0.18215}, "old.latent")
    save_file({"latent_tensor": raw[:, :, None], "latent_format_version_0": torch.tensor([])}, "video.LATENT")
    save_file({"latents": LATENTS}, "z.safetensors")
    assert main(["decode", "z.safetensors", "z.png", *FAST]) == 0
    for name in "new.latent", "old.latent", "video.LATENT":
        assert main(["decode", name, f"{name}.png", *FAST, "--latent-space", "flux"]) == 0
        assert np.abs(np.array(Image.open(f"{name}.png")).astype(int) - np.array(Image.open("z.png"))).max() <= 1
    assert main(["decode", "new.latent", "a.png", *FAST]) == 2
    assert (
        "decoder does not tell its latent space: give --latent-space (latent_space), one of flux, flux2"
        in capsys.readouterr().err
    )
    assert main(["decode", "new.latent", "a.png", *FAST, "--latent-space", "sd2"]) == 2
    assert 'no latent space "sd2"' in capsys.readouterr().err


def test_latents_of_another_family(capsys):
    save_file({"latents": LATENTS}, "z.safetensors", {"latent_space": "sd3"})
    assert main(["decode", "z.safetensors", "a.png", "--steps", "1"]) == 2
    assert "z.safetensors: latents of the sd3 space, but nano decodes those of flux" in capsys.readouterr().err


def test_generate_numbers_on(capsys):
    common = ["generate", "a cat", "outs", *GENERATE, *FAST]
    for expected in ["0.png"], ["0.png", "1.png"]:
        assert main(common) == 0
        assert sorted(os.listdir("outs")) == expected
    assert same("outs/0.png", "outs/1.png")
    first = Path("outs/0.png").read_bytes()
    assert main([*common, "--seed", "1"]) == main([*common, "--images", "2", "--seed", "1"]) == 0
    assert sorted(os.listdir("outs")) == [f"{number}.png" for number in range(5)]
    assert Path("outs/0.png").read_bytes() == first
    capsys.readouterr()
    for option in ["outs/0.png"], ["new.png", "--save-latents", "z.safetensors"]:
        Path("z.safetensors").write_text("mine")
        assert main(["generate", "a cat", *option, *GENERATE, *FAST]) == 2
        assert "exists: give another output, or --overwrite" in capsys.readouterr().err
    assert Path("z.safetensors").read_text() == "mine"


def test_errors_about_inputs_come_before_a_decoder_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("pixeldecoder.execution.Execution.load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("pixeldecoder.execution.load_encoder", lambda *_, **__: pytest.fail("loaded"))
    photo("wide.png", 4100, 16)
    save_file({"latents": torch.zeros(16, 2, 600)}, "wide.safetensors")
    torch.save(torch.zeros(3), "flat.pt")
    Path("broken.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (9")
    Path("text.png").write_text("no picture")
    for args, message in (
        ("upscale wide.png a.webp", "a.webp: .webp holds at most 16383 px a side, not 16400 x 64: use .png"),
        ("decode wide.safetensors a.webp", "a.webp: .webp holds at most 16383 px a side, not 19200 x 64: use .png"),
        ("decode flat.pt a.png", "flat.pt: expected latents (C, h, w) or (B, C, h, w), got (3,)"),
        ("decode broken.npy a.png", "broken.npy: not a readable array of numbers"),
        ("upscale text.png a.png", "text.png: not a readable image"),
        ("upscale wide.png text.png/a.png", "text.png is not a folder"),
        ("encode text.png z.safetensors", "text.png: not a readable image"),
    ):
        assert main([*args.split(), *([] if "encode" in args else FAST)]) == 2
        assert message in capsys.readouterr().err
    os.makedirs("all")
    os.rename("text.png", "all/text.png")
    assert main(["upscale", "all", "out", *FAST]) == 2 and not Path("out").exists()
    assert capsys.readouterr().err.splitlines()[-1] == "pixeldecoder: 1 of 1 file could not be used: see above"


# Folders


def folder(count, bad):
    """Small pictures, some of which are none; their names."""
    names = [f"in/{number:04}.png" for number in range(count)]
    photo(names[0], 16, 16)
    whole = Path(names[0]).read_bytes()
    wrong = names[count // (2 * bad) :: count // bad]
    for name in names:
        Path(name).write_bytes(whole[: len(whole) // 2] if name in wrong else whole)
    return names, wrong


UPSCALE = ["upscale", "in", "out", *FAST, "--dtype", "float32"]


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_folder_with_ten_bad_files(count, capsys):
    _, bad = folder(count, 10)
    assert main(UPSCALE) == 2 and len(bad) == 10
    out, error = capsys.readouterr()
    assert len(os.listdir("out")) == count - 10 and len(re.findall("out/.*png", out)) == count - 10
    assert error.endswith(f"\npixeldecoder: 10 of {count} files could not be used: see above\n")
    for name in bad:
        assert re.search(f"{name}: not a readable image [(].*[)]\n", error)
    assert main(UPSCALE) == 2
    out, error = capsys.readouterr()
    assert not re.findall("out/.*png", out) and f"skipped {count - 10} files whose outputs are there" in error


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_only_the_rest_is_made_after_a_kill(ending, capsys):
    count = 40
    folder(count, 1)
    command = [sys.executable, "-m", "pixeldecoder", *UPSCALE]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background job ignores
    )  # fmt: skip
    for _ in range(5):
        child.stdout.readline()
    child.send_signal(ending)
    _, error = child.communicate()
    assert child.returncode == (130 if ending == signal.SIGINT else -ending)
    made = {path: path.stat().st_mtime_ns for path in Path("out").glob("[0-9]*")}
    assert 5 <= len(made) < count - 1
    if ending == signal.SIGINT:
        assert error.endswith("pixeldecoder: interrupted\n") and len(os.listdir("out")) == len(made)
    for path in made:
        Image.open(path).load()
    assert main(UPSCALE) == 2
    assert len(re.findall("out/.*png", capsys.readouterr().out)) == count - 1 - len(made)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert len([*Path("out").glob("[0-9]*")]) == count - 1
