"""What the routes share: an engine's answers for a client that may leave, jobs that outlive their request, counts."""

import asyncio
import base64
import io
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from fastapi import HTTPException
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from pixeldecoder.errors import OUT_OF_MEMORY
from pixeldecoder.pictures import to_image
from pixeldecoder.serve.engine import Engine
from pixeldecoder.serve.jobs import ClosedError, Job, Progress, Request, Result

logger = logging.getLogger(__name__)

LEFT = 499
"""Status that is counted where the client left; nobody reads it."""
ENDED = ("done", "failed", "cancelled")
KEPT_JOBS = 256
"""Background jobs that are remembered; the oldest finished ones are forgotten first."""
KEPT_BYTES = 512 * 2**20
"""Of their results and previews."""


@dataclass(frozen=True)
class Settings:
    """What a server allows."""

    max_bytes: int = 64 * 2**20
    """Of a request's body."""
    deadline: float = 600.0
    """Seconds after which a request is given up."""
    token: str | None = None
    """That every request must have, as a bearer or as Basic's password."""


@dataclass(eq=False)
class Background:
    """A job that its client asks about."""

    id: str
    job: Job | None
    """Until it ends, as it holds what was sent and the image in floats."""
    ended: Progress = field(default_factory=Progress)
    created: float = field(default_factory=time.time)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    finish: asyncio.Task | None = None
    response: Response | None = None
    error: Exception | None = None

    @property
    def progress(self) -> Progress:
        return self.ended if self.job is None else self.job.progress

    @property
    def kept(self) -> int:
        """Bytes."""
        x0 = self.progress.x0
        return (0 if self.response is None else len(self.response.body)) + (0 if x0 is None else x0.nbytes)

    @property
    def state(self) -> str:
        """As its job's, which ends only once there is a file, or a reason why not."""
        if self.error is not None:
            return "failed"
        state = self.progress.state
        return "running" if state in ("done", "failed") and self.response is None else state

    def status(self) -> dict[str, Any]:
        progress = self.progress
        remaining = None if progress.remaining is None else round(progress.remaining, 2)
        return {
            "id": self.id, "object": "job", "created": int(self.created), "status": self.state, "step": progress.step,
            "steps": progress.steps, "share": round(progress.share, 4), "remaining": remaining,
            "error": None if self.error is None else {"message": told(self.error)},
        }  # fmt: skip


def told(error: Exception) -> str:
    """What a client may know of an error: what it can mend, and nothing of the inside of the server."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(text):
        return "out of memory: try a smaller image, or later"
    if isinstance(error, HTTPException):
        return str(error.detail)
    if isinstance(error, ValueError | ClosedError | TimeoutError):
        return text
    return "something is wrong in the server, which has written it down"


class Service:
    """An engine behind HTTP.

    Args:
        engine: whose answers are sent.
        settings: of the server.
    """

    def __init__(self, engine: Engine, settings: Settings):
        self.engine, self.settings = engine, settings
        self.jobs: dict[str, Background] = {}
        self.draining = False

    def decoder(self, name: str | None) -> str:
        """By default the first; raises a 404 for one that is not there."""
        if name is not None and name not in self.engine.pipelines:
            raise HTTPException(404, f'no decoder "{name}": expected one of {", ".join(self.engine.pipelines)}')
        return name or next(iter(self.engine.pipelines))

    async def answer(
        self, http: HttpRequest, requests: Sequence[Request], timeout: float | None = None
    ) -> list[Result]:
        """The results of requests, which are cancelled if the client leaves, or after `timeout` seconds or the server's
        deadline; raises as `Engine.submit`, TimeoutError, or what went wrong."""
        jobs: list[Job] = []
        gone: asyncio.Future[Any] = asyncio.ensure_future(_gone(http))
        everything: asyncio.Future[Any] | None = None
        try:
            for request in requests:
                jobs.append(await self.submit(request))
            everything = asyncio.gather(*(asyncio.wrap_future(job) for job in jobs))
            allowed = min(timeout or math.inf, self.settings.deadline)
            await asyncio.wait({everything, gone}, timeout=allowed, return_when=asyncio.FIRST_COMPLETED)
            if everything.done():
                if everything.cancelled():
                    raise ClosedError("the request was cancelled, as the server is being closed")
                return everything.result()
            if gone.done():
                raise HTTPException(LEFT, "the client left")
            raise TimeoutError(f"not done within {allowed:g} seconds: try again later, or make something smaller")
        finally:
            gone.cancel()
            if everything is not None:
                everything.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await everything
            for job in jobs:
                job.cancel()

    async def submit(self, request: Request, watcher: Callable[[Progress], object] | None = None) -> Job:
        """As the engine's, beside the event loop."""
        if self.draining:
            raise ClosedError("the server is being closed: no more requests are taken")
        return await run_in_threadpool(self.engine.submit, request, watcher)

    async def start(
        self, request: Request, respond: Callable[[Result], Awaitable[Response]], timeout: float | None = None
    ) -> Background:
        """Have a request done in the background; `respond` makes the response with its result, which is kept."""
        allowed = min(timeout or math.inf, self.settings.deadline)
        loop = asyncio.get_running_loop()
        held: list[Background] = []

        def changed(progress: Progress) -> None:
            if held:
                loop.call_soon_threadsafe(lambda: asyncio.ensure_future(_notify(held[0])))

        job = await self.submit(request, changed)
        background = Background(f"job-{uuid.uuid4().hex}", job)
        held.append(background)

        async def finish(job: Job) -> None:
            try:
                background.response = await respond(await asyncio.wait_for(asyncio.wrap_future(job), allowed))
            except TimeoutError:
                background.error = TimeoutError(f"not done within {allowed:g} seconds")
            except asyncio.CancelledError:
                if not job.cancelled():
                    raise
            except Exception as error:
                if not isinstance(error, ValueError | ClosedError):
                    logger.error("a job failed", exc_info=error)
                background.error = error.with_traceback(None)  # which would hold the job
            background.ended, background.job = job.progress, None
            await _notify(background)
            self._forget()

        background.finish = asyncio.create_task(finish(job))
        self.jobs[background.id] = background
        return background

    def job(self, id: str) -> Background:
        if id not in self.jobs:
            raise HTTPException(404, f"no job {id}: it was never there, or is forgotten")
        return self.jobs[id]

    async def events(self, background: Background) -> AsyncIterator[bytes]:
        """Server-sent events: "progress", with "x0" as a JPEG where there is a new one; the last is the job's end."""
        shown: torch.Tensor | None = None
        while True:
            status, progress = background.status(), background.progress
            if progress.x0 is not None and progress.x0 is not shown:
                shown = progress.x0
                status["x0"] = await run_in_threadpool(_jpeg, shown)
            ended = status["status"] in ENDED
            yield _event(status["status"] if ended else "progress", status)
            if ended:
                return
            async with background.changed:
                if background.status() == {key: status[key] for key in status if key != "x0"}:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(background.changed.wait(), 15)

    def retry_after(self) -> int:
        """Seconds after which a place in the queue is likely to be free."""
        return min(60, max(1, math.ceil(self.engine.pace or 1.0)))

    async def drain(self) -> None:
        """Take nothing new, and return when what was taken is done."""
        self.draining = True
        while self.engine.waiting or self.engine.running:
            await asyncio.sleep(0.05)
        await asyncio.gather(*(job.finish for job in self.jobs.values() if job.finish), return_exceptions=True)

    def _forget(self) -> None:
        ended = [one for one in self.jobs.values() if one.state in ENDED]
        held = sum(one.kept for one in ended)
        while ended and (len(self.jobs) > KEPT_JOBS or held > KEPT_BYTES):
            oldest = ended.pop(0)
            held -= oldest.kept
            del self.jobs[oldest.id]


async def _gone(http: HttpRequest) -> None:
    """Returns when the client has left."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _notify(background: Background) -> None:
    async with background.changed:
        background.changed.notify_all()


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _jpeg(x0: torch.Tensor) -> str:
    file = io.BytesIO()
    to_image(x0).save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()
