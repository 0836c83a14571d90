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
STRIP = 36
"""Pixels under a picture for its label."""


def comparison(
    pipeline: PixelDecoderPipeline,
    generator: Callable[[], torch.Generator],
    noise_generator: Callable[[], torch.Generator],
    kwargs: dict[str, Any],
) -> Image.Image:
    """A row for each bundled photo: what TAEF1's decoder made of the latents, enlarged, two decodes, the original;
    prints PSNR and seconds.

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
        small = to_tensor(Image.open(path.with_suffix(".taef1.webp")))
        enlarged = F.interpolate(small, size=original.shape[-2:], mode="bicubic").clamp(-1, 1)
        row = [(f"TAEF1's decoder, {small.shape[-1]} px, enlarged: {psnr(enlarged, original):.2f} dB", enlarged)]
        print(f"{path.stem:10} {row[0][0]}")
        for label, z, sigma in ("nano", latents, 0.0), (f"nano, sigma {SIGMA}", noisy, SIGMA):
            begun = time.perf_counter()
            image = pipeline(z, sigma=sigma, generator=generator(), output_type="pt", **kwargs).images
            image, seconds = image.cpu().float() * 2 - 1, time.perf_counter() - begun
            row.append((f"{label}: {psnr(image, original):.2f} dB", image))
            # Not in the picture, which is the same whenever it is made.
            print(f"{path.stem:10} {row[-1][0]}, {seconds:.1f} s", flush=True)
        rows.append([*row, ("original", original)])
    return _sheet(rows)


def _sheet(rows: list[list[tuple[str, torch.Tensor]]]) -> Image.Image:
    """Pictures at full size, each with its label under it."""
    sizes = [row[0][1].shape[-2:] for row in rows]
    widest = max(width * len(row) for (_, width), row in zip(sizes, rows, strict=True))
    sheet = Image.new("RGB", (widest, sum(height + STRIP for height, _ in sizes)))
    draw, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(size=20), 0
    for (height, width), row in zip(sizes, rows, strict=True):
        for i, (label, image) in enumerate(row):
            sheet.paste(to_image(image), (i * width, y))
            draw.text((i * width + 8, y + height + 6), label, font=font, fill="white")
        y += height + STRIP
    return sheet
