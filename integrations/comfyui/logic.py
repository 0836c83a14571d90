"""ComfyUI's LATENT and IMAGE in, a decoder's images out; a sampler's latents with their noise: without ComfyUI."""

import math
from collections.abc import Callable
from typing import Any

import torch

from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.flow import add_noise
from pixeldecoder.latents import SPACES, LatentSpace, normalise

CAPTURED = "pixeldecoder"
"""Key in a LATENT of what `captured` says of it."""


def captured(
    x: torch.Tensor,
    signal: float,
    noise: float,
    space: LatentSpace,
    process_out: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, Any]:
    """A sampler's latents, signal z + noise n, as a LATENT that knows how noisy it is.

    Args:
        x: in the latent model's own space, (B, C, h, w) or one frame (B, C, 1, h, w).
        space: the latent model's, to whose frame they are scaled.
        process_out: the latent model's way to a LATENT, which is not normalised.

    Raises:
        ValueError: several frames, other channels, or a sampler whose latents are no such sum.
    """
    if x.ndim not in (4, 5) or (x.ndim == 5 and x.shape[2] != 1) or x.shape[1] != space.channels:
        raise ValueError(f"expected latents of one image, (B, {space.channels}, h, w), got {tuple(x.shape)}")
    total = signal + noise if space.frame == "flow" else math.hypot(signal, noise)
    if not (math.isfinite(total) and total > 0 and min(signal, noise) >= 0):
        raise ValueError(f"this model's latents are no sum of image and noise ({signal:g}, {noise:g})")
    samples = process_out(x.float() / total).cpu()
    return {"samples": samples, CAPTURED: {"sigma": noise / total, "space": space.name, "samples": samples}}


def find_space(process_in: Callable[[torch.Tensor], torch.Tensor], channels: int) -> str:
    """The latent space of a ComfyUI model, told by how it normalises a LATENT.

    Raises:
        ValueError: none that a decoder is known for.
    """
    probe = torch.linspace(-2, 2, channels * 4).reshape(1, channels, 2, 2)
    for space in SPACES.values():
        if space.channels == channels and space.name not in ("dinov2", "siglip"):
            expected = probe if space.name == "flux2" else normalise(probe, space)
            for shaped in probe, probe[:, :, None]:
                try:
                    found = process_in(shaped.clone()).reshape(probe.shape)
                except RuntimeError:  # a video model's numbers, on an image's latents
                    continue
                if torch.allclose(found, expected, atol=1e-4, rtol=1e-4):
                    return space.name
    raise ValueError(f"no decoder is known for the latents of this model, of {channels} channels")


def normalised(latent: dict[str, Any], decoder: PixelDecoderPipeline, sigma: float) -> tuple[torch.Tensor, float]:
    """What a decoder takes, (B, C, h, w), of a LATENT, which is not normalised, and its noise level.

    Args:
        latent: its noise mask says where a sampler worked, not how noisy it is, and is not needed.
        sigma: in [0, 1]; below 0: what the LATENT says, 0 if it says nothing.

    Raises:
        ValueError: latents of another family, or that were changed since their noise level was told.
    """
    samples = latent["samples"]
    if getattr(samples, "is_nested", False) or latent.get("type") not in (None, "image"):
        raise ValueError("expected the latents of images, got those of video with sound, or of another kind")
    shape, channels = tuple(samples.shape), decoder.transformer.config.latent_channels
    if samples.ndim == 5 and shape[2] == 1:
        samples = samples[:, :, 0]
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise ValueError(
            f"expected latents (B, {channels}, h, w), got {shape}: they are of another family than the decoder, which "
            f"decodes those of {decoder.config.latent_space or 'a space that it does not name'}"
        )
    told = latent.get(CAPTURED)
    if sigma < 0:
        sigma = told["sigma"] if told else 0.0
        if told and told["samples"] is not latent["samples"]:
            raise ValueError(
                f"these latents were captured with noise of sigma {sigma:.4g} and have been changed since, so that "
                "nothing tells their noise now: set sigma, to 0 if they were finished"
            )
    if told and decoder.config.latent_space not in (None, told["space"]):
        raise ValueError(
            f"these latents were captured from a model of {told['space']}, and this decoder decodes those of "
            f"{decoder.config.latent_space}: load one of {told['space']}"
        )
    if sigma > 1:
        raise ValueError(f"expected sigma in [0, 1], or -1 for what the latents say, got {sigma:g}")
    space = SPACES.get(decoder.config.latent_space or "")
    if space is None:
        raise ValueError("this decoder does not name its latent space, so that ComfyUI's latents cannot be normalised")
    # FLUX.2's autoencoder normalises by itself in ComfyUI.
    return samples.float() if space.name == "flux2" else normalise(samples.float(), space), sigma


def decode(
    decoder: PixelDecoderPipeline,
    latents: torch.Tensor,
    sigma: float,
    seed: int,
    after_step: Callable[[int, int, torch.Tensor], object],
    **call: Any,
) -> tuple[torch.Tensor, str]:
    """Latents (B, C, h, w) -> IMAGE (B, H, W, 3) in [0, 1], each as `pixeldecoder decode --seed` makes it alone, and
    how they were decoded.

    Args:
        after_step: called with the steps made, of how many, and the image so far (1, 3, H, W) in [-1, 1]; may raise.
        call: for the decoder.
    """
    images: list[torch.Tensor] = []

    def look(pipe: PixelDecoderPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        made, steps = len(images) * pipe.num_timesteps + step + 1, len(latents) * pipe.num_timesteps
        after_step(made, steps, tensors["image"])
        return {}

    for one in latents.split(1):
        generator = torch.Generator().manual_seed(seed)
        image = decoder(
            one, sigma=sigma, generator=generator, output_type="pt", callback_on_step_end=look, **call
        ).images
        images.append(image.cpu().movedim(1, -1))
    return torch.cat(images), f"{decoder.layout}"


def upscale(
    decoder: PixelDecoderPipeline,
    image: torch.Tensor,
    sigma: float,
    seed: int,
    after_step: Callable[[int, int, torch.Tensor], object],
    encoder: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **call: Any,
) -> tuple[torch.Tensor, str]:
    """IMAGE (B, H, W, 3) -> a larger one, each as `pixeldecoder upscale --seed` makes it.

    Args:
        encoder: image (1, 3, H, W) in [-1, 1] -> normalised latents; by default the decoder's own.
        after_step, call: as in `decode`.
    """
    if image.ndim != 4 or image.shape[3] != 3:
        raise ValueError(f"expected images (B, H, W, 3), got {tuple(image.shape)}")
    height, width = (side * decoder.transformer.config.scale for side in image.shape[1:3])
    space = SPACES.get(decoder.config.latent_space or "")
    larger, told = [], ""
    for done, one in enumerate(image.movedim(-1, 1).split(1)):
        latents = decoder.encode_image(one.float() * 2 - 1, encoder)
        if sigma > 0:
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed + 1)).to(latents)
            level = torch.full((1,), sigma)
            latents = add_noise(latents, noise, level, space.frame if space else "flow")

        def look(made: int, steps: int, x: torch.Tensor, done: int = done) -> None:
            after_step(done * steps + made, len(image) * steps, x)

        decoded, told = decode(decoder, latents, sigma, seed, look, **call)
        larger.append(decoded[:, :height, :width])
    return torch.cat(larger), told
