"""Files in, tensors and pictures out, and back: read with errors that name the file, written whole or not at all.

Torch is imported where a tensor is made: what is wrong with a path can be told before.
"""

import errno
import io
import json
import logging
import math
import os
import pickle
import re
import shutil
import socket
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, PngImagePlugin
from PIL.ExifTags import IFD, Base

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
LATENT_SUFFIXES = (".safetensors", ".npy", ".pt", ".latent")
COMFYUI = "latent_tensor"
"""What ComfyUI calls its latents, which are not normalised."""
MADE = "pixeldecoder"
"""Key of the text in a PNG that says how it was made."""
LONGEST_NAME = 255
"""Bytes of a file's name on nearly every file system."""
LONGEST_EXIF = 65_000
"""Bytes of text that JPEG's one segment of EXIF holds beside the rest."""
DEEPEST_BRACES = 50
MOST_NAMES = 1_000_000
"""That one pattern may stand for."""
_ASCII = b"ASCII\0\0\0"
"""How EXIF marks the encoding of a comment."""
LARGEST_SIDE = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500}
"""Pixels that a format can hold."""


def is_folder(output: Path) -> bool:
    """Whether an output is, or is to be, a folder."""
    return os.path.isdir(output) or not output.suffix


def check_target(path: Path, suffixes: tuple[str, ...], overwrite: bool = True, inputs: Iterable[Path] = ()) -> None:
    """Raises ValueError if a file of one of these kinds cannot be made there, or may not be: see `check_new`."""
    if path.suffix.lower() not in suffixes or os.path.isdir(path):
        raise ValueError(f"{path}: expected a file ending in {', '.join(suffixes)}")
    check_writable(path)
    check_new(path, overwrite, inputs)


def check_writable(path: Path) -> None:
    """Raises ValueError if a file or folder cannot be made there."""
    if (length := len(os.fsencode(path.name))) > LONGEST_NAME:
        raise ValueError(f"{path}: a name of {length} bytes, expected at most {LONGEST_NAME}")
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if there != path and not there.is_dir():
        raise ValueError(f"{path}: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{path}: {there} may not be written to")


def check_new(path: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Raises ValueError if something would be lost: an input always, another file unless it may be overwritten."""
    if path.exists():
        if any(other.exists() and path.samefile(other) for other in inputs):
            raise ValueError(f"{path} would overwrite its input: give another output")
        if not overwrite:
            raise ValueError(f"{path} exists: give another output, or --overwrite to replace it")


@dataclass(frozen=True)
class Latents:
    """What a file of latents holds."""

    tensor: "torch.Tensor"
    """(B, C, h, w), float32."""
    sigma: "torch.Tensor | None" = None
    """"sigma" in [0, 1], one or B: the noise they have."""
    size: tuple[int, int] | None = None
    """"size", height and width in pixels of the picture that was encoded, before it was padded to whole cells."""
    denormalized: bool = False
    """ComfyUI's: as an autoencoder's `decode` takes them."""
    space: str | None = None
    """The latent space that the file names."""


def inspect_latents(path: Path) -> tuple[tuple[int, ...], tuple[int, int] | None]:
    """Shape (B, C, h, w) and "size" of the latents in a file, by its head; PyTorch is wanted for a .pt alone.

    Raises:
        ValueError: as `load_latents`, as far as the head tells.
    """
    from safetensors import safe_open

    suffix = path.suffix.lower()
    if suffix == ".npy":
        return _batch_shape(path, _read_array(path).shape), None
    if suffix == ".pt":
        latents = load_latents(path)
        return tuple(latents.tensor.shape), latents.size
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    path.open("rb").close()  # safetensors says of what may not be read that it is not there
    try:
        with in_utf8(path) as named, safe_open(named, "numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no dictionary
            size = file.get_tensor("size") if "size" in shapes else None
    except Exception as error:
        raise ValueError(f"{path}: not a readable file of tensors, or truncated ({_first_line(error)})") from None
    name = _latents_name(path, shapes)
    return _batch_shape(path, shapes[name], name), _size(path, size)


def load_latents(path: Path) -> Latents:
    """From .safetensors, .npy, .pt, or .latent, ComfyUI's; nothing in the file is executed.

    Raises:
        ValueError: not readable, or no latents (C, h, w) or (B, C, h, w) of plain real numbers in it.
    """
    import torch
    from safetensors import safe_open

    held: dict[str, Any] = {}
    name = ""
    space = None
    if path.suffix.lower() == ".npy":
        tensor = torch.from_numpy(_read_array(path).astype(np.float32))
    else:
        read = read_tensors(path)
        held = read if isinstance(read, dict) else {"latents": read}
        name = _latents_name(path, held)
        tensor = held[name]
        if path.suffix.lower() == ".safetensors":
            with in_utf8(path) as named, safe_open(named, "numpy") as file:
                space = (file.metadata() or {}).get("latent_space")
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f'{path}: expected one tensor, or one called "latents", got {str(tensor)[:200]}')
    if (
        tensor.is_nested or tensor.is_complex() or tensor.layout != torch.strided or tensor.is_quantized
        or tensor.is_meta
    ):  # fmt: skip
        kind = "nested" if tensor.is_nested else tensor.layout
        raise ValueError(f"{path}: expected plain real numbers, got {tensor.dtype}, {kind}")
    shape = _batch_shape(path, tensor.shape, name)
    tensor = tensor.float().reshape(shape).clone()  # no longer the file, which may change
    if name == COMFYUI and "latent_format_version_0" not in held:
        tensor /= 0.18215  # as all were stored at first, whatever the model
    sigma = held.get("sigma")
    return Latents(
        tensor, None if sigma is None else _sigma(path, sigma, len(tensor)), _size(path, held.get("size")),
        name == COMFYUI, space,
    )  # fmt: skip


def parse_latents(data: bytes, suffix: str) -> Latents:
    """As `load_latents`, of what is in a file with this suffix; errors call it "latents".

    Raises:
        ValueError: as `load_latents`.
    """
    with tempfile.TemporaryDirectory() as folder:  # its readers map files
        path = Path(folder, f"latents{suffix}")
        path.write_bytes(data)
        try:
            return load_latents(path)
        except ValueError as error:
            raise ValueError(str(error).replace(f"{folder}/", "")) from None


def _latents_name(path: Path, held: Mapping[Any, Any]) -> str:
    """Of the tensor that is meant: "latents", ComfyUI's "latent_tensor", or the only one."""
    for name in ("latents", COMFYUI, *(held if len(held) == 1 else ())):
        if name in held:
            return name
    names = str(sorted(map(str, held)))[:200]
    raise ValueError(f'{path}: expected one tensor, or one called "latents", got {names}')


def _batch_shape(path: Path, shape: Sequence[int], name: str = "") -> tuple[int, ...]:
    """As (B, C, h, w); ComfyUI's of video autoencoders hold one frame, (B, C, 1, h, w)."""
    shape = tuple(shape)
    if name == COMFYUI and len(shape) == 5 and shape[2] == 1:
        shape = (*shape[:2], *shape[3:])
    if len(shape) not in (3, 4) or 0 in shape:
        raise ValueError(f"{path}: expected latents (C, h, w) or (B, C, h, w), got {shape}")
    return shape if len(shape) == 4 else (1, *shape)


def _read_array(path: Path) -> np.ndarray:
    """Real numbers, mapped, so that a head that promises more than the file holds takes no memory."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # np.load would take what is none for a pickle
    except Exception as error:  # whatever Python's parser says of a broken head
        raise ValueError(f"{path}: not a readable array of numbers ({_first_line(error)})") from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: not a readable array of numbers, expected plain real ones, got {array.dtype}")
    return array


def _sigma(path: Path, sigma: Any, count: int) -> "torch.Tensor":
    import torch

    if not isinstance(sigma, torch.Tensor | float | int):
        raise ValueError(f'{path}: expected "sigma" to be a number, got {str(sigma)[:200]}')
    sigma = torch.as_tensor(sigma).flatten()
    if sigma.is_complex():
        raise ValueError(f'{path}: expected "sigma" to be a real number, got {sigma.dtype}')
    sigma = sigma.float().clone()
    if len(sigma) not in (1, count) or not ((sigma >= 0) & (sigma <= 1)).all():
        raise ValueError(f'{path}: expected "sigma" in [0, 1], 1 or {count} of them, got {str(sigma.tolist())[:200]}')
    return sigma


def _size(path: Path, size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        height, width = (int(side) for side in size)
    except (TypeError, ValueError, RuntimeError):
        height = width = 0
    if min(height, width) < 1:
        raise ValueError(f'{path}: expected "size" to be a height and a width in pixels, got {str(size)[:200]}')
    return height, width


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def read_tensors(path: str | Path) -> Any:
    """What a `.safetensors`, `.pth` or `.pt` file holds: tensors, or containers of them; nothing in it is executed.

    Raises:
        ValueError: no such file, truncated, of another kind, or it holds pickled code.
    """
    import torch
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
        with in_utf8(path) as named:
            if path.suffix.lower() in (".safetensors", ".latent") or is_safetensors:
                return load_file(named)
            return torch.load(named, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: refused: it is no file of plain tensors, or it holds pickled code") from None
    except Exception as error:  # a broken pickle raises whatever it likes
        raise ValueError(f"{path}: not a readable file of tensors, or truncated ({_first_line(error)})") from None


@contextmanager
def in_utf8(path: str | Path) -> Iterator[Path]:
    """A file under a name that safetensors and PyTorch take."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder, "link").with_suffix(Path(path).suffix)
            link.symlink_to(os.path.abspath(path))
            yield link
    else:
        yield Path(path)


def expand_braces(pattern: str) -> list[str]:
    """The names that "{000..041}" and "{a,b}" stand for.

    Raises:
        ValueError: more than `MOST_NAMES`, or braces that do not close.
    """
    from braceexpand import braceexpand

    # No fewer than the names, which are counted before any is made.
    ends = re.findall(r"\{(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])", pattern)
    places = [[ord(end) if end.isalpha() else float(end) for end in pair] for pair in ends]
    count, alternatives = math.prod(abs(last - first) + 1 for first, last in places), [1]
    for sign in re.findall(r"\\.|[{,}]", pattern):
        if sign == "{":
            alternatives.append(1)
            if len(alternatives) > DEEPEST_BRACES:
                raise ValueError(f"{pattern:.200}: more than {DEEPEST_BRACES} braces within one another")
        elif sign == ",":
            alternatives[-1] += len(alternatives) > 1
        elif sign == "}" and len(alternatives) > 1:
            count *= alternatives.pop()
    if not count <= MOST_NAMES:  # or no number
        raise ValueError(f"{pattern:.200}: stands for more than {MOST_NAMES} files")
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise ValueError(f"{pattern:.200}: {error!s:.100}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Settings, by name.

    Raises:
        ValueError: no such file, or something else in it.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content


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
    match = re.fullmatch(
        r"(?:(\d{1,20})|(\d{0,15}\.?\d{1,15})\s*([KMG])(I?)B?)", str(size).strip(), re.IGNORECASE | re.ASCII
    )
    unit = (1024 if match[4] else 1000) ** (1 + "KMG".index(match[3].upper())) if match and match[3] else 1
    if isinstance(size, bool) or match is None or (count := int(float(match[1] or match[2]) * unit)) < 1:
        raise ValueError(f'{size}: expected bytes, or a size such as "6GB"')
    return count


def save_image(image: Image.Image, path: Path, made: Mapping[str, Any] | None = None) -> None:
    """Whole or not at all.

    Args:
        made: how, as JSON: in PNG a text called "pixeldecoder", in WebP and JPEG EXIF's UserComment.
    """
    data = image_bytes(image, path.suffix, made, path)
    write_whole(path, lambda file: file.write_bytes(data))


def image_bytes(
    image: Image.Image, suffix: str, made: Mapping[str, Any] | None = None, name: object = "image"
) -> bytes:
    """What `save_image` writes into a file with this suffix; warnings call it `name`."""
    suffix = suffix.lower()
    # PNG's usual level, 6, takes two to three times as long for 2 % fewer bytes.
    options: dict[str, Any] = {"compress_level": 4} if suffix == ".png" else {"quality": 95}
    if made is not None:
        text = json.dumps(made)
        if suffix == ".png":
            options["pnginfo"] = PngImagePlugin.PngInfo()
            options["pnginfo"].add_text(MADE, text)
        elif suffix == ".webp" or len(text) < LONGEST_EXIF:
            exif = Image.Exif()
            exif[Base.Software] = made["software"]
            exif[IFD.Exif] = {Base.UserComment: _ASCII + text.encode()}
            options["exif"] = exif
        else:
            logger.warning(f"{name}: how it was made takes {len(text)} bytes, too much for JPEG: use .png")
    file = io.BytesIO()
    image.save(file, {".png": "PNG", ".webp": "WEBP"}.get(suffix, "JPEG"), **options)
    return file.getvalue()


def read_made(path: Path) -> dict[str, Any]:
    """What `save_image` wrote into a picture of how it was made; its strings may be anything.

    Raises:
        ValueError: no picture, or one that does not say.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with Image.open(path, formats=("PNG", "WEBP", "JPEG")) as image:
            text = image.info.get(MADE)
            if image.format != "PNG":
                comment = image.getexif().get_ifd(IFD.Exif).get(Base.UserComment, b"")
                text = comment[len(_ASCII) :] if isinstance(comment, bytes) and comment.startswith(_ASCII) else None
    except Exception as error:  # each format has its own
        raise ValueError(f"{path}: not a readable image ({_first_line(error)})") from None
    try:
        made = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        made = None
    if not isinstance(made, dict) or not isinstance(made.get("software"), str):
        raise ValueError(f"{path} does not say how it was made: expected a picture of ours, without --no-metadata")
    return made


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Whole or not at all: written under another name, then renamed. A link is followed."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_once(path.parent)
    temporary = _temporary(path, path.suffix)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors would leave its files to their owner alone
        with _telling_errno(path):
            write(temporary)
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], Any]) -> None:
    """As `write_whole`, a folder, in place of the one that is there."""
    partial, old = (_temporary(path, f".{kind}") for kind in ("new", "old"))
    sweep_once(path.parent)
    try:
        partial.mkdir(parents=True)
        mode = partial.stat().st_mode & 0o666  # as above, without the right to enter
        with _telling_errno(path):
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
    for other in path.parent.glob(f"{old.name[:19]}*.old"):  # of runs killed between two renamings
        if not _runs(int(other.name.split(".")[3])):
            shutil.rmtree(other)


@contextmanager
def _telling_errno(path: Path) -> Iterator[None]:
    """As an OSError, what safetensors and PyTorch say in their own ways of a disk that is full or broken."""
    try:
        yield
    except Exception as error:
        if match := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from None
        if isinstance(error, RuntimeError) and re.search("PytorchStreamWriter|unexpected pos", str(error)):
            raise OSError(errno.EIO, "could not be written whole, as on a full disk", str(path)) from None
        raise


def _temporary(path: Path, suffix: str) -> Path:
    """Hidden, and short where the name is as long as names can be; with the machine and the process that write it."""
    name = zlib.crc32(os.fsencode(path.name))
    return path.with_name(f".{name:08x}.{_machine():08x}.{os.getpid()}{suffix}")


def _machine() -> int:
    return zlib.crc32(socket.gethostname().encode())


_SWEPT: set[Path] = set()


def sweep_once(folder: Path) -> None:
    """As `sweep`, but nothing in a folder where this process has done so."""
    folder = folder.absolute()
    if folder not in _SWEPT:
        _SWEPT.add(folder)
        sweep(folder)


def sweep(folder: Path, alone: bool = False) -> None:
    """Delete what processes of this machine that were killed have left half written in a folder.

    Args:
        alone: nobody else writes there: what any machine's have left, in its subfolders, too.
    """
    for path in folder.rglob(".????????.????????.*") if alone else folder.glob(f".????????.{_machine():08x}.*"):
        match = re.fullmatch(r"\.[0-9a-f]{8}\.[0-9a-f]{8}\.(\d+)\.\w+", path.name)
        if match is None or path.suffix == ".old" or (not alone and _runs(int(match[1]))):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
