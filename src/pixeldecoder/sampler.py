"""A network with what it is told, noise and a scheduler in; the image after each step out."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchLCMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from pixeldecoder.flow import guided, lcm_step, student_times, time_shift
from pixeldecoder.models.adapter import LatentFeatures
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.tiling import Tiles, tiled_velocity


@dataclass(frozen=True)
class Velocity:
    """The velocity of a noisy image, or of a tile of it, by a network to which all else is told already."""

    transformer: PixelDecoderTransformer2DModel
    sigma: torch.Tensor
    """(B,) in [0, 1]."""
    features: LatentFeatures | None
    """Of the latents, for the whole image."""
    prompt_embeds: torch.Tensor | None
    """(B, T, Dt)."""
    negative_prompt_embeds: Callable[[], torch.Tensor | None]
    """Asked for at the first guided step."""
    guidance_scale: Callable[[], float | None]
    """w (eq. 5) of a step, which a callback may change; `None`: without guidance."""
    tiles: Tiles
    chunk_size: int
    rotary: torch.Tensor
    """Of a tile's size."""
    attention_kwargs: dict[str, Any] | None
    before_tile: Callable[[], object]
    """May raise, to stop."""
    after_tile: Callable[[], object]

    def __call__(self, image: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Image (B, 3, H, W) at time t in [0, 1] -> v (B, 3, H, W), float32."""
        guidance_scale = self.guidance_scale()
        if self.tiles.count == 1:
            return self._tile(image, self.features, t, guidance_scale)
        config = self.transformer.config
        return tiled_velocity(
            lambda tile, features: self._tile(tile, features, t, guidance_scale),
            image, self.features, self.tiles, config.patch_size, config.patch_size // config.scale,
        )  # fmt: skip

    def _tile(
        self, image: torch.Tensor, features: LatentFeatures | None, t: torch.Tensor, guidance_scale: float | None
    ) -> torch.Tensor:
        self.before_tile()
        v = self._predict(image, features, t, self.prompt_embeds)
        if guidance_scale is not None:  # without text alone: the latents are present in both
            v = guided(self._predict(image, features, t, self.negative_prompt_embeds()), v, guidance_scale)
        self.after_tile()
        return v

    def _predict(
        self, image: torch.Tensor, features: LatentFeatures | None, t: torch.Tensor, embeds: torch.Tensor | None
    ) -> torch.Tensor:
        return self.transformer(
            image, 1000 * t, embeds, sigma=self.sigma, latent_features=features, chunk_size=self.chunk_size,
            image_rotary_emb=self.rotary, attention_kwargs=self.attention_kwargs, return_dict=False,
        )[0].float()  # fmt: skip


def sample(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    image: torch.Tensor,
    scheduler: SchedulerMixin,
    generator: torch.Generator | list[torch.Generator] | None,
    wants_x0: bool = False,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Steps from noise (B, 3, H, W), float32, to an image; the next step goes on from what is written into one's image.

    Args:
        velocity: of an image at a time in [0, 1].
        scheduler: from `set_times`.
        generator: of a student's noise between steps.
        wants_x0: estimate the finished image at each step, which takes memory for one more.

    Yields:
        The step from 0, the scheduler's timestep, the image after it, and the estimate (eq. 2) or `None`.
    """
    step_student = isinstance(scheduler, FlowMatchLCMScheduler)
    for step, timestep in enumerate(scheduler.timesteps):
        t = scheduler.sigmas[step]  # not `timestep`, which DPM-Solver++ rounds to an integer
        v = velocity(image, t)
        x0 = torch.addcmul(image, v, t.to(image), value=-1) if wants_x0 else None
        if step_student:
            image = lcm_step(v, image, t, scheduler.sigmas[step + 1], generator)
        else:
            image = scheduler.step(v, timestep, image, return_dict=False)[0]
        del v
        yield step, timestep, image, x0
        del x0


def teacher_scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ 2M on the flow schedule; `set_times` sets its shift by the image size."""
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


def check_steps(scheduler: SchedulerMixin, steps: int) -> None:
    """Raises ValueError if a decoder with this scheduler cannot be sampled in so many steps."""
    teacher = isinstance(scheduler, DPMSolverMultistepScheduler)
    if not isinstance(steps, Integral) or (teacher and steps < 1):
        raise ValueError(f"expected a number of steps, at least 1, got {steps!r}")
    if not teacher:
        student_times(int(steps))


def set_times(
    scheduler: SchedulerMixin,
    steps: int | None,
    sigmas: Sequence[float] | None,
    height: int,
    width: int,
    device: torch.device,
) -> SchedulerMixin:
    """A copy of a scheduler, set to the teacher's times for an image of that size (eq. 4) or the student's (eq. 20).

    Args:
        steps: their number; `None` if there are `sigmas`, a student's times in (0, 1], falling.

    Raises:
        ValueError: a number of steps, or times, that this decoder cannot be sampled in.
    """
    if sigmas is not None:
        sigmas = [float(sigma) for sigma in sigmas]
        steps = len(sigmas) if steps is None else steps
    else:
        check_steps(scheduler, steps)  # type: ignore[arg-type]
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        if sigmas is not None:
            raise ValueError(f"DPM-Solver++ chooses its own times: expected a number of steps, got sigmas {sigmas}")
        shift = time_shift(height, width)
        scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config, flow_shift=shift)
        scheduler.set_timesteps(steps, device=device)
    else:
        scheduler = copy.deepcopy(scheduler)
        times = sigmas if sigmas is not None else student_times(int(steps))  # type: ignore[arg-type]
        falling = all(t > after for t, after in pairwise([*times, 0.0]))
        if not times or len(times) != steps or not falling or times[0] > 1:
            raise ValueError(f"expected {steps} falling sigmas in (0, 1], got {times}")
        scheduler.set_timesteps(sigmas=times, device=device)
    scheduler.set_begin_index(0)
    return scheduler
