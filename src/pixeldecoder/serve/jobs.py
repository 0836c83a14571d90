"""What is asked of an engine, how far it is, what became of it: `Request`, `Progress`, `Result`, and their `Job`."""

import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from pixeldecoder.pictures import Picture
from pixeldecoder.pipeline import postprocess
from pixeldecoder.plan import Plan


class TooLargeError(ValueError):
    """An image of more pixels than the engine makes."""


class ClosedError(RuntimeError):
    """The engine takes no more requests."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """One image: to be decoded from latents, made of a picture, or without either of the prompt by a latent model."""

    decoder: str = "nano"
    """By the name that the engine has it under."""
    latents: torch.Tensor | None = None
    """(C, h, w) or (1, C, h, w), or packed as a pipeline has them, in which case `height` and `width` are needed."""
    image: Image.Image | bytes | torch.Tensor | None = None
    """A picture in any mode, or what is in the file of one, of at least 16 x 16 pixels, in place of latents; to be
    encoded alone, (1, 3, H, W) in [-1, 1], too."""
    encode: bool = False
    """Make the picture's latents, and no image of them."""
    size: tuple[int, int] | None = None
    """Height and width of the picture that latents were made of, before it was padded to whole cells."""
    sigma: float = 0.0
    """Noise level in [0, 1] that latents have, or that is added to the latents of a picture."""
    seed: int = 0
    """Of all noise: the same seed gives the image that it gives in a decode alone."""
    steps: int | None = None
    """By default what the decoder was made for, as is the next."""
    guidance_scale: float | None = None
    prompt: str = ""
    """Ignored by a decoder without text, as is the next."""
    negative_prompt: str | None = None
    height: int | None = None
    """Of the latent model's image in pixels: of packed latents, or of what it shall make, by default its own."""
    width: int | None = None
    stop_at: str | None = "auto"
    """Where the latent model stops, as in `pixeldecoder.ldm.partly_denoise`; and its steps, by default its own."""
    latent_steps: int | None = None
    denormalized: bool = False
    """The latents are what an autoencoder's `decode` takes."""


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    state: str = "queued"
    """Then "running", and at last "done", "failed" or "cancelled"."""
    step: int = 0
    """Steps made, of `steps`."""
    steps: int = 0
    share: float = 0.0
    """Of the work, in [0, 1], counted in tiles."""
    remaining: float | None = None
    """Seconds, once there is something to judge by."""
    x0: torch.Tensor | None = None
    """What the last step expects the finished image to be, (1, 3, H, W) in about [-1, 1], of at most 512 px a side."""


@dataclass(frozen=True)
class Result:
    """What became of a request."""

    seconds: float
    """From the request to here."""
    plan: Plan | None = None
    """How the image was cut; its memory is that of the batch."""
    image: torch.Tensor | None = None
    """(1, 3, H, W) float32 on the CPU, about [-1, 1] but not clamped."""
    alpha: Picture | None = None
    """The picture whose alpha the image gets."""
    latents: torch.Tensor | None = None
    """(1, C, h, w), normalised, if these were wanted."""
    sigma: float = 0.0
    """That the latents had."""

    def picture(self) -> Image.Image:
        """The image as `PixelDecoderPipeline` returns it; RGBA where the picture had alpha."""
        assert self.image is not None
        (image,) = postprocess(self.image, "pil")
        assert isinstance(image, Image.Image)
        return image if self.alpha is None else self.alpha.with_alpha(image)


@dataclass(frozen=True, eq=False)
class Checked:
    """What is told of a request before it runs."""

    key: tuple
    """Jobs of one key may be decoded in one batch."""
    latents: torch.Tensor | None = None
    picture: Picture | None = None
    plan: Plan | None = None
    passes: int = 0
    """Of the network over the image."""


class Job(Future[Result]):
    """The future of a `Result`. A job can be cancelled while it runs, too: the engine leaves it after the tile at hand,
    unless others are decoded in the same batch."""

    def __init__(self, request: Request, checked: Checked):
        super().__init__()
        self.request, self.checked, self.progress, self.begun = request, checked, Progress(), time.monotonic()
        self._watchers: list[Callable[[Progress], object]] = []
        self.add_done_callback(lambda job: self._end())

    def watch(self, callback: Callable[[Progress], object]) -> None:
        """Have `callback` called with each `Progress` from now on, in the engine's thread; with "x0" where it was there
        before the job ran."""
        self._watchers.append(callback)
        callback(self.progress)

    @property
    def watched(self) -> bool:
        return bool(self._watchers)

    def cancel(self) -> bool:
        """True unless it was done already."""
        if super().cancel():
            return True
        with suppress(InvalidStateError):
            self.set_exception(CancelledError())
        return self.cancelled()

    def cancelled(self) -> bool:
        return super().cancelled() or (self.done() and isinstance(self.exception(), CancelledError))

    def report(self, **progress: Any) -> None:
        """For the engine."""
        if not self.done() or "state" in progress:
            self.progress = Progress(**vars(self.progress) | progress)
            for watcher in self._watchers:
                watcher(self.progress)

    def _end(self) -> None:
        ended = "cancelled" if self.cancelled() else "failed" if self.exception() else "done"
        self.report(state=ended, share=1.0 if ended == "done" else self.progress.share, remaining=None)
