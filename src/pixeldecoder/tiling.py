"""One noisy canvas in, its velocity out, tile by tile: images of any size.

The network sees one tile at a time, with what the adapter made of the *whole* latents. Velocities, not images, are
blended, at every step and on one canvas of noise, so that neighbouring tiles agree and no seam appears.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from pixeldecoder.models.adapter import LatentFeatures

LONGEST_SIDE = 2**24
"""Of an image, in pixels; to list the tiles of a longer one would take minutes."""


@dataclass(frozen=True)
class Tiles:
    """How an image is cut: tiles of one size, evenly spread; all in pixels."""

    height: int
    width: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    overlap: int
    """Pixels that neighbours share, or more where tiles are spread so."""

    @property
    def count(self) -> int:
        return len(self.tops) * len(self.lefts)


def cut(height: int, width: int, tile_size: int, overlap: int, patch: int) -> Tiles:
    """Tiles of at most `tile_size` a side for an image, all in pixels; borders lie between patches.

    Raises:
        ValueError: an image that nobody has, a tile of less than two patches, or not larger than its overlap.
    """
    if max(height, width) > LONGEST_SIDE:
        raise ValueError(f"{width} x {height} px: expected at most {LONGEST_SIDE} px a side")
    if tile_size < 2 * patch:
        raise ValueError(f"tile size {tile_size}: expected at least {2 * patch} pixels, two patches")
    if overlap < 0 or overlap >= tile_size:
        raise ValueError(f"tile overlap {overlap}: expected less than the tile size, {tile_size} pixels")
    (tile_height, tops), (tile_width, lefts) = (_spread(side, tile_size, overlap, patch) for side in (height, width))
    return Tiles(tile_height, tile_width, tops, lefts, overlap)


def _spread(side: int, tile: int, overlap: int, patch: int) -> tuple[int, tuple[int, ...]]:
    """Side of the tiles and where they start, in pixels; whole patches both."""
    length, tile, overlap = side // patch, tile // patch, -(-overlap // patch)
    if length <= tile:
        return side, (0,)
    overlap = min(overlap, tile - 1)
    count = -(-(length - overlap) // (tile - overlap))
    tile = -(-(length + (count - 1) * overlap) // count)  # no larger than so many tiles need
    return tile * patch, tuple(i * (length - tile) // (count - 1) * patch for i in range(count))


def tiled_velocity(
    velocity: Callable[[torch.Tensor, LatentFeatures | None], torch.Tensor],
    image: torch.Tensor,
    features: LatentFeatures | None,
    tiles: Tiles,
    patch: int,
    aux_pixels: int,
) -> torch.Tensor:
    """The velocity of a whole noisy image.

    Args:
        velocity: of one tile, from its noisy image (B, 3, h, w) and the features of its patches.
        image: (B, 3, H, W).
        features: of the whole image.
        tiles: of it.
        patch, aux_pixels: side of a patch in pixels, of the image and of the auxiliary image.
    """
    output = torch.zeros_like(image)
    for top, left, weight in _placed(tiles, image.device):
        area = (..., slice(top, top + tiles.height), slice(left, left + tiles.width))
        part = features and crop_features(features, image.shape[3] // patch, tiles, top, left, patch, aux_pixels)
        output[area] += velocity(image[area], part) * weight
    return output


def tiled_latents(encoder: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """The latents (B, C, H/f, W/f) of an image (B, 3, H, W), by an encoder that sees one tile at a time.

    Args:
        encoder: convolutional, of a tile (B, 3, h, w) to (B, C, h/f, w/f).
        tiles: of the image, cut between latent cells, of f pixels a side.
    """
    output, places = None, [(top, left) for top in tiles.tops for left in tiles.lefts]
    for index, (top, left) in enumerate(places):
        latents = encoder(image[..., top : top + tiles.height, left : left + tiles.width])
        if output is None:
            cell = tiles.height // latents.shape[-2]
            output = latents.new_zeros(*latents.shape[:2], *(side // cell for side in image.shape[-2:]))
            small = Tiles(
                tiles.height // cell, tiles.width // cell, tuple(y // cell for y in tiles.tops),
                tuple(x // cell for x in tiles.lefts), tiles.overlap // cell,
            )  # fmt: skip
            placed = list(_placed(small, image.device))
        y, x, weight = placed[index]
        output[..., y : y + small.height, x : x + small.width] += latents * weight.to(latents)
    assert output is not None
    return output


def _placed(tiles: Tiles, device: torch.device) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Each tile's top and left, and the weights (h, w) with which it is added to the others."""
    rows, columns = (
        _weights(starts[-1] + tile, tile, starts, tiles.overlap, device)
        for tile, starts in ((tiles.height, tiles.tops), (tiles.width, tiles.lefts))
    )
    for top, row in zip(tiles.tops, rows, strict=True):
        for left, column in zip(tiles.lefts, columns, strict=True):
            yield top, left, row[:, None] * column


def _weights(side: int, tile: int, starts: tuple[int, ...], overlap: int, device: torch.device) -> list[torch.Tensor]:
    """For each tile its weights along one axis (tile,): ramps towards its neighbours; over all tiles they sum to 1."""
    position = torch.arange(tile, device=device) + 0.5
    ramp = torch.minimum(position, tile - position).clamp(max=max(overlap, 1))
    total = torch.zeros(side, device=device)
    weights = []
    for i, start in enumerate(starts):
        weight = ramp.clone()
        if i == 0:
            weight[: tile // 2] = ramp.max()
        if i == len(starts) - 1:
            weight[tile // 2 :] = ramp.max()
        total[start : start + tile] += weight
        weights.append(weight)
    return [weight / total[start : start + tile] for weight, start in zip(weights, starts, strict=True)]


def crop_features(
    features: LatentFeatures, columns: int, tiles: Tiles, top: int, left: int, patch: int, aux_pixels: int
) -> LatentFeatures:
    """The features of one tile, from those of an image `columns` patches wide."""

    def patches(tokens: torch.Tensor) -> torch.Tensor:
        grid = tokens.unflatten(1, (-1, columns))
        rows = slice(top // patch, (top + tiles.height) // patch)
        return grid[:, rows, left // patch : (left + tiles.width) // patch].flatten(1, 2)

    aux, base = features.aux_rgb, features.base
    if aux is not None:
        y, x, height, width = (side // patch * aux_pixels for side in (top, left, tiles.height, tiles.width))
        aux = aux[..., y : y + height, x : x + width]
    return LatentFeatures(
        injections=tuple(patches(tokens) for tokens in features.injections),
        pixel=None if features.pixel is None else patches(features.pixel),
        aux_rgb=aux,
        gates=tuple(None if gate is None else patches(gate) for gate in features.gates),
        pixel_gate=None if features.pixel_gate is None else patches(features.pixel_gate),
        base=None if base is None else base[..., top : top + tiles.height, left : left + tiles.width],
    )
