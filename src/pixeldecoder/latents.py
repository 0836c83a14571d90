"""A pipeline's latents in, normalised ones (B, C, h, w) out: every latent space, and how it is noised."""

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pixeldecoder.files import Latents
from pixeldecoder.flow import Frame


@dataclass(frozen=True)
class LatentSpace:
    """One latent space; its normalisation is read from the autoencoder's configuration."""

    name: str
    channels: int
    """C of normalised, unpacked latents (B, C, h, w)."""
    downscale_factor: int
    """Pixels of the autoencoder's image for each latent cell."""
    frame: Frame
    """How partly denoised latents are made: "flow": (1 - sigma) z + sigma noise; "variance-preserving"."""
    preset: str
    """The released decoder."""
    stop: float
    """Share of the latent model's steps after which the paper stops."""
    encoder: str
    """Hub id of an autoencoder or vision encoder that makes these latents."""


def _v15(space: str) -> str:
    return f"PiD_v1pt5_res2kto4k_sr4x_official_{space}_distill_4step"


SPACES = {
    space.name: space
    for space in (
        LatentSpace("flux", 16, 8, "flow", _v15("flux"), 24 / 28, "Tongyi-MAI/Z-Image-Turbo"),
        LatentSpace("flux2", 128, 16, "flow", _v15("flux2"), 46 / 50, "black-forest-labs/FLUX.2-klein-4B"),
        LatentSpace("qwenimage", 16, 8, "flow", _v15("qwenimage"), 44 / 50, "Qwen/Qwen-Image"),
        LatentSpace(
            "sd3", 16, 8, "flow", "PiD_res2kto4k_sr4x_official_sd3_distill_4step", 24 / 28,
            "stabilityai/stable-diffusion-3.5-medium",
        ),
        LatentSpace(
            "sdxl", 4, 8, "variance-preserving", "PiD_res2kto4k_sr4x_official_sdxl_distill_4step", 26 / 30,
            "stabilityai/stable-diffusion-xl-base-1.0",
        ),
        LatentSpace(
            "dinov2", 768, 16, "flow", "PiD_res2k_sr4x_official_dinov2_distill_4step", 1.0,
            "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08",
        ),
        LatentSpace(
            "siglip", 1152, 16, "flow", "PiD_res2k_sr8x_official_siglip_distill_4step", 1.0,
            "google/siglip2-so400m-patch14-224",
        ),
    )
}  # fmt: skip
"""Every latent space that a released decoder knows."""

_SCALING = {(0.3611, 0.1159): "flux", (1.5305, 0.0609): "sd3", (0.13025, 0.0): "sdxl"}
"""`AutoencoderKL`'s (scaling_factor, shift_factor)."""


def find_latent_space(autoencoder: torch.nn.Module | None, name: str | None = None) -> LatentSpace:
    """The latent space of a diffusers autoencoder, told by its class and configuration, or the one called `name`.

    Raises:
        ValueError: no known decoder fits.
    """
    if name is not None:
        if name not in SPACES:
            raise ValueError(f'no latent space "{name}": expected one of {", ".join(SPACES)}')
        return SPACES[name]
    kind = type(autoencoder).__name__
    config = getattr(autoencoder, "config", {})
    found = None
    if kind == "AutoencoderKL":
        found = _SCALING.get((round(config.scaling_factor, 5), round(config.shift_factor or 0.0, 5)))
    elif kind == "AutoencoderKLFlux2":
        found = "flux2"
    elif kind in ("AutoencoderKLQwenImage", "AutoencoderKLWan"):  # Wan 2.1's numbers; 2.2 has others
        known = _qwen_image_statistics()
        found = "qwenimage" if all(list(config[key]) == values for key, values in known.items()) else None
    elif kind == "AutoencoderRAE" and (config.encoder_type, config.encoder_hidden_size) == ("dinov2", 768):
        found = "dinov2"
    if found is None:
        numbers = ("latent_channels", "z_dim", "scaling_factor", "shift_factor", "latents_mean", "encoder_type")
        seen = ", ".join(f"{key} {config[key]}" for key in numbers if config.get(key) is not None)
        raise ValueError(
            f"no known decoder fits the latents of {kind} ({seen}): expected the autoencoder of one of "
            f'{", ".join(SPACES)}. If it makes the same latents as one of them, name it: latent_space="..."'
        )
    return SPACES[found]


def _qwen_image_statistics() -> dict[str, list[float]]:
    """Its mean and standard deviation by channel: the autoencoder's defaults."""
    from diffusers import AutoencoderKLQwenImage

    known = inspect.signature(AutoencoderKLQwenImage.__init__).parameters
    return {key: list(known[key].default) for key in ("latents_mean", "latents_std")}


def unpack(
    latents: torch.Tensor,
    space: LatentSpace,
    height: int | None = None,
    width: int | None = None,
    autoencoder: torch.nn.Module | None = None,
) -> torch.Tensor:
    """Latents as a pipeline denoises them, or returns them for `output_type="latent"`, as (B, C, h, w).

    Args:
        latents: (B, C, h, w); tokens (B, n, 4 C), of 2 x 2 cells each with channels (c, dy, dx); FLUX.2's tokens
            (B, n, 128); one frame of a video autoencoder, (B, C, 1, h, w) or (B, 1, h, w, C), or the last of several
            pictures (B, N, C, 1, h, w); or what FLUX.2-klein returns at the end: raw (B, 32, 2 h, 2 w), which are
            packed and normalised again.
        height, width: of the pipeline's image in pixels, needed for tokens.
        autoencoder: FLUX.2's, needed for raw latents.

    Raises:
        ValueError: another shape, several frames, or a size that does not fit the tokens.
    """
    shape = tuple(latents.shape)
    if latents.ndim == 6:  # JoyImage's: pictures that it was given, then the one in the making
        latents = latents[:, -1]
    if latents.ndim == 5:
        if shape[1] != space.channels and shape[4] == space.channels:
            latents = latents.permute(0, 4, 1, 2, 3)
        if latents.shape[1] == space.channels and latents.shape[2] > 1:
            raise ValueError(f"latents {shape} are {latents.shape[2]} frames of a video: expected those of one image")
        latents = latents[:, :, 0]
    elif latents.ndim == 3:
        if height is None or width is None:
            raise ValueError(f"latents {shape} are packed: give the height and width of the pipeline's image")
        latents = unpack_tokens(latents, space.channels, space.downscale_factor, height, width)
    elif latents.ndim == 4 and space.name == "flux2" and 4 * shape[1] == space.channels:
        if autoencoder is None:
            raise ValueError(f"latents {shape} are FLUX.2's raw ones: give its autoencoder, to normalise them")
        latents = normalise_flux2(autoencoder, latents)
    if latents.ndim != 4 or latents.shape[1] != space.channels:
        raise ValueError(f"latents {shape} are not of the {space.name} space: expected {space.channels} channels")
    return latents


def unpack_tokens(latents: torch.Tensor, channels: int, downscale_factor: int, height: int, width: int) -> torch.Tensor:
    """Tokens of one cell (B, n, C), or of 2 x 2 cells (B, n, 4 C) with channels (c, dy, dx), as (B, C, h, w).

    Args:
        channels, downscale_factor: C, and pixels of the latent model's image to a cell.
        height, width: of that image in pixels.

    Raises:
        ValueError: another width of tokens, or as many as do not make such an image.
    """
    if latents.shape[2] not in (channels, 4 * channels):
        raise ValueError(
            f"packed latents {tuple(latents.shape)}: expected {channels} channels, or {4 * channels} of 2 x 2 cells"
        )
    side = downscale_factor * (1 if latents.shape[2] == channels else 2)
    rows, columns = height // side, width // side
    if latents.shape[1] != rows * columns:
        raise ValueError(
            f"{latents.shape[1]} latent tokens do not make an image of {height} x {width} pixels, which has "
            f"{rows} x {columns}: give the latent model's height and width, and latents of one image"
        )
    latents = latents.transpose(1, 2).unflatten(2, (rows, columns)).contiguous()
    return latents if latents.shape[1] == channels else F.pixel_shuffle(latents, 2)


def normalise(latents: torch.Tensor, space: LatentSpace | None) -> torch.Tensor:
    """Latents (B, C, h, w) as an autoencoder's `decode` takes them, normalised by its family's published numbers.

    Raises:
        ValueError: an unknown space, or one whose statistics are in its autoencoder's weights.
    """
    numbers = {name: numbers for numbers, name in _SCALING.items()}
    if space is not None and space.name in numbers:
        scaling, shift = numbers[space.name]
        return (latents - shift) * scaling
    if space is not None and space.name == "qwenimage":
        mean, std = (torch.tensor(x).to(latents)[:, None, None] for x in _qwen_image_statistics().values())
        return (latents - mean) / std
    why = "its latent space is not known" if space is None else f"{space.name}'s numbers are in its autoencoder alone"
    raise ValueError(
        f"denormalized latents cannot be normalised for this decoder, as {why}: give normalised ones, such as "
        "pixeldecoder.latents.unpack(latents, SPACES[...], autoencoder=vae) or pixeldecoder.ldm.partly_denoise returns"
    )


def normalise_file(latents: Latents, decoded: str | None, stored: str | None, decoder: str) -> torch.Tensor:
    """What a file holds, as normalised latents (B, C, h, w) for a decoder.

    Args:
        decoded: the decoder's latent space, if that is known.
        stored: the file's, by name, if it holds ComfyUI's latents; by default the decoder's.
        decoder: what errors call it.

    Raises:
        ValueError: latents of another space, or some that cannot be normalised.
    """
    space = find_latent_space(None, stored) if stored else SPACES.get(decoded or "")
    if latents.space and decoded and latents.space != decoded:
        raise ValueError(f"latents of the {latents.space} space, but {decoder} decodes those of {decoded}")
    if not latents.denormalized:
        return latents.tensor
    if space is None:
        raise ValueError(
            f"ComfyUI's latents are not normalised, and {decoder} does not tell its latent space: give --latent-space "
            f"(latent_space), one of {', '.join(SPACES)}"
        )
    if space.name == "flux2":  # whose autoencoder normalises by itself in ComfyUI
        return latents.tensor
    return normalise(latents.tensor, space)


def denormalise(latents: torch.Tensor, space: LatentSpace | None) -> torch.Tensor:
    """Normalised latents (B, C, h, w) as an autoencoder's `decode` takes them: the way back of `normalise`, with its
    errors."""
    zero, one = (normalise(torch.full_like(latents, value), space) for value in (0.0, 1.0))
    return (latents - zero) / (one - zero)


def check_factors(space: LatentSpace | None, scaling_factor: float | None, shift_factor: float | None) -> None:
    """Raises ValueError if an autoencoder with these factors has not this latent space, as far as that is known."""
    if space is None or (scaling_factor is None and shift_factor is None):
        return
    ours = next((numbers for numbers, name in _SCALING.items() if name == space.name), None)
    given = scaling_factor, shift_factor
    if ours is None or any(one is not None and abs(one - own) > 1e-4 for one, own in zip(given, ours, strict=True)):
        numbers = ", ".join(
            f"{name} {one:g}"
            for name, one in zip(("scaling_factor", "shift_factor"), given, strict=True)
            if one is not None
        )
        expected = "none" if ours is None else f"scaling_factor {ours[0]:g}, shift_factor {ours[1]:g}"
        raise ValueError(
            f"latents of an autoencoder with {numbers}, but the decoder is for the {space.name} space, whose factors "
            f"are {expected}"
        )


def normalise_flux2(vae: torch.nn.Module, raw: torch.Tensor) -> torch.Tensor:
    """FLUX.2's raw latents (B, 32, 2 h, 2 w) as (B, 128, h, w), by its autoencoder's statistics."""
    packed = F.pixel_unshuffle(raw, 2)  # channels (c, dy, dx)
    mean, std = flux2_statistics(vae, packed)
    return (packed - mean) / std


def flux2_statistics(vae: Any, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (C, 1, 1), as `z` is."""
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return vae.bn.running_mean[:, None, None].to(z), std[:, None, None].to(z)


def __getattr__(name: str) -> Any:
    """What stood here before it had a file of its own."""
    if name in ("decode", "encode", "load_autoencoder", "load_image_encoder"):
        return getattr(importlib.import_module("pixeldecoder.autoencoders"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
