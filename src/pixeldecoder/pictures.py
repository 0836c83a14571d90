"""A folder of pictures or shards of them in; records with name, caption and size out, to be opened one by one."""

import csv
import io
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.utils import logging
from PIL import Image

logger = logging.get_logger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for pictures that are none, truncated or absurdly large."""


@dataclass
class Record:
    """One picture, not yet read."""

    name: str
    caption: str
    size: tuple[int, int]
    """Width and height in pixels."""
    open: Callable[[], Image.Image]


@dataclass
class Skipped:
    """Pictures that cannot be used, and why; the first are told at once, all are counted."""

    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, error: Exception | str) -> None:
        if name not in self.reasons:
            self.reasons[name] = str(error) or type(error).__name__
            if len(self.reasons) <= 3:
                logger.warning(f"skipped {name}: {self.reasons[name]}")

    def __str__(self) -> str:
        names = ", ".join(list(self.reasons)[:3]) + (", ..." if len(self.reasons) > 3 else "")
        return f"{len(self.reasons)} pictures could not be used: {names}"


class Folder:
    """A folder of images, with captions in `.txt` files beside them, or in a CSV or JSONL file.

    Args:
        folder: searched with its subfolders.
        captions: a `.csv` with a header or a `.jsonl` with the fields `file_name` (relative to the folder) and `text`;
            pictures that it does not name are left out.

    Raises:
        ValueError: no such folder, or no usable picture in it.
    """

    def __init__(self, folder: Path, captions: Path | None = None):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        self.folder = folder
        self.skipped = Skipped()
        known = None if captions is None else _read_captions(captions)
        self.items: list[Record] = []
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
            name = path.relative_to(folder).as_posix()
            if known is not None and name not in known:
                continue
            try:
                with Image.open(path) as image:
                    size = image.size
            except UNREADABLE as error:
                self.skipped.add(name, error)
                continue
            text = path.with_suffix(".txt")
            caption = known[name] if known is not None else text.read_text().strip() if text.exists() else ""
            self.items.append(Record(name, caption, size, lambda path=path: Image.open(path)))  # type: ignore[misc]
        if not self.items:
            raise ValueError(
                f"{folder}: no usable picture: expected {', '.join(SUFFIXES)}"
                + (f" named in {captions}" if captions else "")
                + (f"; {self.skipped}" if self.skipped.reasons else "")
            )

    def require(self, sizes: list[tuple[int, int]], multiple: int = 1) -> None:
        """Leave out what is smaller than every one of the crops, as if it were not there.

        Args:
            sizes: widths and heights of the crops, the square among them.
            multiple: of the sides of other crops, for what the error suggests.

        Raises:
            ValueError: nothing is left; the message names a resolution at which half of the pictures can be used.
        """
        resolution = _square(sizes)
        small = [record for record in self.items if bucket(record.size, sizes) is None]
        if len(small) == len(self.items):
            median = sorted(min(record.size) for record in small)[len(small) // 2]
            best = median // multiple * multiple
            raise ValueError(
                f"{self.folder}: too small for --data.resolution {resolution}: all {len(small)} pictures; "
                + (
                    f"give --data.resolution {best}, which suits half of them or more"
                    if best
                    else "larger ones are needed"
                )
            )
        if small:
            reasons = {record.name: _too_small(record.size, resolution) for record in small}
            self.skipped.reasons |= reasons
            name, reason = next(iter(reasons.items()))
            logger.warning(f"left out {len(small)} of {len(self.items)} pictures, such as {name}: {reason}")
            self.items = [record for record in self.items if record.name not in reasons]

    def __len__(self) -> int:
        return len(self.items)

    def records(self, seed: int) -> Iterator[Record]:
        """Endless: every epoch in an order of its own."""
        for epoch in count():
            yield from random.Random(f"{seed}/order/{epoch}").sample(self.items, len(self.items))


class Shards:
    """WebDataset shards: tar files, local or URLs, with an image and a `.txt` or `.json` ("caption") per sample.

    Every process reads all shards, and decodes only its own share of the pictures.

    Args:
        pattern: as WebDataset takes it: `data-{0000..0041}.tar`, an `https://` or `pipe:` URL.
    """

    def __init__(self, pattern: str):
        import braceexpand

        self.urls = list(braceexpand.braceexpand(pattern))
        self.skipped = Skipped()
        self.sizes: list[tuple[int, int]] = []

    def require(self, sizes: list[tuple[int, int]], multiple: int = 1) -> None:
        """As `Folder.require`, but found out as the shards are read."""
        self.sizes = sizes

    def __len__(self) -> int:
        return 1000 * len(self.urls)  # unknown; only decides when to give up on a set without a usable picture

    def records(self, seed: int) -> Iterator[Record]:
        """Endless: every epoch in an order of its own."""
        for epoch in count():
            yield from self.once(random.Random(f"{seed}/order/{epoch}"))

    def once(self, rng: random.Random | None = None) -> Iterator[Record]:
        """Every picture once, in the order of the shards, or shuffled."""
        import webdataset

        def on_error(error: Exception) -> bool:
            self.skipped.add(str(getattr(error, "args", ("",))[-1])[:200], error)
            return True

        shards = webdataset.WebDataset(
            rng.sample(self.urls, len(self.urls)) if rng else self.urls,
            shardshuffle=False,
            nodesplitter=None,
            workersplitter=None,
            handler=on_error,
            empty_check=False,
        )
        empty = True
        for sample in shards.shuffle(1000, rng=rng) if rng else shards:
            data = next((sample[s[1:]] for s in SUFFIXES if s[1:] in sample), None)
            name = f"{sample.get('__url__', '')}:{sample['__key__']}"
            try:
                if data is None:
                    raise ValueError(f"no image among {sorted(k for k in sample if k[0] != '_')}")
                size = Image.open(io.BytesIO(data)).size
                if self.sizes and bucket(size, self.sizes) is None:
                    raise ValueError(_too_small(size, _square(self.sizes)))
                caption = sample["txt"].decode() if "txt" in sample else json.loads(sample.get("json", b"{}"))
            except UNREADABLE as error:
                self.skipped.add(name, error)
                continue
            caption = caption if isinstance(caption, str) else str(caption.get("caption", ""))
            empty = False
            yield Record(name, caption.strip(), size, lambda data=data: Image.open(io.BytesIO(data)))  # type: ignore[misc]
        if empty:
            reason = next(iter(self.skipped.reasons.values()), "they are empty")
            raise ValueError(f"{', '.join(self.urls)[:200]}: no usable picture in these shards: {reason[:200]}")


def _square(sizes: list[tuple[int, int]]) -> int:
    return next((width for width, height in sizes if width == height), sizes[0][0])


def _too_small(size: tuple[int, int], resolution: int) -> str:
    return f"{size[0]} x {size[1]} px, which is too small for --data.resolution {resolution}"


def _read_captions(path: Path) -> dict[str, str]:
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file if line]
        return {row["file_name"]: row["text"] for row in rows}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path}: expected "file_name" and "text" in every row: {error!r}') from None


def bucket(size: tuple[int, int], sizes: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Of the crops that a picture of this width and height covers, the one next in shape: nothing is enlarged."""
    shape = math.log(size[0] / size[1])
    covered = (crop for crop in sizes if crop[0] <= size[0] and crop[1] <= size[1])
    return min(covered, key=lambda crop: abs(math.log(crop[0] / crop[1]) - shape), default=None)


def shrink(image: torch.Tensor, factor: int) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 3, H / factor, W / factor): bicubic, antialiased, clamped."""
    return F.interpolate(image, scale_factor=1 / factor, mode="bicubic", antialias=True).clamp(-1, 1)


def psnr(image: torch.Tensor, truth: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], over all values; at most 100."""
    return (10 * torch.log10(4 / F.mse_loss(image.float(), truth.float()).clamp(min=4e-10))).item()
