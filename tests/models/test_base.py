"""The convolutional base: whole or in bands, with sigma, as wide as its latents."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import TINY_NANO, randomized, relative, tiny_model
from pixeldecoder.models.base import HALO, LatentDecoder
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.plan import count_base_flops


@pytest.fixture
def base():
    return randomized(LatentDecoder(16, upsamplings=3, enlargements=2, dim=8))


@torch.no_grad()
def test_bands_give_the_whole(base, monkeypatch):
    """Of latents with a halo on both sides, and of what is enlarged."""
    latents, sigma = torch.randn(1, 16, 3 * base.halo, 3), torch.tensor([0.3])
    monkeypatch.setattr("pixeldecoder.models.base.BAND", 10**6)
    whole = base(latents, sigma)
    assert whole.shape == (1, 3, 32 * 3 * base.halo, 96)
    assert relative(base(latents, sigma, rows=7), whole) < 1e-5
    for band in 5, 50:
        monkeypatch.setattr("pixeldecoder.models.base.BAND", band)
        assert relative(base(latents, sigma), whole) < 1e-5


def test_halo_is_what_a_row_reaches(base):
    """No row further away has a gradient."""
    latents = torch.randn(1, 16, 4 * base.halo, 1, requires_grad=True)
    row = 2 * base.halo
    base(latents, torch.zeros(1))[:, :, 32 * row : 32 * (row + 1)].sum().backward()
    reached = latents.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert row - base.halo <= reached.min() < row < reached.max() <= row + base.halo
    features = torch.randn(1, 8, 8 * HALO, 1, requires_grad=True)
    base._enlarged(features)[:, :, 4 * HALO * 4 : 4 * HALO * 4 + 4].sum().backward()
    reached = features.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert reached.min() >= 3 * HALO and reached.max() <= 5 * HALO


@torch.no_grad()
def test_the_base_is_told_sigma(base):
    latents = torch.randn(1, 16, 2, 2).expand(2, -1, -1, -1)
    clean, noisy = base(latents, torch.tensor([0.0, 0.5]))
    assert relative(noisy, clean) > 1e-3
    torch.testing.assert_close(base(latents[:1], torch.tensor([0.5]))[0], noisy)


@torch.no_grad()
def test_the_network_sees_the_base_and_adds_to_it():
    model = tiny_model(**TINY_NANO)
    given = dict(hidden_states=torch.randn(2, 3, 64, 96), timestep=500.0, sigma=torch.tensor([0.0, 0.35]))
    features = model.encode_latents(torch.randn(2, 16, 2, 3), 64, 96, sigma=given["sigma"])
    assert features.base.shape == (2, 3, 64, 96)
    before = model(**given, latent_features=features).sample
    moved = model(**given, latent_features=features._replace(base=features.base + 1)).sample
    assert relative(moved + 2, before) > 1e-3  # more than the 1 / t that was added
    model.proj_out.weight.zero_()
    model.proj_out.bias.zero_()
    expected = (given["hidden_states"] - features.base) / 0.5
    torch.testing.assert_close(model(**given, latent_features=features).sample, expected)


@pytest.mark.parametrize("change", [{}, dict(scale=8), dict(unpack_latents=True, latent_channels=64, scale=2)])
@torch.no_grad()
def test_base_of_other_spaces(change):
    """Scales, packed latents, an image that ends within a cell."""
    model = tiny_model(**TINY_NANO | dict(adapter_dim=16) | change)
    latents = torch.randn(1, model.config.latent_channels, 3, 2)
    side = model.config.scale * 8
    assert model.encode_latents(latents, 3 * side, 2 * side, sigma=0.1).base.shape == (1, 3, 3 * side, 2 * side)
    assert model.encode_latents(latents, 3 * side - 16, 2 * side, sigma=0.1).base.shape == (
        1,
        3,
        3 * side - 16,
        2 * side,
    )


@torch.no_grad()
@pytest.mark.parametrize("rows", [None, 4])
def test_operations_are_counted(base, rows):
    latents = torch.randn(1, 16, 9, 2)
    with FlopCounterMode(display=False) as counter, torch.enable_grad():  # without bands of what is enlarged
        base(latents, torch.zeros(1), rows)
    assert count_base_flops(base, 9 * 32, 64, rows) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_starts_as_the_small_image_enlarged():
    model = PixelDecoderTransformer2DModel(**TINY_NANO)
    latents = torch.randn(1, 16, 2, 2)
    assert not model.encode_latents(latents, 64, 64, sigma=0.0).base.any()  # grey
    torch.nn.init.normal_(model.base.to_small.weight)
    small = model.base.small(model.base.features(latents, torch.zeros(1))[-1])
    expected = torch.nn.functional.interpolate(small, scale_factor=4, mode="bicubic")
    torch.testing.assert_close(model.encode_latents(latents, 64, 64, sigma=0.0).base, expected)


def test_latents_and_sigma_are_needed():
    with pytest.raises(ValueError, match="pass sigma, as in `forward`"):
        tiny_model(**TINY_NANO).encode_latents(torch.randn(1, 16, 2, 2), 64, 64)
    with pytest.raises(ValueError, match="this model's base is made from latents: pass latents"):
        tiny_model(**TINY_NANO)(torch.randn(1, 3, 64, 64), 500.0)
