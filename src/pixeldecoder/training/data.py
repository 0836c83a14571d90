"""Pictures in a folder, in shards or in memory in, batches of equally large crops out, in an order that a seed decides.

The order is a pure function of the seed: a run goes on where it stopped by skipping what it has seen.
"""

import csv
import io
import json
import math
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
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
class Batch:
    """One process's share of a step."""

    image: torch.Tensor
    """(B, 3, H, W) float32 in [-1, 1]."""
    captions: list[str]
    names: list[str]
    samples: list[int]
    """Each sample's number in the whole run, which its random numbers depend on."""
    position: int
    """Where the next batch is: the `start` of a run that goes on after this one."""


Purpose = Literal["evaluation", "crop", "training", "validation"]


class SampleRandom:
    """Random numbers that depend on the seed, a sample's number and what they are for alone.

    So neither the batch size, nor the number of processes, nor an interruption changes what a sample sees.

    Args:
        purpose: generators of one sample for two purposes are independent; for one they give the same numbers.
    """

    def __init__(self, seed: int, samples: list[int], purpose: Purpose, device: torch.device | str = "cpu"):
        self.device = device
        # Large odd multipliers keep neighbouring seeds, samples and purposes apart.
        start = seed * 0x9E3779B97F4A7C15 + get_args(Purpose).index(purpose) * 0x165667B19E3779F9
        self.generators = [
            torch.Generator(device).manual_seed((start + n * 0xC2B2AE3D27D4EB4F) % 2**63) for n in samples
        ]

    def normal(self, *shape: int) -> torch.Tensor:
        """(B, *shape), standard normal."""
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in self.generators])

    def uniform(self, *shape: int) -> torch.Tensor:
        """(B, *shape), uniform in [0, 1)."""
        return torch.stack([torch.rand(shape, generator=g, device=self.device) for g in self.generators])


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


def side_multiple(network: Any) -> int:
    """What the sides of pictures are multiples of, by the configuration of a network: patches and latent cells."""
    cell = network.scale * network.latent_downscale_factor if network.latent_channels else 1
    return math.lcm(network.patch_size, cell)


def bucket_sizes(resolution: int, multiple: int, max_aspect_ratio: float) -> list[tuple[int, int]]:
    """Widths and heights of about resolution^2 pixels, sides multiples of `multiple`, the square among them.

    Raises:
        ValueError: the resolution is no multiple.
    """
    if resolution % multiple or resolution <= 0:
        raise ValueError(
            f"data.resolution {resolution}: expected a multiple of {multiple}, which patches and latent cells divide: "
            f"for example {max(1, round(resolution / multiple)) * multiple}"
        )
    sizes = {(resolution, resolution)}
    for width in range(multiple, int(resolution * math.sqrt(max_aspect_ratio)) + 1, multiple):
        height = max(1, round(resolution**2 / width / multiple)) * multiple
        if max(width / height, height / width) <= max_aspect_ratio:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def bucket(size: tuple[int, int], sizes: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Of the crops that a picture of this width and height covers, the one next in shape: nothing is enlarged."""
    shape = math.log(size[0] / size[1])
    covered = (crop for crop in sizes if crop[0] <= size[0] and crop[1] <= size[1])
    return min(covered, key=lambda crop: abs(math.log(crop[0] / crop[1]) - shape), default=None)


def batches(
    source: Folder | Shards,
    sizes: list[tuple[int, int]],
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    workers: int = 4,
) -> Iterator[Batch]:
    """Endless batches of one process; pictures are shrunk to cover the bucket next to their shape, then cropped.

    A picture that cannot be decoded is replaced by another one of the same step; too small ones are left out.

    Args:
        sizes: widths and heights of the buckets.
        batch_size: of one process.
        start: `position` of the last batch of the run that goes on.

    Raises:
        ValueError: nothing could be decoded, or all is too small.
    """
    source.require(sizes)
    total = batch_size * world_size
    steps = islice(enumerate(_plan(source.records(seed), sizes, total)), start, None)

    def load(step: int, size: tuple[int, int], records: list[Record]) -> Batch | None:
        crops: dict[int, torch.Tensor] = {}
        chosen = []
        for slot in range(rank * batch_size, (rank + 1) * batch_size):
            for index in ((slot + offset) % total for offset in range(total)):
                try:
                    if index not in crops:
                        crops[index] = crop(records[index], size, random.Random(f"{seed}/crop/{step * total + index}"))
                    chosen.append(index)
                    break
                except UNREADABLE as error:
                    source.skipped.add(records[index].name, error)
            else:
                return None  # nothing of this step is readable, which every process finds alike
        return Batch(
            image=torch.stack([crops[index] for index in chosen]),
            captions=[records[index].caption for index in chosen],
            names=[records[index].name for index in chosen],
            samples=[step * total + slot for slot in range(rank * batch_size, (rank + 1) * batch_size)],
            position=step + 1,
        )

    unreadable = 0
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque(pool.submit(load, step, *planned) for step, planned in islice(steps, workers))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(pool.submit(load, step, *planned) for step, planned in islice(steps, 1))
            unreadable = 0 if batch is not None else unreadable + total
            if batch is not None:
                batch.image = batch.image.to(device).float() / 127.5 - 1
                yield batch
            elif unreadable > len(source) + total:
                raise ValueError(f"no picture can be decoded, among them {', '.join(list(source.skipped.reasons)[:5])}")


def _plan(
    records: Iterator[Record], sizes: list[tuple[int, int]], total: int
) -> Iterator[tuple[tuple[int, int], list[Record]]]:
    """The bucket and the pictures of each step; a bucket's turn comes when it is full."""
    waiting: dict[tuple[int, int], list[Record]] = defaultdict(list)
    for record in records:
        size = bucket(record.size, sizes)
        assert size is not None  # which the source has made sure of
        waiting[size].append(record)
        if len(waiting[size]) == total:
            yield size, waiting.pop(size)


def crop(record: Record, size: tuple[int, int], rng: random.Random) -> torch.Tensor:
    """(3, H, W) uint8, of a picture that covers the size, shrunk as far as it still does."""
    with record.open() as opened:
        image = opened.convert("RGB")
    factor = max(size[0] / image.width, size[1] / image.height)
    if factor != 1:
        covering = (max(size[0], round(image.width * factor)), max(size[1], round(image.height * factor)))
        image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = rng.randint(0, image.width - size[0]), rng.randint(0, image.height - size[1])
    image = image.crop((left, top, left + size[0], top + size[1]))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def batches_in_memory(
    source: Folder,
    size: int,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
) -> Iterator[Batch]:
    """Endless batches of square crops, at full resolution, of a small set that is decoded once and kept on the device.

    Pictures are drawn by area, so that every region counts alike; those smaller than the crop are skipped.

    Raises:
        ValueError: nothing could be decoded, or all is smaller than `size`.
    """
    source.require([(size, size)])
    images, items = [], []
    for record in source.items:
        try:
            with record.open() as opened:
                images.append(torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1).to(device))
            items.append(record)
        except UNREADABLE as error:
            source.skipped.add(record.name, error)
    if not images:
        raise ValueError(
            f"no usable picture of at least {size} px, among them {', '.join(list(source.skipped.reasons)[:3])}"
        )
    area = torch.tensor([image[0].numel() for image in images], dtype=torch.float64).cumsum(0)
    for step in count(start):
        samples = [(step * world_size + rank) * batch_size + slot for slot in range(batch_size)]
        draws = SampleRandom(seed, samples, "crop").uniform(3).double()
        chosen = torch.searchsorted(area, draws[:, 0] * area[-1], right=True).clamp_max(len(images) - 1).tolist()
        crops = []
        for index, (_, y, x) in zip(chosen, draws.tolist(), strict=True):
            height, width = images[index].shape[1:]
            top, left = int(y * (height - size + 1)), int(x * (width - size + 1))
            crops.append(images[index][:, top : top + size, left : left + size])
        yield Batch(
            image=torch.stack(crops).float() / 127.5 - 1,
            captions=[items[index].caption for index in chosen],
            names=[items[index].name for index in chosen],
            samples=samples,
            position=step + 1,
        )
