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
from typing import Any

from diffusers.utils import logging
from PIL import Image

from pixeldecoder import pictures
from pixeldecoder.files import expand_braces
from pixeldecoder.pictures import SUFFIXES, UNREADABLE

logger = logging.get_logger(__name__)


@dataclass
class Record:
    """One picture, not yet read."""

    name: str
    caption: str
    size: tuple[int, int]
    """Width and height in pixels, upright."""
    open: Callable[[], Image.Image]
    """-> RGB, upright, in sRGB, what is transparent on white."""


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
        folder: searched with its subfolders, but not what is hidden.
        captions: a `.csv` with a header or a `.jsonl` with the fields `file_name` (relative to the folder) and `text`;
            pictures that it does not name are left out, and so are rows without a text.
        output: a folder whose pictures are not among them, as they are made of them.

    Raises:
        ValueError: no such folder, or no usable picture in it.
    """

    def __init__(self, folder: Path, captions: Path | None = None, output: Path | None = None):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        self.folder = folder
        self.skipped = Skipped()
        known = None if captions is None else _read_captions(captions, self.skipped)
        self.items: list[Record] = []
        for path in _files(folder, output):
            name = path.relative_to(folder).as_posix()
            if known is not None and name not in known:
                continue
            try:
                size = pictures.size(path)
                caption = known.pop(name) if known is not None else _caption_beside(path)
            except UNREADABLE as error:
                self.skipped.add(name, error)
                continue
            self.items.append(Record(name, caption, size, lambda path=path: pictures.read(path).flattened()))  # type: ignore[misc]
        if known:
            names = ", ".join(list(known)[:3]) + (", ..." if len(known) > 3 else "")
            logger.warning(f"{captions}: {len(known)} of its names are no pictures in {folder}: {names}")
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
        self.urls = expand_braces(pattern)
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
            key = sample["__key__"]
            name = f"{sample.get('__url__', '')}:{key}"
            try:
                if data is None:
                    raise ValueError(f"no image among {sorted(k for k in sample if k[0] != '_')}")
                if ".." in Path(key).parts or Path(key).is_absolute():
                    raise ValueError("its name leads out of the shard's folder")
                size = pictures.size(data)
                if self.sizes and bucket(size, self.sizes) is None:
                    raise ValueError(_too_small(size, _square(self.sizes)))
                caption = _caption_of(sample)
            except UNREADABLE as error:
                self.skipped.add(name, error)
                continue
            empty = False
            yield Record(name, caption, size, lambda data=data: pictures.read(data).flattened())  # type: ignore[misc]
        if empty:
            reason = next(iter(self.skipped.reasons.values()), "they are empty")
            raise ValueError(f"{', '.join(self.urls)[:200]}: no usable picture in these shards: {reason[:200]}")


def _square(sizes: list[tuple[int, int]]) -> int:
    return next((width for width, height in sizes if width == height), sizes[0][0])


def _too_small(size: tuple[int, int], resolution: int) -> str:
    return f"{size[0]} x {size[1]} px, which is too small for --data.resolution {resolution}"


def _files(folder: Path, output: Path | None) -> list[Path]:
    """Those named as pictures in a folder and its subfolders."""
    left_out = None if output is None else output.resolve()
    paths = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        if left_out is None or left_out not in path.resolve().parents:
            paths.append(path)
    return paths


def _caption_beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    return _text(text.read_bytes(), text.name) if text.is_file() else ""


def _caption_of(sample: dict[str, bytes]) -> str:
    if "txt" in sample:
        return _text(sample["txt"], ".txt")
    content = _json(_text(sample.get("json", b"{}"), ".json"))
    if not isinstance(content, str | dict):
        raise ValueError(f'.json: expected an object with "caption", got {content!r:.100}')
    caption = content if isinstance(content, str) else content.get("caption", "")
    if not isinstance(caption, str):
        raise ValueError(f'"caption" is {caption!r:.100}: expected a text')
    return caption.strip()


def _text(data: bytes, name: str) -> str:
    """Without the mark that Windows puts before it."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected text in UTF-8: {error}") from None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON within JSON too deep to be read") from None


def _read_captions(path: Path, skipped: Skipped) -> dict[str, str]:
    """By name; a row without a text is skipped."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        text = _text(path.read_bytes(), path.name)
        if path.suffix.lower() == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            rows = [_json(line) for line in text.splitlines() if line.strip()]
        names = [row["file_name"] for row in rows]
        texts = [row["text"] for row in rows]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f'{path}: expected "file_name" and "text" in every row: {error!r:.200}') from None
    captions = {}
    for name, text in zip(names, texts, strict=True):
        if isinstance(name, str) and isinstance(text, str):
            captions[name] = text.strip()
        else:
            skipped.add(str(name), f"its text is {text!r:.100} in {path.name}: expected words")
    return captions


def bucket(size: tuple[int, int], sizes: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Of the crops that a picture of this width and height covers, the one next in shape: nothing is enlarged."""
    shape = math.log(size[0] / size[1])
    covered = (crop for crop in sizes if crop[0] <= size[0] and crop[1] <= size[1])
    return min(covered, key=lambda crop: abs(math.log(crop[0] / crop[1]) - shape), default=None)
