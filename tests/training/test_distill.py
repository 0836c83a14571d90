"""DMD2's updates: terms worked out by hand on networks of one number; which parts change when, on tiny ones.

A network that sees the clean image c whatever it is given makes every term a closed form: its velocity at x_t is
(x_t - c) / t. The student sees S, the fake score F, the teacher T or, with the negative prompt, U. Random numbers are
fixed: t = sigmoid(0) = 1/2, noise 1 everywhere, the second of the student's times.
"""

import math
import weakref
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils import parametrize

from conftest import TINY, randomized
from pixeldecoder.flow import SampleRandom
from pixeldecoder.models.transformer import PixelDecoderOutput, PixelDecoderTransformer2DModel
from pixeldecoder.training import distill, loop
from pixeldecoder.training.config import Lora, Optimizer
from pixeldecoder.training.data import Batch
from pixeldecoder.training.degrade import Condition
from pixeldecoder.training.distill import Int8Rows, StudentStage
from pixeldecoder.training.parts import Average
from pixeldecoder.training.teacher import TeacherStage
from training.conftest import ARCHITECTURE

S, F, T, U, REAL = 0.2, 0.5, -0.3, 0.1, 0.8
D = 0.7
"""What the discriminator multiplies a feature by, which is the mean of the noisy image."""
MIDDLE = (0.5 * S + 0.5, 0.5 * REAL + 0.5)
"""Means of the student's and of the real image, noised to t = 1/2."""


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


class FixedRandom:
    def __init__(self, seed, samples, purpose, device):
        self.count = len(samples)

    def normal(self, *shape):
        return torch.ones(self.count, *shape) if shape else torch.zeros(self.count)

    def uniform(self, *shape):
        return torch.full((self.count, *shape), 0.3)


class GivenConditions:
    """Embeddings of 1, negative ones of -1."""

    def __init__(self, config, network, device):
        self.encoder = None

    def __call__(self, batch, random):
        count = len(batch.image)
        ones, text = torch.ones(count, 16, 2, 2), torch.ones(count, 12, 20)
        return Condition(ones, torch.full((count,), 0.3), None, torch.ones(count), text, -text)


class Sees(nn.Module):
    """A network, and the part that trains it."""

    def __init__(self, value: float, negative: float = math.nan):
        super().__init__()
        self.value, self.negative = nn.Parameter(torch.tensor(value)), negative
        self.calls: list[SimpleNamespace] = []
        self.encoded = 0

    @property
    def module(self):
        return self

    def encode_latents(self, latents, height, width, sigma):
        self.encoded += 1
        return latents

    def forward(self, x_t, timestep, return_features=(), features_only=False, **inputs):
        t, mean = timestep[:, None, None, None] / 1000, x_t.mean(dim=(1, 2, 3), keepdim=True)
        call = dict(x=mean[0].item(), t=t[0].item(), grad=torch.is_grad_enabled(), wanted=return_features)
        self.calls.append(SimpleNamespace(**call, features_only=features_only, **inputs))
        value = self.value if inputs["encoder_hidden_states"].mean() > 0 else self.negative
        sample = None if features_only else (x_t - value) / t
        return PixelDecoderOutput(sample=sample, features=tuple(mean for _ in return_features))


class Multiplies(nn.Module):
    """A discriminator of one number."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(D))

    @property
    def module(self):
        return self

    def forward(self, features):
        return self.factor * features[0].flatten(1)


@pytest.fixture
def with_text(student, tmp_path):
    """A student with text, given embeddings."""
    model = randomized(PixelDecoderTransformer2DModel(**TINY), 1)
    model.save_pretrained(tmp_path / "model")
    return replace(student, architecture=None, model=str(tmp_path / "model"), feature_blocks=(1,))


def batch(position: int = 1, size: int = 64) -> Batch:
    """Two pictures of one colour."""
    return Batch(torch.full((2, 3, size, size), REAL), ["", ""], ["a", "b"], [0, 1], position)


@pytest.fixture
def by_hand(with_text, monkeypatch):
    """-> a stage of `Sees`."""
    monkeypatch.setattr(distill, "SampleRandom", FixedRandom)

    def build(**settings):
        stage = StudentStage(replace(with_text, **settings), Accelerator(cpu=True), GivenConditions)
        stage.student, stage.fake_score, stage.teacher = Sees(S), Sees(F), Sees(T, U).requires_grad_(False)
        stage.discriminator = Multiplies()
        return stage

    return build


@pytest.mark.parametrize("guidance, x0_teacher", [(3.0, U + 3 * (T - U)), (1.0, T)])
def test_the_student_s_terms(guidance, x0_teacher, by_hand):
    stage = by_hand(guidance_scale=guidance)
    terms = stage.student_losses(batch(), 0.25)
    pull = (F - x0_teacher) / abs(S - x0_teacher)
    assert terms["vsd"].item() == pytest.approx(0.5 * pull**2, rel=1e-5)
    assert terms["gan"].item() == pytest.approx(0.25 * 0.05 * softplus(-D * MIDDLE[0]), rel=1e-5)
    sum(terms.values()).backward()
    fooled = -0.25 * 0.05 * D * 0.5 / (1 + math.exp(D * MIDDLE[0]))  # through the teacher's features
    assert stage.student.value.grad.item() == pytest.approx(pull + fooled, rel=1e-5)
    assert stage.fake_score.value.grad is None
    # The student starts from a real image at one of its times; teacher and fake score see its own, noised to t = 1/2.
    (student,), (fake,) = stage.student.calls, stage.fake_score.calls
    assert (student.t, student.x) == pytest.approx((0.866, 0.134 * REAL + 0.866))
    teacher = stage.teacher.calls
    assert [call.wanted for call in teacher] == [(1,), ()][: 1 if guidance == 1 else 2]
    assert all((call.t, call.x) == pytest.approx((0.5, MIDDLE[0])) for call in (*teacher, fake))
    assert stage.teacher.encoded == 1 and all(call.latents is None for call in teacher)
    assert all((call.latent_features == 1).all() and call.sigma[0] == 0.3 for call in teacher)
    assert (fake.latents == 1).all() and (fake.encoder_hidden_states == 1).all() and not fake.grad


def test_the_student_s_terms_as_configured(by_hand):
    stage = by_hand(gan_weight=0.5)
    assert stage.student_losses(batch(), 1.0)["gan"].item() == pytest.approx(0.5 * softplus(-D * MIDDLE[0]), rel=1e-5)
    assert stage.student_losses(batch(), 0.0)["gan"].item() == 0


@pytest.mark.parametrize("r1_weight, r1_noise", [(200.0, 0.1), (400.0, 0.1), (200.0, 0.3)])
def test_the_critics_terms(r1_weight, r1_noise, by_hand):
    stage = by_hand(r1_weight=r1_weight, r1_noise=r1_noise)
    terms = stage.critic_losses(batch())
    # Velocities of F and of the student's image differ by (S - F) / t.
    assert terms["fake_score"].item() == pytest.approx(((S - F) / 0.5) ** 2, rel=1e-5)
    expected = softplus(D * MIDDLE[0]) + softplus(-D * MIDDLE[1])
    assert terms["discriminator"].item() == pytest.approx(expected, rel=1e-5)
    assert terms["r1"].item() == pytest.approx(r1_weight * (D * r1_noise) ** 2, rel=1e-4)
    sum(terms.values()).backward()
    assert stage.fake_score.value.grad.item() == pytest.approx(-2 * (S - F) / 0.5**2, rel=1e-5)
    assert stage.student.value.grad is None
    # The teacher stops at its features, which are those of the student's image, the real one and that with more noise.
    calls = stage.teacher.calls
    assert [call.x for call in calls] == pytest.approx([*MIDDLE, MIDDLE[1] + r1_noise])
    assert all(call.features_only and call.wanted == (1,) and call.t == 0.5 and not call.grad for call in calls)
    assert stage.teacher.encoded == 1 and (stage.fake_score.calls[0].latents == 1).all()


def test_the_discriminator_judges_both_under_the_same_noise(by_hand, monkeypatch):
    """Sample by sample: else noise, not pictures, would tell them apart."""
    stage = by_hand()
    monkeypatch.setattr(distill, "SampleRandom", SampleRandom)
    seen, teacher = [], stage._teacher
    monkeypatch.setattr(
        stage, "_teacher", lambda x, t, *rest, **kwargs: seen.append((x, t)) or teacher(x, t, *rest, **kwargs)
    )
    stage.critic_losses(batch())
    (made, t), (real, also_t), _ = seen
    assert torch.equal(t, also_t)
    t = t[:, None, None, None]
    noise = (made - (1 - t) * S) / t
    torch.testing.assert_close((real - (1 - t) * REAL) / t, noise, atol=1e-4, rtol=0)
    assert noise.std() > 0.9 and not torch.allclose(noise[0], noise[1])


def test_rollout(by_hand, monkeypatch):
    """From noise through the student's own images, up to the third of its times; that pass alone carries gradient."""
    stage = by_hand(student_input="rollout")
    monkeypatch.setattr(distill, "Random", lambda seed: SimpleNamespace(randrange=lambda count: 2))
    terms = stage.student_losses(batch(), 0.0)
    calls = stage.student.calls
    assert [call.t for call in calls] == pytest.approx([0.999, 0.866, 0.634])
    assert [call.x for call in calls] == pytest.approx([1, 0.134 * S + 0.866, 0.366 * S + 0.634])
    assert [call.grad for call in calls] == [False, False, True]
    x0_teacher = U + 3 * (T - U)
    assert terms["vsd"].item() == pytest.approx(0.5 * ((F - x0_teacher) / (S - x0_teacher)) ** 2, rel=1e-5)


def test_rollouts_end_at_every_time(by_hand):
    stage = by_hand(student_input="rollout")
    ends = Counter()
    for step in range(400):
        passes = set()
        for samples in ([2 * step], [2 * step + 1]):  # in batches of one, too, the two of a step end alike
            stage.student.calls.clear()
            stage.critic_losses(replace(batch(size=1), samples=samples))
            passes.add(len(stage.student.calls))
        assert len(passes) == 1
        ends[passes.pop()] += 1
    assert set(ends) == {1, 2, 3, 4} and all(abs(count - 100) < 4 * 75**0.5 for count in ends.values())


def test_times(by_hand):
    """The student's are its four, alike often; the others' logit-normal, clamped."""
    stage, samples = by_hand(), list(range(2000))
    times = []
    stage.student = lambda x, t, **_: times.append(t / 1000) or PixelDecoderOutput(sample=torch.zeros_like(x))
    image = torch.zeros(len(samples), 3, 1, 1)
    condition = GivenConditions(None, None, None)(SimpleNamespace(image=image), None)
    random = SampleRandom(0, samples, "training")
    stage.student_image(Batch(image, [], [], samples, 1), condition, random)
    counts = Counter(f"{t:.3f}" for t in times[0].tolist())
    assert set(counts) == {"0.999", "0.866", "0.634", "0.342"}
    assert all(abs(count - 500) < 4 * 375**0.5 for count in counts.values())
    x_t, t, noise = stage._noised(image + 1, random)
    torch.testing.assert_close(x_t, 1 - t[:, None, None, None] + t[:, None, None, None] * noise)
    assert t.logit().mean() == pytest.approx(0, abs=4 / 2000**0.5) and t.logit().std() == pytest.approx(1, abs=0.07)
    extreme = SimpleNamespace(
        normal=lambda *shape: torch.full((2, *shape), -9.0) if shape else torch.tensor([-9.0, 9.0])
    )
    assert stage._noised(image[:2], extreme)[1].tolist() == pytest.approx([0.02, 0.99])


def test_every_third_update_is_the_student_s(student):
    stage = StudentStage(replace(student, student_every=3), Accelerator(cpu=True))
    for step in range(7):
        before = {name: [p.detach().clone() for p in part.parameters] for name, part in stage.parts.items()}
        values = stage.update([batch()], step)
        changed = {
            name
            for name, part in stage.parts.items()
            if any(not torch.equal(old, new) for old, new in zip(before[name], part.parameters, strict=True))
        }
        expected = {"student"} if step % 3 == 2 else {"fake_score", "discriminator"}
        assert changed == expected
        assert {name for name in values if "gradient_norm" in name} == {f"gradient_norm_{name}" for name in expected}
        assert all(parameter.requires_grad for parameter in stage.discriminator.parameters)
        assert stage.model_update(step) == (step // 3 if step % 3 == 2 else None)


def test_warm_ups(student, monkeypatch):
    """The learning rate's counts a part's own updates, the adversarial term's all."""
    slow = Optimizer(learning_rate=1.0, warmup_steps=4)
    config = replace(student, student_every=2, gan_warmup_steps=10, optimizer=slow, fake_score_optimizer=slow)
    stage = StudentStage(config, Accelerator(cpu=True))
    weights = []

    def losses(part):
        return lambda batch, gan_warm_up: weights.append(gan_warm_up) or {"sum": part.parameters[0].sum()}

    monkeypatch.setattr(stage, "student_losses", losses(stage.student))
    monkeypatch.setattr(
        stage,
        "critic_losses",
        lambda batch: {"a": stage.fake_score.parameters[0].sum() + stage.discriminator.parameters[0].sum()},
    )
    rates = []
    for step in range(14):
        stage.update([batch()], step)
        rates.append([part.optimizer.param_groups[0]["lr"] for part in (stage.student, stage.fake_score)])
    assert weights == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9, 1, 1])
    assert [rate for rate, _ in rates[1::2]] == [0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert [rate for _, rate in rates[::2]] == [0.25, 0.5, 0.75, 1, 1, 1, 1]


def test_the_average_counts_the_student_s_updates(student, monkeypatch):
    numbers = []
    monkeypatch.setattr(Average, "update", lambda self, number: numbers.append(number))
    monkeypatch.setattr(loop, "validate", lambda *_: {"grid": SimpleNamespace(save=lambda path: None)})
    monkeypatch.setattr("pixeldecoder.training.log.plot", lambda *_: None)
    loop.train(replace(student, steps=4, student_every=2, checkpoint_every=100))
    assert numbers == [0, 1]


def test_the_teacher_runs_no_further_than_its_features(with_text):
    """Nor its adapter more than once; and what the student's update keeps of it, when all teachers' passes are done,
    ends at the features, too."""
    stage = StudentStage(replace(with_text, gradient_checkpointing=False), Accelerator(cpu=True), GivenConditions)
    runs, kept = Counter(), []
    for name, module in {"adapter": stage.teacher.adapter, **dict(enumerate(stage.teacher.patch_blocks))}.items():
        module.register_forward_hook(lambda *_, name=name: runs.update([name]))
    stage.critic_losses(batch())
    assert runs == {"adapter": 1, 0: 3, 1: 3}
    runs.clear()
    for block in stage.teacher.patch_blocks:
        block.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output[0])))
    alive = []
    stage.fake_score.module.register_forward_pre_hook(
        lambda *_: alive.extend(reference() is not None for reference in kept)
    )
    terms = stage.student_losses(batch(), 1.0)
    assert runs == {"adapter": 1, 0: 2, 1: 2, 2: 2, 3: 2}  # with the caption and without
    assert alive == [False, True] + 6 * [False]  # what the features themselves are made of is kept in other tensors
    sum(terms.values()).backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in stage.student.parameters)


def test_the_discriminator_computes_in_float32(with_text):
    stage = StudentStage(replace(with_text, precision="bfloat16"), Accelerator(cpu=True), GivenConditions)
    types = []
    for layer in stage.discriminator.module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda module, args, output: types.append((args[0].dtype, output.dtype)))
    stage.critic_losses(batch())
    stage.student_losses(batch(), 1.0)
    assert types == [(torch.float32, torch.float32)] * 4


def test_optimizers(with_text):
    """Each part's own."""
    config = replace(
        with_text,
        optimizer=Optimizer(learning_rate=1.0, weight_decay=0.1),
        fake_score_optimizer=Optimizer(learning_rate=2.0, weight_decay=0.2),
        discriminator_optimizer=Optimizer(learning_rate=3.0, weight_decay=0.3),
    )
    stage = StudentStage(config, Accelerator(cpu=True), GivenConditions)
    groups = {name: part.optimizer.param_groups[0] for name, part in stage.parts.items()}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "student": 0.1, "fake_score": 0.2, "discriminator": 0.3,
    }  # fmt: skip


def test_int8_rows():
    """Rows of 0, 0.1 and 0.3 times 127, and of nothing: to the nearest of 255 levels, a scale for each."""
    weight = torch.tensor([[0.0, -127.0, 50.4], [12.7, 0.04, -6.36], [0.0, 0.0, 0.0]])
    layer = nn.Linear(3, 3).requires_grad_(False)
    layer.weight.data = weight
    parametrize.register_parametrization(layer, "weight", Int8Rows(torch.float32), unsafe=True)
    rows = layer.parametrizations.weight.original0
    assert rows.dtype == torch.int8 and rows.tolist() == [[0, -127, 50], [127, 0, -64], [0, 0, 0]]
    expected = torch.tensor([[0.0, -127.0, 50.0], [12.7, 0.0, -6.4], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(layer.weight, expected)


def test_the_pipelines_of_stages(with_text, teacher, student):
    """A teacher's of 25 steps, guided where it reads text; a student's of 4, which is not."""
    reads = replace(teacher, architecture=None, model=with_text.model)
    text = PixelDecoderTransformer2DModel(**TINY)
    for config, guidance in (reads, 5.0), (teacher, 1.0):
        stage = TeacherStage.__new__(TeacherStage)
        stage.config = config
        found = stage.pipeline(text if config is reads else PixelDecoderTransformer2DModel(**ARCHITECTURE)).config
        assert (found.default_num_inference_steps, found.default_guidance_scale) == (25, guidance)
    pipeline = StudentStage(student, Accelerator(cpu=True)).pipeline(text)
    assert (pipeline.config.default_num_inference_steps, pipeline.config.default_guidance_scale) == (4, 1.0)
    assert type(pipeline.scheduler).__name__ == "FlowMatchLCMScheduler" and pipeline.scheduler.config.shift == 1.0


@pytest.mark.parametrize("blocks", [(), (4,), (0, -1)])
def test_feature_blocks_that_are_none(blocks, with_text):
    with pytest.raises(ValueError, match=r"feature_blocks \(.*\): the network has blocks 0 to 3"):
        StudentStage(replace(with_text, feature_blocks=blocks), Accelerator(cpu=True), GivenConditions)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_lora_is_the_student_s_alone(rank, student):
    stage = StudentStage(replace(student, lora=Lora(rank=rank)), Accelerator(cpu=True))
    assert all(("lora" in name) == (rank > 0) for name, p in stage.model.named_parameters() if p.requires_grad)
    assert not any("lora" in name for name, _ in stage.fake_score.module.named_parameters())
    assert not any(p.requires_grad for p in stage.teacher.parameters()) and not stage.teacher.training
    assert stage.model.training and stage.fake_score.module.training


@pytest.mark.parametrize("precision, dtype", [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_the_frozen_teacher_s_weights(precision, dtype, student):
    stage = StudentStage(replace(student, precision=precision), Accelerator(cpu=True))
    assert stage.teacher.proj_out.weight.dtype == dtype and stage.model.proj_out.weight.dtype == torch.float32
