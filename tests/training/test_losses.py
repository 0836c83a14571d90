"""Losses against the reference's numbers and closed forms."""

import math

import pytest
import torch
from safetensors.torch import load_file

from conftest import GOLDEN, normal
from pixeldecoder.training import losses

golden = load_file(GOLDEN / "losses.safetensors")


def test_vsd():
    student = normal("gen", (2, 3, 16, 16)).requires_grad_()
    loss = losses.vsd(student, normal("teach", (2, 3, 16, 16)), normal("fake", (2, 3, 16, 16)))
    loss.backward()
    assert loss.item() == pytest.approx(golden["vsd_loss"].item(), rel=1e-6)
    torch.testing.assert_close(student.grad, golden["vsd_grad"], rtol=1e-5, atol=1e-9)


def test_gan():
    fake, real = golden["logits_fake"], golden["logits_real"]
    assert losses.gan_student(fake).item() == pytest.approx(golden["gan_g"].item(), rel=1e-6)
    assert losses.gan_discriminator(fake, real).item() == pytest.approx(golden["gan_d"].item(), rel=1e-6)


def test_flow_matching():
    image, noise = golden["fm_x"], golden["fm_noise"]
    t = golden["fm_t"][:, None, None, None]
    x_t = torch.lerp(image, noise, t)
    loss = losses.flow_matching(-torch.tanh(x_t), image, noise)
    assert loss.item() == pytest.approx(golden["fm_loss_velocity"].item(), rel=1e-6)
    loss = losses.flow_matching((x_t - torch.tanh(x_t)) / t.clamp_min(0.05), image, noise)
    assert loss.item() == pytest.approx(golden["fm_loss_x0"].item(), rel=1e-6)


def test_aux_rgb_of_grey_and_of_red():
    small = torch.zeros(2, 3, 4, 4)
    sigma = torch.tensor([0.0, 0.4])

    def charbonnier(x):
        return math.sqrt(x * x + 1e-6)

    # A grey difference of .2 in [-1, 1] is .1 of luma in [0, 1], and nothing of chroma.
    grey = (0.25 * charbonnier(0.1) + 2e-3) / 3
    assert losses.aux_rgb(small + 0.2, small, sigma).item() == pytest.approx(grey * (1 + 0.6) / 2, rel=1e-5)
    red = small.clone()
    red[:, 0] = 2.0
    expected = (0.25 * charbonnier(0.299) + charbonnier(0.168736) + charbonnier(0.5)) / 3
    assert losses.aux_rgb(red, small, torch.zeros(2)).item() == pytest.approx(expected, rel=1e-5)
    assert losses.aux_rgb(red, small, torch.zeros(2), torch.tensor([1, 0])).item() == pytest.approx(expected / 2)


def test_repa():
    features = torch.randn(2, 5, 8)
    assert losses.repa(3 * features, features).item() == pytest.approx(0, abs=1e-6)
    assert losses.repa(-features, features).item() == pytest.approx(2, abs=1e-6)


def test_approximate_r1():
    assert losses.approximate_r1(torch.zeros(2, 3), torch.full((2, 3), 0.5)).item() == 0.25
