"""Bundled latents in, a picture that compares their decodes with the original out."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

from pixeldecoder.pictures import psnr, to_image, to_tensor
from pixeldecoder.pipeline import PixelDecoderPipeline
from pixeldecoder.presets import NANO

SIGMA = 0.3


def comparison(
    pipeline: PixelDecoderPipeline,
    generator: Callable[[], torch.Generator],
    noise_generator: Callable[[], torch.Generator],
    kwargs: dict[str, Any],
) -> Image.Image:
    """A row for each bundled photo: the small photo enlarged, two decodes, the original; prints PSNR and seconds.

    Args:
        generator: makes the sampler's for each decode, so that all have the same noise and differ by latents alone.
        noise_generator: makes that of the noise in the latents.
        kwargs: for the pipeline's call.
    """
    noise, rows = noise_generator(), []
    for path in sorted((NANO / "samples").glob("*.safetensors")):
        original = to_tensor(Image.open(path.with_suffix(".webp")))
        latents = load_file(path)["latents"].float()
        noisy = (1 - SIGMA) * latents + SIGMA * torch.randn(latents.shape, generator=noise)
        small = F.interpolate(original, scale_factor=1 / 4, mode="bicubic", antialias=True).clamp(-1, 1)
        enlarged = F.interpolate(small, scale_factor=4, mode="bicubic").clamp(-1, 1)
        panels = [(f"input, {small.shape[-1]} px, bicubic", enlarged, 0.0)]
        for label, z, sigma in ("nano, clean latents", latents, 0.0), (f"nano, sigma {SIGMA}", noisy, SIGMA):
            begun = time.perf_counter()
            image = pipeline(z, sigma=sigma, generator=generator(), output_type="pt", **kwargs).images
            panels.append((label, image.cpu().float() * 2 - 1, time.perf_counter() - begun))
        for label, image, seconds in panels:
            print(f"{path.stem:10} {label:24} PSNR {psnr(image, original):5.2f} dB {seconds:6.1f} s", flush=True)
        rows.append([*((label, image) for label, image, _ in panels), ("original", original)])
    return _grid(rows)


def _grid(rows: list[list[tuple[str, torch.Tensor]]]) -> Image.Image:
    height, width = rows[0][0][1].shape[-2:]
    sheet = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=20)
    for y, row in enumerate(rows):
        for x, (label, image) in enumerate(row):
            sheet.paste(to_image(image), (x * width, y * height))
            box = draw.textbbox((x * width + 8, y * height + 6), label, font=font)
            draw.rectangle((box[0] - 6, box[1] - 4, box[2] + 6, box[3] + 4), fill="black")
            draw.text((x * width + 8, y * height + 6), label, font=font, fill="white")
    return sheet
