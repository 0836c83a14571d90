"""A decoder in, the table of docs/export.md out: its graphs' files, seconds and images beside PyTorch's, in one run.

python recipes/export.py nano
"""

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import torch
import tyro

from pixeldecoder.execution import Execution
from pixeldecoder.export import export, onnx_pipeline


@dataclass(kw_only=True)
class Config:
    """One call."""

    decoder: Annotated[str, tyro.conf.Positional] = "nano"
    """As in `export`; one without text."""
    sizes: tuple[int, ...] = (256, 512)
    """Sides of the images in pixels."""
    precisions: tuple[Literal["float32", "float16", "int8"], ...] = ("float32", "float16", "int8")
    repeats: int = 4
    """Timed calls of each, in turn."""
    threads: int = 1
    """PyTorch's. onnxruntime takes as many as the process may use: start it with `taskset --cpu-list 0` for one."""


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    with TemporaryDirectory() as kept:
        pipelines = {"PyTorch": Execution("cpu", "float32").load(config.decoder)}
        for precision in config.precisions:
            folder = Path(kept) / precision
            export(Execution("cpu", "float32").load(config.decoder), folder, precision=precision)
            files = ", ".join(
                f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in sorted(folder.glob("*.onnx*"))
            )
            print(f"ONNX, {precision}: {files}", flush=True)
            pipelines[f"ONNX, {precision}"] = onnx_pipeline(folder, "cpu")
        for size in config.sizes:
            model = pipelines["PyTorch"].transformer.config
            cells = size // (model.scale * model.latent_downscale_factor)
            latents = torch.randn(1, model.latent_channels, cells, cells, generator=torch.Generator().manual_seed(0))
            seconds: dict[str, list[float]] = {name: [] for name in pipelines}
            images = {}
            for _ in range(config.repeats):
                for name, pipeline in pipelines.items():
                    pipeline.set_progress_bar_config(disable=True)
                    # A graph works on all patches at once.
                    chunk = {} if name == "PyTorch" else {"chunk_size": 2**20}
                    call = dict(tile_size=None, generator=torch.Generator().manual_seed(0), output_type="pt") | chunk
                    start = time.perf_counter()
                    images[name] = pipeline(latents, **call).images
                    seconds[name].append(time.perf_counter() - start)
            for name, image in images.items():
                apart = image - images["PyTorch"]
                decibels = -10 * math.log10(max(apart.square().mean().item(), 1e-12))
                print(
                    f"{size} px, {name}: {min(seconds[name]):.2f} s, median {statistics.median(seconds[name]):.2f} s, "
                    f"at most {apart.abs().max().item():.1e} of PyTorch's image apart, {decibels:.1f} dB",
                    flush=True,
                )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
