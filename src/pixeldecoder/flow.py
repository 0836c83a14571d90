"""The method's equations, each once: images, noise and times in, noisy or clean images, velocities and times out.

Numbers are those of docs/method.md.
"""

import math
from typing import Literal, get_args

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

Frame = Literal["flow", "variance-preserving"]
"""How partly denoised latents are made."""
Purpose = Literal["evaluation", "crop", "training", "validation"]
STUDENT_TIMES = (0.999, 0.866, 0.634, 0.342, 0.0)
"""(eq. 20)"""
MIN_TIME = 0.05
"""Bound of the division that turns a clean image into a velocity (eq. 3)."""


def noised(image: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t (eq. 1) of images (B, 3, H, W) at times (B,)."""
    return torch.lerp(image, noise, t.to(image)[:, None, None, None])


def clean(x_t: torch.Tensor, velocity: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x0 (eq. 2) of noisy images (B, 3, H, W) at times (B,)."""
    return x_t - t[:, None, None, None] * velocity.float()


def velocity_of_clean(x_t: torch.Tensor, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """v (eq. 3) of a network that predicts the clean image (B, 3, H, W) at times (B,)."""
    return (x_t - x0) / t.clamp_min(MIN_TIME).to(x0.dtype)[:, None, None, None]


def time_shift(height: int, width: int) -> float:
    """a of an image of that many pixels (eq. 4)."""
    return 6 * math.sqrt(math.sqrt(height * width) / 2048)


def guided(unconditional: torch.Tensor, conditional: torch.Tensor, scale: float) -> torch.Tensor:
    """v of two velocities (eq. 5)."""
    return unconditional + scale * (conditional - unconditional)


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, frame: Frame = "flow") -> torch.Tensor:
    """Latents (B, C, h, w) noised to sigma (B,), as a partly finished latent model leaves them: "flow" (eq. 6), or
    SDXL's "variance-preserving" (eq. 7)."""
    sigma = sigma.to(latents)[:, None, None, None]
    keep = 1 - sigma if frame == "flow" else (1 - sigma**2).sqrt()
    return keep * latents + sigma * noise


def student_times(steps: int) -> list[float]:
    """The distilled student's times for 1 to 4 steps, without the closing 0 (eq. 20).

    Raises:
        ValueError: more or fewer steps.
    """
    if not 1 <= steps <= 4:
        raise ValueError(f"a distilled decoder takes 1 to 4 steps, got {steps}: more is not what it learned")
    if steps == 1:
        return [1.0]
    return [STUDENT_TIMES[i] for i in np.linspace(0, 4, steps + 1).round().astype(int)[:-1]]


def lcm_step(
    velocity: torch.Tensor,
    image: torch.Tensor,
    t: torch.Tensor,
    t_next: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None,
) -> torch.Tensor:
    """A student's step (eq. 21), overwriting the velocity.

    The same numbers as `FlowMatchLCMScheduler.step`, whose seven tensors as large as the image would be the peak of a
    tiled decode; here are three.
    """
    noise = randn_tensor(image.shape, generator=generator, device=image.device, dtype=torch.float32)
    return velocity.mul_(-t).add_(image).mul_(1 - t_next).add_(noise.mul_(t_next))


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


def training_times(random: SampleRandom, height: int, width: int) -> torch.Tensor:
    """t (B,) of pictures of that many pixels (eq. 23): logit-normal, shifted towards noise for large ones."""
    shift = time_shift(height, width)
    t = random.normal().sigmoid()
    return shift * t / (1 + (shift - 1) * t)
