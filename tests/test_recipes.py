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
from accelerate import Accelerator
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
    monkeypatch.setattr(module, "SMALLER", {})
    monkeypatch.setattr(module.NanoStage, "crops", {4: (1, 1.0)})  # of which some cells are inside
    for stage in (module.BaseStage, module.CascadeStage, module.TeacherStage):
        monkeypatch.setattr(stage, "crops", {2: (1, 1.0)})
    for stage in (module.PhotoStage, module.StudentStage):  # whose pictures are cut and shrunk
        monkeypatch.setattr(stage, "crops", {4: (1, 1.0)})
    monkeypatch.setattr(module, "CASCADE", 3)
    return module


@pytest.fixture
def taef1():
    torch.manual_seed(0)
    return AutoencoderTiny(latent_channels=16).eval()


@pytest.fixture
def run(nano, taef1, photos, tmp_path):
    """Trains a stage for some steps; returns the folder of the last checkpoint."""
    weights = published(tmp_path / "weights", taef1)

    def run(stage, steps, out="out", space="flux", **kwargs):
        config = nano.Config(
            stage=stage, data=photos, weights=weights, out=tmp_path / out, resolution=64, batch_size=2, crops=3,
            device="cpu", latent_space=space,
        )  # fmt: skip
        config = replace(nano.configure(config), precision="float32", steps=steps, log_every=1)
        return nano.train(replace(config, **kwargs), nano.STAGES[stage])

    return run


def published(folder: Path, taef1: AutoencoderTiny) -> Path:
    """The networks that nano learns from, small or with random weights, as they are published."""
    folder.mkdir()
    publish(folder, "taef1", taef1)
    save_file(SqueezeNet().state_dict(), folder / "squeezenet1_0.safetensors")
    save_file(real_esrgan(blocks=1), folder / "realesrgan_x4plus.safetensors")
    save_file(efficientnet(), folder / "efficientnet_lite0.safetensors")
    return folder


def publish(folder: Path, name: str, autoencoder: AutoencoderTiny) -> None:
    state = autoencoder.state_dict()
    encoder = {k.removeprefix("encoder.layers."): v for k, v in state.items() if k.startswith("encoder.")}
    decoder = {k.removeprefix("decoder.layers."): v for k, v in state.items() if k.startswith("decoder.")}
    decoder = {f"{int((parts := k.split('.', 1))[0]) + 1}.{parts[1]}": v for k, v in decoder.items()}
    save_file(encoder, folder / f"{name}_encoder.safetensors")
    save_file(decoder, folder / f"{name}_decoder.safetensors")


def real_esrgan(blocks: int) -> dict[str, torch.Tensor]:
    shapes = {"conv_first": (64, 3), "conv_last": (3, 64)}
    shapes |= dict.fromkeys(("conv_body", "conv_up1", "conv_up2", "conv_hr"), (64, 64))
    for block, part, i in itertools.product(range(blocks), (1, 2, 3), range(1, 6)):
        shapes[f"body.{block}.rdb{part}.conv{i}"] = (64 if i == 5 else 32, 32 + 32 * i)
    convs = {name: torch.nn.Conv2d(inputs, outputs, 3) for name, (outputs, inputs) in shapes.items()}
    return {f"{name}.{k}": v.detach() for name, conv in convs.items() for k, v in conv.state_dict().items()}


def efficientnet() -> dict[str, torch.Tensor]:
    stages = ((1, 3, 1, 16), (2, 3, 6, 24), (2, 5, 6, 40), (3, 3, 6, 80), (3, 5, 6, 112))  # blocks, kernel, widening
    parts, width, block = {"_conv_stem": torch.nn.Conv2d(3, 32, 3, bias=False), "_bn0": torch.nn.BatchNorm2d(32)}, 32, 0
    for count, kernel, wider, out in stages:
        for _ in range(count):
            name, inner = f"_blocks.{block}", width * wider
            if wider > 1:
                parts[f"{name}._expand_conv"] = torch.nn.Conv2d(width, inner, 1, bias=False)
                parts[f"{name}._bn0"] = torch.nn.BatchNorm2d(inner)
            parts[f"{name}._depthwise_conv"] = torch.nn.Conv2d(inner, inner, kernel, groups=inner, bias=False)
            parts[f"{name}._project_conv"] = torch.nn.Conv2d(inner, out, 1, bias=False)
            parts |= {f"{name}._bn1": torch.nn.BatchNorm2d(inner), f"{name}._bn2": torch.nn.BatchNorm2d(out)}
            width, block = out, block + 1
    state = {f"{name}.{k}": v.detach() for name, part in parts.items() for k, v in part.state_dict().items()}
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def test_nano(run, nano, taef1, tmp_path):
    """Every stage, from what the ones before it have left."""
    with pytest.raises(ValueError, match="run the encoder's stage first"):
        run("cascade", 1)
    run("encoder", 2)
    assert nano.TinyLatentEncoder.from_pretrained(tmp_path / "out" / "encoder")
    assert {"units", "latents"} <= log(tmp_path / "out" / "encoder_training")
    with pytest.raises(ValueError, match="run the base's stage first"):
        run("cascade", 1)
    run("base", 2, validate_every=1)
    assert {"units", "features", "psnr_sigma_0.4"} <= log(tmp_path / "out" / "base_training")
    run("cascade", 2)
    assert {"pixel", "colour", "perceptual"} <= log(tmp_path / "out" / "cascade_training")
    run("photo", 2)
    judged = {"pixel", "colour", "grid", "perceptual", "gan", "discriminator", "r1"}
    assert judged <= log(tmp_path / "out" / "photo_training")
    run("teacher", 2)
    assert "x0" in log(tmp_path / "out" / "teacher_training")
    run("student", 3)
    lines = (tmp_path / "out" / "student_training" / "log.jsonl").read_text().splitlines()
    first, *_, last = map(json.loads, lines)
    assert judged | {"spread", "vsd", "fake_score"} <= set(last)
    assert all(math.isfinite(value) for value in last.values())
    # The fake score is the teacher at first, so that nothing is distilled.
    assert first["gan"] == 0 < last["gan"] and abs(first["vsd"]) < 1e-9 < last["vsd"]
    run("student", 2, output=tmp_path / "plain", export=tmp_path / "made", terms=nano.Weights(gan=0, vsd=0))
    assert not {"gan", "discriminator", "vsd", "fake_score"} & log(tmp_path / "plain")
    assert "spread" not in log(tmp_path / "out" / "photo_training")

    weights = {
        stage: PixelDecoderTransformer2DModel.from_pretrained(tmp_path / "out" / stage / "transformer").state_dict()
        for stage in ("base", "cascade", "photo", "teacher", "student")
    }

    def moved(one, other):
        """What of the base, and whether anything beside it."""
        changed = {name for name in weights[one] if not torch.equal(weights[one][name], weights[other][name])}
        base = {name for name in changed if name.startswith("base.")}
        return bool(base), bool(changed - base)

    assert moved("base", "cascade") == moved("cascade", "photo") == (True, False)
    assert moved("photo", "teacher") == (True, True) and moved("teacher", "student") == (False, True)
    for name, tensor in weights["teacher"].items():
        if name.startswith("base."):
            torch.testing.assert_close(tensor, (weights["cascade"][name] + weights["photo"][name]) / 2)


def test_taef1_itself_imitates_taef1(nano, taef1, photos, tmp_path):
    """Unit by unit and whole; with another first convolution the first unit alone, or all that follow, do not."""
    weights = published(tmp_path / "weights", taef1)
    config = nano.Config(stage="baseline", data=photos, weights=weights, out=tmp_path, device="cpu")
    nano.main(config)
    loaded = AutoencoderTiny.from_pretrained(tmp_path / "taef1")
    assert all(torch.equal(a, b) for a, b in zip(taef1.parameters(), loaded.parameters(), strict=True))
    (tmp_path / "taef1").rename(tmp_path / "encoder")
    config = replace(config, stage="base")
    config = replace(nano.configure(config), precision="float32")
    encoder, base = (stage(config, Accelerator(cpu=True)) for stage in (nano.EncoderStage, nano.BaseStage))
    encoder.model.encoder.load_state_dict(taef1.encoder.state_dict())
    decoder = with_weights_of(taef1, base.model.base)

    latents, sigma = torch.randn(2, 16, 6, 6), torch.zeros(2)
    for x, told, stage, first in (
        (torch.rand(2, 3, 48, 48), None, encoder, encoder.model.encoder.layers[0]),
        (latents, sigma, base, decoder.conv_in),
    ):
        assert stage.imitation(x, told) < 1e-9 and stage.imitation(x, told, alone=True) < 1e-9
        torch.nn.init.normal_(first.weight)
        whole, alone = stage.imitation(x, told), stage.imitation(x, told, alone=True)
        assert whole > alone > 1e-3


@pytest.mark.parametrize(("space", "name", "channels"), [("sdxl", "taesdxl", 4), ("flux2", "taef2", 32)])
def test_nano_of_other_latents(space, name, channels, run, nano, tmp_path):
    """Every stage, and a pipeline that decodes the latents that its own encoder makes."""
    teachers = sys.modules["teachers"]
    autoencoder = AutoencoderTiny(latent_channels=channels)
    if space == "flux2":
        for layers, blocks in (autoencoder.encoder.layers, (11, 12, 13)), (autoencoder.decoder.layers, (2, 3, 4)):
            for block in blocks:
                layers[block] = teachers.PooledBlock()
    publish(tmp_path / "weights", name, autoencoder)
    loaded = teachers.tiny_autoencoder(tmp_path / "weights", name)
    assert all(torch.equal(a, b) for a, b in zip(autoencoder.parameters(), loaded.parameters(), strict=True))
    for stage in ("encoder", "base", "cascade", "photo", "teacher", "student"):
        run(stage, 1, space=space)
    config = nano.Config(stage="bundle", weights=tmp_path / "weights", out=tmp_path / "out", latent_space=space)
    nano.main(config)
    if space == "flux2":
        with pytest.raises(ValueError, match="taef2 has layers"):
            nano.main(replace(config, stage="baseline"))
    pipeline = PixelDecoderPipeline.from_pretrained(tmp_path / "out" / "nano")
    latents = pipeline.encode_image(torch.rand(1, 3, 32, 48) * 2 - 1)
    cells = (4 * channels, 2, 3) if space == "flux2" else (channels, 4, 6)
    assert latents.shape == (1, *cells) and pipeline.config.latent_space == space
    image = pipeline(latents, output_type="pt").images
    assert image.shape == (1, 3, 128, 192) and image.isfinite().all()


def test_decoders_of_other_latents_are_small(monkeypatch):
    module = load("nano", monkeypatch)
    for space in module.SPACES:
        with torch.device("meta"):
            parts = PixelDecoderTransformer2DModel(**module.architecture(space)), module.TinyLatentEncoder()
        megabytes = 2 * sum(p.numel() for part in parts for p in part.parameters()) / 1e6
        assert megabytes < (36 if space == "flux" else 12), (space, megabytes)


def log(folder: Path) -> set[str]:
    return set().union(*(json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()))


@pytest.mark.parametrize("stage", ["encoder", "student"])
def test_nano_resumed_equals_uninterrupted(stage, run, nano, tmp_path):
    """Killed after a checkpoint and a step more; critics and Muon's momentum go on, too."""
    for before in itertools.takewhile(lambda name: name != stage, ("encoder", "base", "cascade", "photo", "teacher")):
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
    load = lambda: nano.Photos(nano.Folder(photos), {tmp_path / "latents.pt": taef1}, torch.device("cpu"))  # noqa: E731
    first = load()
    image = nano.shrink(first.images[1][None].float() / 127.5 - 1, 4)  # mirrored
    torch.testing.assert_close(first.latents[0][1].float()[None], taef1.encode(image).latents, atol=2e-3, rtol=1e-3)
    kept = (tmp_path / "latents.pt").stat().st_mtime_ns
    load()
    assert (tmp_path / "latents.pt").stat().st_mtime_ns == kept
    (photos / "0.png").rename(photos / "9.png")
    assert torch.equal(load().latents[0][2], first.latents[0][0])
    assert (tmp_path / "latents.pt").stat().st_mtime_ns != kept


def test_crops_are_cut_alike(nano, photos, taef1, tmp_path):
    """Latents belong to the picture's part, and cells beside a cut are told from those at the photo's edge."""
    all_photos = nano.Photos(nano.Folder(photos), {tmp_path / "latents.pt": taef1}, torch.device("cpu"))
    # Every cell by its own value, in picture and latents.
    for image, latents in zip(all_photos.images, all_photos.latents[0], strict=True):
        cells = torch.arange(latents[0].numel()).reshape(latents.shape[1:])
        latents[:] = cells
        image[:] = cells.repeat_interleave(32, 0).repeat_interleave(32, 1)
    crops = all_photos.crops(3, all_photos.places(3, 64, random.Random(0)), list(range(64)), 5)
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


def test_cascade_s_pictures_are_kept(nano, photos, taef1, tmp_path):
    """Of the latents at their place; made once for the same photos, seed and number."""
    all_photos = nano.Photos(nano.Folder(photos), {tmp_path / "latents.pt": taef1}, torch.device("cpu"))
    seen = []

    def make(latents):
        seen.append(latents)
        return latents[:, :3].repeat_interleave(32, 2).repeat_interleave(32, 3) / 4

    path = tmp_path / "cascade.pt"
    kept = all_photos.cascade(path, 4, 0, make)
    assert len(kept) == len(seen) == 4
    for ((index, y, x), picture), latents in zip(kept, seen, strict=True):
        expected = all_photos.latents[0][index][None, :, y : y + 3, x : x + 3].float()
        assert torch.equal(latents, expected)
        values = picture[:, 16::32, 16::32] / 127.5 - 1
        torch.testing.assert_close(values, (expected[0, :3] / 4).clamp(-1, 1), atol=0.005, rtol=0)
    again = all_photos.cascade(path, 4, 0, make)
    assert len(seen) == 4 and all(torch.equal(a[1], b[1]) for a, b in zip(kept, again, strict=True))
    all_photos.cascade(path, 2, 1, make)
    assert len(seen) == 6


def with_weights_of(taef1, base):
    """A base that does what TAEF1's decoder does, whatever sigma it is told."""
    layers = [layer for layer in taef1.decoder.layers if any(True for _ in layer.parameters())]
    blocks = [layer for layer in layers if not isinstance(layer, torch.nn.Conv2d)]
    convs = [layer for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    for ours, theirs in zip([block for stage in base.stages for block in stage], blocks, strict=True):
        ours.load_state_dict(theirs.state_dict())
    for ours, theirs in zip([base.conv_in, *base.convs, base.to_small], convs, strict=True):
        ours.load_state_dict(theirs.state_dict())
    torch.nn.init.zeros_(base.sigma_embed[2].weight)
    torch.nn.init.zeros_(base.sigma_embed[2].bias)
    return base


def test_the_base_has_taesds_shape(nano, taef1):
    """With TAEF1's weights its small image is that of TAEF1's decoder."""
    model, latents = with_weights_of(taef1, nano.LatentDecoder(16, 3, 2, 64)), torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        image = model.small(model.features(latents, torch.zeros(2))[-1])
    torch.testing.assert_close(image, taef1.decoder(latents).detach())


def test_colour_error(nano):
    """Of greys the distance of their lightness, of strong colours less; with a gradient where it is nothing."""
    grey = torch.zeros(1, 3, 32, 32, requires_grad=True)
    nano.colour_error(grey, grey.detach()).backward()
    assert grey.grad.isfinite().all()
    lighter = torch.full_like(grey, 0.2)
    lightness = (nano.lab(lighter) - nano.lab(grey))[:, 0].mean()
    torch.testing.assert_close(nano.colour_error(lighter, grey), lightness, atol=0.01, rtol=0)
    red, redder = (torch.tensor([r, -0.6, -0.6])[None, :, None, None].expand(1, 3, 32, 32) for r in (0.5, 0.6))
    whole = (nano.lab(redder) - nano.lab(red)).norm(dim=1).mean()
    assert 0.5 < nano.colour_error(redder, red) < 0.7 * whole


def test_image_layers_are_not_muons(nano):
    model = torch.nn.ModuleDict({"network": nano.LatentDecoder(4, 1, 1, 8)})
    muons = nano.Muon(model, Optimizer(), 0.02).param_groups[1]["params"]
    base = model["network"]
    for layer, moved in ((base.to_small, False), (base.to_image, False), (base.refine, True), (base.conv_in, True)):
        assert any(layer.weight is p for p in muons) == moved


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
