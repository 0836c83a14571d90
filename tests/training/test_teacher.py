"""Terms of the prior and of the teacher, worked out by hand on a network that sees one clean image.

Random numbers are fixed, as in test_distill: noise 1 everywhere, u = sigmoid(0) = 1/2.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from pixeldecoder.models.transformer import PixelDecoderOutput
from pixeldecoder.training.config import Prior
from pixeldecoder.training.data import Batch
from pixeldecoder.training.degrade import Condition
from pixeldecoder.training.teacher import PriorStage, TeacherStage
from training.conftest import ARCHITECTURE
from training.test_distill import FixedRandom
from training.test_loop import dinov2

C, REAL, SIGMA = 0.5, 0.8, torch.tensor([0.0, 0.4, 0.2])
SHIFT = 6 * (64 / 2048) ** 0.5
T = SHIFT * 0.5 / (1 + (SHIFT - 1) * 0.5)
AUX = torch.tensor([0.1, 0.3, 0.5])[:, None, None, None]
"""What the auxiliary image is too bright by, in [-1, 1]."""
BATCH = Batch(torch.full((3, 3, 64, 64), REAL), ["", "", ""], ["a", "b", "c"], [0, 1, 2], 1)


@pytest.fixture
def by_hand(monkeypatch):
    """A stage -> the same with a network that sees C, and what its network and conditions were asked."""
    monkeypatch.setattr("pixeldecoder.training.teacher.SampleRandom", FixedRandom)

    def build(config):
        kind = PriorStage if isinstance(config, Prior) else TeacherStage
        stage, asked = kind(config, Accelerator(cpu=True)), SimpleNamespace()
        small, kept = torch.full((3, 3, 16, 16), REAL), torch.tensor([1.0, 1.0, 0.0])

        def conditions(batch, random, caption_dropout, latent_dropout=0.0):
            asked.dropout = caption_dropout, latent_dropout
            return Condition(torch.ones(3, 16, 2, 2), SIGMA, small, kept, None, None)

        def network(x_t, timestep, return_features=None, **inputs):
            asked.x, asked.t, asked.features, asked.inputs = x_t.mean().item(), timestep, return_features, inputs
            t = timestep[:, None, None, None] / 1000
            return PixelDecoderOutput(sample=(x_t - C) / t, features=(x_t,), aux_rgb=small + AUX)

        stage.conditions, stage.network = conditions, network
        return stage, asked

    return build


def test_the_teacher_s_terms(by_hand, teacher):
    """Velocities of C and of the image differ by (REAL - C) / t; the third sample's latents were dropped."""
    stage, asked = by_hand(replace(teacher, aux_rgb_weight=0.3, caption_dropout=0.2, latent_dropout=0.4))
    terms = stage.losses(BATCH)
    assert terms.keys() == {"velocity", "aux_rgb"}
    assert terms["velocity"].item() == pytest.approx(((REAL - C) / T) ** 2, rel=1e-5)
    # Of a grey difference d, d / 2 in [0, 1], only luma, weighted by .25, tells.
    grey = [((0.25 * d / 2) ** 2 + 1e-6) ** 0.5 - 1e-3 for d in (0.1, 0.3)]
    expected = 0.3 * (grey[0] + 0.6 * grey[1]) / 1.6 / 3
    assert terms["aux_rgb"].item() == pytest.approx(expected, rel=1e-4)
    assert stage.losses(BATCH, torch.tensor(3.2))["aux_rgb"].item() == pytest.approx(expected / 2, rel=1e-4)
    assert asked.dropout == (0.2, 0.4) and asked.inputs["sigma"] is SIGMA and asked.inputs["return_aux_rgb"]
    assert asked.t.tolist() == pytest.approx(3 * [1000 * T]) and asked.x == pytest.approx((1 - T) * REAL + T)
    assert stage.model_update(7) == 7


def test_the_prior_s_terms(by_hand, teacher, tmp_path):
    architecture = ARCHITECTURE | dict(latent_channels=None, base_dim=None)
    (tmp_path / "architecture.json").write_text(json.dumps(architecture))
    common = {name: value for name, value in vars(teacher).items() if name in Prior.__dataclass_fields__}
    repa = dict(repa_weight=0.5, repa_block=1, repa_encoder=str(dinov2(tmp_path / "dinov2")))
    stage, asked = by_hand(Prior(**common | repa | dict(caption_dropout=0.2)))
    stage.repa.loss = lambda features, image: features.mean() + image.mean()
    terms = stage.losses(BATCH)
    assert terms.keys() == {"velocity", "repa"} and asked.features == (1,)
    assert terms["repa"].item() == pytest.approx(0.5 * ((1 - T) * REAL + T + REAL), rel=1e-5)
    assert asked.dropout == (0.2, 0.0)


@pytest.mark.parametrize("train", ["adapter", "all"])
def test_what_a_teacher_trains(train, teacher):
    stage = TeacherStage(replace(teacher, train=train), Accelerator(cpu=True))
    trained = {name.partition(".")[0] for name, p in stage.model.named_parameters() if p.requires_grad}
    assert trained == ({"adapter"} if train == "adapter" else {name for name, _ in stage.model.named_children()})


@pytest.mark.parametrize("weight, trained", [(0.5, True), (0.0, False)])
def test_the_auxiliary_head_trains_where_a_loss_reads_it(weight, trained, teacher):
    stage = TeacherStage(replace(teacher, aux_rgb_weight=weight), Accelerator(cpu=True))
    assert {p.requires_grad for p in stage.model.adapter.aux_rgb_head.parameters()} == {trained}
