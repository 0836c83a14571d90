"""Files in, tensors and pictures out, and back: read with errors that name the file, written whole or not at all."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from pixeldecoder.convert import read_tensors

IMAGE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
LATENT_SUFFIXES = (".safetensors", ".npy", ".pt")


def pairs(source: Path, output: Path, suffixes: tuple[str, ...], format: str) -> Iterator[tuple[Path, Path]]:
    """Each input with its output, under a progress bar if the input is a folder."""
    if not source.is_dir():
        if source.suffix.lower() not in suffixes:
            raise ValueError(f"{source}: expected one of {', '.join(suffixes)}, got {source.suffix or 'no suffix'!r}")
        yield source, output
        return
    paths = sorted(path for path in source.iterdir() if path.suffix.lower() in suffixes)
    if not paths:
        raise ValueError(f"{source}: expected files ending in {', '.join(suffixes)}, found none")
    stems = [path.stem for path in paths]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ValueError(f"{source}: several files would become {twice[0]}.{format}: rename one")
    for path in tqdm(paths, desc="files"):
        yield path, output / f"{path.stem}.{format}"


def check_output(source: Path, output: Path) -> None:
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if source.is_dir():
        if output.is_file():
            raise ValueError(f"{output} is a file: a folder of inputs needs a folder of outputs")
    elif output.suffix and output.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"{output}: expected an image ending in {', '.join(IMAGE_SUFFIXES)}")


def load_latents(path: Path) -> torch.Tensor:
    """(C, h, w) or (B, C, h, w) from .safetensors, .npy or .pt; nothing in the file is executed."""
    if path.suffix == ".npy":
        try:
            found = torch.from_numpy(np.load(path, allow_pickle=False))
        except (ValueError, OSError, EOFError, TypeError) as error:
            raise ValueError(f"{path}: not a readable array of numbers ({str(error).splitlines()[0]})") from None
    else:
        found = read_tensors(path)
        if isinstance(found, dict):
            found = found.get("latents", next(iter(found.values())) if len(found) == 1 else sorted(found))
    if not isinstance(found, torch.Tensor):
        raise ValueError(f'{path}: expected one tensor, or one called "latents", got {str(found)[:200]}')
    if found.ndim not in (3, 4):
        raise ValueError(f"{path}: expected latents (C, h, w) or (B, C, h, w), got {tuple(found.shape)}")
    return found.float()


def load_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: too large to be opened safely: {error}") from None
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_image(image: torch.Tensor) -> Image.Image:
    """The first of (B, 3, H, W) in [-1, 1]."""
    return Image.fromarray(((image[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def side_by_side(*images: Image.Image) -> Image.Image:
    picture = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    left = 0
    for image in images:
        picture.paste(image, (left, 0))
        left += image.width
    return picture


def save_image(image: Image.Image, path: Path) -> None:
    path = path if path.suffix else path.with_suffix(".png")
    write_whole(path, lambda file: image.save(file, quality=95))  # PNG, which loses nothing, takes no notice


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Whole or not at all: written under another name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Naming:
    """Puts the file's name before an error about its content."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError):
            raise ValueError(f"{self.path}: {error}") from None
