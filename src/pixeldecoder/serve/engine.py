"""Requests in, futures of images out: one thread owns the device and decodes together what fits together."""

import functools
import inspect
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils import logging

from pixeldecoder.autoencoders import ImageEncoder
from pixeldecoder.execution import image_encoder
from pixeldecoder.ldm import (
    check_decoder,
    decoder_seed,
    default_side,
    parse_stop,
    partly_denoise,
    pipeline_latent_space,
)
from pixeldecoder.pictures import read, size
from pixeldecoder.pipeline import PixelDecoderPipeline
from pixeldecoder.plan import Limits, Plan, estimate_seconds, measure_rates, plan, release_memory
from pixeldecoder.sampler import check_steps
from pixeldecoder.serve.jobs import Checked, ClosedError, Job, Progress, Request, Result, TooLargeError

UNLIMITED = Limits()
logger = logging.get_logger(__name__)

PREVIEW = 512
"""Largest side in pixels of the picture in the making that watchers get."""
REST = 1.0
"""Seconds without a request after which the memory that was freed goes back to the system."""
KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}
"""That oneDNN and PyTorch keep for a CPU, from their first use on: those of the last 6 sizes and numbers of images, of
which each takes 11 MB, in place of 24."""


@dataclass
class _Batch:
    """What the device is working on."""

    jobs: list[Job] = field(default_factory=list)
    passes: int = 0
    made: int = 0
    begun: float = 0.0


class Engine:
    """Decodes requests one batch at a time, in a thread of its own.

    Args:
        pipelines: decoders by name, placed on their device.
        limits: of every decode.
        queue_size: requests that may wait.
        max_batch: images that are decoded together, if the memory allows; of one decoder, size and settings alone.
        max_pixels: of an image that is made.
        latent_model: a diffusers pipeline on the decoders' device, for requests that have a prompt alone.

    Attributes:
        batches: how many batches were done, by their number of images.
        pace: seconds that an image took lately.
    """

    def __init__(
        self,
        pipelines: Mapping[str, PixelDecoderPipeline],
        limits: Limits = UNLIMITED,
        queue_size: int = 64,
        max_batch: int = 8,
        max_pixels: int | None = None,
        latent_model: Any = None,
    ):
        self.pipelines, self.limits = dict(pipelines), limits
        self.queue_size, self.max_batch, self.max_pixels = queue_size, max_batch, max_pixels
        self.latent_model = latent_model
        self.latent_space: Any = None if latent_model is None else pipeline_latent_space(latent_model)
        self.batches: dict[int, int] = {}
        self.pace: float | None = None
        self._encoders: dict[str, ImageEncoder | None] = {}
        self._rates: dict[str, tuple[float, float]] = {}
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._batch = _Batch()
        self._hooks = []
        for name, most in KERNELS.items():
            os.environ.setdefault(name, most)
        for pipeline in {id(one): one for one in self.pipelines.values()}.values():
            pipeline.set_progress_bar_config(disable=True)
            after = functools.partial(self._after_pass, pipeline)
            self._hooks.append(pipeline.transformer.register_forward_hook(after))
        self._thread = threading.Thread(target=self._work, name="pixeldecoder-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, watcher: Callable[[Progress], object] | None = None) -> Job:
        """Have a request done.

        Args:
            watcher: see `Job.watch`.

        Raises:
            ValueError: it cannot be; `TooLargeError` among them.
            queue.Full: too many requests wait already.
            ClosedError: the engine is being closed.
        """
        job = Job(request, self._check(request))
        if watcher is not None:
            job.watch(watcher)
        with self._changed:
            if self._closed:
                raise ClosedError("the engine is being closed: no more requests are taken")
            if self.waiting >= self.queue_size:
                raise queue.Full(f"{self.queue_size} requests wait already: try again later")
            self._waiting.append(job)
            self._changed.notify()
        return job

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(not job.done() for job in list(self._waiting))

    @property
    def running(self) -> int:
        """Requests that the device is working on."""
        return sum(not job.done() for job in self._batch.jobs)

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def estimate(self, request: Request) -> tuple[Plan, float]:
        """How a request would be decoded, and about how many seconds that takes; raises as `submit` does."""
        checked = self._check(request)
        if checked.plan is None:
            raise ValueError("what encoding takes is not known beforehand")
        if request.decoder not in self._rates:
            pipeline = self.pipelines[request.decoder]
            self._rates[request.decoder] = measure_rates(pipeline.transformer, pipeline._execution_device)
        return checked.plan, estimate_seconds(checked.plan, self._rates[request.decoder], checked.passes)

    def close(self, drain: bool = True) -> None:
        """Take no more requests, and return when the last one is done, or cancelled without `drain`."""
        with self._changed:
            self._closed = True
            jobs = [] if drain else [*self._waiting, *self._batch.jobs]
            self._changed.notify()
        for job in jobs:
            job.cancel()
        self._thread.join()
        for hook in self._hooks:
            hook.remove()

    def _check(self, request: Request) -> Checked:
        if request.decoder not in self.pipelines:
            raise ValueError(f'no decoder "{request.decoder}": expected one of {", ".join(self.pipelines)}')
        pipeline = self.pipelines[request.decoder]
        config, scale = pipeline.transformer.config, pipeline.transformer.config.scale
        if request.latents is not None and request.image is not None:
            raise ValueError("expected latents or an image, and not both")
        if request.latents is None and request.image is None and self.latent_model is None:
            raise ValueError("expected latents or an image, as there is no latent model that could make them")
        if not isinstance(request.seed, int) or not 0 <= request.seed < 2**63:
            raise ValueError(f"seed {request.seed!r}: expected a whole number from 0 to 2^63 - 1")
        if not isinstance(request.sigma, int | float) or not 0 <= request.sigma <= 1:
            raise ValueError(f"sigma {request.sigma!r}: expected a noise level in [0, 1]")
        steps = pipeline.config.default_num_inference_steps if request.steps is None else request.steps
        check_steps(pipeline.scheduler, steps)
        picture = latents = None
        cell = config.latent_downscale_factor
        if request.image is not None:  # by its head, before it is unpacked
            image = request.image
            if isinstance(image, torch.Tensor):
                if not request.encode or image.ndim != 4 or len(image) != 1:
                    raise ValueError(
                        f"expected a picture, or to encode a tensor (1, 3, H, W), got {tuple(image.shape)}"
                    )
                height, width = image.shape[2:]
            else:
                width, height = size(image, "image") if isinstance(image, bytes) else image.size
            if min(height, width) < 16:
                raise ValueError(f"expected an image of at least 16 x 16 pixels, got {width} x {height}")
            larger = 1 if request.encode else scale
            self._check_size(larger * height, larger * width)
            if request.encode:
                return Checked((object(),), picture=None if isinstance(image, torch.Tensor) else read(image, "image"))
            picture = read(image, "image")  # type: ignore[arg-type]
            height, width = (-(-side // cell) for side in (picture.rgb.height, picture.rgb.width))
        elif request.latents is None:
            height, width = self._check_generation(request, pipeline)
        else:
            latents = pipeline.check_latents(request.latents, request.height, request.width, request.denormalized)
            if len(latents) != 1:
                raise ValueError(f"expected the latents of one image, got {len(latents)}")
            height, width = latents.shape[-2:]
            self._check_size(cell * scale * height, cell * scale * width)
            if request.size is not None and (request.size[0] > cell * height or request.size[1] > cell * width):
                raise ValueError(
                    f"size {request.size[1]} x {request.size[0]} px, but the latents are those of {cell * width} x "
                    f"{cell * height} px"
                )
        layout = self._plan(pipeline, height, width, 1, self.limits)
        key: tuple = (request.decoder, height, width, steps, request.guidance_scale)
        if request.latents is None and request.image is None:
            key = (*key, object())  # the latent model makes them one by one
        passes = steps * (2 if pipeline.guides(request.guidance_scale) else 1)
        return Checked(key, latents, picture, layout, passes)

    def _check_generation(self, request: Request, pipeline: PixelDecoderPipeline) -> tuple[int, int]:
        """Cells of the latents that the latent model will make."""
        check_decoder(pipeline, self.latent_space)
        parse_stop(request.stop_at)
        if not request.prompt.strip():
            raise ValueError("expected a prompt: what shall be made")
        if request.latent_steps is not None and request.latent_steps < 1:
            raise ValueError(f"latent_steps {request.latent_steps}: expected at least 1")
        sides = []
        for name in ("height", "width"):
            side = default_side(self.latent_model, name, vars(request))
            if side is None or side < 16 or side % 16:
                raise ValueError(f"{name} {side}: expected pixels, a multiple of 16")
            sides.append(side)
        self._check_size(*(pipeline.transformer.config.scale * side for side in sides))
        return sides[0] // self.latent_space.downscale_factor, sides[1] // self.latent_space.downscale_factor

    def _check_size(self, height: int, width: int) -> None:
        if self.max_pixels is not None and height * width > self.max_pixels:
            raise TooLargeError(
                f"{width} x {height} px would be made, more than the {self.max_pixels} pixels that an image may have "
                "here: give a smaller one"
            )

    def _plan(self, pipeline: PixelDecoderPipeline, height: int, width: int, batch: int, limits: Limits) -> Plan:
        """Of a batch of latents of that size."""
        config = pipeline.transformer.config
        cell = config.scale * config.latent_downscale_factor
        height, width = (-(-side * cell // config.patch_size) * config.patch_size for side in (height, width))
        return plan(
            pipeline.transformer, height, width, batch, config.max_text_length if config.text_embed_dim else 0, limits,
            trained_size=pipeline.config.trained_size, device=pipeline._execution_device,
        )  # fmt: skip

    def _work(self) -> None:
        while self._next():
            jobs = [job for job in self._batch.jobs if job.set_running_or_notify_cancel()]
            self._batch.jobs = jobs
            if jobs:
                self._answer(jobs)
            self._batch = _Batch()  # nothing of it is held while there is nothing to do
            del jobs

    def _due(self) -> bool:
        return bool(self._waiting) or self._closed

    def _next(self) -> bool:
        """Whether there is a next batch: the job that waits longest, and what can be decoded with it."""
        with self._changed:
            if not self._changed.wait_for(self._due, REST):
                for device in {pipeline._execution_device for pipeline in self.pipelines.values()}:
                    release_memory(device)
                self._changed.wait_for(self._due)
            if not self._waiting:
                return False
            first = self._waiting[0]
            alike = [job for job in self._waiting if job.checked.key == first.checked.key and not job.cancelled()]
        jobs = alike[: self._fitting(first, min(len(alike), self.max_batch))] or [first]
        with self._changed:
            for job in jobs:
                self._waiting.remove(job)
            self._batch = _Batch(jobs)
        return True

    def _fitting(self, job: Job, most: int) -> int:
        """How many such jobs the memory allows, cut in the same tiles as one, so that each is what it is alone."""
        for count in range(most, 1, -1):
            with suppress(ValueError):
                name, height, width, *_ = job.checked.key
                layout = self._plan(self.pipelines[name], height, width, count, self.limits)
                if job.checked.plan is not None and layout.tiles == job.checked.plan.tiles:
                    return count
        return 1

    def _answer(self, jobs: list[Job]) -> None:
        begun = time.monotonic()
        try:
            results = self._encode(jobs[0]) if jobs[0].request.encode else self._decode(jobs)
        except BaseException as error:  # nobody else would tell those who wait
            if len(jobs) > 1:  # of one of them, or of their number
                for job in jobs:
                    if not job.done():
                        self._batch.jobs = [job]
                        self._answer([job])
                return
            if not isinstance(error, ValueError):
                logger.warning("a request failed", exc_info=error)
            with suppress(InvalidStateError):
                jobs[0].set_exception(error.with_traceback(None))  # which would hold tensors
            return
        self.batches[len(jobs)] = self.batches.get(len(jobs), 0) + 1
        spent = (time.monotonic() - begun) / len(jobs)
        self.pace = spent if self.pace is None else 0.8 * self.pace + 0.2 * spent
        for job, result in zip(jobs, results, strict=True):
            with suppress(InvalidStateError):  # cancelled meanwhile
                job.set_result(result)

    def _encode(self, job: Job) -> list[Result]:
        job.report(state="running")
        latents = self._latents(job)[0].cpu()
        return [Result(time.monotonic() - job.begun, latents=latents)]

    def _latents(self, job: Job) -> tuple[torch.Tensor, float]:
        """(1, C, h, w), and their sigma."""
        request, checked = job.request, job.checked
        if checked.latents is not None:
            return checked.latents.float(), request.sigma
        if request.image is None:
            return self._denoise(job)
        pipeline = self.pipelines[request.decoder]
        if request.decoder not in self._encoders:
            self._encoders[request.decoder] = image_encoder("auto", pipeline)
        if checked.picture is None:
            picture: Any = request.image
        else:
            picture = checked.picture.flattened() if request.encode else checked.picture.rgb
        latents = pipeline.prepare(
            picture, request.sigma, noise_generator(request.seed), self._encoders[request.decoder],
            self.limits.max_memory,
        )  # fmt: skip
        return latents, request.sigma

    def _denoise(self, job: Job) -> tuple[torch.Tensor, float]:
        """By the latent model, as far as is asked for."""
        request, taken = job.request, inspect.signature(self.latent_model.__call__).parameters

        def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if job.done():
                pipe._interrupt = True
            return {}

        given: dict[str, Any] = {
            "height": request.height, "width": request.width, "num_inference_steps": request.latent_steps,
            "callback_on_step_end": stop if "callback_on_step_end" in taken else None,
        }  # fmt: skip
        denoised = partly_denoise(
            self.latent_model, request.stop_at, prompt=request.prompt, generator=generator(request.seed),
            **{name: value for name, value in given.items() if value is not None},
        )  # fmt: skip
        return denoised.latents, denoised.sigma

    def _decode(self, jobs: list[Job]) -> list[Result]:
        request, checked, batch = jobs[0].request, jobs[0].checked, self._batch
        pipeline = self.pipelines[request.decoder]
        steps, layout = checked.key[3], checked.plan
        assert layout is not None
        for job in jobs:
            job.report(state="running", steps=steps)
        latents, sigmas = zip(*(self._latents(job) for job in jobs), strict=True)
        batch.passes, batch.made, batch.begun = checked.passes * layout.tiles.count, 0, time.monotonic()
        limits = self.limits
        if len(jobs) > 1:  # the tiles of one, whatever the memory has become since
            side = max(layout.tiles.height, layout.tiles.width) if layout.tiled else None
            limits = Limits(side, layout.tiles.overlap if layout.tiled else None, limits.chunk_size, limits.max_memory)
        text: dict[str, Any] = {"prompt": [job.request.prompt for job in jobs]}
        if any(job.request.negative_prompt is not None for job in jobs):
            default = pipeline.config.default_negative_prompt
            given = [job.request.negative_prompt for job in jobs]
            text["negative_prompt"] = [default if one is None else one for one in given]
        images = pipeline(
            torch.cat([one.to(pipeline._execution_device) for one in latents]),
            sigma=list(sigmas),
            num_inference_steps=steps,
            guidance_scale=request.guidance_scale,
            generator=[generator(_sampler_seed(job.request)) for job in jobs],
            output_type="latent",
            callback_on_step_end=self._after_step,
            callback_on_step_end_tensor_inputs=["x0"] if any(job.watched for job in jobs) else [],
            **text,
            **vars(limits),
        ).images.cpu()
        results, now = [], time.monotonic()
        for job, image, sigma in zip(jobs, images.split(1), sigmas, strict=True):
            picture, sides = job.checked.picture, job.request.size
            if picture is not None:
                sides = picture.rgb.height, picture.rgb.width
            if sides is not None:
                height, width = (pipeline.transformer.config.scale * side for side in sides)
                image = image[..., :height, :width]
            # A copy: the rest of the batch is not held with it.
            results.append(Result(now - job.begun, pipeline.layout, image.clone(), picture, sigma=sigma))
        return results

    def _after_pass(self, pipeline: PixelDecoderPipeline, *args: Any) -> None:
        """Of the network, over an image or a tile."""
        batch = self._batch
        if threading.current_thread() is not self._thread or not batch.passes:
            return
        if all(job.done() for job in batch.jobs):
            pipeline._interrupt = True
        batch.made += 1
        spent = time.monotonic() - batch.begun
        share = min(1.0, batch.made / batch.passes)
        for job in batch.jobs:
            job.report(share=share, remaining=spent * (1 - share) / share)

    def _after_step(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        for index, job in enumerate(self._batch.jobs):
            x0 = tensors["x0"][index : index + 1] if job.watched and "x0" in tensors else None
            if x0 is not None:
                x0 = F.avg_pool2d(x0, -(-max(x0.shape[-2:]) // PREVIEW), ceil_mode=True).cpu()
            job.report(step=step + 1, x0=x0)
        return {}


def _sampler_seed(request: Request) -> int:
    """Another than that of the latent model, whose noise it would repeat."""
    return decoder_seed(request.seed) if request.latents is None and request.image is None else request.seed


def generator(seed: int) -> torch.Generator:
    """Of the sampler's noise, on the CPU, so that a seed gives the same noise on every device."""
    return torch.Generator().manual_seed(seed)


def noise_generator(seed: int) -> torch.Generator:
    """Of the noise that is added to latents: another sigma shall not change the sampler's."""
    return torch.Generator().manual_seed(seed + 1)
