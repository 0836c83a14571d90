"""Pictures in, normalised latents (B, C, h, w) out, and back, by the autoencoder of each latent space."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from pixeldecoder.files import read_json
from pixeldecoder.hub import download, hub_id, is_code, or_from_hub
from pixeldecoder.latents import SPACES, flux2_statistics, normalise_flux2
from pixeldecoder.models.encoder import TinyLatentEncoder
from pixeldecoder.presets import NANO

ImageEncoder = Callable[[torch.Tensor], torch.Tensor]
"""Image (B, 3, H, W) in [-1, 1] -> normalised latents (B, C, H/f, W/f)."""


def load_image_encoder(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ImageEncoder:
    """A frozen encoder.

    Args:
        name: "nano" (the bundled encoder), a latent space by name (its usual autoencoder), a folder or Hub id of one of
            diffusers' autoencoders (of a whole pipeline too), or "module:function", a callable of your own that maps
            images to normalised latents.

    Raises:
        ValueError: no such encoder, or an autoencoder whose normalisation is not known.
    """
    if is_code(name):
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f'encoder "{name}": expected "module:function" that can be imported: {error}') from None
    if name == "nano":
        model = TinyLatentEncoder.from_pretrained(NANO / "encoder", dtype=dtype)
    else:
        model = load_autoencoder(name, dtype)
    model = model.to(device).eval().requires_grad_(False)

    def encoder(image: torch.Tensor) -> torch.Tensor:
        return encode(model, image.to(device, dtype)).float()

    encoder.autoencoder = model  # type: ignore[attr-defined]  # whose memory is planned
    return encoder


def load_autoencoder(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """From a folder, a Hub id or the name of a latent space: one of diffusers' autoencoders (a pipeline's too), nano's
    encoder, or SigLIP 2."""
    import diffusers

    name = SPACES[name].encoder if name in SPACES else name
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        if hub_id(name) is None:
            raise ValueError(
                f'no encoder "{name}": no such folder{or_from_hub(name)}: expected "nano", a latent space '
                f'({", ".join(SPACES)}), a folder, a Hub id (owner/name) or "module:function"'
            )
        # A pipeline's root may hold its whole model in one file: take that only where there is no vae folder.
        folder = download(name, ["vae/*"])
        if not (folder / "vae").is_dir():
            folder = download(name, ["config.json", "*.safetensors"])
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    try:
        config = read_json(folder / "config.json")
        siglip = str(config.get("model_type")).startswith("siglip")
        class_name = "SiglipVisionModel" if siglip else str(config["_class_name"])
    except (OSError, KeyError, ValueError):
        raise ValueError(
            f"{folder}: expected a diffusers autoencoder, with its class in config.json, or a SigLIP model"
        ) from None
    if class_name == "TinyLatentEncoder":
        return TinyLatentEncoder.from_pretrained(folder, dtype=dtype)
    if class_name == "SiglipVisionModel":
        from transformers import SiglipVisionModel

        return SiglipVisionModel.from_pretrained(folder, dtype=dtype)
    if class_name not in _ENCODE:
        known = ", ".join([*_ENCODE, "TinyLatentEncoder"])
        raise ValueError(f'{folder}: {class_name}: expected one of {known}, or a callable of yours ("module:function")')
    kind = getattr(diffusers, class_name)
    _check_size(kind, config, folder)
    return kind.from_pretrained(folder, dtype=dtype)


def _check_size(kind: Any, config: dict[str, Any], folder: Path) -> None:
    """Refuse settings of far more than the files hold, which would take minutes and gigabytes to find out.

    Raises:
        ValueError: naming the first such setting, or the sizes of both.
    """
    for name, value in config.items():
        values = value if isinstance(value, list) else [value]
        most = 512 if "layers" in name or "num_" in name else 2**20
        if len(values) > 512 or any(type(number) is int and number > most for number in values):
            raise ValueError(f"{folder}/config.json: {name} is {value!r:.100}: expected at most {most}")
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in kind.from_config(config).parameters())
    held = sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    if weights > held:
        raise ValueError(f"{folder}: config.json is of a network of {weights} weights, but its files have {held} bytes")


@torch.no_grad()
def encode(autoencoder: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Image (B, 3, H, W) in [-1, 1] -> normalised latents, by the mean of the autoencoder's posterior."""
    known = _ENCODE.get(type(autoencoder).__name__)
    return autoencoder(image) if known is None else known(autoencoder, image)


@torch.no_grad()
def decode(autoencoder: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents -> the autoencoder's own image (B, 3, H, W), clamped to [-1, 1]: the way back of `encode`.

    Raises:
        ValueError: an encoder alone.
    """
    known = _DECODE.get(type(autoencoder).__name__)
    if known is None:
        raise ValueError(f"{type(autoencoder).__name__} has no decoder: expected one of {', '.join(_DECODE)}")
    return known(autoencoder, latents).clamp(-1, 1)


def _encode_kl(vae, image):
    return (vae.encode(image).latent_dist.mode() - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def _decode_kl(vae, z):
    return vae.decode(z / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample


def _encode_flux2(vae, image):
    return normalise_flux2(vae, vae.encode(image).latent_dist.mode())


def _decode_flux2(vae, z):
    mean, std = flux2_statistics(vae, z)
    return vae.decode(F.pixel_shuffle(z * std + mean, 2)).sample


def _encode_qwen_image(vae, image):
    z = vae.encode(image[:, :, None]).latent_dist.mode()[:, :, 0]
    mean, std = _statistics_qwen_image(vae, z)
    return (z - mean) / std


def _decode_qwen_image(vae, z):
    mean, std = _statistics_qwen_image(vae, z)
    return vae.decode((z * std + mean)[:, :, None]).sample[:, :, 0]


def _statistics_qwen_image(vae, z):
    return (torch.tensor(x).to(z)[:, None, None] for x in (vae.config.latents_mean, vae.config.latents_std))


def _encode_tiny(vae, image):
    return vae.encode(image).latents  # made to equal normalised ones


def _encode_rae(vae, image):
    # Its images are in [0, 1]; it resizes and normalises by itself.
    return vae.encode(image / 2 + 0.5).latent


def _encode_siglip(model, image):
    # 224 px of a 256 px image: 14 px to a token, 16 px to a latent cell. It is normalised with mean and std .5, and
    # not clamped, as it was not where the decoder's latents were made.
    height, width = (side * 14 // 16 for side in image.shape[-2:])
    small = F.interpolate(image, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    hidden = model(small, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-1]
    tokens = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)  # hidden: before the model's own last norm
    return tokens.transpose(1, 2).unflatten(2, (height // 14, width // 14))


_ENCODE: dict[str, Callable] = {
    "AutoencoderKL": _encode_kl,
    "AutoencoderKLFlux2": _encode_flux2,
    "AutoencoderKLQwenImage": _encode_qwen_image,
    "AutoencoderTiny": _encode_tiny,
    "AutoencoderRAE": _encode_rae,
    "SiglipVisionModel": _encode_siglip,
}


_DECODE: dict[str, Callable] = {
    "AutoencoderKL": _decode_kl,
    "AutoencoderKLFlux2": _decode_flux2,
    "AutoencoderKLQwenImage": _decode_qwen_image,
    "AutoencoderTiny": lambda vae, z: vae.decode(z).sample,
    "AutoencoderRAE": lambda vae, z: vae.decode(z).sample * 2 - 1,
}
