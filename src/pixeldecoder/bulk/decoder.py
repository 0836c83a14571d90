"""A row in, what became of it out: the engine of the server, fed row by row."""

import errno
import socket
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pixeldecoder.bulk.output import RESULT
from pixeldecoder.bulk.rows import read_row
from pixeldecoder.bulk.settings import Settings, row_seed
from pixeldecoder.errors import explain
from pixeldecoder.latents import find_latent_space, normalise_file
from pixeldecoder.plan import Plan
from pixeldecoder.serve.engine import Engine
from pixeldecoder.serve.jobs import Job, Request
from pixeldecoder.serve.results import how_made, picture_bytes

AHEAD = 2
"""Rows that are read while one is decoded."""
TRIED = 8
"""Rows that all are judged by."""


class Decoder:
    """An actor: loads the decoder once, and turns tables of rows into tables of results, a row at a time."""

    def __init__(self, settings: Settings):
        self.settings = settings
        if settings.latent_space is not None:
            find_latent_space(None, settings.latent_space)
        self.pipeline = settings.load()
        # One at a time: in a batch an image would differ in its last bits with its neighbours, which chance decides.
        self.engine = Engine({settings.decoder: self.pipeline}, settings.limits(), max_batch=1)
        self.node = socket.gethostname()

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        waiting: deque[tuple[dict[str, Any], Request | None, Job | Exception]] = deque()
        self.since = time.perf_counter()
        for row in rows.to_pylist():
            waiting.append((row, *self._submit(row)))
            if len(waiting) > AHEAD:
                yield self._finish(*waiting.popleft())
        while waiting:
            yield self._finish(*waiting.popleft())

    def request(self, row: dict[str, Any]) -> Request:
        """Raises ValueError or OSError if the row cannot be used."""
        settings = self.settings
        if row["error"] is not None:
            raise ValueError(row["error"])
        data, latents = read_row(row)
        sigma = row["sigma"] if settings.sigma is None else settings.sigma
        request = Request(
            decoder=settings.decoder, image=data, sigma=sigma or 0.0, seed=row_seed(settings.seed, row["id"]),
            steps=settings.steps, prompt=row["prompt"] or settings.prompt,
        )  # fmt: skip
        if latents is None:
            return request
        if len(latents.tensor) != 1:
            raise ValueError(f"holds {len(latents.tensor)} latents: expected those of one image")
        if sigma is None and latents.sigma is not None:
            sigma = latents.sigma.item()
        decoded = self.pipeline.config.latent_space
        tensor = normalise_file(latents, decoded, settings.latent_space, settings.decoder)
        return Request(**vars(request) | {"latents": tensor, "size": latents.size, "sigma": sigma or 0.0})

    def _submit(self, row: dict[str, Any]) -> tuple[Request | None, Job | Exception]:
        try:
            request = self.request(row)
            return request, self.engine.submit(request)
        except Exception as error:  # whatever a row holds, it is that row's
            return None, error

    def _finish(self, row: dict[str, Any], request: Request | None, job: Job | Exception) -> pa.Table:
        settings = self.settings
        said: dict[str, Any] = dict.fromkeys(RESULT.names)
        said |= {"id": row["id"], "url": row["url"], "seed": row_seed(settings.seed, row["id"])}
        try:
            if request is None or isinstance(job, Exception):
                assert isinstance(job, Exception)
                raise job
            result = job.result()
            image = result.picture()
            made = None
            if settings.metadata:
                made = how_made(self.engine, request, result, "bulk", id=row["id"], url=row["url"])
            said |= {"status": "done", "width": image.width, "height": image.height}
            said["image"] = picture_bytes(image, settings.output.format, made)
        except Exception as error:  # whatever a row holds, it is that row's
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # as the next row would meet it
                raise
            if "CUDA error" in str(error):  # after which a device does nothing more
                raise OSError(f"the device has failed at {row['id']}: {error}") from None
            said |= {"status": "skipped" if row["suffix"] == "" else "failed"}
            said["reason"] = explain(error, "") or f"{type(error).__name__}: {error}"
        now = time.perf_counter()
        said |= {"seconds": now - self.since, "time": time.time(), "node": self.node}
        said["device"] = self.pipeline._execution_device.type
        self.since = now
        return pa.Table.from_pylist([said], RESULT)


@dataclass
class Estimate:
    """What rows would take, judged by a few."""

    tried: int
    seconds: float
    """Of a device for one row."""
    largest: Plan
    device: str
    failures: list[str]


def estimate(rows: pa.Table, settings: Settings) -> Estimate:
    """Plans for a few rows, evenly spread, and the seconds that this machine's device would take for one.

    Raises:
        ValueError: none of them can be used.
    """
    decoder = Decoder(settings)
    seconds, plans, failures = [], [], []
    count = min(TRIED, len(rows))
    tried = rows.take([len(rows) * index // count for index in range(count)]).to_pylist()
    for row in tried:
        try:
            layout, time_ = decoder.engine.estimate(decoder.request(row))
        except (ValueError, OSError) as error:
            failures.append(f"{row['id']}: {error}")
            continue
        plans.append(layout)
        seconds.append(time_)
    if not plans:
        raise ValueError(f"none of {len(tried)} rows that were tried can be decoded: {failures[0]}")
    return Estimate(
        len(tried), sum(seconds) / len(seconds), max(plans, key=lambda layout: layout.height * layout.width),
        decoder.pipeline._execution_device.type, failures,
    )  # fmt: skip
