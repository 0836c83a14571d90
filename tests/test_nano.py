"""The bundled decoder, encoder, samples and demo."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.cli import main
from pixeldecoder.pictures import psnr, to_tensor
from pixeldecoder.presets import NANO

SAMPLES = sorted((NANO / "samples").glob("*.safetensors"))


@pytest.fixture(scope="module")
def nano():
    pipeline = PixelDecoderPipeline.from_pretrained("nano")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def decode(nano, latents, sigma=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return nano(latents, sigma=sigma, generator=generator, output_type="pt").images * 2 - 1


def original(path):
    return to_tensor(Image.open(path.with_suffix(".webp")))


def test_size(nano):
    assert sum(p.numel() for p in nano.transformer.parameters()) <= 16e6
    assert sum(p.numel() for p in nano.encoder.parameters()) <= 1.5e6
    files = list((NANO / "transformer").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 32e6
    assert max(file.stat().st_size for file in files) <= 15e6
    assert nano.transformer.config.text_embed_dim is None and nano.transformer.config.scale == 4


def test_quality_on_samples(nano):
    """Nearer than what the autoencoder's own decoder makes of the same latents, enlarged."""
    values = []
    for path in SAMPLES:
        truth, small = original(path), to_tensor(Image.open(path.with_suffix(".taef1.webp")))
        enlarged = F.interpolate(small, scale_factor=4, mode="bicubic").clamp(-1, 1)
        values.append((psnr(decode(nano, load_file(path)["latents"]), truth), psnr(enlarged, truth)))
    assert len(values) == 4 and np.subtract(*np.mean(values, axis=0)) > 0


def test_encoder_gives_the_samples_latents(nano):
    for path in SAMPLES:
        small = F.interpolate(original(path), scale_factor=0.25, mode="bicubic", antialias=True).clamp(-1, 1)
        latents, expected = nano.encode_image(small), load_file(path)["latents"]
        assert latents.shape == (1, 16, *(side // 32 for side in original(path).shape[-2:]))
        torch.testing.assert_close(latents, expected, atol=1e-3, rtol=1e-3)


def test_demo(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path), "--steps", "1", "--device", "cpu"]) == 0
    assert Image.open(tmp_path / "comparison.png").size == (4 * 1024, 3 * 1024 + 512 + 4 * 36)
    lines = [line for line in capsys.readouterr().out.splitlines() if " dB" in line]
    assert len(lines) == 12 and sum("nano" in line and line.endswith(" s") for line in lines) == 8


@torch.no_grad()
def test_chunk_size_does_not_change_the_image():
    """In float32; a chunk's numbers round as its shape has it."""
    pipeline = PixelDecoderPipeline.from_pretrained("nano")
    latents = torch.randn(1, 16, 3, 5, generator=torch.Generator().manual_seed(0))
    images = []
    for chunk_size in (10_000, 1, 7, 32, 59):  # of 60 patches
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline(latents, generator=generator, output_type="pt", chunk_size=chunk_size).images)
    assert images[0].std() > 0.1
    for image in images[1:]:
        assert (image - images[0]).abs().max() < 1e-6


def test_float16(nano):
    """Its pixels go to millions on their way."""
    latents = load_file(SAMPLES[0])["latents"][..., :12, :12]
    half = PixelDecoderPipeline.from_pretrained("nano", dtype=torch.float16)
    half.set_progress_bar_config(disable=True)
    assert psnr(decode(half, latents), decode(nano, latents)) > 40
