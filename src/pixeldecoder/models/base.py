"""Latents and their sigma in, an image at full size out: the convolutional base that a decoder may stand on."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from torch import nn

BAND = 64
"""Rows of the autoencoder's image that are enlarged at a time where no gradient is kept."""
HALO = 12
"""Rows around them that the enlarged ones depend on: six convolutions and what follows at twice the size and more."""


class LatentDecoder(nn.Module):
    """TAESD's decoder (MIT), told sigma, whose features are then enlarged to the output's size.

    They are enlarged bilinearly: nearest steps and pixel shuffles leave a grid in the image.

    Args:
        latent_channels: channels C of the latents.
        upsamplings: steps by 2 from the latents to the autoencoder's image.
        enlargements: steps by 2 from there to the output.
        dim: width of the convolutions up to the autoencoder's size; half of it beyond.
    """

    def __init__(self, latent_channels: int, upsamplings: int, enlargements: int, dim: int):
        super().__init__()
        self.upsamplings, self.enlargements = upsamplings, enlargements
        counts = [3] * upsamplings + [1]
        self.conv_in = nn.Conv2d(latent_channels, dim, 3, padding=1)
        self.sigma_embed = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim * len(counts)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(AutoencoderTinyBlock(dim, dim, "relu") for _ in range(count))) for count in counts
        )
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1, bias=False) for _ in range(upsamplings))
        self.to_small = nn.Conv2d(dim, 3, 3, padding=1)
        self.detail = nn.Sequential(*(AutoencoderTinyBlock(dim, dim, "relu") for _ in range(2)))
        widths = [dim, *[dim // 2] * enlargements]
        self.enlarge = nn.ModuleList(nn.Conv2d(widths[i], widths[i + 1], 3, padding=1) for i in range(enlargements))
        self.refine = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.to_image = nn.Conv2d(widths[-1], 3, 3, padding=1)
        # What a latent cell reaches: a stage's convolutions and the one before them, in its own pixels, and a pixel
        # for the step between them.
        reach = sum((3 * count + 2) / 2**stage for stage, count in enumerate(counts))
        self.halo = math.ceil(reach + HALO / 2**upsamplings)

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        """Latents (B, C, h, w) at sigma (B,) -> image (B, 3, h n, w n), about [-1, 1].

        Args:
            rows: of latents that are decoded at a time, by default all. Fewer take less memory, and more time, since
                `halo` rows on either side are decoded with them; the numbers stay the same to rounding.
        """
        scale = 2**self.enlargements
        # Bands of a size that is not known yet, or that gradients keep anyway, gain nothing.
        band = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else self.band(rows)

        def decode(latents: torch.Tensor) -> torch.Tensor:
            return in_bands(self._enlarged, self.features(latents, sigma)[-1], band, HALO, scale)

        return in_bands(decode, latents, rows, self.halo, scale * 2**self.upsamplings)

    def band(self, rows: int | None) -> int:
        """Rows of the autoencoder's image that are enlarged at a time where so many of latents are decoded."""
        return BAND if rows is None else min(BAND, rows * 2**self.upsamplings // 2)

    def features(self, latents: torch.Tensor, sigma: torch.Tensor) -> list[torch.Tensor]:
        """After each stage, up to the autoencoder's size: (B, dim, h 2^i, w 2^i)."""
        x, features = latents, []
        for i, (stage, bias) in enumerate(zip(self.stages, self.biases(sigma), strict=True)):
            x = stage(self.enter(i, x, bias))
            features.append(x)
        return features

    def biases(self, sigma: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What each stage is told of sigma (B,): (B, dim, 1, 1)."""
        told = self.sigma_embed(sigma.to(self.conv_in.weight.dtype)[:, None])
        return told[..., None, None].chunk(len(self.stages), dim=1)

    def enter(self, i: int, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """The latents, or the features of the stage before -> what a stage's blocks are given."""
        if i == 0:
            # Convolutions keep this layout, in which a CPU enlarges and convolves large images a third faster.
            x = x.contiguous(memory_format=torch.channels_last)
            x = F.relu(self.conv_in(torch.tanh(x / 3) * 3))
        else:
            x = self.convs[i - 1](F.interpolate(x, scale_factor=2, mode="nearest"))
        return x + bias

    def products(self) -> int:
        """Multiplications that a latent cell takes."""
        small, full = self.upsamplings, self.upsamplings + self.enlargements
        levels: list[tuple[nn.Module, int]] = [
            (self.conv_in, 0), (self.to_small, small), (self.detail, small), (self.refine, full), (self.to_image, full),
            *((stage, i) for i, stage in enumerate(self.stages)),
            *((conv, i + 1) for i, conv in enumerate((*self.convs, *self.enlarge))),
        ]  # fmt: skip
        return sum(p.numel() * 4**level for module, level in levels for p in module.parameters() if p.ndim == 4)

    def small(self, features: torch.Tensor) -> torch.Tensor:
        """The last features -> the autoencoder's image (B, 3, H, W), about [-1, 1]."""
        return self.to_small(features).mul(2).sub(1)

    def _enlarged(self, features: torch.Tensor) -> torch.Tensor:
        """The last features -> the image at full size: the small one enlarged, and what is sharper."""
        x = self.detail(features)
        for conv in self.enlarge:
            x = conv(F.interpolate(x, scale_factor=2, mode="bilinear")).relu_()
        x = self.refine(x).relu_()
        sharper, image = self.to_image(x), self.small(features)
        return sharper + F.interpolate(image, scale_factor=2.0**self.enlargements, mode="bicubic")


def in_bands(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, rows: int | None, halo: int, factor: int
) -> torch.Tensor:
    """`function` of x (B, C, h, w), `factor` times as large, by bands of `rows` rows and `halo` rows around them."""
    height = x.shape[2]
    if rows is None or rows >= height:
        return function(x)
    bands = []
    for top in range(0, height, rows):
        start = max(0, top - halo)
        band = function(x[:, :, start : top + rows + halo])
        bands.append(band[:, :, (top - start) * factor : (top - start + rows) * factor])
    return torch.cat(bands, dim=2)
