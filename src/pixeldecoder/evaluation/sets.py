"""All pictures of each setting in, what compares them with all truths out: FID or KID."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pixeldecoder.evaluation.methods import Setting
from pixeldecoder.evaluation.results import image_path
from pixeldecoder.pictures import read, to_tensor

PATCH = 256
"""Side in pixels of the patches of the patch FID."""


def compare_sets(
    makers: dict[str, Callable[..., Any]],
    output: Path,
    seed: int,
    device: str,
    skipped: dict[str, str],
    files: dict[Setting, list[str]],
) -> dict[str, dict[str, float | None]]:
    """Each metric of every setting that has all pictures: of fewer it would be another quantity.

    Args:
        makers: of torchmetrics' accumulators, by name: "fid", "kid", "patch_fid".
        output: folder of the images.
        seed: KID draws subsets.
        skipped: is told why a metric cannot be computed.
        files: the images of each setting.
    """
    values: dict[str, dict[str, float | None]] = {name: {} for name in makers}
    every = max(files.values(), key=len)
    complete = [setting for setting, own in files.items() if own == every]
    for name, make in makers.items():
        try:
            torch.manual_seed(seed)
            count = sum(len(_patches(name, output, "truth", file)) for file in every)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the memory that features take
                accumulator = make(**({"subset_size": min(1000, count)} if name == "kid" else {})).to(device)
            for file in every:
                accumulator.update(_patches(name, output, "truth", file).to(device), real=True)
            for setting in complete:
                accumulator.reset()
                for file in every:
                    accumulator.update(_patches(name, output, setting, file).to(device), real=False)
                value = accumulator.compute()
                values[name][str(setting)] = float(value[0] if isinstance(value, tuple) else value)
        except (ValueError, RuntimeError) as error:
            skipped[name] = str(error).splitlines()[0][:200]
            print(f"skipped {name}: {skipped[name]}")
    return values


def _patches(name: str, output: Path, setting: Setting | str, file: str) -> torch.Tensor:
    """A picture as FID takes it, (B, 3, H, W) uint8; in patches for the patch FID."""
    image = (to_tensor(read(image_path(output, setting, file)).flattened()) * 127.5 + 127.5).round().byte()
    if name != "patch_fid":
        return image
    return image.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, PATCH, PATCH)
