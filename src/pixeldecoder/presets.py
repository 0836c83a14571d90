"""A released checkpoint's name in; its configuration, latent space and licence out ."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixeldecoder.hub import hub_id, or_from_hub

NANO = Path(__file__).parent / "weights" / "nano"
"""The bundled decoder."""
HUB_REPOSITORY = "nvidia/PiD"
TEXT_ENCODER = "Efficient-Large-Model/gemma-2-2b-it"
"""The ungated copy of google/gemma-2-2b-it, whose last hidden state the released networks read."""
RELEASED_LICENSE = "NVIDIA non-commercial licence (research and evaluation only)"
RELEASED_NEGATIVE_PROMPT = (
    "low quality, worst quality, over-saturated, three legs, six fingers, cartoon, anime, cgi, low res, blurry, "
    "deformed, distortion, duplicated limbs, plastic skin, jpeg artifacts, watermark"
)
"""What the released teachers and the prior are guided away from, and their students were distilled with."""


@dataclass(frozen=True)
class Preset:
    """One released checkpoint."""

    name: str
    latent_space: str | None
    """Whose latents: "flux", "sd3", "sdxl", "flux2", "qwenimage", "dinov2", "siglip"; `None` for text to image."""
    config: dict[str, Any]
    """Keyword arguments of `PixelDecoderTransformer2DModel`."""
    distilled: bool
    """A 4-step student; otherwise a teacher or the prior, sampled with DPM-Solver++ and guidance."""
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str = ""
    """What guidance leads away from."""

    @property
    def trained_size(self) -> int:
        """Side in pixels of the largest square image it was trained on."""
        return 3840 if "2kto4k" in self.name else 2048

    @property
    def filename(self) -> str:
        """Path in the Hub repository."""
        return f"checkpoints/{self.name}/model_ema_bf16.pth"


V1_5 = dict(
    adapter_dim=1024,
    adapter_padding_mode="replicate",
    per_channel_gate=False,
    inject_pixels=True,
    aux_rgb=True,
    rope_reference_size=2048,
)
_FLUX2 = dict(latent_channels=128, latent_downscale_factor=16)
_DINOV2 = dict(latent_channels=768, latent_downscale_factor=16)
_SIGLIP = dict(latent_channels=1152, latent_downscale_factor=16, scale=8)


def _presets() -> dict[str, Preset]:
    students: dict[str, tuple[str, dict[str, Any]]] = {  # v1 has the model's defaults
        "PiD_res2k_sr4x_official_flux_distill_4step": ("flux", {}),
        "PiD_res2k_sr4x_official_sd3_distill_4step": ("sd3", {}),
        "PiD_res2k_sr4x_official_flux2_distill_4step": ("flux2", _FLUX2),
        "PiD_res2k_sr4x_official_dinov2_distill_4step": ("dinov2", _DINOV2),
        "PiD_res2k_sr8x_official_siglip_distill_4step": ("siglip", _SIGLIP),
        "PiD_res2kto4k_sr4x_official_sd3_distill_4step": ("sd3", {}),
        "PiD_res2kto4k_sr4x_official_sdxl_distill_4step": ("sdxl", dict(latent_channels=4)),
        "PiD_v1pt5_res2kto4k_sr4x_official_flux_distill_4step": ("flux", V1_5),
        "PiD_v1pt5_res2kto4k_sr4x_official_flux2_distill_4step": ("flux2", V1_5 | _FLUX2 | dict(unpack_latents=True)),
        "PiD_v1pt5_res2kto4k_sr4x_official_qwenimage_distill_4step": ("qwenimage", V1_5),
    }
    presets = [Preset(name, space, config, True, 4, 1.0) for name, (space, config) in students.items()]
    for space in ("flux", "flux2", "qwenimage"):
        _, config = students[f"PiD_v1pt5_res2kto4k_sr4x_official_{space}_distill_4step"]
        name = f"PiD_v1pt5_res2kto4k_sr4x_official_{space}_undistilled"
        presets.append(Preset(name, space, config, False, 25, 5.0, RELEASED_NEGATIVE_PROMPT))
    # v1.5 trains the adapter alone on top of this network, so the two share the rotary reference.
    prior = dict(latent_channels=None, rope_reference_size=2048)
    presets.append(Preset("PixelDiT_finetune_2kto4k", None, prior, False, 50, 2.75, RELEASED_NEGATIVE_PROMPT))
    return {preset.name: preset for preset in presets}


PRESETS = _presets()
"""Every released checkpoint by name."""


def sampled_like(path: str | Path, is_prior: bool) -> Preset | None:
    """A release that an unreleased network is sampled like: the prior; a teacher or a student, where its file's name or
    its folder's says so ("undistilled", "teacher", "distilled", "4step", "student"); `None` where nothing tells."""
    if is_prior:
        return PRESETS["PixelDiT_finetune_2kto4k"]
    for name in (Path(path).stem, Path(path).parent.name):
        if re.search("undistilled|teacher", name, re.IGNORECASE):
            return PRESETS["PiD_v1pt5_res2kto4k_sr4x_official_flux_undistilled"]
        if re.search("distill|4step|student", name, re.IGNORECASE):
            return PRESETS["PiD_v1pt5_res2kto4k_sr4x_official_flux_distill_4step"]
    return None


def find_preset(path: str | Path, name: str | None = None) -> Preset | None:
    """The preset called `name`, or the one that a file is named after, by its own name or its folder's.

    Raises:
        ValueError: no preset is called `name`.
    """
    if name is not None:
        if name not in PRESETS:
            raise ValueError(f'no released checkpoint "{name}": expected one of {", ".join(PRESETS)}')
        return PRESETS[name]
    path = Path(path)
    return next((PRESETS[known] for known in (path.stem, path.name, path.parent.name) if known in PRESETS), None)


def told_config(name: str) -> dict[str, Any] | None:
    """A network's configuration as far as it can be told before it is loaded; `None` for what must be fetched or opened
    first. What is missing is the model's default."""
    if name in PRESETS:
        return PRESETS[name].config
    from pixeldecoder.files import read_json  # noqa: PLC0415 (with numpy, which a command line is read without)

    folder = NANO if name == "nano" else Path(os.path.expanduser(name))
    try:
        return read_json(folder / "transformer" / "config.json")
    except ValueError:
        return None


def check_decoder_name(name: str) -> None:
    """Raises ValueError if there can be no decoder of that name."""
    if name != "nano" and name not in PRESETS and not Path(os.path.expanduser(name)).exists() and hub_id(name) is None:
        raise ValueError(
            f'no decoder "{name}": no such folder or file{or_from_hub(name)}: expected "nano", a folder, a checkpoint '
            f"file, a Hub id (owner/name) or one of the released names {', '.join(PRESETS)}"
        )
