"""Pictures in, numbers out: what each metric is, which way is better, and where it comes from."""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from tqdm import tqdm

from pixeldecoder.convert import read_tensors
from pixeldecoder.errors import OUT_OF_MEMORY
from pixeldecoder.files import to_image
from pixeldecoder.pictures import psnr

Score = Callable[[torch.Tensor, Any, str], float]
"""Of an image (1, 3, H, W) in [-1, 1], the truth of the same shape or `None`, and the prompt."""


Way = Literal["higher", "lower", "zero", "one"]
WAYS: tuple[Way, ...] = get_args(Way)


@dataclass(frozen=True)
class Metric:
    name: str
    better: Way
    """Which way, or which value is the right one."""
    load: Callable[[torch.device, dict[str, Path]], Any]
    """Makes the `Score`, from weights given by name and path; any error means that it cannot be had here."""
    title: str
    needs: Literal["truth", "prompt", "image", "set"] = "truth"
    """A "set" metric compares all pictures with all truths: `load` makes torchmetrics' accumulator."""
    light: bool = True
    """Needs no weights and no library beyond the `evaluate` extra, so it is there without being asked for."""

    def badness(self, value: float) -> float:
        """Smaller is better, whatever the metric."""
        return {"higher": -value, "lower": value, "zero": abs(value), "one": abs(value - 1)}[self.better]


def find_metrics(names: Iterable[str], weights: dict[str, Path]) -> list[Metric]:
    """Metrics by name: those of `METRICS`, and whatever else pyiqa has; "all": all of `METRICS`; none: the light ones
    and those that weights are given for.

    Raises:
        ValueError: a name that is neither.
    """
    given = [name for name in weights if name != "lpips-linear"]
    asked = list(names) or [name for name, metric in METRICS.items() if metric.light]
    if "all" in asked:
        asked = [*METRICS, *(name for name in asked if name != "all")]
    found = []
    for name in dict.fromkeys([*asked, *given]):
        metric = METRICS.get(name) or _of_pyiqa(name)
        if metric is None:
            raise ValueError(
                f'no metric "{name}": expected all, {", ".join(METRICS)}, or a name that an installed pyiqa knows'
            )
        found.append(metric)
    return found


def load_metrics(
    metrics: Iterable[Metric], device: torch.device, weights: dict[str, Path]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What each metric is computed by, and why the others are skipped, both by name."""
    for name, path in weights.items():
        if not path.exists():
            raise ValueError(f"weights of {name}: {path}: no such file")
    scores, skipped = {}, {}
    for metric in metrics:
        try:
            scores[metric.name] = metric.load(device, weights)
        except ModuleNotFoundError as error:
            extra = "evaluate" if metric.light else "iqa"
            skipped[metric.name] = f"needs {str(error.name).split('.')[0]}: pip install 'pixeldecoder[{extra}]'"
        except Exception as error:  # of other people's libraries: no network, no weights, not installed
            skipped[metric.name] = _reason(error)
    return scores, skipped


def measure(
    name: str, score: Score, image: torch.Tensor, truth: torch.Tensor | None, prompt: str, picture: str
) -> float | None:
    """`None`, with a line that says why, for a picture that the metric cannot be computed of, such as a small one.

    Raises:
        MemoryError: for want of memory, which tells nothing of the picture; the line is printed as well.
    """
    try:
        value = score(image, truth, prompt)
        return value if math.isfinite(value) else None
    except Exception as error:  # of other people's libraries: each has errors of its own
        tqdm.write(f"{name} of {picture}: {_reason(error)}")
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))):
            raise MemoryError(str(error)) from error
        return None


def _reason(error: Exception) -> str:
    """In one line; before what is no sentence of ours, its kind."""
    text = str(error).strip().split("\n")[0][:200]
    return text if text and isinstance(error, ValueError) else f"{type(error).__name__}: {text}".rstrip(": ")


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


class SqueezeNetDistance:
    """How differently SqueezeNet 1.0 sees two images; not calibrated, to be compared with itself alone.

    Features before each pooling and the last ones, channels scaled to unit length at every position, squared difference
    averaged over positions and summed over channels, mean over layers.

    Args:
        path: ImageNet weights under torchvision's names, `.safetensors`.
    """

    POOLS = (2, 6, 11)

    def __init__(self, path: Path, device: torch.device | str = "cpu"):
        self.weights = {name: tensor.float().to(device) for name, tensor in load_file(path).items()}
        self.mean = torch.tensor([104.0, 117.0, 123.0], device=device)[:, None, None]

    @torch.no_grad()
    def __call__(self, image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1], twice -> (B,)."""
        return self.between(self.features(image), self.features(truth))

    @staticmethod
    def between(features: list[torch.Tensor], truth: list[torch.Tensor]) -> torch.Tensor:
        """Two images' features -> (B,)."""
        distances = [(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in zip(features, truth, strict=True)]
        return torch.stack(distances).mean(dim=0)

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, H, W) in [-1, 1] -> the four layers' (B, C, h, w), of unit length, with gradient if it has one."""
        x = ((image.float() + 1) * 127.5).flip(1) - self.mean  # blue, green, red, as it was trained
        x = x.contiguous(memory_format=torch.channels_last)  # a third less time on a CPU
        x = self._conv("features.0", x, stride=2)
        found = [x]
        for layer in range(2, 13):
            if layer in self.POOLS:
                x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
                continue
            squeezed = self._conv(f"features.{layer}.squeeze", x)
            wide = self._conv(f"features.{layer}.expand3x3", squeezed, padding=1)
            x = torch.cat([self._conv(f"features.{layer}.expand1x1", squeezed), wide], dim=1)
            if layer + 1 in self.POOLS or layer == 12:
                found.append(x)
        return [F.normalize(x, dim=1) for x in found]

    def _conv(self, name: str, x: torch.Tensor, **kwargs) -> torch.Tensor:
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **kwargs).relu()


class LPIPS:
    """Learned perceptual distance v0.1 (arXiv 1801.03924), of AlexNet or VGG-16.

    Args:
        backbone: ImageNet weights of torchvision's `alexnet` or `vgg16`.
        linear: the metric's own layers, `lin{i}.model.1.weight`.

    Raises:
        ValueError: linear layers of another network.
    """

    # For the kernel of the first layer: strides and paddings by layer (1 and 1 elsewhere), poolings, layers compared.
    NETS = {
        11: ({0: (4, 2), 3: (1, 2)}, {2: 3, 5: 3}, (1, 4, 7, 9, 11)),
        3: ({}, {4: 2, 9: 2, 16: 2, 23: 2}, (3, 8, 15, 22, 29)),
    }

    def __init__(self, backbone: Path, linear: Path, device: torch.device | str = "cpu"):
        self.weights, linears = (
            {name: tensor.float().to(device) for name, tensor in read_tensors(path).items()}
            for path in (backbone, linear)
        )
        first = self.weights.get("features.0.weight", torch.zeros(1, 1, 0)).shape[-1]
        if first not in self.NETS:
            raise ValueError(f"{backbone}: expected torchvision's alexnet or vgg16")
        self.convs, self.pools, self.taps = self.NETS[first]
        self.linears = [linears[f"lin{i}.model.1.weight"] for i in range(len(self.taps))]
        for tap, weight in zip(self.taps, self.linears, strict=True):
            if weight.shape[1] != (width := len(self.weights[f"features.{tap - 1}.bias"])):
                raise ValueError(f"{linear}: made for another network than {backbone}: {weight.shape[1]} for {width}")
        self.mean = torch.tensor([-0.030, -0.088, -0.188], device=device)[:, None, None]
        self.std = torch.tensor([0.458, 0.448, 0.450], device=device)[:, None, None]

    @torch.no_grad()
    def __call__(self, image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1], twice -> (B,)."""
        x, distance = (torch.cat([image, truth]).float() - self.mean) / self.std, torch.zeros(())
        for layer in range(self.taps[-1]):
            if layer in self.pools:
                x = F.max_pool2d(x, self.pools[layer], stride=2)
            if f"features.{layer}.weight" not in self.weights:
                continue
            weight, bias = (self.weights[f"features.{layer}.{part}"] for part in ("weight", "bias"))
            stride, padding = self.convs.get(layer, (1, 1))
            x = F.conv2d(x, weight, bias, stride, padding).relu()
            if layer + 1 in self.taps:
                a, b = (x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)).chunk(2)
                linear = self.linears[self.taps.index(layer + 1)]
                distance = distance.to(x) + F.conv2d((a - b).square(), linear).mean(dim=(1, 2, 3))
        return distance


def _plain(score: Callable[..., Any]) -> Callable[[torch.device, dict[str, Path]], Score]:
    """A metric of the two pictures that needs nothing."""
    return lambda device, weights: lambda image, truth, prompt: float(score(image, truth))


def _ssim(of: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.device, dict[str, Path]], Score]:
    """With the Gaussian window of its paper, of pictures in [0, 1]."""

    def load(device: torch.device, weights: dict[str, Path]) -> Score:
        from torchmetrics.functional.image import structural_similarity_index_measure

        def score(image: torch.Tensor, truth: Any, prompt: str) -> float:
            _, everywhere = structural_similarity_index_measure(
                of(image), of(truth), data_range=1.0, return_full_image=True
            )
            return everywhere[..., 5:-5, 5:-5].mean().item()  # where the window needs no padding, as in the paper

        return score

    return load


def _ms_ssim(device: torch.device, weights: dict[str, Path]) -> Score:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    return lambda image, truth, prompt: multiscale_structural_similarity_index_measure(
        unit(image), unit(truth), data_range=1.0
    ).item()


def _squeezenet(device: torch.device, weights: dict[str, Path]) -> Score:
    if "squeezenet" not in weights:
        raise ValueError("needs the ImageNet weights of SqueezeNet 1.0: --weights squeezenet PATH")
    distance = SqueezeNetDistance(weights["squeezenet"], device)
    return lambda image, truth, prompt: distance(image, truth).item()


def _lpips(device: torch.device, weights: dict[str, Path]) -> Score:
    if "lpips" not in weights:
        return _pyiqa("lpips", device, weights)
    if "lpips-linear" not in weights:
        raise ValueError("needs its linear layers too: --weights lpips BACKBONE lpips-linear PATH")
    distance = LPIPS(weights["lpips"], weights["lpips-linear"], device)
    return lambda image, truth, prompt: distance(image, truth).item()


def _pyiqa(name: str, device: torch.device, weights: dict[str, Path]) -> Score:
    import pyiqa

    if "fid" in name or name == "inception_score":
        raise ValueError("pyiqa computes it of folders, not of images: take fid, kid or patch_fid")
    logging.getLogger("pyiqa").disabled = True  # it tells what it loads
    given = {"pretrained_model_path": str(weights[name])} if name in weights else {}
    metric = pyiqa.create_metric(name, device=device, **given)

    def score(image: torch.Tensor, truth: Any, prompt: str) -> float:
        if name == "clipscore":
            return metric(unit(image), caption_list=[prompt]).item()
        return metric(unit(image), *([unit(truth)] if metric.metric_mode == "FR" else [])).item()

    return score


def _of_pyiqa(name: str) -> Metric | None:
    try:
        from pyiqa.default_model_configs import DEFAULT_CONFIGS
    except ImportError:
        return None
    if (config := DEFAULT_CONFIGS.get(name)) is None:
        return None
    needs: Any = "truth" if config["metric_mode"] == "FR" else "image"
    better: Any = "lower" if config.get("lower_better") else "higher"
    return Metric(name, better, partial(_pyiqa, name), name, needs, light=False)


def _hps(device: torch.device, weights: dict[str, Path]) -> Score:
    import open_clip

    path = weights.get("hps") or hf_hub_download("xswu/HPSv2", "HPS_v2.1_compressed.pt")
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-H-14", pretrained=str(path), device=device)
    model.eval()
    tokenizer = open_clip.get_tokenizer("ViT-H-14")

    @torch.no_grad()
    def score(image: torch.Tensor, truth: Any, prompt: str) -> float:
        seen = model.encode_image(preprocess(to_image(image))[None].to(device), normalize=True)
        return (seen @ model.encode_text(tokenizer([prompt]).to(device), normalize=True).T).item()

    return score


def _distribution(kind: str) -> Callable[[torch.device, dict[str, Path]], Any]:
    """FID or KID over Inception features; its accumulator takes uint8 pictures."""

    def load(device: torch.device, weights: dict[str, Path]) -> Any:
        import torch_fidelity  # noqa: F401  whose absence torchmetrics would notice at the end only
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        inception: Any = 2048
        if "fid" in weights:
            from torchmetrics.image.fid import NoTrainInceptionV3

            inception = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights["fid"]))
            inception.num_features = 2048
        made = {"fid": FrechetInceptionDistance, "kid": KernelInceptionDistance}[kind]
        return partial(made, feature=inception, reset_real_features=False)

    return load


METRICS = {
    metric.name: metric
    for metric in (
        Metric("psnr", "higher", _plain(psnr), "PSNR, dB"),
        Metric("psnr_y", "higher", _plain(lambda a, b: psnr(luma(a) * 2, luma(b) * 2)), "PSNR of luma, dB"),
        Metric("ssim", "higher", _ssim(unit), "SSIM"),
        Metric("ssim_y", "higher", _ssim(luma), "SSIM of luma"),
        Metric("ms_ssim", "higher", _ms_ssim, "MS-SSIM"),
        Metric("ciede2000", "lower", _plain(lambda a, b: ciede2000(a, b).mean()), "CIEDE2000"),
        Metric("colour_shift", "lower", _plain(colour_shift), "Colour shift, CIEDE2000 of 16 px means"),
        Metric("spectral_error", "lower", _plain(spectral_error), "Spectral error, dB"),
        Metric("texture", "zero", _plain(texture), "Texture, dB"),
        Metric("texture_flat", "zero", _plain(partial(texture, where="flat")), "Texture in flat regions, dB"),
        Metric("texture_textured", "zero", _plain(partial(texture, where="textured")), "Texture elsewhere, dB"),
        Metric("border", "one", _plain(lambda a, b: border(a)), "Gradient at 16 px borders", "image"),
        Metric("squeezenet", "lower", _squeezenet, "SqueezeNet distance", light=False),
        Metric("lpips", "lower", _lpips, "LPIPS", light=False),
        Metric("dists", "lower", partial(_pyiqa, "dists"), "DISTS", light=False),
        Metric("fid", "lower", _distribution("fid"), "FID", "set", light=False),
        Metric("kid", "lower", _distribution("kid"), "KID", "set", light=False),
        Metric("patch_fid", "lower", _distribution("fid"), "Patch FID", "set", light=False),
        Metric("niqe", "lower", partial(_pyiqa, "niqe"), "NIQE", "image", light=False),
        Metric("musiq", "higher", partial(_pyiqa, "musiq"), "MUSIQ", "image", light=False),
        Metric("maniqa", "higher", partial(_pyiqa, "maniqa"), "MANIQA", "image", light=False),
        Metric("clipiqa", "higher", partial(_pyiqa, "clipiqa"), "CLIP-IQA", "image", light=False),
        Metric("qalign", "higher", partial(_pyiqa, "qalign"), "Q-Align", "image", light=False),
        Metric("deqa", "higher", partial(_pyiqa, "deqa"), "DeQA", "image", light=False),
        Metric("clipscore", "higher", partial(_pyiqa, "clipscore"), "CLIP score", "prompt", light=False),
        Metric("hps", "higher", _hps, "HPS v2.1", "prompt", light=False),
    )
}
