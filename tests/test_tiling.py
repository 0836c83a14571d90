"""Tiles against the whole image."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import TINY, TINY_NANO, TINY_V15, tiny_pipeline
from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.models.adapter import LatentFeatures
from pixeldecoder.presets import NANO
from pixeldecoder.tiling import Tiles, cut, tiled_latents, tiled_velocity


@pytest.mark.parametrize("side", [16, 48, 512, 528, 1000 // 8 * 8, 4096])
@pytest.mark.parametrize(("tile", "overlap", "patch"), [(512, 64, 16), (512, 0, 8), (256, 255, 8), (40, 20, 8)])
def test_tiles_cover_the_image_and_their_weights_sum_to_one(side, tile, overlap, patch):
    side = side // patch * patch
    tiles = cut(side, 3 * patch, tile, overlap, patch)
    assert tiles.tops[0] == 0 and tiles.tops[-1] + tiles.height == side
    assert all(top % patch == 0 for top in (*tiles.tops, tiles.height)) and tiles.height <= max(tile, patch)
    shared = [a + tiles.height - b for a, b in zip(tiles.tops, tiles.tops[1:], strict=False)]
    assert all(pixels >= min(overlap, tiles.height - patch) for pixels in shared)
    calls = []
    image = torch.randn(1, 3, side, 3 * patch)
    velocity = tiled_velocity(lambda x, _: calls.append(1) or x, image, None, tiles, patch, 4)
    torch.testing.assert_close(velocity, image)
    assert len(calls) == tiles.count


@pytest.mark.parametrize(
    ("side", "tile", "overlap", "patch", "length", "starts"),
    [
        (1024, 512, 64, 16, 384, (0, 320, 640)),  # 64 patches: 3 tiles of 24, where 2 of 32 would share none
        (1024, 512, 0, 16, 512, (0, 512)),
        (1024, 512, 60, 16, 384, (0, 320, 640)),  # of whole patches
        (1024, 544, 64, 16, 544, (0, 480)),
        (528, 512, 64, 16, 304, (0, 224)),
        (80, 32, 0, 16, 32, (0, 16, 48)),  # cannot be spread evenly
        (512, 512, 64, 16, 512, (0,)),
        (64, 40, 39, 8, 40, (0, 8, 16, 24)),  # at least a patch further each time
        (520, 512, 0, 8, 264, (0, 256)),
    ],
)
def test_where_tiles_lie(side, tile, overlap, patch, length, starts):
    tiles = cut(side, patch, tile, overlap, patch)
    assert (tiles.height, tiles.tops, tiles.width, tiles.lefts) == (length, starts, patch, (0,))
    assert tiles.count == len(starts)
    turned = cut(patch, side, tile, overlap, patch)
    assert turned == Tiles(patch, length, (0,), starts, overlap) == replace(turned, overlap=overlap)
    assert replace(tiles, lefts=(0, 8)).count == 2 * len(starts)


def test_weights_ramp():
    """Where two tiles meet, the velocity passes smoothly from one to the other."""
    tiles = cut(8, 48, 32, 16, 8)
    assert tiles == Tiles(8, 32, (0,), (0, 16), 16)
    seen = iter([0.0, 1.0])
    ones = torch.ones(1, 3, 8, 48)
    velocity = tiled_velocity(lambda x, _: x * next(seen), ones, None, tiles, 8, 2)
    expected = torch.cat([torch.zeros(16), (torch.arange(16) + 0.5) / 16, torch.ones(16)])
    torch.testing.assert_close(velocity[0, 0, 0], expected)


@pytest.mark.parametrize(
    ("lefts", "overlap", "expected"),
    [
        # Overlap of 8, 12 shared: ramps of 8 pixels, level where they are past.
        ((0, 20), 8, [*[1] * 20, *(min(8, 11.5 - i) / (min(8, 11.5 - i) + min(8, i + 0.5)) for i in range(12))]),
        # More shared than half a tile: ramps end at half of it, and no weight jumps there.
        ((0, 8), 24, [*[1] * 8, *(15.5 / (16 + i) for i in range(8)), *((15.5 - i) / 24 for i in range(8)),
                      *((7.5 - i) / (23 - i) for i in range(8))]),
    ],
)  # fmt: skip
def test_weights_by_hand(lefts, overlap, expected):
    """Of the first of two tiles of 32 px."""
    tiles = Tiles(8, 32, (0,), lefts, overlap)
    seen = iter([1.0, 0.0])
    ones = torch.ones(1, 3, 8, 32 + lefts[1])
    velocity = tiled_velocity(lambda x, _: x * next(seen), ones, None, tiles, 8, 2)
    torch.testing.assert_close(velocity[0, 0, 0], torch.tensor([*expected, *[0.0] * lefts[1]]))
    assert velocity.diff(dim=3).abs().max() < 0.15


def test_every_tile_gets_its_own_features():
    """A network that returns its features: each patch finds what the adapter made for it."""
    patch, aux_pixels, grid = 8, 2, (6, 9)
    tokens = torch.arange(54.0).reshape(1, 54, 1)
    aux = F.interpolate(tokens.reshape(1, 1, *grid), scale_factor=2.0)

    def network(image: torch.Tensor, features: LatentFeatures) -> torch.Tensor:
        size = image.shape[-2] // patch, image.shape[-1] // patch
        per_patch = [x.reshape(1, 1, *size) for x in (*features.injections, features.pixel)]
        enlarged = F.interpolate(torch.cat(per_patch, dim=1), scale_factor=float(patch))
        assert torch.equal(F.interpolate(features.aux_rgb, scale_factor=4.0), enlarged[:, :1])
        return enlarged

    features = LatentFeatures(injections=(tokens, 2 * tokens), pixel=3 * tokens, aux_rgb=aux)
    image = torch.zeros(1, 3, 48, 72)
    velocity = tiled_velocity(network, image, features, cut(48, 72, 32, 8, patch), patch, aux_pixels)
    expected = F.interpolate(tokens.reshape(1, 1, *grid), scale_factor=8.0)
    torch.testing.assert_close(velocity, torch.cat([expected, 2 * expected, 3 * expected], dim=1))


@pytest.mark.parametrize("config", [TINY, TINY_V15, TINY_NANO], ids=["v1", "v1.5", "nano"])
def test_pipeline_tiles(config):
    """Any decoder, also two images at once; one tile is the whole image; a decoder's own range decides by itself."""
    pipeline = tiny_pipeline(**config)
    latents, text = torch.randn(2, 16, 5, 3), None if config["text_embed_dim"] is None else torch.randn(1, 5, 20)

    def decode(**kwargs):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        result = pipeline(latents, prompt_embeds=text, generator=generators, output_type="pt", **kwargs)
        return result.images

    whole, tiled = decode(), decode(tile_size=64, tile_overlap=32)
    assert tiled.shape == whole.shape == (2, 3, 160, 96) and not torch.equal(tiled, whole)
    assert torch.equal(decode(tile_size=160), whole)
    pipeline.register_to_config(trained_size=64)
    assert torch.equal(decode(tile_overlap=32), tiled) and torch.equal(decode(tile_size=None), whole)


@pytest.fixture(scope="module")
def decoded():
    """A 768 x 1024 px picture, whole and in tiles, (H, W, 3) in [0, 1]."""
    pipeline = PixelDecoderPipeline.from_pretrained("nano")
    pipeline.set_progress_bar_config(disable=True)
    photo = Image.open(next((NANO / "samples").glob("*.webp"))).convert("RGB").resize((256, 192))
    images = {
        size: pipeline.upscale(
            photo, generator=torch.Generator().manual_seed(0), tile_size=size, output_type="np", num_inference_steps=2
        ).images[0]
        for size in (None, "auto")
    }
    return images[None], images["auto"]


def test_tiles_look_like_the_whole(decoded):
    whole, tiled = decoded
    psnr = -10 * np.log10(((whole - tiled) ** 2).mean())
    assert 35 < psnr < 90  # 90: no tiles would have been used


def test_no_seam_is_seen(decoded):
    """What tiles change has no edges where tiles begin and end, nor in the middle of what they share."""
    whole, tiled = decoded
    tiles = cut(768, 1024, 512, 64, 16)
    assert tiles.count == 6
    for axis, starts, length in (0, tiles.tops, tiles.height), (1, tiles.lefts, tiles.width):
        change = np.abs(np.diff(tiled - whole, axis=axis)).mean(axis=(1 - axis, 2))
        gradient = np.abs(np.diff(tiled, axis=axis)).mean(axis=(1 - axis, 2))
        borders = [x for start in starts for x in (start, start + length) if 0 < x < tiled.shape[axis]]
        at = np.array([x - 1 for x in borders])
        assert len(at) >= 2
        away = np.abs(np.arange(len(gradient))[:, None] - at).min(axis=1) > 8
        same_phase = away & ((np.arange(len(gradient)) + 1) % 16 == 0)  # patch borders, as tile borders are
        assert gradient[at].mean() < 1.25 * gradient[same_phase].mean()
        assert change[at].mean() < 0.25 * gradient[at].mean()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tile_size": 16}, "tile size 16: expected at least 32 pixels, two patches"),
        ({"tile_size": 64, "tile_overlap": 64}, "tile overlap 64: expected less than the tile size, 64 pixels"),
        ({"tile_size": 64, "tile_overlap": -1}, "tile overlap -1"),
        ({"chunk_size": 0}, "expected a chunk size of at least 1 patch, got 0"),
        ({"max_memory": "lots"}, "expected bytes, or a size such"),
        ({"max_memory": 0}, '0: expected bytes, or a size such as "6GB"'),
        (
            {"max_memory": "1MB"},
            "96 x 96 px would take .* GB with the whole image and 16 patches at a time, but 0.00 GB may be",
        ),
    ],
)
def test_bad_layout(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()(torch.randn(1, 16, 3, 3), **kwargs)


def test_smallest_tiles_and_largest_overlaps():
    """Two patches; one pixel less than the tile, of which the last patch is a new one."""
    assert cut(64, 64, 16, 15, 8).tops == (0, 8, 16, 24, 32, 40, 48)
    for tile, overlap, message in (15, 0, "expected at least 16 pixels"), (16, 16, "less than the tile size, 16"):
        with pytest.raises(ValueError, match=message):
            cut(64, 64, tile, overlap, 8)


def test_three_tiles_of_both_axes_by_hand():
    """Without an overlap, each keeps its own; ramps are a pixel long."""
    tiles = cut(48, 24, 16, 0, 8)
    assert tiles == Tiles(16, 16, (0, 16, 32), (0, 8), 0)
    seen = iter(range(6))
    velocity = tiled_velocity(lambda x, _: x * next(seen), torch.ones(1, 3, 48, 24), None, tiles, 8, 2)
    rows = velocity[0, 0, 8::16]
    shared = [1 / 3, *[0.5] * 6, 2 / 3]  # the middle columns are of both
    for row, found in enumerate(rows):
        torch.testing.assert_close(found - 2 * row, torch.tensor([*[0.0] * 8, *shared, *[1.0] * 8]))


@pytest.mark.parametrize(("height", "width", "side"), [(64, 96, 32), (40, 200, 64), (128, 64, 64)])
def test_tiles_of_latents_are_placed_where_they_belong(height, width, side):
    """An encoder that looks at no neighbours gives the same in tiles as whole."""
    image = torch.randn(2, 3, height, width)
    encoder = lambda x: F.avg_pool2d(x, 8)  # noqa: E731
    tiles = cut(height, width, side, side // 4, 8)
    assert tiles.count > 1
    torch.testing.assert_close(tiled_latents(encoder, image, tiles), encoder(image))


def test_tiles_of_latents_are_blended():
    """Over the overlap the one gives way to the other."""
    level = iter([0.0, 1.0])
    tiles = cut(32, 96, 64, 32, 8)
    latents = tiled_latents(
        lambda x: torch.full((1, 1, 4, x.shape[3] // 8), next(level)), torch.zeros(1, 3, 32, 96), tiles
    )
    torch.testing.assert_close(latents[0, 0, 0], torch.tensor([0, 0, 0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1]))
