"""Configurations and sizes in, seconds, memory and FLOPs out, as JSON and a plot.

Each configuration runs in a process of its own, so that its peak of memory is its own; they take turns, so that a
machine that slows down slows all of them.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchLCMScheduler

from pixeldecoder.charts import scale_log
from pixeldecoder.execution import Quantization, compile_blocks, quantize, set_attention
from pixeldecoder.files import write_whole
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.pipeline import PixelDecoderPipeline
from pixeldecoder.plan import Limits, count_flops, measure_rates, measured_peak, plan
from pixeldecoder.presets import PRESETS

MakeImage = Callable[[], torch.Tensor]
"""Makes one image (1, 3, H, W) in [0, 1]."""
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZED: tuple[Quantization, ...] = ("int8", "float8", "float8-storage")
LAYOUTS = ("auto", "whole")
BASELINES = ("vae", "upscaler")
UPSCALER_STEPS = 20


def check_configuration(text: str) -> list[str]:
    """The parts of a configuration such as "bfloat16+whole+compile".

    Raises:
        ValueError: an unknown part.
    """
    parts = text.split("+")
    for part in parts:
        expected = (*DTYPES, *QUANTIZED, *LAYOUTS, *BASELINES, "compile")
        if part not in expected and ":" not in part and not part.startswith(("tile=", "chunk=", "attention=")):
            raise ValueError(
                f"configuration {text}: {part!r} is unknown: expected parts of {', '.join(expected)}, tile=PIXELS, "
                "chunk=PATCHES, attention=NAME or module:function, joined by +"
            )
    return parts


def benchmark(
    configurations: list[str],
    sizes: list[int],
    decoder: str = "nano",
    device: str = "cpu",
    steps: int | None = None,
    repeats: int = 3,
    max_memory: str | None = None,
    progress: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Time and peak memory of each configuration at each output size.

    Args:
        configurations: parts joined by "+": a dtype, "auto" (default) or "whole" or "tile=512", "chunk=256", "compile",
            "int8", "float8", "float8-storage", "attention=flash"; or "vae" (FLUX.1's, to an image of that size),
            "upscaler" (that VAE to a fourth of the size, then diffusers' x4 upscaler with 20 steps), random weights
            both; or "module:function", called with the pipeline, the latents and the number of steps, which returns
            what makes an image.
        sizes: sides of square images in pixels.
        decoder: as for `PixelDecoderPipeline.from_pretrained`; a released name is not fetched, but gets random weights.
        device: "cpu" or "cuda".
        steps: of the sampler.
        repeats: timed runs, after one that is not.
        max_memory: as for the pipeline's call.
        progress: told every result.

    Raises:
        ValueError: an unknown configuration, or one that failed; the message has its last line.
    """
    for text in configurations:
        check_configuration(text)
    if not sizes or min(sizes) < 1 or repeats < 1 or not configurations:
        raise ValueError(f"expected sizes and repeats of at least 1, got {sizes} and {repeats}")
    results = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            workers = []
            try:
                for i, text in enumerate(configurations):
                    task = {
                        "configuration": text, "size": size, "decoder": decoder, "device": device, "steps": steps,
                        "max_memory": max_memory, "image": f"{folder}/{i}.npy",
                    }  # fmt: skip
                    workers.append(_Worker(task))
                seconds = [[worker.ask("run")["seconds"] for worker in workers] for _ in range(repeats)]
                first = np.load(f"{folder}/0.npy")
                for i, (text, worker) in enumerate(zip(configurations, workers, strict=True)):
                    image = np.load(f"{folder}/{i}.npy")
                    same = image.shape == first.shape and not set(text.split("+")) & set(BASELINES)
                    error = float(((image - first) ** 2).mean()) if same else 0.0
                    times = [row[i] for row in seconds]
                    result = {
                        "configuration": text,
                        "size": size,
                        "seconds": statistics.median(times),
                        "fastest": min(times),
                        "slowest": max(times),
                        "psnr_to_first": -10 * np.log10(error) if error else None,
                        "largest_difference_to_first": float(np.abs(image - first).max()) if same else None,
                    } | worker.ask("report")
                    results.append(result)
                    progress(
                        f"{size:5} px  {text:32} {result['seconds']:8.2f} s ({min(times):.2f} to {max(times):.2f})  "
                        f"{result['peak_memory'] / 1e9:6.2f} GB"
                    )
            finally:
                for worker in workers:
                    worker.process.kill()
    return {
        "decoder": decoder,
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": repeats,
        "results": results,
    }


class _Worker:
    """A process that holds one configuration and runs it when asked."""

    def __init__(self, task: dict[str, Any]):
        self.name = task["configuration"]
        command = [sys.executable, "-m", "pixeldecoder.benchmark", json.dumps(task)]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.ask("warm up")

    def ask(self, what: str) -> dict[str, Any]:
        try:
            self.process.stdin.write(f"{what}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines() or [f"exit code {code}"]
        raise ValueError(f"configuration {self.name}: {lines[-1]}")


STARTUP = {("--help",): 0, ("--version",): 0, ("plan", "1024", "1024"): 0, ("upscale", "missing.png", "x.png"): 2}
"""What should answer at once, with its exit code."""


def startup(repeats: int = 3) -> dict[str, float]:
    """CPU seconds, of user and system, that each of `STARTUP` takes in a process of its own: medians of the repeats.

    Raises:
        ValueError: one ended with another code.
    """
    if repeats < 1:
        raise ValueError(f"expected repeats of at least 1, got {repeats}")
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as empty:
        for _ in range(repeats):
            for arguments, code in STARTUP.items():
                before = os.times()
                command = [sys.executable, "-m", "pixeldecoder", *arguments]
                result = subprocess.run(command, capture_output=True, text=True, cwd=empty)
                after = os.times()
                text = " ".join(["pixeldecoder", *arguments])
                if result.returncode != code:
                    raise ValueError(f"{text}: exit code {result.returncode}, expected {code}: {result.stderr[-300:]}")
                spent = after.children_user + after.children_system - before.children_user - before.children_system
                seconds.setdefault(text, []).append(spent)
    return {text: statistics.median(spent) for text, spent in seconds.items()}


def plot(report: dict[str, Any], path: Path) -> None:
    """Time and memory over output size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    names = list(dict.fromkeys(result["configuration"] for result in report["results"]))
    sizes = sorted({result["size"] for result in report["results"]})
    for axis, key, label, unit in (axes[0], "seconds", "time, s", 1), (axes[1], "peak_memory", "peak memory, GB", 1e9):
        for name in names:
            rows = [result for result in report["results"] if result["configuration"] == name]
            axis.plot([r["size"] for r in rows], [r[key] / unit for r in rows], marker="o", label=name)
        axis.set(xlabel="side of the output, px", ylabel=label)
        scale_log(axis.xaxis)
        scale_log(axis.yaxis)
        axis.set_xticks(sizes)
        axis.grid(alpha=0.3)
    axes[0].legend(loc="upper left")
    figure.suptitle(f"{report['decoder']}, {report['device']}, {report['threads']} threads")
    write_whole(path, lambda file: figure.savefig(file, dpi=110))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def _pipeline(task: dict[str, Any], parts: list[str]) -> PixelDecoderPipeline:
    device = task["device"]
    default = "float32" if device == "cpu" and any(":" in part for part in parts) else "bfloat16"
    dtype = getattr(torch, next((part for part in parts if part in DTYPES), default))
    if task["decoder"] in PRESETS:
        preset = PRESETS[task["decoder"]]
        with torch.device(device):
            model = PixelDecoderTransformer2DModel(**preset.config).to(dtype).eval()
        pipeline = PixelDecoderPipeline(model, FlowMatchLCMScheduler(shift=1.0), trained_size=preset.trained_size)
    else:
        pipeline = PixelDecoderPipeline.from_pretrained(task["decoder"], dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _decoder_maker(task: dict[str, Any], parts: list[str]) -> tuple[MakeImage, dict[str, float]]:
    pipeline, size = _pipeline(task, parts), task["size"]
    model = pipeline.transformer
    config, device = model.config, model.device
    cell = config.scale * config.latent_downscale_factor
    if size % cell:
        raise ValueError(f"size {size}: expected a multiple of {cell}, a latent cell")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, config.latent_channels, size // cell, size // cell, generator=generator)
    steps = task["steps"] or pipeline.config.default_num_inference_steps
    own = next((part for part in parts if ":" in part), None)
    if own is not None:
        module, function = own.split(":")
        return getattr(importlib.import_module(module), function)(pipeline, latents, steps), {}
    given = {key: value for key, _, value in (part.partition("=") for part in parts)}
    set_attention(model, given.get("attention", "auto"))
    for kind in QUANTIZED:
        if kind in parts:
            quantize(model, kind)
    if "compile" in parts:
        compile_blocks(model)
    text = None if config.text_embed_dim is None else torch.randn(1, config.max_text_length, config.text_embed_dim)
    layout: dict[str, Any] = {
        "tile_size": int(given["tile"]) if "tile" in given else None if "whole" in parts else "auto",
        "chunk_size": int(given["chunk"]) if "chunk" in given else None,
        "max_memory": task["max_memory"],
    }
    text_tokens = 0 if text is None else text.shape[1]
    chosen = plan(model, size, size, 1, text_tokens, Limits(**layout), trained_size=pipeline.config.trained_size)
    rates = measure_rates(model, device)
    floor = steps * (chosen.matrix_flops / rates[0] + chosen.attention_flops / rates[1])
    whole = sum(count_flops(model, (size // config.patch_size) ** 2, text_tokens))

    def run() -> torch.Tensor:
        return pipeline(
            latents, prompt_embeds=text, num_inference_steps=steps, generator=torch.Generator().manual_seed(0),
            output_type="pt", **layout,
        ).images  # fmt: skip

    return run, {
        "tiles": chosen.tiles.count,
        "planned_memory": chosen.memory,
        "tflop": steps * (chosen.matrix_flops + chosen.attention_flops) / 1e12,
        "tflop_whole": steps * whole / 1e12,
        "matrix_tflops": rates[0] / 1e12,
        "attention_tflops": rates[1] / 1e12,
        "floor_seconds": floor,
    }


def _baseline_maker(task: dict[str, Any], name: str) -> MakeImage:
    """Other decoders, with random weights, which are as fast as trained ones."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DDPMScheduler,
        StableDiffusionUpscalePipeline,
        UNet2DConditionModel,
    )

    device, size = task["device"], task["size"]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def autoencoder(latent_channels: int, widths: tuple[int, ...]) -> AutoencoderKL:
        kinds = {f"{way}_block_types": [f"{way.title()}{end}2D"] * len(widths) for way, end in _ENDS}
        return AutoencoderKL(
            block_out_channels=widths, latent_channels=latent_channels, layers_per_block=2, **kinds
        ).eval()  # fmt: skip

    with torch.device(device):
        vae = autoencoder(16, (128, 256, 512, 512)).to(dtype)  # FLUX.1's
        shown = size if name == "vae" else size // 4
        latents = torch.randn(1, 16, shown // 8, shown // 8, dtype=dtype)

    @torch.no_grad()
    def decode() -> torch.Tensor:
        return (vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)

    if name == "vae":
        return decode
    with torch.device(device):
        unet = UNet2DConditionModel(
            in_channels=7, out_channels=4, block_out_channels=(256, 512, 512, 1024), attention_head_dim=8,
            cross_attention_dim=1024, num_class_embeds=1000, only_cross_attention=(True, True, True, False),
            use_linear_projection=True, down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
            up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
        ).to(dtype)  # fmt: skip
        upscaler = StableDiffusionUpscalePipeline(
            vae=autoencoder(4, (128, 256, 512)).to(dtype), text_encoder=None, tokenizer=None, unet=unet,
            low_res_scheduler=DDPMScheduler(), scheduler=DDIMScheduler(prediction_type="v_prediction"),
        )  # fmt: skip
        text = torch.randn(1, 77, 1024, dtype=dtype)
    upscaler.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        return upscaler(
            image=decode() * 2 - 1, prompt_embeds=text, negative_prompt_embeds=text, output_type="pt",
            num_inference_steps=UPSCALER_STEPS,
        ).images  # fmt: skip

    return run


_ENDS = (("down", "EncoderBlock"), ("up", "DecoderBlock"))


def _serve(task: dict[str, Any]) -> None:
    """What a worker process does: warm up, make an image when asked, report."""
    parts = check_configuration(task["configuration"])
    baseline = next((part for part in parts if part in BASELINES), None)
    run, facts = (_baseline_maker(task, baseline), {}) if baseline else _decoder_maker(task, parts)
    on_gpu = task["device"] == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for line in sys.stdin:
        answer: dict[str, Any] = {}
        if line.strip() == "report":
            answer = facts | {"peak_memory": measured_peak(torch.device(task["device"]))}
        else:
            start = time.perf_counter()
            image = run()
            if on_gpu:
                torch.cuda.synchronize()
            answer["seconds"] = time.perf_counter() - start
            if line.strip() == "warm up":
                np.save(task["image"], image.float().cpu().numpy())
            del image
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
