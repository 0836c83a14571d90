"""Pictures in, numbers out: what each metric is, which way is better, and where it comes from."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from tqdm import tqdm

from pixeldecoder.errors import OUT_OF_MEMORY
from pixeldecoder.evaluation.perceptual import LPIPS, SqueezeNetDistance
from pixeldecoder.evaluation.pixels import border, ciede2000, colour_shift, grid, luma, spectral_error, texture, unit
from pixeldecoder.hub import repository
from pixeldecoder.pictures import psnr, to_image

Score = Callable[[torch.Tensor, Any, str], float]
"""From an image (1, 3, H, W) in [-1, 1], the truth of the same shape or `None`, and the prompt."""

Way = Literal["higher", "lower", "zero", "one"]

WAYS: tuple[Way, ...] = get_args(Way)


@dataclass(frozen=True)
class Metric:
    name: str
    better: Way
    """Which way is better, or which value is right."""
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
    metrics = []
    for name in dict.fromkeys([*asked, *given]):
        metric = METRICS.get(name) or _of_pyiqa(name)
        if metric is None:
            raise ValueError(
                f'no metric "{name}": expected all, {", ".join(METRICS)}, or a name that an installed pyiqa knows'
            )
        metrics.append(metric)
    return metrics


def load_metrics(
    metrics: Iterable[Metric], device: torch.device, weights: dict[str, Path]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What computes each metric, and why the others are skipped, both by name."""
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
    """An error in one line, with its type unless the text is ours."""
    text = str(error).strip().split("\n")[0][:200]
    return text if text and isinstance(error, ValueError) else f"{type(error).__name__}: {text}".rstrip(": ")


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

    path = weights.get("hps") or hf_hub_download(repository("hub:xswu/HPSv2"), "HPS_v2.1_compressed.pt")
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-H-14", pretrained=str(path), device=device)
    model.eval()
    tokenizer = open_clip.get_tokenizer("ViT-H-14")

    @torch.no_grad()
    def score(image: torch.Tensor, truth: Any, prompt: str) -> float:
        seen = model.encode_image(preprocess(to_image(image))[None].to(device), normalize=True)
        return (seen @ model.encode_text(tokenizer([prompt]).to(device), normalize=True).T).item()

    return score


def _letters(device: torch.device, weights: dict[str, Path]) -> Score:
    """Of the letters that PP-OCR reads in the truth, the share that it reads at the same places, in the same order."""
    from rapidocr import RapidOCR

    engine, known = RapidOCR(params={"Global.log_level": "critical"}), {}

    def boxes(pixels: np.ndarray) -> list[list[int]]:
        """Left, top, right and bottom of the lines."""
        found = engine(pixels, use_det=True, use_cls=True).boxes  # named, since what a call asks for stays
        found = [] if found is None else found
        return [[*box.min(axis=0).clip(0).astype(int), *np.ceil(box.max(axis=0)).astype(int)] for box in found]

    def read(pixels: np.ndarray, box: list[int]) -> str:
        left, top, right, bottom = box
        line = pixels[top:bottom, left:right]
        line = np.rot90(line) if len(line) >= 1.5 * line.shape[1] else line  # written downwards
        return "".join("".join(engine(np.ascontiguousarray(line), use_det=False, use_cls=False).txts or ()).split())

    def score(image: torch.Tensor, truth: Any, prompt: str) -> float:
        made, real = (np.asarray(to_image(x))[..., ::-1] for x in (image, truth))  # blue first
        if (key := hashlib.sha256(real.tobytes()).digest()) not in known:
            known[key] = [(box, read(real, box)) for box in boxes(real)]
        matcher = partial(SequenceMatcher, None, autojunk=False)
        blocks = [block for box, text in known[key] for block in matcher(text, read(made, box)).get_matching_blocks()]
        all_letters = sum(len(text) for _, text in known[key])
        return sum(block.size for block in blocks) / all_letters if all_letters else math.nan  # nothing to read

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
        Metric("grid", "one", _plain(lambda a, b: grid(a)), "Grid of 4 px", "image"),
        Metric("squeezenet", "lower", _squeezenet, "SqueezeNet distance", light=False),
        Metric("lpips", "lower", _lpips, "LPIPS", light=False),
        Metric("dists", "lower", partial(_pyiqa, "dists"), "DISTS", light=False),
        Metric("letters", "higher", _letters, "Letters kept", light=False),
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
