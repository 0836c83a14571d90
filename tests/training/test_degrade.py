"""What the network is told of a picture: noise, dropout, times, against their distributions and closed forms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import TINY
from pixeldecoder.flow import SampleRandom, noised, training_times
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.pictures import shrink, to_tensor
from pixeldecoder.training import degrade
from pixeldecoder.training.config import Data, Prior, Student, Teacher
from pixeldecoder.training.data import Batch
from pixeldecoder.training.degrade import Conditions
from training.conftest import ARCHITECTURE

COUNT = 4000
STANDARD_ERROR = COUNT**-0.5
"""Of a mean of `COUNT` numbers of variance 1. Bounds are four of them."""
DATA = Data(resolution=32)


def batch(value: float, count: int = COUNT, captions: list[str] | None = None) -> Batch:
    """Pictures of one colour."""
    captions = captions or [""] * count
    return Batch(torch.full((count, 3, 32, 32), value), captions, captions, list(range(count)), 1)


def conditions(config) -> Conditions:
    return Conditions(config, PixelDecoderTransformer2DModel(**ARCHITECTURE), torch.device("cpu"))


def draw(config, value: float, **dropout) -> degrade.Condition:
    given = batch(value)
    return conditions(config)(given, SampleRandom(0, given.samples, "training"), **dropout)


@pytest.mark.parametrize("probability, highest", [(0.75, 0.8), (0.3, 0.5)])
def test_noising_is_uniform_in_its_share_of_the_samples(probability, highest):
    config = Teacher(encoder="averaging:encode", data=DATA, noise_probability=probability, max_sigma=highest)
    sigma = draw(config, 0.0).sigma
    noisy = sigma[sigma > 0]
    assert len(noisy) / COUNT == pytest.approx(probability, abs=2 * STANDARD_ERROR)
    quantiles = noisy.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    expected = highest * torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert (quantiles - expected).abs().max() < 4 * highest * STANDARD_ERROR
    assert noisy.max() <= highest


@pytest.mark.parametrize(
    "space, keep", [(None, lambda sigma: 1 - sigma), ("sdxl", lambda sigma: (1 - sigma**2).sqrt())]
)
def test_latents_are_noised_in_their_frame(space, keep):
    """Of a black and of a white picture with the same noise: their difference is what is kept of the latents."""
    config = Teacher(encoder="averaging:encode", data=DATA, latent_space=space)
    grey, white = draw(config, 0.0), draw(config, 1.0)
    assert torch.equal(grey.sigma, white.sigma)
    expected = keep(grey.sigma)[:, None, None, None].expand_as(grey.latents)
    torch.testing.assert_close(white.latents - grey.latents, expected, atol=1e-6, rtol=0)
    noisy = grey.sigma > 0
    noise = grey.latents[noisy] / grey.sigma[noisy][:, None, None, None]
    assert noise.std() == pytest.approx(1, abs=0.02) and noise.mean() == pytest.approx(0, abs=0.02)
    assert (grey.latents[~noisy] == 0).all()


def test_latents_are_dropped_whole():
    config = Teacher(encoder="averaging:encode", data=DATA)
    condition = draw(config, 1.0, latent_dropout=0.25)
    assert 1 - condition.kept.mean() == pytest.approx(0.25, abs=2 * STANDARD_ERROR)
    assert torch.equal(condition.latents.flatten(1).abs().sum(dim=1) > 0, condition.kept.bool())
    assert draw(config, 1.0).kept.all() and not draw(config, 1.0, latent_dropout=1.0).kept.any()
    # What the auxiliary loss weighs samples by, before they are drawn and after.
    weight = conditions(config).aux_rgb_weight(SampleRandom(0, list(range(COUNT)), "training"), 0.25)
    torch.testing.assert_close(weight, condition.kept * (1 - condition.sigma))
    torch.testing.assert_close(weight, condition.aux_rgb_weight)


def test_captions_and_latents_are_dropped_apart():
    """Draws of a sample: for its caption, for its latents, whether it is noised, and how much."""
    draws = torch.tensor([[0.0, 0.9, 0.7, 0.5], [0.9, 0.0, 0.8, 0.5]])
    kept, sigma = conditions(Teacher(encoder="averaging:encode", data=DATA))._levels(draws, 0.5)
    assert kept.tolist() == [1, 0] and sigma.tolist() == pytest.approx([0.4, 0])


@pytest.fixture
def spelled(monkeypatch):
    """In place of Gemma-2: a caption's embedding is its length."""

    class Encoder:
        def __init__(self, name, device):
            pass

        def __call__(self, captions):
            return torch.tensor([len(caption) for caption in captions]).float()[:, None, None].expand(-1, 12, 20)

    monkeypatch.setattr(degrade, "PromptEncoder", Encoder)
    return PixelDecoderTransformer2DModel(**TINY)


def test_captions_are_dropped(spelled):
    given = batch(0.0, captions=["a cat"] * COUNT)
    made = Conditions(Teacher(encoder="averaging:encode", data=Data(resolution=64)), spelled, torch.device("cpu"))

    def lengths(dropout):
        return made(given, SampleRandom(0, given.samples, "training"), caption_dropout=dropout).embeds[:, 0, 0]

    assert (lengths(0.0) == 5).all() and (lengths(1.0) == 0).all()
    assert (lengths(0.1) == 0).float().mean() == pytest.approx(0.1, abs=2 * STANDARD_ERROR)


@pytest.mark.parametrize(
    "config, length", [(Teacher(), 0), (Student(), 0), (Student(negative_prompt="low quality"), 11)]
)
def test_the_unconditional_pass_reads_the_negative_prompt(config, length, spelled):
    config = replace(config, encoder="averaging:encode", data=Data(resolution=64))
    given = batch(0.0, captions=["a cat", "two cats"], count=2)
    condition = Conditions(config, spelled, torch.device("cpu"))(given, SampleRandom(0, [0, 1], "training"))
    assert condition.negative_embeds[:, 0, 0].tolist() == [length, length]
    assert condition.embeds[:, 0, 0].tolist() == [5, 8]
    assert condition.inputs()["encoder_hidden_states"] is condition.embeds


def test_a_prior_has_no_latents():
    network = PixelDecoderTransformer2DModel(**ARCHITECTURE | dict(latent_channels=None, base_dim=None))
    condition = Conditions(Prior(), network, torch.device("cpu"))(batch(0.0, 2), SampleRandom(0, [0, 1], "training"))
    assert condition.latents is None and condition.inputs()["sigma"] == 0.0


@pytest.mark.parametrize("height, width, shift", [(2048, 2048, 6), (512, 512, 3), (128, 2048, 3)])
def test_training_times_are_logit_normal_and_shifted(height, width, shift):
    """t = s u / (1 + (s - 1) u) has the odds of u, s times: their logarithm is N(ln s, 1)."""
    logits = training_times(SampleRandom(0, list(range(COUNT)), "training"), height, width).logit()
    assert logits.mean() == pytest.approx(math.log(shift), abs=4 * STANDARD_ERROR)
    assert logits.std() == pytest.approx(1, abs=4 * STANDARD_ERROR)


def test_noised():
    image, noise = torch.tensor([2.0, 2.0, 2.0]), torch.tensor([-1.0, -1.0, -1.0])
    x_t = noised(image[:, None, None, None], noise[:, None, None, None], torch.tensor([0.0, 0.25, 1.0]))
    assert x_t.flatten().tolist() == [2.0, 1.25, -1.0]


def test_shrink():
    assert torch.equal(shrink(torch.full((1, 3, 8, 8), 0.5), 4), torch.full((1, 3, 2, 2), 0.5))
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (32, 48, 3), dtype=np.uint8))
    theirs = to_tensor(picture.resize((12, 8), Image.Resampling.BICUBIC))  # antialiased, and rounded twice
    assert (shrink(to_tensor(picture), 4) - theirs).abs().max() < 1.5 / 127.5
    edge = torch.ones(1, 3, 32, 32)
    edge[..., :16] = -1
    assert shrink(edge, 4).abs().max() == 1  # bicubic overshoots, and is clamped


def test_networks_of_the_wrong_kind():
    blind = PixelDecoderTransformer2DModel(**ARCHITECTURE | dict(latent_channels=None, base_dim=None))
    seeing = PixelDecoderTransformer2DModel(**ARCHITECTURE)
    for config, network, message in (
        (Teacher(encoder="averaging:encode", data=DATA), blind, "this network takes no latents"),
        (Prior(data=DATA), seeing, "a prior takes no latents"),
    ):
        with pytest.raises(ValueError, match=message):
            Conditions(config, network, torch.device("cpu"))
