"""Two pictures in, how their pixels differ out: colour, spectrum, texture, a grid; no weights."""

import math

import torch
import torch.nn.functional as F


def unit(image: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> [0, 1]."""
    return image.float() / 2 + 0.5


def luma(image: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 1, H, W), the Y of BT.601's YCbCr in [16, 235] / 255, as super-resolution does."""
    weights = torch.tensor([65.481, 128.553, 24.966], device=image.device)[:, None, None]
    return (16 + (weights * unit(image)).sum(dim=1, keepdim=True)) / 255


def lab(image: torch.Tensor) -> torch.Tensor:
    """sRGB (B, 3, H, W) in [-1, 1] -> CIE L*a*b* (D65, 2 degrees)."""
    rgb = unit(image)
    rgb = torch.where(rgb > 0.04045, ((rgb.clamp(min=0) + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
    matrix = torch.tensor(to_xyz, device=image.device)
    white = torch.tensor([0.95047, 1.0, 1.08883], device=image.device)
    xyz = torch.einsum("ij,bjhw->bihw", matrix / white[:, None], rgb)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def ciede2000(image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Colour difference of every pixel, (B, H, W), of images (B, 3, H, W) in [-1, 1].

    CIE 142-2001, as written out by Sharma, Wu and Dalal (2005), whose equation numbers stand below.
    """
    (l1, a1, b1), (l2, a2, b2) = lab(image).unbind(1), lab(truth).unbind(1)
    chroma7 = ((torch.hypot(a1, b1) + torch.hypot(a2, b2)) / 2) ** 7
    g = 0.5 * (1 - (chroma7 / (chroma7 + 25**7)).sqrt())  # (4)
    a1, a2 = (1 + g) * a1, (1 + g) * a2  # (5)
    c1, c2 = torch.hypot(a1, b1), torch.hypot(a2, b2)  # (6)
    h1, h2 = (torch.atan2(b, a) % (2 * math.pi) for a, b in ((a1, b1), (a2, b2)))  # (7)
    grey = c1 * c2 == 0
    turn = h2 - h1
    turn = turn - 2 * math.pi * (turn > math.pi) + 2 * math.pi * (turn < -math.pi)
    dl, dc = l2 - l1, c2 - c1  # (8), (9)
    dh = 2 * (c1 * c2).sqrt() * torch.where(grey, 0.0, turn / 2).sin()  # (10), (11)
    light, c = (l1 + l2) / 2, (c1 + c2) / 2  # (12), (13)
    far = (h1 - h2).abs() > math.pi
    h = (h1 + h2) / 2 + torch.where(far, torch.where(h1 + h2 < 2 * math.pi, math.pi, -math.pi), 0.0)
    h = torch.where(grey, h1 + h2, h)  # (14)
    t = (  # (15)
        1
        - 0.17 * (h - math.radians(30)).cos()
        + 0.24 * (2 * h).cos()
        + 0.32 * (3 * h + math.radians(6)).cos()
        - 0.20 * (4 * h - math.radians(63)).cos()
    )
    around = math.radians(30) * (-(((h - math.radians(275)) / math.radians(25)) ** 2)).exp()  # (16)
    r_c = 2 * (c**7 / (c**7 + 25**7)).sqrt()  # (17)
    s_l = 1 + 0.015 * (light - 50) ** 2 / (20 + (light - 50) ** 2).sqrt()  # (18)
    s_c, s_h = 1 + 0.045 * c, 1 + 0.015 * c * t  # (19), (20)
    r_t = -(2 * around).sin() * r_c  # (21)
    dl, dc, dh = dl / s_l, dc / s_c, dh / s_h
    return (dl**2 + dc**2 + dh**2 + r_t * dc * dh).clamp(min=0).sqrt()  # (22)


def colour_shift(image: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean CIEDE2000 of the means of 16 x 16 pixels: colours that are off, whatever the detail."""
    return ciede2000(F.avg_pool2d(image.float(), 16), F.avg_pool2d(truth.float(), 16)).mean().item()


def spectral_error(image: torch.Tensor, truth: torch.Tensor, bands: int = 32) -> float:
    """Mean absolute difference in dB of the two radial power spectra of luma, over bands up to Nyquist."""
    spectra = []
    for picture in (image, truth):
        y = luma(picture)[0, 0]
        height, width = y.shape
        window = torch.hann_window(height, device=y.device)[:, None] * torch.hann_window(width, device=y.device)
        power = torch.fft.fft2((y - y.mean()) * window).abs().square()
        rows, columns = (torch.fft.fftfreq(side, device=y.device) for side in y.shape)
        band = (torch.hypot(rows[:, None], columns) * 2 * bands).long().flatten()
        inside = band < bands
        total = torch.zeros(bands, device=y.device).index_add_(0, band[inside], power.flatten()[inside])
        # As strong as the rounding to 8 bits, so that a picture without any detail has a finite one.
        count = torch.bincount(band[inside], minlength=bands).clamp(min=1)
        spectra.append(10 * torch.log10(total / count + window.square().sum() / 12 / 255**2))
    return (spectra[0] - spectra[1]).abs().mean().item()


CELL = 32
"""Side in pixels of the regions that texture is judged in."""

_FLAT = 2.5 / 255
"""Regions whose true high frequencies have no larger standard deviation are flat: skin, sky, walls."""


def texture_map(image: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Energy of the high frequencies of luma (what a Gaussian of 2 pixels takes away) in regions of 32 x 32 pixels.

    Args:
        image, truth: (1, 3, H, W) in [-1, 1].

    Returns:
        Of the image and of the truth, (H // 32, W // 32) each; their ratio is above 1 where texture is invented, below
        1 where it is lost. The energy of rounding to 8 bits is added to both.
    """
    x = torch.arange(-6, 7, device=image.device)
    kernel = (-(x**2) / 8.0).exp()
    kernel = kernel / kernel.sum()
    energies = []
    for picture in (image, truth):
        y = luma(picture)
        blurred = F.conv2d(F.pad(y, (6, 6, 6, 6), mode="reflect"), kernel[None, None, None])
        high = y - F.conv2d(blurred, kernel[None, None, :, None])
        energies.append(F.avg_pool2d(high.square(), CELL)[0, 0] + 1 / 12 / 255**2)
    return energies[0], energies[1]


def texture(image: torch.Tensor, truth: torch.Tensor, where: str = "") -> float:
    """High-frequency energy over that of the truth, in dB: above 0 texture was invented, below 0 it was lost.

    Args:
        where: "flat", "textured" (by the truth), or everywhere. NaN if there is no such region.
    """
    ours, true = texture_map(image, truth)
    flat = true <= _FLAT**2
    chosen = {"flat": flat, "textured": ~flat}.get(where, torch.ones_like(flat))
    return (10 * torch.log10(ours[chosen].sum() / true[chosen].sum())).item()


def border(image: torch.Tensor, patch: int = 16) -> float:
    """Mean absolute difference of neighbours across borders of patches, over that of all others: 1 without a grid."""
    gradients = [image.diff(dim=-1).abs().mean(dim=(0, 1, 2)), image.diff(dim=-2).abs().mean(dim=(0, 1, 3))]
    across = torch.cat([gradient[patch - 1 :: patch] for gradient in gradients]).mean()
    within = torch.cat([g[torch.arange(len(g)) % patch != patch - 1] for g in gradients]).mean()
    return (across / within).item()


def phases(image: torch.Tensor, period: int) -> torch.Tensor:
    """Differences of neighbouring columns, and of rows, by their place modulo a period, over the mean of all: (2,
    period), with gradient if the image has one; what an upsampling repeats stands out."""
    found = []
    for gradient in image.diff(dim=-1).abs().mean(dim=(0, 1, 2)), image.diff(dim=-2).abs().mean(dim=(0, 1, 3)):
        means = torch.stack([gradient[place::period].mean() for place in range(period)])
        found.append(means / means.mean())
    return torch.stack(found)


def grid(image: torch.Tensor, period: int = 4) -> float:
    """The largest of `phases`: a photo has about 1.03, upsampling by a pixel shuffle 1.2."""
    return phases(image, min(period, min(image.shape[2:]) - 1)).max().item()
