"""What is planned against what is measured."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderTiny
from torch.utils.flop_counter import FlopCounterMode

from conftest import TINY, TINY_NANO, tiny_model
from pixeldecoder import PixelDecoderTransformer2DModel, TinyLatentEncoder
from pixeldecoder.execution import set_attention
from pixeldecoder.plan import (
    Limits,
    Plan,
    _seconds,
    count_flops,
    default_chunk_size,
    estimate_seconds,
    measure_rates,
    memory_budget,
    must_offload,
    plan,
    plan_encoder,
    weight_bytes,
)
from pixeldecoder.tiling import Tiles

DECODE = """
import json, sys
import torch
import pixeldecoder.pipeline
from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.plan import measured_peak, plan
planned = []
pixeldecoder.pipeline.plan = lambda *a, **k: planned.append(plan(*a, **k)) or planned[0]
size, kwargs = json.loads(sys.argv[1])
pipeline = PixelDecoderPipeline.from_pretrained("nano")
pipeline(torch.randn(1, 16, size // 32, size // 32), num_inference_steps=1, **kwargs)
print(json.dumps([planned[0].tiles.count, planned[0].memory, measured_peak(pipeline.device)]))
"""


@pytest.mark.parametrize(
    ("size", "kwargs"), [(512, {}), (768, {"tile_size": None}), (1024, {}), (1536, {"max_memory": "1.2GB"})]
)
def test_peak_memory_is_what_was_planned(size, kwargs):
    command = [sys.executable, "-c", DECODE, json.dumps([size, kwargs])]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tiles, planned, peak = json.loads(output.splitlines()[-1])
    assert (tiles > 1) == (size > 768)
    assert 0.85 * peak < planned < 1.25 * peak
    if "max_memory" in kwargs:
        assert peak < 1.2e9


ENCODE = """
import json, sys
import torch
from diffusers import AutoencoderKL
from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.autoencoders import encode
from pixeldecoder.plan import held_memory, measured_peak
pipeline = PixelDecoderPipeline.from_pretrained("nano")
blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
vae = AutoencoderKL(**blocks, block_out_channels=(64, 64, 64, 64), latent_channels=16).eval()
sizes = []
def encoder(image):
    sizes.append(max(image.shape))
    return encode(vae, image)
encoder.autoencoder = vae
pipeline.encode_image(torch.zeros(1, 3, 64, 64), encoder)
before = held_memory(pipeline.device)
pipeline.encode_image(torch.zeros(1, 3, 512, 512), encoder, max_memory=before + int(sys.argv[1]))
print(json.dumps([max(sizes), measured_peak(pipeline.device) - before]))
"""


@pytest.mark.parametrize(("allowed", "side"), [(600_000_000, 512), (210_000_000, 256)])
def test_peak_memory_of_an_encoder(allowed, side):
    """Five tensors of 64 channels of the image, 336 MB, or of a tile of a quarter of it."""
    output = subprocess.run(
        [sys.executable, "-c", ENCODE, str(allowed)], capture_output=True, text=True, check=True
    ).stdout
    largest, peak = json.loads(output.splitlines()[-1])
    tensors = 5 * 64 * 4 * largest**2
    assert side * 0.75 < largest <= side and 0.8 * tensors < peak < 1.1 * tensors + 24 * 512**2 + 32 * 2**20 < allowed


@pytest.mark.parametrize(
    ("autoencoder", "width"),
    [
        (AutoencoderKL(block_out_channels=(32,)), 32),
        (AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 512)), 128),
        (AutoencoderTiny(encoder_block_out_channels=(8, 8, 8, 8)), 8),
        (TinyLatentEncoder(channels=12), 12),
        (AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1), 8 * 13 / 5),
    ],
    ids=lambda x: type(x).__name__,
)
def test_memory_of_encoders_by_hand(autoencoder, width, monkeypatch):
    """Five tensors, thirteen of Qwen-Image's, of the stage that has the largest, beside what is there already."""
    monkeypatch.setattr("pixeldecoder.plan.held_memory", lambda device: 1000)
    needed = 1000 + 96 * 2**20 + 24 * 2 * 512 * 768 + int(5 * width * 4 * 2 * 512 * 768)
    assert plan_encoder(autoencoder, 512, 768, 2, 8, needed).count == 1
    assert plan_encoder(autoencoder, 512, 768, 2, 8, needed - 5).count > 1


def test_what_is_no_convolutional_encoder_is_given_the_whole_image():
    for encoder in None, torch.nn.Linear(2, 2):
        assert plan_encoder(encoder, 5120, 64, 1, 16, 1).count == 1


def released(dtype=torch.bfloat16) -> PixelDecoderTransformer2DModel:
    with torch.device("meta"):
        return PixelDecoderTransformer2DModel().to(dtype)


def test_memory_is_saved_by_chunks_first_then_by_tiles():
    model, device = released(), torch.device("cuda")  # nothing is allocated there
    plans = [
        plan(model, 2048, 2048, limits=Limits(max_memory=memory), text_tokens=300, device=device, trained_size=2048)
        for memory in ("20GB", "4.2GB", "3.8GB")
    ]
    assert [p.tiles.count for p in plans[:2]] == [1, 1] and plans[2].tiles.count > 1
    assert plans[0].chunk_size > plans[1].chunk_size
    assert plans[0].memory > plans[1].memory > plans[2].memory
    assert "whole" in str(plans[0]) and "tiles of" in str(plans[2])
    with pytest.raises(ValueError, match="allow more memory"):
        plan(model, 2048, 2048, limits=Limits(max_memory="2.8GB"), device=device)
    assert not plan(model, 2048, 2048, limits=Limits(max_memory="100GB", tile_size=None), device=device).tiled


def test_released_network_takes_little_memory():
    """Of 13 and 22.5 GB that the paper reports at 2048 and 4096 px, text encoder left out."""
    device = torch.device("cuda")
    for size, limit in (2048, 6e9), (4096, 9e9):
        memory = plan(
            released(), size, size, limits=Limits(tile_size=None, max_memory="80GB"), text_tokens=300, device=device
        ).memory
        assert 3e9 < memory < limit


def test_beyond_the_trained_range():
    model = tiny_model(**TINY_NANO)
    assert not plan(model, 512, 512, trained_size=512).tiled
    assert not plan(model, 256, 1024, trained_size=512).tiled  # as many pixels
    assert plan(model, 512, 528, trained_size=512).tiled and plan(model, 64, 1040, trained_size=512).tiled
    assert not plan(model, 1024, 1024).tiled


@pytest.mark.parametrize("config", [TINY, TINY_NANO], ids=["text", "nano"])
def test_flops(config):
    """As a gradient is recorded, since the counter does not know oneDNN's products."""
    model = tiny_model(**config)
    text = None if config["text_embed_dim"] is None else torch.randn(1, 7, 20)
    features = model.encode_latents(torch.randn(1, 16, 8, 6), 256, 192, sigma=0.0)
    set_attention(model, "_native_math")  # whose products are counted
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 256, 192), 500.0, text, latent_features=features)
    counted = counter.get_flop_counts()["Global"]
    attended = sum(count for name, count in counted.items() if "bmm" in str(name))
    expected = count_flops(model, 16 * 12, 0 if text is None else 7)
    assert attended == pytest.approx(expected[1])
    assert sum(counted.values()) - attended == pytest.approx(expected[0], rel=0.01)  # the time embedding is not counted


def test_time_is_estimated():
    model = tiny_model(**TINY_NANO).to(torch.bfloat16)
    rates = measure_rates(model, torch.device("cpu"), tokens=256)
    assert all(1e6 < rate < 1e14 for rate in rates)
    one, four = (
        estimate_seconds(plan(model, size, size, limits=Limits(tile_size=None)), rates, 4) for size in (256, 512)
    )
    assert 4 < four / one < 16


def test_offloading_is_for_accelerators():
    model = released()
    assert not must_offload(model, torch.device("cpu"), "1GB")
    assert must_offload(model, torch.device("cuda"), "4GB") and not must_offload(model, torch.device("cuda"), "8GB")
    offloaded = plan(model, 1024, 1024, device=torch.device("cpu"), offload=True).memory
    assert offloaded < plan(model, 1024, 1024, device=torch.device("cpu")).memory - 2e9


def test_chunks_and_overlap_by_default():
    """The largest tensor of a chunk takes 8 MiB on a CPU, 128 MiB elsewhere: 2 bytes to each of 4 x 256 x 16 values."""
    model = released()
    for device, patches in ("cpu", 256), ("cuda", 4096):
        assert default_chunk_size(model, torch.device(device)) == patches
    assert default_chunk_size(released(torch.float32), torch.device("cuda")) == 2048

    def tiles(**limits) -> Tiles:
        limits = Limits(**limits, max_memory="80GB")
        return plan(model, 4096, 4096, limits=limits, trained_size=2048, device=torch.device("cuda")).tiles

    assert tiles() == Tiles(1408, 1408, (0, 1344, 2688), (0, 1344, 2688), 64)
    assert tiles(tile_size=128).overlap == 32  # a quarter
    assert tiles(tile_size=512, tile_overlap=16).overlap == 16


@pytest.mark.parametrize(
    ("config", "chunk_size", "kwargs", "expected"),
    [
        # Pixels: 2 x 32 x 32 of tokens, 32 x 2048 and 12 x 16 x 2048 of pixels, 4 x 32 x 24 of attention.
        (TINY, 8, {}, 4 * (2 * 32 * 64 + 1.1 * (3 * 3 * 8192 + 2048 + 65536 + 393216 + 3072))),
        # Patches, tokens of 512, with text: they, what is attended to, three times joined, and 12 x 4 x 512 of a chunk.
        (TINY | dict(num_attention_heads=32, pixel_dim=4), 1, {},
         4 * (2 * 32 * 1024 + 1.1 * (3 * 3 * 8192 + 5 * (16384 + 5120) + 24576))),
        # The same in tiles of 32 x 32: the canvas once more, features of 8 patches, 3 x 3 x 2 x 1024 of a tile.
        (TINY | dict(num_attention_heads=32, pixel_dim=4, per_channel_gate=False), 1,
         dict(tile_size=32, tile_overlap=16),
         4 * (2 * (32 + 8) * 513 + 1.1 * (2 * 3 * 8192 + 2 * 3 * 2048 + 5 * (4096 + 5120) + 24576))),
        # The adapter, 5 x 32 x 1280 of it at once, before anything else.
        (TINY | dict(adapter_dim=1280, num_adapter_layers=0, pixel_dim=4), 1, {},
         4 * (2 * 32 * 64 + 1.1 * 5 * 32 * 1280)),
    ],
    ids=["pixels", "patches", "tiles", "adapter"],
)  # fmt: skip
def test_memory_by_hand(config, chunk_size, kwargs, expected, monkeypatch):
    """Two images of 64 x 64 px, 32 patches of 2 of 16 px, and 5 text tokens to each, in float32."""
    monkeypatch.setattr("pixeldecoder.plan.held_memory", lambda device: 1000)
    limits = Limits(**dict(tile_size=None, chunk_size=chunk_size, max_memory="80GB") | kwargs)
    chosen = plan(tiny_model(**config), 64, 64, 2, 5, limits)
    assert chosen.memory == pytest.approx(1000 + 96 * 2**20 + expected, abs=2)


def test_weights_elsewhere_are_counted(monkeypatch):
    """Those of a model that is yet to be moved, or of a block and the next where they take turns."""
    monkeypatch.setattr("pixeldecoder.plan.held_memory", lambda device: 0)
    model, limits = tiny_model(**TINY), Limits(tile_size=None, max_memory="80GB")
    here = plan(model, 64, 64, limits=limits).memory
    limits = replace(limits, chunk_size=plan(model, 64, 64, limits=limits).chunk_size)
    there = plan(model, 64, 64, limits=limits, device=torch.device("cuda"))
    assert there.memory - here == 4 * sum(p.numel() for p in model.parameters())
    largest = max(
        sum(p.numel() for p in m.parameters()) for m in (*model.patch_blocks, *model.pixel_blocks, model.adapter)
    )
    assert plan(model, 64, 64, limits=limits, offload=True).memory - here == 2 * 4 * largest


def test_seconds_from_known_rates():
    """4 passes of 1 TFLOP at 1 TFLOP/s and 2 at 4, a base of 2 once, and a quarter more for all else."""
    known = Plan(
        64, 64, Tiles(64, 64, (0,), (0,), 0), 16, 0,
        matrix_flops=1e12, attention_flops=2e12, base_rows=None, base_flops=2e12,
    )  # fmt: skip
    assert estimate_seconds(known, (1e12, 4e12), 4) == pytest.approx(10)


def test_limit_of_a_container(monkeypatch, tmp_path):
    """What it may take, less what it holds; but files read, such as weights, are held for nobody."""
    monkeypatch.setattr("pixeldecoder.plan.CGROUP", tmp_path)
    monkeypatch.setattr("pixeldecoder.plan.held_memory", lambda device: 1000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=50_000))
    cpu = torch.device("cpu")
    assert memory_budget(cpu) == 1000 + 47_500  # no container
    (tmp_path / "memory.current").write_text("30000\n")
    (tmp_path / "memory.stat").write_text("anon 6000\nfile 24000\nactive_file 4000\ninactive_file 20000\n")
    for limit, free in ("max", 50_000), ("40000", 30_000), ("900000", 50_000):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert memory_budget(cpu) == 1000 + 0.95 * free
    assert memory_budget(cpu, "2GB") == memory_budget(cpu, "2000000000") == 2 * 10**9


def test_operations_are_those_of_all_tiles_and_images():
    model = tiny_model()
    chosen = plan(
        model, 256, 512, limits=Limits(tile_size=128, tile_overlap=0, max_memory="80GB"), batch=3, text_tokens=7
    )
    matrix, attention = count_flops(model, 8 * 8, 7)
    assert chosen.tiles.count == 8
    assert (chosen.matrix_flops, chosen.attention_flops) == (24 * matrix, 24 * attention)


@pytest.mark.parametrize(("overlap", "smallest"), [(None, 256), (32, 128)])
def test_tiles_are_made_smaller_down_to_four_overlaps(overlap, smallest):
    with pytest.raises(ValueError, match=f"with {smallest} x {smallest} px tiles and 16 patches at a time"):
        plan(tiny_model(), 2048, 2048, limits=Limits(tile_overlap=overlap, max_memory=1))


def test_overlap_is_nothing_to_an_image_of_one_tile():
    assert plan(tiny_model(), 32, 32, limits=Limits(tile_overlap=64, max_memory="80GB")).tiles.count == 1


def test_operations_of_text():
    narrow, wide = (count_flops(tiny_model(**TINY | dict(text_embed_dim=width)), 12, 7)[0] for width in (20, 50))
    assert wide - narrow == 2 * 7 * 30 * 32


def test_operations_of_gates():
    """Two, from 32 channels: 32 values of a token, or one. What they make of the latents they make once an image."""
    wide, narrow = (count_flops(tiny_model(**TINY | dict(per_channel_gate=wide)), 12)[0] for wide in (True, False))
    assert wide - narrow == 2 * 12 * 2 * 32 * 31


def test_memory_of_accelerators(monkeypatch):
    """What is free there, and what the allocator holds for nobody; of all 95 %, and what is held already."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40_000, 90_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3000)
    assert memory_budget(torch.device("cuda")) == 3000 + 43_700
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 50_000)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 10_000)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 4000)
    assert memory_budget(torch.device("mps")) == 4000 + 38_000


def test_rates_are_of_the_operations_that_were_timed(monkeypatch):
    """4 D columns of D values, two operations each; two products of tokens x tokens x D."""
    monkeypatch.setattr("pixeldecoder.plan._seconds", lambda function, device: function() is None or 2.0)
    dim = TINY_NANO["num_attention_heads"] * TINY_NANO["attention_head_dim"]
    rates = measure_rates(tiny_model(**TINY_NANO), torch.device("cpu"), tokens=64)
    assert rates == (2 * 64 * 4 * dim * dim / 2, 2 * 2 * 64 * 64 * dim / 2)


def test_the_fastest_run_counts_but_for_the_first(monkeypatch):
    clock, lengths = [0.0], iter([0.01, 0.3, 0.05, 0.2, 0.001])
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def function():
        clock[0] += next(lengths)

    assert _seconds(function, torch.device("cpu")) == pytest.approx(0.05) and next(lengths) == 0.2


def test_a_plan_in_words():
    plain = Plan(64, 96, Tiles(64, 96, (0,), (0,), 0), 16, 1_260_000_000, 0, 0, None, 0)
    assert str(plain) == "96 x 64 px, whole, 16 patches at a time, 1.3 GB of memory"
    tiled = replace(plain, tiles=Tiles(32, 48, (0, 32), (0, 48), 0))
    assert str(tiled) == "96 x 64 px, 4 tiles of 48 x 32 px, 16 patches at a time, 1.3 GB of memory"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tile_size": "big"}, "tile_size is 'big': expected a whole number of pixels"),
        ({"tile_overlap": "auto"}, "tile_overlap is 'auto': expected a whole number of pixels"),
        ({"chunk_size": 1.5}, "chunk_size is 1.5: expected a whole number of patches"),
        ({"max_memory": 1}, "make a smaller image$"),
        ({"max_memory": 1, "tile_size": 64}, "with 64 x 64 px tiles and .* make smaller tiles or a smaller image$"),
        ({"max_memory": 1, "tile_size": None}, "with the whole image and 16 patches at a time"),
        ({"max_memory": 1, "chunk_size": 300}, "and 300 patches at a time"),
    ],
)
def test_plans_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        plan(tiny_model(), 128, 128, limits=Limits(**{"tile_overlap": 0} | given))


def test_chunks_are_tried_in_quarters(monkeypatch):
    """Down to 16 patches, of each size of tiles, which halve."""
    tried = []

    def peak_memory(model, height, width, batch, text_tokens, tiles, chunk, *rest):
        tried.append((tiles.height, chunk))
        return 0 if tiles.height == 32 else 2

    monkeypatch.setattr("pixeldecoder.plan.peak_memory", peak_memory)
    monkeypatch.setattr("pixeldecoder.plan.CHUNK_BYTES", {"cpu": 4 * 256 * 8 * 4 * 300})
    chosen = plan(tiny_model(), 128, 128, limits=Limits(tile_overlap=0, max_memory=1))
    assert tried == [(side, chunk) for side in (128, 64) for chunk in (300, 75, 18, 16)] + [(32, 300)]
    assert (chosen.chunk_size, chosen.tiles.count) == (300, 16)
    monkeypatch.setattr("pixeldecoder.plan.CHUNK_BYTES", {"cpu": 1})
    assert default_chunk_size(tiny_model(), torch.device("cpu")) == 16


def test_blocks_take_turns_beyond_half_of_the_memory():
    model = released()
    weights, cuda = weight_bytes(model), torch.device("cuda")
    assert must_offload(model, cuda, 2 * weights - 2) and not must_offload(model, cuda, 2 * weights)
