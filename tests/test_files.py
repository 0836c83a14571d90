"""Files whole or not at all, of the usual mode; inputs with their outputs, or what is wrong with them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pixeldecoder import files, pictures


@pytest.fixture(autouse=True)
def _there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fails_half_way(path):
    path.write_text("half of")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["image.png", "latents.safetensors", "report.json", "results.csv"])
def test_whole_or_not_at_all(name):
    Path(name).write_text("the old one")
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(Path(name), fails_half_way)
    assert Path(name).read_text() == "the old one" and os.listdir() == [name]
    files.write_whole(Path(name), lambda path: path.write_text("the new one"))
    assert Path(name).read_text() == "the new one" and os.listdir() == [name]


def test_an_image_that_cannot_be_written_leaves_the_old_one(monkeypatch):
    files.save_image(Image.new("RGB", (8, 8), "red"), Path("a.png"))
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: fails_half_way(path))
    with pytest.raises(OSError, match="No space left"):
        files.save_image(Image.new("RGB", (8, 8), "blue"), Path("a.png"))
    assert Image.open("a.png").getpixel((0, 0)) == (255, 0, 0) and os.listdir() == ["a.png"]


def write_weights(folder):
    (folder / "deep").mkdir()
    save_file({"x": torch.zeros(1)}, folder / "deep/weights.safetensors")  # for its owner alone, as libraries have it


def test_a_folder_is_replaced_whole_or_not_at_all():
    def fails(folder):
        write_weights(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        files.write_folder(Path("a/b"), fails)
    assert os.listdir("a") == []
    files.write_folder(Path("a/b"), lambda folder: (folder / "old").touch())
    with pytest.raises(OSError):
        files.write_folder(Path("a/b"), fails)
    assert os.listdir("a") == ["b"] and os.listdir("a/b") == ["old"]
    files.write_folder(Path("a/b"), write_weights)
    assert os.listdir("a") == ["b"] and os.listdir("a/b") == ["deep"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_mode_is_what_the_umask_says(umask):
    before = os.umask(umask)
    try:
        files.write_whole(Path("z.safetensors"), lambda path: save_file({"latents": torch.zeros(1)}, path))
        files.write_whole(Path("a.json"), lambda path: path.write_text("{}"))
        files.write_folder(Path("folder"), write_weights)
    finally:
        os.umask(before)
    names = ("z.safetensors", "a.json", "folder/deep/weights.safetensors")
    assert [Path(name).stat().st_mode & 0o777 for name in names] == [0o666 & ~umask] * 3
    assert os.listdir("folder") == ["deep"]


def test_jpeg_of_quality_95():
    """The luminance of lowest frequency is quantised by 16 at quality 50, by (100 - 95) / 50 of it at 95."""
    files.save_image(Image.effect_noise((32, 32), 60).convert("RGB"), Path("a.jpg"))
    assert Image.open("a.jpg").quantization[0][0] == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to():
    os.mkdir("closed", 0o555)
    with pytest.raises(ValueError, match="closed may not be written to"):
        files.check_writable(Path("closed/new/a.png"))


def test_what_a_format_cannot_hold():
    files.check_image_size(Path("a.png"), 70_000, 10)
    files.check_image_size(Path("a.webp"), 16_383, 16_383)
    for name, width, height in ("a.webp", 10, 16_384), ("a.JPG", 65_501, 10):
        with pytest.raises(ValueError, match="holds at most"):
            files.check_image_size(Path(name), width, height)


@pytest.mark.parametrize(
    ("tensors", "sigma"),
    [
        ({"latents": torch.ones(2, 3, 4)}, None),
        ({"latents": torch.ones(2, 3, 4), "sigma": torch.tensor(0.25)}, [0.25]),
        ({"latents": torch.ones(2, 5, 3, 4), "sigma": torch.tensor([0.25, 0.5])}, [0.25, 0.5]),
        ({"latents": torch.ones(2, 5, 3, 4), "sigma": torch.tensor(0.25)}, [0.25]),
    ],
)
def test_latents_with_their_sigma(tensors, sigma):
    for path, save in (Path("z.safetensors"), save_file), (Path("z.pt"), torch.save):
        save(tensors, path)
        read = files.load_latents(path)
        assert torch.equal(read.tensor.reshape(tensors["latents"].shape), tensors["latents"]) and read.tensor.ndim == 4
        assert (read.sigma if read.sigma is None else read.sigma.tolist()) == sigma
        assert files.inspect_latents(path) == (read.tensor.shape, None)


def write_latents(path: str | Path) -> torch.Tensor:
    latents, suffix = torch.ones(1, 2, 300, 400), Path(path).suffix
    if suffix == ".npy":
        np.save(path, latents.numpy())
    else:
        save_file({"latents": latents}, path) if suffix == ".safetensors" else torch.save(latents, path)
    return latents


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "npy"])
def test_latents_are_no_longer_their_file(suffix):
    """Which may change, or end early, while they are decoded."""
    path = Path(f"z.{suffix}")
    latents = write_latents(path)
    held = files.load_latents(path).tensor
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(held, latents)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "npy"])
def test_names_that_are_not_utf8(suffix):
    """Which Linux allows, and old archives hold."""
    latents, path = write_latents(f"z.{suffix}"), Path(os.fsdecode(b"\xff") + f".{suffix}")
    try:
        os.rename(f"z.{suffix}", path)
    except OSError:
        pytest.skip("this file system has no such names")
    assert files.inspect_latents(path) == (latents.shape, None)
    assert torch.equal(files.load_latents(path).tensor, latents)


def test_latents_that_are_no_plain_numbers():
    for tensors, message in (
        ({"latents": torch.ones(2, 3, 4), "sigma": "0.5"}, 'expected "sigma" to be a number, got 0.5'),
        ({"latents": torch.ones(2, 3, 4), "sigma": torch.tensor(0.5 + 0.1j)}, 'expected "sigma" to be a real number'),
        ({1: torch.ones(2), "a": torch.ones(2)}, 'expected one tensor, or one called "latents"'),
        (torch.ones(2, 3, 4, dtype=torch.complex64), "expected plain real numbers, got torch.complex64"),
        (torch.ones(2, 3, 4).to_sparse(), "expected plain real numbers"),
        (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "expected plain real numbers, .* nested"),
    ):
        torch.save(tensors, "z.pt")
        with pytest.raises(ValueError, match=f"z.pt: {message}"):
            files.load_latents(Path("z.pt"))


@pytest.mark.parametrize("sigma", [torch.tensor(1.5), torch.tensor(float("nan")), torch.zeros(3)])
def test_latents_with_a_bad_sigma(sigma):
    save_file({"latents": torch.ones(2, 5, 3, 4), "sigma": sigma}, "z.safetensors")
    with pytest.raises(ValueError, match=r'z.safetensors: expected "sigma" in \[0, 1\], 1 or 2 of them'):
        files.load_latents(Path("z.safetensors"))


def test_pictures_that_are_none():
    Path("text.png").write_text("no picture")
    Path("empty.jpg").touch()
    os.mkdir("folder.png")
    for name in "text.png", "empty.jpg":
        for read in pictures.read, pictures.size:
            with pytest.raises(ValueError, match=f"{name}: not a readable image"):
                read(Path(name))
    for name in "none.png", "folder.png":
        with pytest.raises(ValueError, match=f"{name}: no such file"):
            pictures.read(Path(name))


def test_suffixes_in_capitals():
    np.save("z.npy", np.ones((2, 3, 4), np.float32))
    save_file({"latents": torch.ones(2, 3, 4)}, "z.safetensors")
    save_file({"latent_tensor": torch.ones(2, 3, 4)}, "z.latent")
    torch.save(torch.ones(2, 3, 4), "z.pt")
    for suffix in files.LATENT_SUFFIXES:
        Path(f"z{suffix}").rename(f"Z{suffix.upper()}")
        path = Path(f"Z{suffix.upper()}")
        assert files.load_latents(path).tensor.shape == files.inspect_latents(path)[0] == (1, 2, 3, 4)


def test_pictures_and_tensors_are_the_same():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    assert np.array_equal(pictures.to_image(pictures.to_tensor(ramp)), ramp)
    nearly = pictures.to_tensor(ramp) + 0.4 / 127.5 * (1 - pictures.to_tensor(ramp).abs())  # to the nearest
    assert np.array_equal(pictures.to_image(nearly), ramp)
    assert np.array_equal(pictures.to_image(nearly - 0.8 / 127.5 * (1 - pictures.to_tensor(ramp).abs())), ramp)


def test_values_out_of_range_are_cut():
    image = torch.tensor([-7.0, 7.0, 0.0])[None, :, None, None].expand(2, 3, 1, 2)
    assert np.array(pictures.to_image(image)).tolist() == [[[0, 255, 128]] * 2]


def test_pictures_side_by_side():
    left, right = Image.new("RGB", (3, 5), "red"), Image.new("RGB", (2, 7), "blue")
    both = pictures.side_by_side(left, right)
    assert both.size == (5, 7)
    red, blue, nothing = (255, 0, 0), (0, 0, 255), (0, 0, 0)
    assert [both.getpixel(at) for at in ((2, 4), (3, 0), (4, 6), (0, 6))] == [red, blue, blue, nothing]


def test_whole_numbers_become_real_ones():
    np.save("z.npy", np.ones((2, 3, 4), np.int64))
    torch.save({"z": torch.ones(2, 3, 4, dtype=torch.float16)}, "z.pt")
    for name in "z.npy", "z.pt":
        assert files.load_latents(Path(name)).tensor.dtype == torch.float32


@pytest.mark.parametrize(
    ("size", "count"),
    [
        *((text, 2 * 10**9) for text in ("2gb", "2GB", "2Gb", "2G", "2g", "2 GB", " 2 gb ", "2000MB", "2000000000")),
        *((text, 2**31) for text in ("2GiB", "2 gib", "2Gi", "2048MiB")),
        ("1.5k", 1500), (".5GB", 5 * 10**8), (7, 7),
    ],
)  # fmt: skip
def test_sizes_mean_what_people_think(size, count):
    assert files.parse_size(size) == count


@pytest.mark.parametrize(
    "size", ["", "0", "0GB", "-1GB", "6XB", "GB", "1e999GB", "6 G B", "1,5GB", "nan", 1.5, -1, True]
)
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match=r'expected bytes, or a size such as "6GB"$'):
        files.parse_size(size)


@pytest.mark.parametrize("suffix", ["ckpt", "pth", "pt", "bin"])
def test_files_under_another_suffix(tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    save_file({"a": torch.ones(2)}, path)
    assert files.read_tensors(path).keys() == {"a"}
    torch.save({"a": torch.ones(2)}, path)
    assert files.read_tensors(path).keys() == {"a"}
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert files.read_tensors(path).keys() == {"a"}
    path.write_bytes(b"GGUF\x03" + bytes(60))
    with pytest.raises(ValueError, match=rf"model.{suffix}: a GGUF file of quantised weights: expected a .safetensors"):
        files.read_tensors(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"model.{suffix}: not a readable file of tensors, or truncated"):
        files.read_tensors(path)


def test_what_killed_runs_left_is_swept(tmp_path):
    """That of processes which are no more, here; what others write, here or elsewhere, stays."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    kept = [files._temporary(tmp_path / "a.png", ".png"), tmp_path / ".0123abcd.89abcdef.1.png", tmp_path / ".hidden"]
    dead = [tmp_path / path.name.replace(f".{os.getpid()}.", f".{gone.pid}.") for path in kept[:1]]
    folder = tmp_path / files._temporary(tmp_path / "b", ".new").name.replace(f".{os.getpid()}.", f".{gone.pid}.")
    for path in (*kept, *dead):
        path.touch()
    (folder / "deep").mkdir(parents=True)
    files.sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    files.sweep(tmp_path / "none")
    (tmp_path / "deep").mkdir()
    kept[1].rename(tmp_path / "deep" / kept[1].name)
    files.sweep(tmp_path, alone=True)  # others' too, but not what is called otherwise
    assert sorted(tmp_path.rglob("*")) == [tmp_path / ".hidden", tmp_path / "deep"]


def test_a_folder_s_name_as_long_as_names_can_be(tmp_path):
    target = tmp_path / ("n" * 255)
    files.write_folder(target, lambda folder: (folder / "a").write_text("1"))
    files.write_folder(target, lambda folder: (folder / "a").write_text("2"))
    assert (target / "a").read_text() == "2" and list(tmp_path.iterdir()) == [target]
