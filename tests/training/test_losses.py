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
    both = torch.ones(2)

    def charbonnier(x):
        return math.sqrt(x * x + 1e-6) - 1e-3

    # A grey difference of .2 in [-1, 1] is .1 of luma in [0, 1], and nothing of chroma.
    grey = charbonnier(0.25 * 0.1) / 3
    assert losses.aux_rgb(small + 0.2, small, both).item() == pytest.approx(grey, rel=1e-5)
    red = small.clone()
    red[:, 0] = 2.0
    expected = (charbonnier(0.25 * 0.299) + charbonnier(0.168736) + charbonnier(0.5)) / 3
    assert losses.aux_rgb(red, small, both).item() == pytest.approx(expected, rel=1e-5)
    assert losses.aux_rgb(small, small, both).item() == 0
    # The mean is weighted: a grey picture counts 1, a red one .6.
    mixed = torch.stack([small[0] + 0.2, red[1]])
    weight = torch.tensor([1.0, 0.6])
    assert losses.aux_rgb(mixed, small, weight).item() == pytest.approx((grey + 0.6 * expected) / 1.6, rel=1e-5)
    # Of a larger batch, whose weights sum up to 5, these two are a part.
    part = losses.aux_rgb(mixed, small, weight, torch.tensor(5.0))
    assert part.item() == pytest.approx((grey + 0.6 * expected) / 5, rel=1e-5)
    assert losses.aux_rgb(mixed, small, torch.tensor([0.0, 1.0])).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("total", [None, torch.tensor(0.0)])
def test_aux_rgb_of_nothing(total):
    """All samples dropped: neither a loss nor a gradient, and no division by 0."""
    prediction = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = losses.aux_rgb(prediction, torch.zeros(2, 3, 4, 4), torch.zeros(2), total)
    loss.backward()
    assert loss.item() == 0 and (prediction.grad == 0).all()


def test_repa():
    features = torch.randn(2, 5, 8)
    assert losses.repa(3 * features, features).item() == pytest.approx(0, abs=1e-6)
    assert losses.repa(-features, features).item() == pytest.approx(2, abs=1e-6)


def test_approximate_r1():
    assert losses.approximate_r1(torch.zeros(2, 3), torch.full((2, 3), 0.5)).item() == 0.25
    assert losses.approximate_r1(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.5])).item() == 0.25  # nothing cancels


def test_vsd_by_hand():
    """Each picture by its own distance to the teacher's: .5 and 2 here, pulled by .3 and by -.1."""
    student, teacher = torch.zeros(2, 3, 4, 4), torch.tensor([-0.5, 2.0])[:, None, None, None].expand(2, 3, 4, 4)
    fake = teacher + torch.tensor([0.3, -0.1])[:, None, None, None]
    expected = 0.5 * ((0.3 / 0.5) ** 2 + (0.1 / 2) ** 2) / 2
    assert losses.vsd(student, teacher, fake).item() == pytest.approx(expected, rel=1e-5)
    assert losses.vsd(student, student, student + 1e-6).item() == pytest.approx(0.5, rel=1e-5)  # no division by 0


def test_gan_by_hand():
    fake, real = torch.tensor([0.0, 2.0]), torch.tensor([1.0, -1.0])
    softplus = {x: math.log(1 + math.exp(x)) for x in (-2, -1, 0, 1, 2)}
    assert losses.gan_student(fake).item() == pytest.approx((softplus[0] + softplus[-2]) / 2, rel=1e-5)
    expected = (softplus[0] + softplus[2] + softplus[-1] + softplus[1]) / 2
    assert losses.gan_discriminator(fake, real).item() == pytest.approx(expected, rel=1e-5)
