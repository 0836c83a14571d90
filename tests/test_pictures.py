"""Pictures as people have them, against Pillow and littleCMS used by hand."""

import io
import itertools
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from pixeldecoder import pictures

CASES = Path(__file__).parent / "cases"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def stored(image: Image.Image, format: str = "PNG", **kwargs) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return file.getvalue()


def noise(*shape: int, seed: int = 0, high: int = 256, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def rgb(source) -> np.ndarray:
    return np.asarray(pictures.read(source).rgb).astype(int)


def test_orientation_of_a_phone():
    path = CASES / "exif_orientation6_96x64.jpg"
    picture = pictures.read(path)
    assert pictures.size(path) == picture.rgb.size == (64, 96)
    assert np.array_equal(rgb(path), np.asarray(ImageOps.exif_transpose(Image.open(path))))
    assert not picture.rgb.getexif()


def test_sixteen_bits_are_scaled():
    picture = pictures.read(CASES / "grey16_ramp_0_65535.png")
    assert np.asarray(picture.rgb).mean() == pytest.approx(127.5, abs=0.1)


@pytest.mark.parametrize("name", ["rgba_magenta_under_transparent.png", "palette_transparent.png"])
def test_hidden_colours_are_not_shown(name):
    picture = pictures.read(CASES / name)
    seen = np.asarray(Image.open(CASES / name).convert("RGBA"))
    hidden = seen[seen[..., 3] == 0][0, :3]
    for image in picture.rgb, picture.flattened(), picture.with_alpha(picture.rgb.resize((256, 256))).convert("RGB"):
        assert not (np.abs(np.asarray(image).astype(int) - hidden).max(-1) < 60).any()
    flat = np.asarray(picture.flattened())
    assert (flat[seen[..., 3] == 0] == 255).all()
    enlarged = picture.with_alpha(picture.rgb.resize((256, 256)))
    assert enlarged.mode == "RGBA" and np.asarray(enlarged)[..., 3].min() < 8


def test_a_wide_gamut():
    path = CASES / "icc_wide_gamut_rgb.png"
    image = Image.open(path)
    profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    expected = ImageCms.profileToProfile(image, profile, SRGB)
    assert np.array_equal(rgb(path), np.asarray(expected)) and np.abs(rgb(path) - np.asarray(image)).max() > 3


def test_ghostscript_is_never_started(monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("started"))
    path = CASES / "postscript.png"
    for function in pictures.read, pictures.size:
        with pytest.raises(ValueError, match=r"postscript.png: .*not a picture of a known format \(png, jpg, "):
            function(path)


@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 40), st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF"]))
@settings(max_examples=60, deadline=None)
def test_every_orientation(orientation, width, height, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = stored(Image.fromarray(noise(height, width, 3)), format, exif=exif, lossless=True)
    expected = Image.open(io.BytesIO(data))
    expected.load()
    expected = ImageOps.exif_transpose(expected).convert("RGB")
    assert pictures.size(data) == expected.size and np.array_equal(rgb(data), np.asarray(expected))


@given(st.sampled_from(["1", "L", "P", "RGB", "CMYK", "YCbCr"]), st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_modes_without_alpha(mode, width, height):
    image = Image.fromarray(noise(height, width, 3)).convert(mode)
    expected = image.convert("RGB")
    assert np.array_equal(rgb(image), np.asarray(expected)) and pictures.read(image).alpha is None


@given(st.sampled_from(["RGBA", "LA", "PA", "RGBa"]), st.integers(1, 30), st.integers(1, 30), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_modes_with_alpha(mode, width, height, seed):
    """What is seen keeps its colour; what is not has one that lies between those that are."""
    values = noise(height, width, 4, seed=seed)
    values[..., 3] *= noise(height, width, seed=seed + 1, high=2)
    image = Image.fromarray(values, "RGBA")
    image = image if mode == "RGBA" else image.convert("LA").convert(mode) if mode != "RGBa" else image.convert(mode)
    expected = np.asarray(image.convert("RGBA"))
    picture = pictures.read(image)
    alpha = expected[..., 3]
    assert np.array_equal(np.asarray(picture.alpha), alpha) if alpha.min() < 255 else picture.alpha is None
    seen = alpha > 0
    assert np.array_equal(np.asarray(picture.rgb)[seen], expected[seen, :3])
    if not seen.any():
        assert (np.asarray(picture.rgb) == 255).all()
    elif not seen.all():
        filled = np.asarray(picture.rgb)[~seen].astype(int)
        low, high = expected[seen, :3].astype(int).min(0), expected[seen, :3].astype(int).max(0)
        assert (filled >= low - 1).all() and (filled <= high + 1).all()


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
def test_whole_numbers_of_16_bits(dtype):
    values = np.array([[0, 257, 65535], [32767, 128, 129]])
    mode = {"<u2": "I;16", ">u2": "I;16B", "<i4": "I"}[dtype]
    image = Image.frombytes(mode, (3, 2), values.astype(dtype).tobytes())
    assert np.array_equal(rgb(image)[..., 0], np.rint(values / 257))
    assert np.array_equal(rgb(stored(Image.fromarray(values.astype(np.uint16))))[..., 1], np.rint(values / 257))


def test_rgb_of_16_bits():
    rows = b"".join(b"\0" + struct.pack(">6H", 0, 65535, 32768, 257, 514, 65278) for _ in range(2))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.abs(rgb(data)[0] - [[0, 255, 127.5], [1, 2, 254]]).max() <= 1


@pytest.mark.parametrize(
    ("values", "told"),
    [([[-0.1, 1]], "from -0.1 to 1"), ([[0, 300]], "from 0 to 300"), ([[0, np.nan]], "floating-point values")],
)
def test_floats_that_are_no_picture(values, told):
    with pytest.raises(ValueError, match=f"{told}.*expected them in"):
        pictures.read(Image.fromarray(np.array(values, np.float32)))


def test_floats_and_large_numbers(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(path)
    picture = pictures.read(path)
    assert np.asarray(picture.rgb)[0, :, 2].tolist() == [0, 128, 255] and "from 0 to 1" in picture.notes[0]
    Image.fromarray(np.array([[0, 70000]], np.int32)).save(path)
    with pytest.raises(ValueError, match=r"a.tif: whole values from 0 to 70000: expected them in \[0, 65535\]"):
        pictures.read(path)


def cmyk_profile() -> bytes:
    """A printer's, of ICC version 2: the corners of its cube as Lab, and straight lines between them."""
    corners = itertools.product((0, 1), repeat=4)
    lab = [
        (255 - 60 * c - 40 * m - 20 * y - 90 * k, 128 - 50 * c + 60 * m, 128 - 40 * c + 70 * y)
        for c, m, y, k in corners
    ]
    table = bytes(max(0, value) for colour in lab for value in colour)
    identity = struct.pack(">9I", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + bytes(range(256)) * 4 + table + bytes(range(256)) * 3
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    text = b"text" + bytes(4) + b"none\0"
    name = b"desc" + bytes(4) + struct.pack(">I", 5) + b"cmyk\0" + bytes(78)
    tags, data = [], b""
    for kind, body in (b"desc", name), (b"cprt", text), (b"wtpt", white), (b"A2B0", lut):
        body += bytes(-len(body) % 4)
        tags.append((kind, 128 + 4 + 4 * 12 + len(data), len(body)))
        data += body
    head = struct.pack(">I4sI4s4s4s", 128 + 4 + 48 + len(data), b"none", 0x02100000, b"prtr", b"CMYK", b"Lab ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    return head.ljust(128, b"\0") + struct.pack(">I", 4) + b"".join(struct.pack(">4sII", *tag) for tag in tags) + data


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_with_a_profile(format):
    profile = cmyk_profile()
    data = stored(Image.fromarray(noise(16, 16, 4), "CMYK"), format, icc_profile=profile)
    image = Image.open(io.BytesIO(data))
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    expected = ImageCms.profileToProfile(image, source, SRGB, outputMode="RGB")
    assert np.array_equal(rgb(data), np.asarray(expected))
    assert np.abs(rgb(data) - np.asarray(image.convert("RGB"))).mean() > 10
    assert pictures.read(data).notes == ()


def test_lab():
    lab = Image.fromarray(noise(8, 8, 3)).convert("RGB")
    lab = ImageCms.profileToProfile(lab, SRGB, ImageCms.createProfile("LAB"), outputMode="LAB")
    back = ImageCms.profileToProfile(lab, ImageCms.createProfile("LAB"), SRGB, outputMode="RGB")
    assert np.array_equal(rgb(lab), np.asarray(back))


@pytest.mark.parametrize(
    "profile", [b"", b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()]
)
def test_a_profile_that_does_not_fit(profile):
    image = Image.fromarray(noise(8, 8, 3))
    image.info["icc_profile"] = profile
    picture = pictures.read(image)
    assert np.array_equal(np.asarray(picture.rgb), np.asarray(image))
    assert bool(picture.notes) == bool(profile)


@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_of_several(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    data = stored(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
    picture = pictures.read(data)
    assert picture.notes == ("the first of 3 frames or pages",) and picture.rgb.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["BMP", "TIFF", "GIF", "AVIF", "WEBP", "JPEG", "PNG"])
def test_formats_by_content(format, tmp_path):
    (tmp_path / "a.xyz").write_bytes(stored(Image.new("RGB", (16, 16), "red"), format))
    assert np.abs(rgb(tmp_path / "a.xyz")[8, 8] - [255, 0, 0]).max() < 8


@pytest.mark.parametrize("format", ["PPM", "PCX", "EPS", "ICO", "TGA"])
def test_formats_that_are_not_opened(format):
    with pytest.raises(ValueError, match="not a picture of a known format"):
        pictures.read(stored(Image.new("RGB", (16, 16)), format))


def test_damaged_files(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(stored(Image.fromarray(noise(64, 64, 3)))[:3000])
    assert pictures.size(path) == (64, 64)  # which its head tells
    with pytest.raises(ValueError, match=r"a.png: not a readable image \("):
        pictures.read(path)
    with pytest.raises(ValueError, match=r"b.png: no such file"):
        pictures.read(tmp_path / "b.png")


def test_a_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = stored(Image.new("1", (15, 15)))
    for function in pictures.size, pictures.read:
        with pytest.raises(ValueError, match=r"bomb.png: too large to be opened safely"):
            function(data, "bomb.png")


def test_colours_come_from_the_nearest_that_are_seen():
    values = np.zeros((8, 8, 4), np.uint8)
    values[..., :3] = (255, 0, 255)
    values[0, 0], values[7, 7] = (255, 0, 0, 255), (0, 0, 255, 1)
    filled = np.asarray(pictures.read(Image.fromarray(values, "RGBA")).rgb)
    assert filled[1, 1].tolist() == filled[3, 3].tolist() == [255, 0, 0]
    assert filled[6, 6].tolist() == filled[4, 4].tolist() == [0, 0, 255]
    assert filled[7, 0].tolist() == [254, 0, 1]  # both, by how far they are seen


def test_nothing_heavy_is_imported():
    import subprocess

    code = "import sys, pixeldecoder.pictures; assert not {'torch', 'diffusers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_alpha_is_enlarged_apart():
    values = np.full((16, 16, 4), 255, np.uint8)
    values[:, :8, 3] = 0
    picture = pictures.read(Image.fromarray(values, "RGBA"))
    alpha = np.asarray(picture.with_alpha(Image.new("RGB", (64, 64))))[..., 3]
    expected = np.asarray(picture.alpha.resize((64, 64), Image.Resampling.LANCZOS))
    assert np.array_equal(alpha, expected) and (alpha[:, 8] == 0).all() and (alpha[:, 56] == 255).all()
    opaque = pictures.read(Image.new("RGBA", (8, 8)).convert("RGB"))
    image = Image.new("RGB", (16, 16))
    assert opaque.with_alpha(image) is image and list(itertools.chain(opaque.notes)) == []
