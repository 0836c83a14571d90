"""Files in, tensors and pictures out, and back: read with errors that name the file, written whole or not at all.

Torch is imported where a tensor is made: what is wrong with a path can be told before.
"""

import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

if TYPE_CHECKING:
    import torch

IMAGE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
LATENT_SUFFIXES = (".safetensors", ".npy", ".pt")
LARGEST_SIDE = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500}
"""Pixels that a format can hold."""


def jobs(
    source: Path, output: Path, suffixes: tuple[str, ...], output_suffixes: tuple[str, ...], format: str
) -> list[tuple[Path, Path]]:
    """Each input with its output.

    Args:
        source: a file, or a folder of them.
        output: a file with one of `output_suffixes`; or a folder, there or not, which gets a file of each input's name.
        format: suffix of the files in an output folder, without its dot.

    Raises:
        ValueError: no such input, or an output that cannot be; told before anything is loaded.
    """
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if source.is_dir():
        paths = sorted(path for path in source.iterdir() if path.suffix.lower() in suffixes)
        if not paths:
            raise ValueError(f"{source}: expected files ending in {', '.join(suffixes)}, found none")
        stems = [path.stem for path in paths]
        if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
            raise ValueError(f"{source}: several files would become {twice[0]}.{format}: rename one")
    elif source.suffix.lower() not in suffixes:
        raise ValueError(f"{source}: expected one of {', '.join(suffixes)}, got {source.suffix or 'no suffix'!r}")
    else:
        paths = [source]
    into = is_folder(output)
    if source.is_dir() and (output.is_file() or not into):
        why = " is a file" if output.is_file() else ""
        raise ValueError(f"{output}{why}: a folder of inputs needs a folder as output, whose name has no suffix")
    if not into and output.suffix.lower() not in output_suffixes:
        kind = "an image" if output_suffixes == IMAGE_SUFFIXES else "a file"
        raise ValueError(f"{output}: expected {kind} ending in {', '.join(output_suffixes)}, or a folder")
    pairs = [(path, output / f"{path.stem}.{format}" if into else output) for path in paths]
    for path, target in pairs:
        if target.exists() and target.samefile(path):
            raise ValueError(f"{target} would overwrite its input: give another output")
    check_writable(pairs[0][1])
    return pairs


def is_folder(output: Path) -> bool:
    """Whether an output is, or is to be, a folder."""
    return output.is_dir() or not output.suffix


def check_target(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raises ValueError if a file of one of these kinds cannot be made there."""
    if path.suffix.lower() not in suffixes or path.is_dir():
        raise ValueError(f"{path}: expected a file ending in {', '.join(suffixes)}")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Raises ValueError if a file or folder cannot be made there."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if there != path and not there.is_dir():
        raise ValueError(f"{path}: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{path}: {there} may not be written to")


def progress(pairs: list[tuple[Path, Path]]) -> Iterator[tuple[Path, Path]]:
    """Under a progress bar, if there are several."""
    return iter(tqdm(pairs, desc="files", disable=len(pairs) < 2))


def load_latents(path: Path) -> "tuple[torch.Tensor, torch.Tensor | None]":
    """(C, h, w) or (B, C, h, w) from .safetensors, .npy or .pt, and the "sigma" in [0, 1] that a file says they have,
    one or B; nothing in the file is executed."""
    import torch

    sigma = None
    if path.suffix.lower() == ".npy":
        try:
            found = torch.from_numpy(np.load(path, allow_pickle=False))
        except (ValueError, OSError, EOFError, TypeError) as error:
            raise ValueError(f"{path}: not a readable array of numbers ({str(error).splitlines()[0]})") from None
    else:
        found = read_tensors(path)
        if isinstance(found, dict):
            sigma = found.get("sigma")
            found = found.get("latents", next(iter(found.values())) if len(found) == 1 else sorted(map(str, found)))
    if not isinstance(found, torch.Tensor):
        raise ValueError(f'{path}: expected one tensor, or one called "latents", got {str(found)[:200]}')
    if found.ndim not in (3, 4):
        raise ValueError(f"{path}: expected latents (C, h, w) or (B, C, h, w), got {tuple(found.shape)}")
    if found.is_complex() or found.layout != torch.strided:
        raise ValueError(f"{path}: expected plain real numbers, got {found.dtype}, {found.layout}")
    if sigma is not None:
        count = len(found) if found.ndim == 4 else 1
        if not isinstance(sigma, torch.Tensor | float | int):
            raise ValueError(f'{path}: expected "sigma" to be a number, got {str(sigma)[:200]}')
        sigma = torch.as_tensor(sigma).flatten()
        if sigma.is_complex():
            raise ValueError(f'{path}: expected "sigma" to be a real number, got {sigma.dtype}')
        sigma = sigma.float()
        if len(sigma) not in (1, count) or not ((sigma >= 0) & (sigma <= 1)).all():
            raise ValueError(
                f'{path}: expected "sigma" in [0, 1], 1 or {count} of them, got {str(sigma.tolist())[:200]}'
            )
    return found.float(), sigma


def read_tensors(path: str | Path) -> Any:
    """What a `.safetensors`, `.pth` or `.pt` file holds: tensors, or containers of them; nothing in it is executed.

    Raises:
        ValueError: no such file, truncated, of another kind, or it holds pickled code.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a .safetensors, .pth or .pt file, there is no such file")
    with path.open("rb") as file:
        head = file.read(9)
    if head[:4] == b"GGUF":
        raise ValueError(f"{path}: a GGUF file of quantised weights: expected a .safetensors, .pth or .pt file")
    # Some go under another suffix: the length of a header, and its beginning.
    is_safetensors = head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size
    try:
        if path.suffix.lower() == ".safetensors" or is_safetensors:
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: refused: it is no file of plain tensors, or it holds pickled code") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        detail = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a readable file of tensors, or truncated ({detail})") from None


def load_image(path: Path) -> Image.Image:
    """An RGB picture."""
    with _opened(path) as image:
        return image.convert("RGB")


def image_size(path: Path) -> tuple[int, int]:
    """Width and height, by the head of the file."""
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with Image.open(path) as image:
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: too large to be opened safely: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # each format has its own
        raise ValueError(f"{path}: not a readable image ({error})") from None


def to_tensor(image: Image.Image) -> "torch.Tensor":
    """(1, 3, H, W) in [-1, 1]."""
    import torch

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1


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


def check_image_size(path: Path, width: int, height: int) -> None:
    """Raises ValueError if a picture of that size cannot be saved there."""
    largest = LARGEST_SIDE.get(path.suffix.lower())
    if largest is not None and max(width, height) > largest:
        raise ValueError(f"{path}: {path.suffix} holds at most {largest} px a side, not {width} x {height}: use .png")


def parse_size(size: int | str) -> int:
    """Bytes, of their number or of "6GB", "6 gb", "6G" (10^9 each) or "6GiB" (2^30), in whatever case.

    Raises:
        ValueError: anything else, or nothing.
    """
    match = re.fullmatch(r"(?:(\d+)|(\d*\.?\d+)\s*([KMG])(I?)B?)", str(size).strip(), re.IGNORECASE | re.ASCII)
    unit = (1024 if match[4] else 1000) ** (1 + "KMG".index(match[3].upper())) if match and match[3] else 1
    if isinstance(size, bool) or match is None or (count := int(float(match[1] or match[2]) * unit)) < 1:
        raise ValueError(f'{size}: expected bytes, or a size such as "6GB"')
    return count


def save_image(image: Image.Image, path: Path) -> None:
    write_whole(path, lambda file: image.save(file, quality=95))  # PNG, which loses nothing, takes no notice


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Whole or not at all: written under another name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors would leave its files to their owner alone
        write(temporary)
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], Any]) -> None:
    """As `write_whole`, a folder, in place of the one that is there."""
    partial, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        partial.mkdir(parents=True)
        mode = partial.stat().st_mode & 0o666  # as above, without the right to enter
        write(partial)
        for file in partial.rglob("*.safetensors"):
            file.chmod(mode)
        if path.exists():
            path.rename(old)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists():
            shutil.rmtree(old) if path.exists() else old.rename(path)


class Naming:
    """Puts the name of a file or an option before an error about it."""

    def __init__(self, name: Path | str):
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError):
            raise ValueError(f"{self.name}: {error}") from None
