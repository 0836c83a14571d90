"""Configurations and sizes in, their seconds and memory out: `benchmark`."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pixeldecoder.cli.options import (
    Device,
    check_memory,
    check_positive,
    word,
)
from pixeldecoder.presets import check_decoder_name


@dataclass(kw_only=True)
class Benchmark:
    """Time, peak memory and FLOPs of configurations at several output sizes, as a table, JSON and a plot.

    Example: pixeldecoder benchmark --configs bfloat16+whole bfloat16 bfloat16+int8 --sizes 512 1024
    """

    configs: tuple[str, ...] = ("float32+whole", "bfloat16+whole", "bfloat16")
    """Each of parts joined by "+": a dtype; "whole" or tile=PIXELS; chunk=PATCHES; compile; int8, float8 or
    float8-storage; attention=NAME. Or "vae" (FLUX.1's), "upscaler" (it and the x4 upscaler), or module:function. All
    are compared with the first."""
    sizes: tuple[int, ...] = (512, 1024)
    """Sides of the outputs in pixels."""
    decoder: str = "nano"
    """As in `decode`; a released name gets random weights, which are as fast."""
    device: Device = "auto"
    """Where it runs; "auto": the fastest there is."""
    steps: int | None = None
    """Sampling steps; by default what the decoder was made for."""
    repeats: int = 3
    """Timed runs, after one that is not."""
    max_memory: Annotated[str | None, word("SIZE")] = None
    """As in `decode`."""
    startup: bool = False
    """Instead, the CPU time until the command itself answers: --help, --version, a plan, an error."""
    count: bool = False
    """Instead, for any machine: the operations of one step and the bytes that it passes through memory, by part, in
    bfloat16, and what they would take by the data sheets of GPUs. Nothing is computed."""
    output: Path = Path("outputs/benchmark")
    """Folder of benchmark.json and benchmark.png."""
    overwrite: bool = False
    """Replace the figures that are there."""

    def run(self) -> None:
        from pixeldecoder import files

        check_positive(steps=self.steps, repeats=self.repeats)
        if self.max_memory is not None:
            check_memory(self.max_memory)
        check_decoder_name(self.decoder)
        files.check_writable(self.output / "benchmark.json")
        if not self.startup:
            files.check_new(self.output / "benchmark.json", self.overwrite)

        if self.count:
            from pixeldecoder.counting import table

            for size in self.sizes:
                print("\n".join(table(self.decoder, size, self.steps)))
            return

        from pixeldecoder.benchmark import benchmark, plot, startup
        from pixeldecoder.execution import torch_device

        if self.startup:
            for command, seconds in startup(self.repeats).items():
                print(f"{command:40} {seconds:6.2f} s of CPU")
            return

        device = torch_device(self.device)
        report = benchmark(
            list(self.configs), list(self.sizes), self.decoder, device, self.steps, self.repeats, self.max_memory
        )
        files.write_whole(self.output / "benchmark.json", lambda path: path.write_text(json.dumps(report, indent=1)))
        try:
            plot(report, self.output / "benchmark.png")
        except ImportError:
            print("no plot: pip install 'pixeldecoder[evaluate]'", file=sys.stderr)
        print(self.output / "benchmark.json")
