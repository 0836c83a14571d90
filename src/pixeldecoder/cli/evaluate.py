"""Pictures or prompts in, reports out: `evaluate`, `compare`, `judge`."""

import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from pixeldecoder.cli.options import (
    ExecutionOptions,
    TextEncoder,
    check_positive,
    json_object,
    word,
)
from pixeldecoder.presets import check_decoder_name

if TYPE_CHECKING:
    from pixeldecoder.pipeline import PixelDecoderPipeline


@dataclass(kw_only=True)
class Evaluate(TextEncoder, ExecutionOptions):
    """Decoders and baselines on the same pictures or prompts: images, metrics and a report.

    Pictures are made small, encoded, noised, decoded and compared with themselves. With prompts a latent model is
    stopped early. What is in the output folder already is not made again, so an interrupted run goes on, and more
    decoders, settings or metrics can be added; `torchrun --nproc-per-node 2 -m pixeldecoder evaluate ...` shares the
    work.

    Example: pixeldecoder evaluate photos/ --crop 512 --sigmas 0 0.4 --baselines bicubic vae --vae madebyollin/taef1
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A folder of pictures (captions in .txt files beside them), WebDataset shards ("data-{000..041}.tar"), or a .txt
    file with a prompt in each line."""
    output: Path = Path("outputs/evaluation")
    """Folder of report.html, report.md, results.csv and images."""
    decoders: tuple[str, ...] = ("nano",)
    """As in `decode`, all of the same scale."""
    baselines: tuple[str, ...] = ("bicubic",)
    """bicubic, lanczos; vae (the autoencoder's own decoder, then bicubic); upscale:FOLDER_OR_HUB_ID (that decoder, then
    a diffusers upscale pipeline); spandrel:FILE (that decoder, then a model that spandrel loads)."""
    steps: tuple[int, ...] = ()
    """Sampling steps of the decoders; by default what each was made for."""
    sigmas: tuple[float, ...] = (0.0,)
    """Noise levels of the latents of pictures, in [0, 1]."""
    as_if_clean: bool = False
    """Decode noisy latents also as if they were clean."""
    crop: int | None = None
    """Side in pixels of the centre crops; by default whole pictures."""
    limit: int | None = None
    """The first pictures or prompts alone."""
    scale: int = 4
    """Of the baselines, if there is no decoder."""
    encoder: str = "auto"
    """What makes the decoders' latents, as in `upscale`."""
    vae: str | None = None
    """Folder or Hub id of the autoencoder of the baselines: it encodes and decodes."""
    model: str | None = None
    """Folder or Hub id of a diffusers pipeline, for prompts."""
    stops: tuple[str, ...] = ("auto",)
    """Where it stops, as in `generate`."""
    pipeline_args: Annotated[str, word("JSON")] = "{}"
    """For its call: '{"num_inference_steps": 28}'."""
    metrics: tuple[str, ...] = ()
    """By name, or "all"; by default those that need no weights, and those whose weights are given. What cannot be had
    is skipped with a line."""
    weights: dict[str, Path] = field(default_factory=dict)
    """Of metrics, in files: squeezenet PATH lpips BACKBONE lpips-linear PATH fid PATH."""

    def run(self) -> None:
        from pixeldecoder.files import check_writable

        self.check()
        check_writable(self.output / "report.html")
        check_positive(crop=self.crop, limit=self.limit, scale=self.scale, steps=min(self.steps, default=None))
        for name in self.decoders:
            check_decoder_name(name)
        extra = json_object(self.pipeline_args)

        from pixeldecoder.evaluation.cases import Source
        from pixeldecoder.evaluation.report import write_report
        from pixeldecoder.evaluation.study import Baselines, Decoders, LatentModel, Study
        from pixeldecoder.execution import image_encoder, load_diffusion_pipeline, torch_device, torch_dtype

        device = torch_device(self.device)
        dtype = torch_dtype(self.dtype, device)

        def load(name: str) -> "PixelDecoderPipeline":
            pipeline = self.execution().load(name)
            if pipeline.transformer.config.text_embed_dim is not None and pipeline.text_encoder is None:
                self.attach(pipeline)
            return pipeline

        def pipe() -> Any:
            return load_diffusion_pipeline(str(self.model), dtype, extra).to(device)

        study = Study(
            source=Source(
                path=self.source, crop=self.crop, limit=self.limit, sigmas=self.sigmas, stops=self.stops
            ),
            output=self.output,
            decoders=Decoders(
                load={name: partial(load, name) for name in self.decoders},
                encoder=lambda pipeline: image_encoder(self.encoder, pipeline),
                steps=self.steps, as_if_clean=self.as_if_clean, call_kwargs=vars(self.limits()),
            ),
            baselines=Baselines(names=self.baselines, vae=self.vae, scale=self.scale),
            latent_model=LatentModel(load=None if self.model is None else pipe, kwargs=extra),
            metrics=self.metrics, weights=self.weights, seed=self.seed, device=device,
            identity={
                name: getattr(self, name)
                for name in ("encoder", "model", "tile", "tile_overlap", "quantize", "attention")
            }
            | {"dtype": str(dtype)},
        )  # fmt: skip
        study.run()
        if study.state.is_main_process:
            write_report(self.output)
            print(self.output / "report.html")


@dataclass(kw_only=True)
class Compare:
    """Two images of one size: metrics of the second against the first, and a page with a slider and a zoom.

    Example: pixeldecoder compare original.png decoded.png
    """

    first: Annotated[Path, tyro.conf.Positional, word("TRUTH")]
    """The image that is taken for the truth."""
    second: Annotated[Path, tyro.conf.Positional, word("IMAGE")]
    """The image that is compared with it."""
    output: Path = Path("outputs/comparison.html")
    """The page, a file."""
    weights: dict[str, Path] = field(default_factory=dict)
    """Of metrics, as in `evaluate`."""
    overwrite: bool = False
    """Replace the page if it is there."""

    def run(self) -> None:
        from pixeldecoder.files import check_target
        from pixeldecoder.pictures import size

        check_target(self.output, (".html",), self.overwrite, [self.first, self.second])
        for path in (self.first, self.second):
            size(path)

        from pixeldecoder.evaluation.report import write_comparison

        for name, value in write_comparison(self.first, self.second, self.output, self.weights).items():
            print(f"{name:16} {'–' if value is None else format(value, '.4f'):>10}")
        print(self.output)


@dataclass(kw_only=True)
class Judge:
    """Let a vision model say which of two methods' images it prefers, in both orders; win rates go to the report.

    Example: pixeldecoder judge outputs/evaluation --url http://localhost:8000/v1 --model Qwen/Qwen3-VL-8B-Instruct
    """

    evaluation: Annotated[Path, tyro.conf.Positional, word("FOLDER")]
    """Folder of a finished evaluation."""
    url: str
    """Of an OpenAI-compatible server, up to /v1."""
    model: str
    """Its name there."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    settings: tuple[str, ...] = ()
    """As the report calls them; by default the first of each method."""
    limit: int | None = None
    """The first images alone."""

    def run(self) -> None:
        check_positive(limit=self.limit)

        from pixeldecoder.evaluation.judge import judge
        from pixeldecoder.evaluation.report import write_report

        # Never a token of another service's.
        key = os.environ.get(self.key_variable) or "none"
        answers = judge(self.evaluation, self.url, self.model, key, self.settings, self.limit)
        if unclear := sum(answer["answer"] is None for answer in answers):
            print(f"{unclear} of {len(answers)} answers are neither first, second nor tie: left out", file=sys.stderr)
        write_report(self.evaluation)
        print(self.evaluation / "report.html")
