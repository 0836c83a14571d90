"""Operations and bytes of a step: exact numbers of the released network, and single operations by hand."""

import pytest
import torch

from conftest import TINY, TINY_NANO, tiny_model
from pixeldecoder import PixelDecoderTransformer2DModel
from pixeldecoder.cli import main
from pixeldecoder.counting import Counts, _Counting, count
from pixeldecoder.models.layers import RMSNorm, _rotate_parts, image_rotary, rotate
from pixeldecoder.plan import count_flops
from pixeldecoder.presets import PRESETS

V15 = "PiD_v1pt5_res2kto4k_sr4x_official_flux_distill_4step"


def released(name: str) -> PixelDecoderTransformer2DModel:
    with torch.device("meta"):
        return PixelDecoderTransformer2DModel(**PRESETS[name].config).to(torch.bfloat16)


def test_a_step_of_the_released_network():
    """At 2048 px: passes over memory that were saved stay saved, and products too. (Before: 105.3 GB, 1.0008 times.)"""
    counts = count(released(V15), 2048, 2048, 300)
    assert counts.step(counts.bytes) == pytest.approx(43.83e9, rel=1e-3) and counts.step(counts.bytes) <= 45e9
    assert counts.step(counts.flops) == pytest.approx(43.1167e12, rel=1e-5)
    assert 1 <= counts.step(counts.flops) / counts.least_flops <= 1.005
    assert counts.image(counts.flops, 4) == 4 * counts.step(counts.flops) + counts.flops["adapter"]


def test_gates_read_the_latents_once_an_image():
    """Seven gates of 1536 values from as many channels of 16,384 tokens."""
    counts = count(released("PiD_res2k_sr4x_official_flux_distill_4step"), 2048, 2048, 300)
    assert counts.flops["gates"] == 2 * 7 * 16384 * 1536**2


@pytest.mark.parametrize("config", [TINY, TINY_NANO], ids=["text", "nano"])
def test_operations_are_those_of_the_plan(config):
    with torch.device("meta"):
        model = PixelDecoderTransformer2DModel(**config)
    counts = count(model, 256, 192, 7 if config["text_embed_dim"] else 0, chunk_size=50)
    expected = count_flops(tiny_model(**config), 16 * 12, 7 if config["text_embed_dim"] else 0)
    attention = sum(flops for part, flops in counts.flops.items() if part.startswith("attention"))
    assert attention == expected[1]
    assert counts.step(counts.flops) - attention == pytest.approx(expected[0], rel=0.01)  # and the time's embedding


@torch.no_grad()
def test_bytes_by_hand():
    with torch.device("meta"):
        model = PixelDecoderTransformer2DModel(**TINY)
        x, row, norm = torch.empty(4, 6), torch.empty(1, 6), RMSNorm(6, eps=1e-6)
    counting = _Counting(model)
    for operation, expected in (
        (lambda: x + 1, 2 * 96),
        (lambda: x * row.expand(4, 6), 2 * 96 + 24),  # a row is read once
        (lambda: x.add_(row), 2 * 96 + 24),
        (lambda: torch.addcmul(row, x, row, out=x), 2 * 96 + 2 * 24),
        (lambda: x[:, ::2].copy_(x[:, 1::2]), 96),  # what is written over is not read
        (lambda: torch.cat([x, x]), 4 * 96),
        (lambda: x.bfloat16(), 96 + 48),
        (lambda: x.unflatten(1, (2, 3)).transpose(0, 1), 0),
        (lambda: torch.empty_like(x), 0),
        (lambda: x @ x.T, 0),
    ):
        counting.counts.bytes.clear()
        with counting:
            operation()
        assert counting.counts.bytes.total() == expected
    assert counting.counts.flops == {"ends": 2 * 4 * 6 * 4}
    norm.register_forward_pre_hook(counting._before_norm)
    norm.register_forward_hook(counting._after_norm)
    counting.counts.bytes.clear()
    with counting:
        norm(x)
    assert counting.counts.bytes == {"ends": 2 * 96}


def test_roofline():
    """An adapter of 2 TFLOP and 3 steps of 4, with 5 GB each; at 7 TFLOP/s and 0.5 TB/s."""
    counts = Counts()
    counts.flops.update({"adapter": 2e12, "a": 3e12, "b": 1e12})
    counts.bytes.update({"a": 5e9})
    assert counts.roofline(3, 7, 0.5) == pytest.approx(14 / 7 + 15 / 500)


def test_rotation_without_a_float32_copy():
    """As GPUs do it in bfloat16, whose products are rounded once more."""
    x = torch.randn(2, 12, 3, 16)
    table = image_rotary(3, 4, 16, 64, torch.device("cpu"))
    exact = rotate(x, table)
    parts = _rotate_parts(x.unflatten(-1, (-1, 2)), table[:, :, None], torch.empty_like(x))
    torch.testing.assert_close(parts, exact)
    half = x.bfloat16()
    rounded = _rotate_parts(half.unflatten(-1, (-1, 2)), table[:, :, None], torch.empty_like(half)).float()
    assert (rounded - exact).std() < 1.5 * (rotate(half, table).float() - exact).std() < 0.01


def test_count(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", "--count", "--sizes", "512", "1024", "--steps", "2"]) == 0
    text = capsys.readouterr().out
    assert "nano, 512 px, whole, 0 text tokens" in text and "an image of 2 steps" in text and "H100" in text
    assert main(["benchmark", "--count", "--sizes", "500"]) == 2
    assert "size 500: expected a multiple of 32" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
