"""Pictures in a folder, in shards or in memory in, batches of equally large crops out, in an order that a seed decides.

The order is a pure function of the seed: a run goes on where it stopped by skipping what it has seen.
"""

import math
import random
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.utils import logging
from PIL import Image

from pixeldecoder.flow import SampleRandom
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.pictures import UNREADABLE
from pixeldecoder.plan import held_memory, memory_budget
from pixeldecoder.sources import Folder, Record, Shards, bucket
from pixeldecoder.training.config import Run

logger = logging.get_logger(__name__)


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


def load_source(config: Run) -> Folder | Shards:
    data = config.data
    if not data.source:
        raise ValueError("data.source: expected a folder of images or WebDataset shards")
    if (folder := Path(data.source)).is_dir():
        return Folder(folder, data.captions, config.output)
    if ".tar" not in data.source:
        what = "expected a folder, or .tar shards" if folder.exists() else "no such folder"
        raise ValueError(f"data.source {data.source}: {what}")
    if data.in_memory:
        raise ValueError("data.in_memory: expected a folder, got shards")
    return Shards(data.source)


def load_batches(
    config: Run,
    model: PixelDecoderTransformer2DModel,
    source: Folder | Shards,
    accelerator: Accelerator,
    position: int,
) -> Iterator[Batch]:
    data = config.data
    sizes = load_sizes(config, model)
    source.require(sizes, side_multiple(model.config))
    share = dict(
        seed=config.seed,
        device=accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start=position,
    )
    if data.in_memory:
        assert isinstance(source, Folder)
        total = sum(3 * math.prod(record.size) for record in source.items)
        free = memory_budget(accelerator.device) - held_memory(accelerator.device)
        if total > free:
            raise ValueError(
                f"data.in_memory: {len(source)} pictures take {total / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: "
                "give --data.no-in-memory, and they are read and shrunk as they are needed"
            )
        return batches_in_memory(source, data.resolution, config.micro_batch_size, **share)  # type: ignore[arg-type]
    return batches(source, sizes, config.micro_batch_size, **share, workers=data.workers)  # type: ignore[arg-type]


def load_sizes(config: Run, model: PixelDecoderTransformer2DModel) -> list[tuple[int, int]]:
    """Widths and heights of the crops."""
    data = config.data
    widest = 1.0 if data.in_memory else data.max_aspect_ratio
    return bucket_sizes(data.resolution, side_multiple(model.config), widest)


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
    image = record.open()
    factor = max(size[0] / image.width, size[1] / image.height)
    width, height = max(size[0], round(image.width * factor)), max(size[1], round(image.height * factor))
    left, top = rng.randint(0, width - size[0]), rng.randint(0, height - size[1])
    x, y = image.width / width, image.height / height
    # Cut out of the whole picture before it is shrunk: a thin one is never made large.
    box = (left * x, top * y, (left + size[0]) * x, (top + size[1]) * y)
    image = image.resize(size, Image.Resampling.BICUBIC, box=box)
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
            images.append(torch.from_numpy(np.array(record.open())).permute(2, 0, 1).to(device))
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
