"""Images in, normalised latents out, by any frozen encoder; and the frames in which latents are noised."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

Frame = Literal["flow", "variance-preserving"]
ImageEncoder = Callable[[torch.Tensor], torch.Tensor]
"""Image (B, 3, H, W) in [-1, 1] -> normalised latents (B, C, H/f, W/f)."""


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, frame: Frame = "flow") -> torch.Tensor:
    """Latents (B, C, h, w) noised to sigma (B,), as a partly finished latent model leaves them (method: Latent spaces).

    "flow": (1 - sigma) z + sigma noise; "variance-preserving" (SDXL): sqrt(1 - sigma^2) z + sigma noise.
    """
    sigma = sigma.to(latents)[:, None, None, None]
    keep = 1 - sigma if frame == "flow" else (1 - sigma**2).sqrt()
    return keep * latents + sigma * noise


def load_image_encoder(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ImageEncoder:
    """A frozen encoder.

    Args:
        name: "nano" (the bundled encoder), a folder or Hub id of one of diffusers' autoencoders (of a whole pipeline
            too), or "module:function", a callable of your own that maps images to normalised latents.

    Raises:
        ValueError: no such encoder, or an autoencoder whose normalisation is not known.
    """
    if ":" in name and not Path(name).exists():
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f'encoder "{name}": expected "module:function" that can be imported: {error}') from None
    if name == "nano":
        from pixeldecoder.models.encoder import TinyLatentEncoder
        from pixeldecoder.pipeline import NANO

        model = TinyLatentEncoder.from_pretrained(NANO / "encoder", torch_dtype=dtype)
    else:
        model = _load_autoencoder(name, dtype)
    model = model.to(device).eval().requires_grad_(False)
    return lambda image: encode(model, image.to(device, dtype)).float()


def _load_autoencoder(name: str, dtype: torch.dtype) -> torch.nn.Module:
    import diffusers

    folder = Path(name)
    if not folder.is_dir():
        if name.count("/") != 1:
            raise ValueError(f'no encoder "{name}": expected "nano", a folder, a Hub id or "module:function"')
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, allow_patterns=["config.json", "*.safetensors", "vae/*"]))
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    try:
        class_name = json.loads((folder / "config.json").read_text())["_class_name"]
    except (OSError, KeyError, ValueError):
        raise ValueError(f"{folder}: expected a diffusers autoencoder, with its class in config.json") from None
    if class_name == "TinyLatentEncoder":
        from pixeldecoder.models.encoder import TinyLatentEncoder

        return TinyLatentEncoder.from_pretrained(folder, torch_dtype=dtype)
    if class_name not in _ENCODE:
        known = ", ".join([*_ENCODE, "TinyLatentEncoder"])
        raise ValueError(f'{folder}: {class_name}: expected one of {known}, or a callable of yours ("module:function")')
    return getattr(diffusers, class_name).from_pretrained(folder, torch_dtype=dtype)


@torch.no_grad()
def encode(autoencoder: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Image (B, 3, H, W) in [-1, 1] -> normalised latents, by the mean of the autoencoder's posterior."""
    known = _ENCODE.get(type(autoencoder).__name__)
    return autoencoder(image) if known is None else known(autoencoder, image)


def _encode_kl(vae, image):
    return (vae.encode(image).latent_dist.mode() - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def _encode_flux2(vae, image):
    packed = F.pixel_unshuffle(vae.encode(image).latent_dist.mode(), 2)  # channels (c, dy, dx)
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return (packed - vae.bn.running_mean[:, None, None]) / std[:, None, None]


def _encode_qwen_image(vae, image):
    z = vae.encode(image[:, :, None]).latent_dist.mode()[:, :, 0]
    mean, std = (torch.tensor(x).to(z)[:, None, None] for x in (vae.config.latents_mean, vae.config.latents_std))
    return (z - mean) / std


def _encode_tiny(vae, image):
    return vae.encode(image).latents  # made to equal normalised ones


def _encode_rae(vae, image):
    # Its images are in [0, 1]; it resizes and normalises by itself.
    return vae.encode(image / 2 + 0.5).latent


_ENCODE: dict[str, Callable] = {
    "AutoencoderKL": _encode_kl,
    "AutoencoderKLFlux2": _encode_flux2,
    "AutoencoderKLQwenImage": _encode_qwen_image,
    "AutoencoderTiny": _encode_tiny,
    "AutoencoderRAE": _encode_rae,
}
