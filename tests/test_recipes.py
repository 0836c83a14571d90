"""The recipes' own scripts, on a few small pictures."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file

from families import SqueezeNet
from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel

RECIPES = Path(__file__).parents[1] / "recipes"


def load(name: str, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(2):
        pixels = np.random.RandomState(index).randint(0, 256, (16, 16, 3)).astype("uint8")
        Image.fromarray(pixels).resize((288, 256), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def nano(monkeypatch):
    """With a smaller network."""
    module = load("nano", monkeypatch)
    small = dict(num_layers=2, num_attention_heads=1, adapter_dim=16, num_adapter_layers=1, pixel_dim=4)
    monkeypatch.setattr(module, "NANO", module.NANO | small)
    monkeypatch.setattr(module, "SIZES", {64: (1, 1.0)})
    return module


def published(folder: Path, taef1: AutoencoderTiny) -> Path:
    """TAEF1's weights as they are published."""
    state = taef1.state_dict()
    encoder = {k.removeprefix("encoder.layers."): v for k, v in state.items() if k.startswith("encoder.")}
    decoder = {k.removeprefix("decoder.layers."): v for k, v in state.items() if k.startswith("decoder.")}
    decoder = {f"{int((parts := k.split('.', 1))[0]) + 1}.{parts[1]}": v for k, v in decoder.items()}
    save_file(encoder, folder / "taef1_encoder.safetensors")
    save_file(decoder, folder / "taef1_decoder.safetensors")
    return folder / "taef1_encoder.safetensors"


def test_nano(nano, photos, tmp_path, capsys):
    torch.manual_seed(0)
    taef1 = AutoencoderTiny(latent_channels=16)
    save_file(SqueezeNet().state_dict(), tmp_path / "squeezenet.safetensors")
    common = dict(data=photos, taef1=published(tmp_path, taef1), out=tmp_path / "out", batch_size=2, device="cpu")
    common |= dict(squeezenet=tmp_path / "squeezenet.safetensors", compile=False)

    def run(stage, **kwargs):
        config = nano.Config(stage=stage, **common, **kwargs)
        nano.STAGES[stage](config)

    run("baseline")
    loaded = AutoencoderTiny.from_pretrained(tmp_path / "out" / "taef1")
    assert all(torch.equal(a, b) for a, b in zip(taef1.parameters(), loaded.parameters(), strict=True))
    run("encoder", minutes=1e-4)
    run("adapter", minutes=math.inf, piece=1e-4)
    assert not (tmp_path / "out" / "base.safetensors").exists()  # goes on where it was
    run("adapter", minutes=1e-4)
    assert "from step 1," in capsys.readouterr().out and (tmp_path / "out" / "base.safetensors").exists()
    run("teacher", minutes=1e-4)
    with pytest.raises(SystemExit, match="run the student's stage first"):
        run("polish", minutes=1e-4)
    run("student", minutes=1e-4, piece=0)
    run("student", minutes=1e-4)
    state = torch.load(tmp_path / "out" / "student.pt", weights_only=True)
    assert state["step"] >= 1 and state["minutes"] >= 1e-4
    run("polish", minutes=1e-4)
    teacher, student, polished = (
        PixelDecoderTransformer2DModel.from_pretrained(tmp_path / "out" / folder).state_dict()
        for folder in ("teacher", "student", "transformer")
    )
    fake = state["parts"]["fake"]
    moved = {name for name in teacher if not torch.equal(teacher[name], student[name])}
    base = {name for name in teacher if name.startswith(("adapter.convs.", "adapter.aux_rgb_head."))}
    assert moved and base and not moved & base  # the base stays as it is
    assert {name for name in base if not torch.equal(student[name], polished[name])}  # until it is polished
    assert any(not torch.equal(teacher[name], fake[name].bfloat16()) for name in moved)


def test_base_decoder(nano, photos, tmp_path):
    """With TAEF1's weights it is TAEF1's decoder; and it learns from its features."""
    torch.manual_seed(0)
    taef1 = AutoencoderTiny(latent_channels=16).eval()
    model, latents = nano.BaseDecoder(), torch.randn(2, 16, 8, 8)
    layers = [layer for layer in taef1.decoder.layers if any(True for _ in layer.parameters())]
    blocks = [layer for layer in layers if not isinstance(layer, torch.nn.Conv2d)]
    convs = [layer for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    for ours, theirs in zip([block for stage in model.stages for block in stage], blocks, strict=True):
        ours.load_state_dict(theirs.state_dict())
    for ours, theirs in zip([model.conv_in, *model.convs, model.to_small], convs, strict=True):
        ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        image, features = model(latents, torch.zeros(2))
        target, wanted = nano.taef1_features(taef1.decoder, latents)
        torch.testing.assert_close(target, taef1.decoder(latents))
        torch.testing.assert_close(image, target)
    assert [x.shape[-1] for x in wanted] == [8, 16, 32, 64]
    for ours, theirs in zip(features, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)

    common = dict(data=photos, taef1=published(tmp_path, taef1), out=tmp_path / "out", batch_size=2, device="cpu")
    nano.STAGES["base"](nano.Config(stage="base", **common, minutes=math.inf, piece=1e-4))
    assert not (tmp_path / "out" / "decoder.safetensors").exists()
    nano.STAGES["base"](nano.Config(stage="base", **common, minutes=1e-4))
    trained = load_file(tmp_path / "out" / "decoder.safetensors")
    model.load_state_dict(trained)


def test_muon_is_pytorchs(nano):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Sequential() for _ in range(2))
    for model in (ours, theirs):
        torch.manual_seed(1)
        model.add_module("mlp", torch.nn.Sequential(torch.nn.Linear(8, 24, bias=False)))
    muon = torch.optim.Muon(theirs.parameters(), 0.02, weight_decay=0.01, momentum=0.9)
    optimizer = nano.Optimizer(torch.nn.ModuleDict({"block": ours, "others": torch.nn.Linear(1, 1)}), 0.02)
    optimizer.steps = 50  # warmed up
    for _ in range(3):
        x = 0.3 * torch.randn(64, 8)  # gradients too small to be clipped
        theirs(x).square().mean().backward()
        muon.step()
        muon.zero_grad()
        optimizer.step(ours(x).square().mean(), 0.0)
    torch.testing.assert_close(ours.mlp[0].weight, theirs.mlp[0].weight, atol=2e-3, rtol=0)  # theirs in bfloat16


@pytest.mark.slow
def test_base(photos, tmp_path, monkeypatch):
    base = load("base", monkeypatch)
    common = dict(data=str(photos), encoder="nano", out=tmp_path, resolution=64, batch_size=2, micro_batch_size=1)
    for stage in ("teacher", "student"):
        base.train(base.configure(base.Config(stage=stage, steps=2, device="cpu", **common), stage))
    pipeline = PixelDecoderPipeline.from_pretrained(tmp_path / "student")
    assert 90e6 < sum(p.numel() for p in pipeline.transformer.parameters()) < 110e6
    image = pipeline(torch.randn(1, 16, 2, 2), output_type="pt").images
    assert image.shape == (1, 3, 64, 64) and image.isfinite().all()
