"""The recipes' own scripts, on a few small pictures."""

import importlib.util
import itertools
import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.checkpoint import FileSystemReader

from conftest import TINY_NANO
from families import SqueezeNet
from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.training.config import Optimizer

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
    """With a smaller network, on small crops."""
    module = load("nano", monkeypatch)
    small = dict(num_layers=2, num_attention_heads=1, adapter_dim=16, num_adapter_layers=1, pixel_dim=4)
    monkeypatch.setattr(module, "NANO", module.NANO | small)
    monkeypatch.setattr(module.NanoStage, "crops", {4: (1, 1.0)})  # of which some cells are inside
    for stage in (module.BaseStage, module.TeacherStage, module.StudentStage):
        monkeypatch.setattr(stage, "crops", {2: (1, 1.0)})
    return module


@pytest.fixture
def taef1():
    torch.manual_seed(0)
    return AutoencoderTiny(latent_channels=16).eval()


@pytest.fixture
def run(nano, taef1, photos, tmp_path):
    """Trains a stage for some steps; returns the folder of the last checkpoint."""
    save_file(SqueezeNet().state_dict(), tmp_path / "squeezenet.safetensors")
    files = dict(taef1=published(tmp_path, taef1), squeezenet=tmp_path / "squeezenet.safetensors")

    def run(stage, steps, out="out", **kwargs):
        config = nano.Config(
            stage=stage, data=photos, **files, out=tmp_path / out, resolution=64, batch_size=2, device="cpu"
        )
        nano.main(replace(config, stage="baseline"))
        config = replace(nano.configure(config), precision="float32", steps=steps, log_every=1)
        return nano.train(replace(config, **kwargs), nano.STAGES[stage])

    return run


def published(folder: Path, taef1: AutoencoderTiny) -> Path:
    """TAEF1's weights as they are published."""
    state = taef1.state_dict()
    encoder = {k.removeprefix("encoder.layers."): v for k, v in state.items() if k.startswith("encoder.")}
    decoder = {k.removeprefix("decoder.layers."): v for k, v in state.items() if k.startswith("decoder.")}
    decoder = {f"{int((parts := k.split('.', 1))[0]) + 1}.{parts[1]}": v for k, v in decoder.items()}
    save_file(encoder, folder / "taef1_encoder.safetensors")
    save_file(decoder, folder / "taef1_decoder.safetensors")
    return folder / "taef1_encoder.safetensors"


def test_nano(run, nano, taef1, tmp_path):
    """Every stage, from what the ones before it have left."""
    with pytest.raises(ValueError, match="run the encoder's stage first"):
        run("adapter", 1)
    run("encoder", 2)
    loaded = AutoencoderTiny.from_pretrained(tmp_path / "out" / "taef1")
    assert all(torch.equal(a, b) for a, b in zip(taef1.parameters(), loaded.parameters(), strict=True))
    assert nano.TinyLatentEncoder.from_pretrained(tmp_path / "out" / "encoder")
    run("base", 2)
    assert nano.BaseDecoder.from_pretrained(tmp_path / "out" / "base")
    run("adapter", 2, validate_every=1)
    log = [json.loads(line) for line in (tmp_path / "out" / "adapter_training" / "log.jsonl").read_text().splitlines()]
    assert {"rgb", "psnr_sigma_0.4"} <= set().union(*log)
    run("teacher", 2)
    with pytest.raises(ValueError, match="run the student's stage first"):
        run("polish", 1)
    run("student", 3)
    log = [json.loads(line) for line in (tmp_path / "out" / "student_training" / "log.jsonl").read_text().splitlines()]
    terms = {"pixel", "perceptual", "gan", "discriminator", "r1", "vsd", "fake_score"}
    assert terms <= set(log[-1]) and all(math.isfinite(value) for value in log[-1].values())
    # The fake score is the teacher at first, so that nothing is distilled.
    assert log[0]["gan"] == log[0]["vsd"] == 0 and log[-1]["gan"] > 0 and log[-1]["vsd"] > 0
    run("polish", 2, weights=nano.Weights(gan=0, vsd=0))
    log = (tmp_path / "out" / "polish_training" / "log.jsonl").read_text()
    assert "pixel" in log and not any(term in log for term in ("gan", "discriminator", "vsd", "fake_score"))

    weights = {
        stage: PixelDecoderTransformer2DModel.from_pretrained(tmp_path / "out" / stage / "transformer").state_dict()
        for stage in ("adapter", "teacher", "student", "polish")
    }

    def moved(one, other):
        return {name for name in weights[one] if not torch.equal(weights[one][name], weights[other][name])}

    base = {name for name in weights["teacher"] if name.startswith(("adapter.convs.", "adapter.aux_rgb_head."))}
    assert base and moved("adapter", "teacher") and not base & moved("adapter", "teacher")  # it stays as it is
    assert moved("teacher", "student") and not base & moved("teacher", "student")
    assert base & moved("student", "polish")  # until it is polished


@pytest.mark.parametrize("stage", ["encoder", "student"])
def test_nano_resumed_equals_uninterrupted(stage, run, nano, tmp_path):
    """Killed after a checkpoint and a step more; critics and Muon's momentum go on, too."""
    for before in itertools.takewhile(lambda name: name != stage, ("encoder", "adapter", "teacher")):
        run(before, 1)
    whole = run(stage, 4)
    folder = tmp_path / "out" / f"{stage}_killed"
    sound = nano.NanoStage.update

    def killed(self, batches, step, progress):
        if step == 3:
            raise KeyboardInterrupt
        return sound(self, batches, step, progress)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nano.NanoStage, "update", killed)
        run(stage, 4, output=folder, checkpoint_every=2)
    resumed = run(stage, 4, output=folder)
    assert resumed.name == whole.name == "step_00000004"
    for one, other in zip(*(sorted(tensors(path).items()) for path in (whole, resumed)), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1]), one[0]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, optimizers too."""
    reader = FileSystemReader(checkpoint)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    assert any("momentum" in name for name in state) and any("exp_avg" in name for name in state)
    return state


def test_kept_latents_are_of_these_pictures(nano, photos, taef1, tmp_path):
    """They are made once; for other pictures again."""
    taef1.save_pretrained(tmp_path / "taef1")
    load = lambda: nano.Photos(nano.Folder(photos), [str(tmp_path / "taef1")], torch.device("cpu"))  # noqa: E731
    first = load()
    image = nano.shrink(first.images[1][None].float() / 127.5 - 1, 4)  # mirrored
    torch.testing.assert_close(first.latents[0][1].float()[None], taef1.encode(image).latents, atol=2e-3, rtol=1e-3)
    kept = (tmp_path / "taef1" / "latents.pt").stat().st_mtime_ns
    load()
    assert (tmp_path / "taef1" / "latents.pt").stat().st_mtime_ns == kept
    (photos / "0.png").rename(photos / "9.png")
    assert torch.equal(load().latents[0][2], first.latents[0][0])
    assert (tmp_path / "taef1" / "latents.pt").stat().st_mtime_ns != kept


def test_crops_are_cut_alike(nano, photos, taef1, tmp_path):
    """Latents belong to the picture's part, and cells beside a cut are told from those at the photo's edge."""
    taef1.save_pretrained(tmp_path / "taef1")
    all_photos = nano.Photos(nano.Folder(photos), [str(tmp_path / "taef1")], torch.device("cpu"))
    # Every cell by its own value, in picture and latents.
    for image, latents in zip(all_photos.images, all_photos.latents[0], strict=True):
        cells = torch.arange(latents[0].numel()).reshape(latents.shape[1:])
        latents[:] = cells
        image[:] = cells.repeat_interleave(32, 0).repeat_interleave(32, 1)
    crops = all_photos.crops(3, list(range(64)), random.Random(0), 5)
    assert crops.position == 5 and crops.image.shape == (64, 3, 96, 96)
    cells = crops.latents[0][:, 0]
    assert torch.equal(((crops.image[:, 0, 16::32, 16::32] + 1) * 127.5).round(), cells)
    height, width = 8, 9
    rows, columns = cells[:, 1, 1] // width, cells[:, 1, 1] % width
    for mask, row, column in zip(crops.inside[:, 0], rows.tolist(), columns.tolist(), strict=True):
        expected = torch.ones(3, 3)
        expected[0] *= row == 1
        expected[2] *= row == height - 2
        expected[:, 0] *= column == 1
        expected[:, 2] *= column == width - 2
        assert torch.equal(mask, expected)
    assert (rows == 1).any() and (rows == height - 2).any() and not crops.inside.all()


def test_base_decoder(nano, taef1):
    """With TAEF1's weights it is TAEF1's decoder."""
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


def test_muon_is_pytorchs(nano):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Sequential() for _ in range(2))
    for model in (ours, theirs):
        torch.manual_seed(1)
        model.add_module("mlp", torch.nn.Sequential(torch.nn.Linear(8, 24, bias=False)))
    muon = torch.optim.Muon(theirs.parameters(), 0.02, weight_decay=0.01, momentum=0.9)
    model = torch.nn.ModuleDict({"block": ours, "others": torch.nn.Linear(1, 1)})
    optimizer = nano.Muon(model, Optimizer(weight_decay=0.01), 0.02)
    for _ in range(3):
        x = 0.3 * torch.randn(64, 8)
        theirs(x).square().mean().backward()
        muon.step()
        muon.zero_grad()
        ours(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(ours.mlp[0].weight, theirs.mlp[0].weight, atol=2e-3, rtol=0)  # theirs in bfloat16


@pytest.mark.parametrize("run", ["teacher, everything", "student"])
def test_training_memory_is_counted(run, monkeypatch, tmp_path):
    """Weights, average, gradients and AdamW's two moments are there at once; PyTorch is as it was afterwards."""
    memory = load("training_memory", monkeypatch)
    (tmp_path / "network.json").write_text(json.dumps(TINY_NANO))
    before = torch.nn.Module._apply, torch.nn.init.trunc_normal_
    config = replace(memory.RUNS[run], architecture=tmp_path / "network.json", micro_batch_size=1)
    if run == "student":
        config = replace(config, feature_blocks=(0,))
    peak, _ = memory.one(config, 64, memory.Config())
    weights = 4 * sum(p.numel() for p in PixelDecoderTransformer2DModel(**TINY_NANO).parameters())
    networks = 4 + 1 + (1 + 4 if run == "student" else 0)
    assert networks * weights < 1.2 * peak < 3 * networks * weights + 2e7
    assert (torch.nn.Module._apply, torch.nn.init.trunc_normal_) == before
    assert not isinstance(torch.zeros(1), FakeTensor)


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
