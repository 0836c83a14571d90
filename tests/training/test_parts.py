"""Updates, averages and networks that train, by numbers worked out by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import TINY, TINY_V15
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.training.config import Data, Lora, Optimizer, Run
from pixeldecoder.training.data import Batch
from pixeldecoder.training.distill import StudentStage
from pixeldecoder.training.network import add_lora, build_network, freeze_unused, read_architecture
from pixeldecoder.training.parts import (
    Average,
    Part,
    TrainingError,
    update,
)
from pixeldecoder.training.teacher import TeacherStage
from training.conftest import write_photos

RUN = Run(precision="float32", device="cpu")
ACCELERATOR = Accelerator(cpu=True)


class Scale(nn.Module):
    """x -> w x."""

    def __init__(self, value: float):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([value]))

    def forward(self, x):
        return self.w * x


def part(value: float, config: Run = RUN, **settings) -> Part:
    defaults = dict(learning_rate=1.0, weight_decay=0.0, warmup_steps=0, max_grad_norm=None)
    return Part(Scale(value), Optimizer(**defaults | settings), config, ACCELERATOR)


def batch(*values: float) -> Batch:
    """One number for a picture, which is called by it."""
    return Batch(torch.tensor(values), [""] * len(values), [f"{v:g}" for v in values], list(range(len(values))), 1)


def weight(trained: Part) -> float:
    w = trained.module.w
    return (w.full_tensor() if isinstance(w, DTensor) else w).item()


def test_average_warms_up():
    """Decays 1/10, 2/11 and 3/12, then at most that of the configuration."""
    for decay, expected in (0.99, (0.9, 1.8, 2.7)), (0.15, (0.9, 1.835, 2.82525)):
        model = Scale(0.0)
        average = Average(model, decay)
        for number, (value, mean) in enumerate(zip((1.0, 2.0, 3.0), expected, strict=True)):
            model.w.data.fill_(value)
            average.update(number)
            assert average.values["w"].item() == pytest.approx(mean, rel=1e-6)
    with average.applied():
        assert model.w.item() == pytest.approx(2.82525, rel=1e-6)
    assert model.w.item() == 3.0
    frozen = Scale(0.0).requires_grad_(False)
    assert Average(frozen, 0.9).values == {}


def test_accumulation_is_a_mean():
    """The gradient of mean (w x)^2 / 2 at w = 1 is the mean of x^2, whether x comes at once or in two batches."""
    whole, halves = part(1.0, max_grad_norm=0.1), part(1.0, max_grad_norm=0.1)

    def losses(trained):
        return lambda batch: {"half": trained(batch.image).square().mean() / 2}

    one = update({"scale": whole}, [batch(1, 2, 3, 4)], losses(whole), 0, 0, ACCELERATOR)
    two = update({"scale": halves}, [batch(1, 2), batch(3, 4)], losses(halves), 0, 0, ACCELERATOR)
    assert one == {"half": 3.75, "gradient_norm_scale": 7.5} and one == two
    assert weight(whole) == weight(halves)


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize(
    "slope, longest, kept", [(7.0, None, 7.0), (7.0, 0.1, 0.1), (7.0, 100.0, 7.0), (7e30, 0.1, 0.1)]
)
def test_a_gradient_is_cut_to_its_longest(slope, longest, kept, fsdp):
    """Also one whose square float32 cannot hold."""
    trained = part(1.0, replace(RUN, fsdp=fsdp), max_grad_norm=longest)
    trained(torch.tensor([slope])).sum().backward()
    assert trained.clip().item() == pytest.approx(slope, rel=1e-6)
    grad = trained.module.w.grad
    assert (grad.full_tensor() if fsdp else grad).item() == pytest.approx(kept, rel=1e-5)


def test_the_learning_rate_warms_up_over_a_part_s_own_updates():
    """AdamW's first step is as long as the learning rate, that of update 3 of 10 four tenths of it."""

    def moved(number, **settings):
        trained = part(1.0, **settings)
        update({"w": trained}, [batch(5)], lambda batch: {"w": trained(batch.image).sum()}, 99, number, ACCELERATOR)
        return 1 - weight(trained)

    assert [moved(n, warmup_steps=10) for n in (0, 3, 9, 50)] == pytest.approx([0.1, 0.4, 1, 1], abs=1e-6)
    assert moved(0, weight_decay=0.5, learning_rate=0.1) == pytest.approx(0.1 * 0.5 + 0.1, abs=1e-6)


def test_gradient_norms_are_named_after_their_parts():
    first, second = part(1.0), part(1.0)
    values = update(
        {"student": first, "fake_score": second},
        [batch(3)],
        lambda batch: {"a": first(batch.image).sum(), "b": 2 * second(batch.image).sum()},
        0, 0, ACCELERATOR,
    )  # fmt: skip
    assert values == {"a": 3.0, "b": 6.0, "gradient_norm_student": 3.0, "gradient_norm_fake_score": 6.0}


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("bad", [(0,), (1,)])
def test_a_gradient_that_is_not_finite_leaves_every_part_as_it_was(fsdp, bad):
    """The loss is finite, the slope of a root at 0 is not; in the first or in the second of two batches."""
    sound, broken = part(2.0, replace(RUN, fsdp=fsdp)), part(2.0, replace(RUN, fsdp=fsdp))

    def losses(batch):
        return {"sound": sound(batch.image).sum(), "broken": broken(batch.image).clamp_min(0).sqrt().sum()}

    batches = [batch(4, 9), batch(16, 25)]
    for index in bad:
        batches[index].image[0] = 0.0
    expected = r"the gradient of step 7 \(fake_score\) is not finite, in a batch of 4: 4, 9, 16, 25"
    with pytest.raises(TrainingError, match=expected):
        update({"student": sound, "fake_score": broken}, batches, losses, 7, 0, ACCELERATOR)
    assert weight(sound) == weight(broken) == 2.0
    assert not sound.optimizer.state and not broken.optimizer.state


def test_a_loss_that_is_not_finite_names_its_batch():
    trained = part(2.0)
    with pytest.raises(
        TrainingError, match=r"step 7 is not finite \(.* what is given to scale \(\w+\)\), in the batch of inf, 1$"
    ):
        update(
            {"scale": trained},
            [batch(4), batch(math.inf, 1), batch(2)],
            lambda batch: {"sum": trained(batch.image).sum(), "other": trained(batch.image[-1:]).sum()},
            7, 0, ACCELERATOR,
        )  # fmt: skip
    assert weight(trained) == 2.0


class Looks(TorchDispatchMode):
    """Counts how often a tensor's value is asked for, which waits for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_values_are_looked_at_once_a_step(monkeypatch):
    """However many terms and batches there are; `tolist` does not come by the dispatcher."""
    looks = []
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda self, tolist=torch.Tensor.tolist: looks.append(1) or tolist(self)
    )
    monkeypatch.setattr(Part, "step", lambda *_: None)  # a CPU's AdamW asks for its own count
    trained = part(2.0)
    with Looks() as mode:
        update(
            {"scale": trained},
            [batch(i) for i in range(1, 5)],
            lambda batch: {f"{i}": trained(batch.image).sum() for i in range(3)},
            0, 0, ACCELERATOR,
        )  # fmt: skip
    assert mode.count + len(looks) == 1


def test_a_teacher_s_batch_in_micro_batches(teacher, tmp_path):
    """Its auxiliary term is a weighted mean over all four, of which two halves are not the mean."""
    photos = write_photos(tmp_path / "four", 4, (64, 64))
    config = replace(teacher, data=Data(source=str(photos), resolution=64), latent_dropout=0.3)
    image = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    names = list("abcd")
    # Samples whose weights are not alike, one of them dropped.
    samples = [0, 1, 2, 3]
    found = []
    for parts in ([slice(0, 4)], [slice(0, 2), slice(2, 4)], [slice(i, i + 1) for i in range(4)]):
        torch.manual_seed(0)
        stage = TeacherStage(config, ACCELERATOR)
        weights = stage._aux_rgb_weight(Batch(image, names, names, samples, 1))
        gradients = []
        stage.network.optimizer.register_step_pre_hook(
            lambda *_, stage=stage, gradients=gradients: gradients.extend(
                p.grad.clone() for p in stage.network.parameters
            )
        )
        values = stage.update([Batch(image[s], names[s], names[s], samples[s], 1) for s in parts], 0)
        found.append((values, gradients))
    assert weights.unique().numel() > 2
    (whole, gradients), *others = found
    for values, accumulated in others:
        assert values == pytest.approx(whole, rel=1e-5)
        for a, b in zip(gradients, accumulated, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_optimizer_is_set_as_its_part_says():
    (group,) = part(1.0, betas=(0.5, 0.7), weight_decay=0.3).optimizer.param_groups
    assert group["betas"] == (0.5, 0.7) and group["weight_decay"] == 0.3


def test_the_learning_rate_falls_over_the_run():
    trained = part(1.0, decay=0.9, warmup_steps=2)
    for number, progress, rate in ((0, 0.0, 0.5), (1, 0.5, 0.55), (9, 1.0, 0.1)):
        trained.step(number, progress)
        assert trained.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_bfloat16_is_of_the_computation_alone():
    """And of none under FSDP2, which casts by itself."""
    for precision, dtype in ("bfloat16", torch.bfloat16), ("float32", torch.float32):
        config = replace(RUN, precision=precision)
        trained = Part(nn.Linear(2, 2), Optimizer(), config, ACCELERATOR)
        assert trained(torch.ones(1, 2)).dtype == dtype and trained.module.weight.dtype == torch.float32
    assert not part(1.0, replace(RUN, precision="bfloat16", fsdp=True)).autocast


@pytest.mark.parametrize("aux_rgb", [True, False])
def test_what_no_loss_reaches_is_frozen(aux_rgb):
    """The last block's text branch after its keys and values, and an auxiliary head without a loss."""
    model = PixelDecoderTransformer2DModel(**TINY_V15)
    freeze_unused(model, aux_rgb)
    frozen = {name.rpartition(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    text = {"text.norm2", "text_mlp.gate_proj", "text_mlp.up_proj", "text_mlp.down_proj", "attn.to_add_out"}
    head = {name.rpartition(".")[0] for name, _ in model.named_parameters() if name.startswith("adapter.aux_rgb_head")}
    assert head and frozen == {f"patch_blocks.3.{name}" for name in text} | (set() if aux_rgb else head)


@pytest.mark.parametrize("name", ["backbone", "adapter"])
def test_what_a_lora_trains(name):
    model = PixelDecoderTransformer2DModel(**TINY_V15)
    add_lora(model, Lora(rank=3, part=name))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == (
        {"patch_blocks", "pixel_blocks"} if name == "backbone" else {"adapter"}
    )
    layers = {module for module in model.modules() if hasattr(module, "lora_A")}
    assert all("lora_" in name for name in trained) and len(trained) == 2 * len(layers)
    assert all(layer.scaling == {"default": 1.0} and layer.r == {"default": 3} for layer in layers)
    kinds = {name.partition(".lora_")[0].split(".", 2)[-1] for name in trained}
    backbone = {
        "attn.to_qkv", "attn.to_out", "attn.add_qkv", "attn.to_add_out", "compress", "expand", "mlp.0", "mlp.2",
        *(f"{mlp}.{layer}_proj" for mlp in ("mlp", "text_mlp") for layer in ("gate", "up", "down")),
    }  # fmt: skip
    assert kinds == backbone if name == "backbone" else {"0", "2", "pixel_head"} <= kinds | {"pixel_head"}


def test_blocks_are_compiled_where_that_is_wanted(monkeypatch):
    compiled = []
    monkeypatch.setattr(PixelDecoderTransformer2DModel, "compile_repeated_blocks", lambda self: compiled.append(self))
    for wanted in False, True:
        for module in PixelDecoderTransformer2DModel(**TINY), nn.Linear(2, 2):
            Part(module, Optimizer(), replace(RUN, compile=wanted), ACCELERATOR)
        assert len(compiled) == wanted


def test_an_architecture_may_hold_what_diffusers_writes(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "X", "num_layers": 3}')
    assert read_architecture(tmp_path / "config.json") == {"num_layers": 3}


def test_weights_that_do_not_fit_an_architecture(tmp_path):
    PixelDecoderTransformer2DModel(**TINY).save_pretrained(tmp_path / "model")
    (tmp_path / "wide.json").write_text(json.dumps(TINY | dict(pixel_dim=12)))
    with pytest.raises(ValueError, match=r"model does not fit .*wide.json: \d+ tensors differ: "):
        build_network(replace(RUN, model=str(tmp_path / "model"), architecture=tmp_path / "wide.json"))
    (tmp_path / "deep.json").write_text(json.dumps(TINY | dict(num_layers=5)))
    with pytest.raises(ValueError, match=r"tensors differ: patch_blocks.4"):
        build_network(replace(RUN, model=str(tmp_path / "model"), architecture=tmp_path / "deep.json"))


@pytest.mark.parametrize("kind", ["teacher", "student"])
@pytest.mark.parametrize("wanted", [True, False])
def test_gradient_checkpointing_is_as_configured(kind, wanted, request):
    config = replace(request.getfixturevalue(kind), gradient_checkpointing=wanted)
    stage = (TeacherStage if kind == "teacher" else StudentStage)(config, ACCELERATOR)
    networks = [stage.model] if kind == "teacher" else [stage.model, stage.fake_score.module, stage.teacher]
    assert [network.is_gradient_checkpointing for network in networks] == [wanted] * len(networks)
