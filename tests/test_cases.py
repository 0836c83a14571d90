"""Every odd file of `cases` through every command that can take it: the right values, or one line that names it."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import tiny_pipeline
from pixeldecoder.cli import main
from pixeldecoder.files import read_made
from pixeldecoder.pictures import read
from pixeldecoder.training.config import load_yaml

CASES = Path(__file__).parent / "cases"
PICTURES = {  # name: size and mode of what it becomes
    "exif_orientation6_96x64": ((64, 96), "RGB"),
    "grey16_ramp_0_65535": (None, "RGB"),
    "icc_wide_gamut_rgb": (None, "RGB"),
    "palette_transparent": (None, "RGBA"),
    "rgba_magenta_under_transparent": (None, "RGBA"),
}
BAD = ("postscript.png", "thin_2x3000.png")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder of the pictures, and a decoder."""
    folder = tmp_path_factory.mktemp("odd")
    torch.manual_seed(0)
    tiny_pipeline().save_pretrained(folder / "decoder")
    (folder / "pictures").mkdir()
    for path in CASES.iterdir():
        if path.stem in PICTURES or path.name in BAD:
            shutil.copy(path, folder / "pictures")
    return folder


def run(*words, capsys) -> tuple[int, str]:
    code = main([*map(str, words), *(() if words[0] == "redo" else ("--device", "cpu"))])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.err


def original(name: str) -> Path:
    return next(CASES.glob(f"{name}.*"))


@pytest.mark.parametrize("format", ["png", "webp", "jpg"])
def test_enlarged(format, odd, tmp_path, capsys):
    """Sizes, orientation and colours stay, alpha where the format has it, and the bad ones are named at the end."""
    code, said = run(
        "upscale", odd / "pictures", tmp_path / "out", "--decoder", odd / "decoder", "--format", format, capsys=capsys
    )
    assert code == 2 and all(name in said for name in BAD) and f"2 of {len(PICTURES) + 2} files" in said
    made = {path.stem: path for path in (tmp_path / "out").iterdir()}
    assert made.keys() == PICTURES.keys()
    for name, (size, mode) in PICTURES.items():
        with Image.open(made[name]) as image:
            expected = size or Image.open(original(name)).size
            assert image.size == tuple(4 * side for side in expected)
            assert image.mode == ("RGB" if format == "jpg" else mode)
            assert 0x0112 not in image.getexif()  # no tag that turns it again
            if image.mode == "RGBA":  # the alpha that it had, enlarged
                small = np.asarray(image.getchannel("A").resize(expected, Image.Resampling.BOX)).astype(int)
                assert np.abs(small - np.asarray(Image.open(original(name)).convert("RGBA"))[..., 3]).mean() < 8


def test_encoded(odd, tmp_path, capsys):
    """The latents are those of the picture as `read` has it, on white."""
    code, said = run("encode", odd / "pictures", tmp_path / "out", capsys=capsys)
    assert code == 2 and "postscript.png" in said and "latents keep no alpha" in said
    for name in PICTURES:
        held = load_file(tmp_path / "out" / f"{name}.safetensors")
        flat = read(original(name)).flattened()
        assert held["size"].tolist() == [flat.height, flat.width]
        flat.save(tmp_path / f"{name}.png")
        assert run("encode", tmp_path / f"{name}.png", tmp_path / f"{name}.safetensors", capsys=capsys)[0] == 0
        assert torch.equal(load_file(tmp_path / f"{name}.safetensors")["latents"], held["latents"])


def test_evaluated(odd, tmp_path, capsys):
    """What is no picture is left out with its reason, what has no crop ends it; a picture says how it was made."""
    shutil.copytree(odd / "pictures", tmp_path / "in")
    words = (
        "evaluate", tmp_path / "in", "--output", tmp_path / "out", "--decoders", odd / "decoder", "--crop", 64,
        "--baselines", "bicubic", "--steps", 1, "--dtype", "float32",
    )  # fmt: skip
    code, said = run(*words, capsys=capsys)
    assert code == 2 and "thin_2x3000.png is 2 x 3000 pixels, smaller than the crop of 64" in said
    (tmp_path / "in" / "thin_2x3000.png").unlink()
    code, said = run(*words, capsys=capsys)
    assert code == 0 and "skipped postscript.png" in said
    folders = tmp_path.glob("out/images/bicubic*"), tmp_path.glob("out/images/decoder*")
    made = [path for found in folders for folder in found for path in folder.glob("*orientation6*")]
    assert len(made) == 2
    told = {read_made(path)["method"]: read_made(path) for path in made}
    assert told["bicubic"]["image"] == "exif_orientation6_96x64.jpg" and told["bicubic"]["seed"] == 0
    assert told[str(odd / "decoder")]["steps"] == 1 and "decoder_sha256" in told[str(odd / "decoder")]
    code, said = run("redo", made[0], capsys=capsys)
    assert code == 2 and "a picture of an evaluation: run that again" in said


def test_compared(tmp_path, capsys):
    turned, page = CASES / "exif_orientation6_96x64.jpg", tmp_path / "page.html"
    read(turned).rgb.save(tmp_path / "upright.png")
    assert main(["compare", str(turned), str(tmp_path / "upright.png"), "--output", str(page)]) == 0
    assert "ciede2000            0.0000" in capsys.readouterr().out  # the same picture
    assert main(["compare", str(turned), str(CASES / "postscript.png"), "--output", str(page), "--overwrite"]) == 2
    before = page.read_bytes()
    assert main(["compare", str(turned), str(turned), "--output", str(page)]) == 2
    assert page.read_bytes() == before and "exists: give another output, or --overwrite" in capsys.readouterr().err


def test_decoded(odd, tmp_path, capsys):
    """Stored sigma and ComfyUI's form are taken and said, two batches' names do not meet, heads that lie are named."""
    folder = tmp_path / "latents"
    shutil.copytree(CASES / "latents_folder_name_collision", folder)
    for pattern in "latents_saved*", "comfyui*", "lat_npy*":
        for path in CASES.glob(pattern):
            shutil.copy(path, folder)
    code, said = run(
        "decode", folder, tmp_path / "out", "--decoder", odd / "decoder", "--latent-space", "flux", "--steps", 1,
        capsys=capsys,
    )  # fmt: skip
    bad = [path.name for path in CASES.glob("lat_npy*")]
    assert code == 2 and all(name in said for name in bad) and "0.72" in said
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(made) == 5 and len([name for name in made if name.startswith("a")]) == 3


def test_too_wide_for_a_format(odd, tmp_path, capsys):
    wide = CASES / "latents_for_16416px_wide.safetensors"
    code, said = run("decode", wide, tmp_path / "wide.webp", "--decoder", odd / "decoder", capsys=capsys)
    assert code == 2 and "16416 x" in said and not (tmp_path / "wide.webp").exists()


@pytest.mark.parametrize("path", sorted(CASES.glob("yaml_*")), ids=lambda path: path.stem)
def test_settings(path, tmp_path, capsys):
    """Refused in one short line, or read as what is there: no number to the base of 60."""
    (tmp_path / "photos").mkdir()
    words = ["train", "teacher", "--data.source", str(tmp_path / "photos"), "--recipe", "nano", "--encoder", "nano"]
    assert main([*words, "--config", str(path), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and len(said) < 600 and "Traceback" not in said
    if path.stem == "yaml_sexagesimal":
        assert load_yaml(path) == {"steps": "1:30:00"} and "steps" in said


@pytest.mark.parametrize("line", ["encoder: spy:encode", "data: {source: 'pipe:touch ran #.tar'}"])
def test_settings_run_nothing(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spy.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    (tmp_path / "bad.yaml").write_text(line)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["train", "teacher", "--recipe", "nano", "--config", "bad.yaml", "--output", "out"]) == 2
    assert "is run for --" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and "spy" not in sys.modules


def test_numbers_in_settings(tmp_path):
    """As PyYAML has them but for colons; 1e-4 is a number, too."""
    (tmp_path / "a.yaml").write_text("[-3, 0x1F, 1_000, 0b11, 1e-4, -2.5E+3, .5, 7., .inf, '12', 1:30, 2026-01-02x]")
    (tmp_path / "a.yaml").write_text("a: " + (tmp_path / "a.yaml").read_text())
    expected = [-3, 31, 1000, 3, 1e-4, -2500.0, 0.5, 7.0, float("inf"), "12", "1:30", "2026-01-02x"]
    assert load_yaml(tmp_path / "a.yaml")["a"] == expected
