"""A picture file in, an upright sRGB picture and its alpha out: the one way in for every picture.

Torch is imported where a tensor is made: what is wrong with a picture can be told before.
"""

import importlib.util
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    import torch

FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF"]
"""Pillow's names; others, of which some start programs, are not opened whatever a file is called."""
SUFFIXES: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
if importlib.util.find_spec("pillow_heif"):
    FORMATS.append("HEIF")
    SUFFIXES += (".heic", ".heif")
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow and this file raise for pictures that are none, truncated or absurdly large."""
SIXTEEN_BITS = 65535
TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


@dataclass(frozen=True)
class Picture:
    """An upright picture in sRGB."""

    rgb: Image.Image
    """Mode RGB. Where alpha is 0 its colours are those of what is seen next to it, and never a hidden one."""
    alpha: Image.Image | None
    """Mode L, of the same size; `None`: opaque."""
    notes: tuple[str, ...] = ()
    """What was done that people may not expect."""

    def flattened(self) -> Image.Image:
        """On white."""
        if self.alpha is None:
            return self.rgb
        return Image.composite(self.rgb, Image.new("RGB", self.rgb.size, "white"), self.alpha)

    def with_alpha(self, image: Image.Image) -> Image.Image:
        """An RGB image made of this picture, of any size, with its alpha enlarged by Lanczos."""
        if self.alpha is None:
            return image
        image = image.copy()
        image.putalpha(self.alpha.resize(image.size, Image.Resampling.LANCZOS))
        return image


def read(source: Path | bytes | Image.Image, name: object = None) -> Picture:
    """A picture, turned as its EXIF says, in sRGB by its ICC profile, of 8 bits.

    16-bit values are divided by 257. Of animations and files of several pages it is the first.

    Args:
        source: a file, what is in one, or a picture of Pillow's in any mode.
        name: how errors call it; by default the path.

    Raises:
        ValueError: no such file, not one of `FORMATS`, truncated, too large, or with values that no picture has.
    """
    if isinstance(source, Image.Image):
        with _named("this picture" if name is None else name):
            return _convert(source)
    with _opened(source, name) as image:
        return _convert(image)


def size(source: Path | bytes, name: object = None) -> tuple[int, int]:
    """Width and height of the upright picture, by the head of the file.

    Raises:
        ValueError: as `read`, as far as the head tells.
    """
    with _opened(source, name) as image:
        exif = Image.Exif()
        with suppress(Exception):  # broken EXIF turns nothing
            if image.format == "PNG":  # of which `getexif` would decode all
                exif.load(_png_exif(image.fp))  # type: ignore[attr-defined]
            elif image.format != "TIFF":  # which Pillow turns itself
                exif = image.getexif()
        turned = exif.get(ExifTags.Base.Orientation) in TURNED
        return (image.height, image.width) if turned else image.size


def _png_exif(file: IO[bytes]) -> bytes:
    """Of a PNG, which may have it after its pixels."""
    exif = b""
    file.seek(8)
    while re.fullmatch(rb".{4}\w{4}", head := file.read(8), re.DOTALL) and head[4:] != b"IEND":  # where Pillow stops
        length = int.from_bytes(head[:4])
        if head[4:] == b"eXIf":
            exif, length = file.read(length), 0
        file.seek(length + 4, io.SEEK_CUR)  # with its checksum
    return exif


@contextmanager
def _opened(source: Path | bytes, name: object) -> Iterator[Image.Image]:
    if isinstance(source, Path) and not source.is_file():
        raise ValueError(f"{source}: no such file")
    _register_heif()
    name = source if name is None and isinstance(source, Path) else name
    with _named(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that are large, and of broken metadata
        try:
            opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        except UnidentifiedImageError:
            known = ", ".join(suffix[1:] for suffix in SUFFIXES)
            raise ValueError(f"not a readable image: not a picture of a known format ({known})") from None
        with opened:
            yield opened


@contextmanager
def _named(name: object) -> Iterator[None]:
    """Errors as ValueError, with the name of the file before them."""
    before = "" if name is None else f"{name}: "
    try:
        yield
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"{before}too large to be opened safely: {error}") from None
    except ValueError as error:
        raise ValueError(f"{before}{error}") from None
    except Exception as error:  # each format has its own
        raise ValueError(f"{before}not a readable image ({error})") from None


@cache
def _register_heif() -> None:
    if "HEIF" in FORMATS:
        import pillow_heif

        pillow_heif.register_heif_opener()


def _convert(image: Image.Image) -> Picture:
    notes = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # whose other pictures are a camera's previews
        notes.append(f"the first of {frames} frames or pages")
        image.seek(0)
    image.load()
    profile = image.info.get("icc_profile")
    with suppress(Exception):  # broken EXIF turns nothing
        image = ImageOps.exif_transpose(image)
    has_alpha = image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info
    alpha = None
    if image.mode == "F":
        image = _from_float(image)
        notes.append("values from 0 to 1 taken as black to white")
    elif image.mode.startswith("I"):
        image = _from_16_bits(image)
    elif image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, lab, _srgb(), outputMode="RGB")  # type: ignore[assignment]
    elif has_alpha:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        alpha = None if alpha.getextrema()[0] == 255 else alpha
        image = image.convert("RGB")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile:
        image = _to_srgb(image, profile, notes)
    image = image.convert("RGB")
    if alpha is not None:
        image = _without_hidden(image, alpha)
    return Picture(image, alpha, tuple(notes))


def _from_float(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        low, high = np.nanmin(values), np.nanmax(values)
        raise ValueError(
            f"floating-point values from {low:g} to {high:g}: expected them in [0, 1]: convert it to 8 or 16 bits"
        )
    return Image.fromarray((values * 255).round().astype(np.uint8))


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > SIXTEEN_BITS:
        raise ValueError(
            f"whole values from {values.min()} to {values.max()}: expected them in [0, {SIXTEEN_BITS}]: convert it to "
            "8 or 16 bits"
        )
    return Image.fromarray((values / 257).round().astype(np.uint8))


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _to_srgb(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() == "RGB" and image.mode == "L":  # of grey, or of a palette's
            image = image.convert("RGB")
        return ImageCms.profileToProfile(image, source, _srgb(), outputMode="RGB")  # type: ignore[return-value]
    except (ImageCms.PyCMSError, OSError, ValueError):
        notes.append("its colour profile does not fit it or is broken: taken as sRGB")
        return image


def _without_hidden(image: Image.Image, alpha: Image.Image) -> Image.Image:
    """Colours that alpha hides become those of what is seen next to them: an enlargement would show them at edges."""
    seen = np.asarray(alpha, np.float32) / 255
    colours = np.asarray(image, np.float32)
    filled = _fill(colours, seen)
    return Image.fromarray(np.where((seen > 0)[..., None], colours, filled).round().astype(np.uint8))


def _fill(colours: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(H, W, 3), (H, W): where the weight is 0, the mean of the smallest block around it that has any, or white."""
    if weight.all():
        return colours
    if max(weight.shape) == 1:
        return np.full_like(colours, 255)
    height, width = weight.shape
    rows = [(0, height % 2), (0, width % 2)]
    blocks = np.pad(weight, rows).reshape(-(-height // 2), 2, -(-width // 2), 2)
    total = blocks.sum((1, 3))
    sums = (np.pad(colours * weight[..., None], [*rows, (0, 0)]).reshape(*blocks.shape, 3)).sum((1, 3))
    means = sums / np.maximum(total, 1e-12)[..., None]
    above = _fill(means, total).repeat(2, 0).repeat(2, 1)[:height, :width]
    return np.where((weight > 0)[..., None], colours, above)


def to_tensor(image: Image.Image) -> "torch.Tensor":
    """A picture, as `read` and `Picture.flattened` make it -> (1, 3, H, W) in [-1, 1]."""
    import torch

    return torch.from_numpy(np.array(read(image).flattened())).permute(2, 0, 1)[None].float().div_(127.5).sub_(1)


def to_image(image: "torch.Tensor") -> Image.Image:
    """The first of (B, 3, H, W) in [-1, 1]."""
    return Image.fromarray(((image[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def side_by_side(*images: Image.Image) -> Image.Image:
    picture = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    left = 0
    for image in images:
        picture.paste(image, (left, 0))
        left += image.width
    return picture


def shrink(image: "torch.Tensor", factor: int) -> "torch.Tensor":
    """(B, 3, H, W) in [-1, 1] -> (B, 3, H / factor, W / factor): bicubic, antialiased, clamped."""
    import torch.nn.functional as F

    return F.interpolate(image, scale_factor=1 / factor, mode="bicubic", antialias=True).clamp(-1, 1)


def psnr(image: "torch.Tensor", truth: "torch.Tensor") -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], over all values; at most 100."""
    import torch
    import torch.nn.functional as F

    return (10 * torch.log10(4 / F.mse_loss(image.float(), truth.float()).clamp(min=4e-10))).item()
