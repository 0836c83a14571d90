"""Images or a pipeline's latents in, normalised latents (B, C, h, w) out: every latent space, and how it is noised."""

import importlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from pixeldecoder.flow import Frame
from pixeldecoder.hub import download, is_hub_id
from pixeldecoder.models.encoder import TinyLatentEncoder
from pixeldecoder.presets import NANO

ImageEncoder = Callable[[torch.Tensor], torch.Tensor]
"""Image (B, 3, H, W) in [-1, 1] -> normalised latents (B, C, H/f, W/f)."""


@dataclass(frozen=True)
class LatentSpace:
    """One latent space (method: Latent spaces); its normalisation is read from the autoencoder's configuration."""

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
            (B, n, 128); one frame of a video autoencoder, (B, C, 1, h, w) or (B, 1, h, w, C); or what FLUX.2-klein
            returns at the end: raw (B, 32, 2 h, 2 w), which are packed and normalised again.
        height, width: of the pipeline's image in pixels, needed for tokens.
        autoencoder: FLUX.2's, needed for raw latents.

    Raises:
        ValueError: another shape, several frames, or a size that does not fit the tokens.
    """
    shape = tuple(latents.shape)
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
        latents = _normalise_flux2(autoencoder, latents)
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
    if ":" in name and not Path(name).exists():
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
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not is_hub_id(name):
            raise ValueError(
                f'no encoder "{name}": expected "nano", a latent space ({", ".join(SPACES)}), a folder (there is no '
                'such folder), a Hub id (owner/name) or "module:function"'
            )
        # A pipeline's root may hold its whole model in one file: take that only where there is no vae folder.
        folder = download(name, ["vae/*"])
        if not (folder / "vae").is_dir():
            folder = download(name, ["config.json", "*.safetensors"])
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    try:
        config = json.loads((folder / "config.json").read_text())
        class_name = "SiglipVisionModel" if config.get("model_type", "").startswith("siglip") else config["_class_name"]
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
    return getattr(diffusers, class_name).from_pretrained(folder, dtype=dtype)


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
    return _normalise_flux2(vae, vae.encode(image).latent_dist.mode())


def _normalise_flux2(vae, raw):
    packed = F.pixel_unshuffle(raw, 2)  # channels (c, dy, dx)
    mean, std = _statistics_flux2(vae, packed)
    return (packed - mean) / std


def _decode_flux2(vae, z):
    mean, std = _statistics_flux2(vae, z)
    return vae.decode(F.pixel_shuffle(z * std + mean, 2)).sample


def _statistics_flux2(vae, z):
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return (x[:, None, None].to(z) for x in (vae.bn.running_mean, std))


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
