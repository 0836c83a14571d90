"""A command line's options in; a decoder, its text and the arguments of its call out: what commands share."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from pixeldecoder.hub import cache_folder, hub_id, or_from_hub
from pixeldecoder.presets import TEXT_ENCODER, check_decoder_name, told_config

if TYPE_CHECKING:
    import torch

    from pixeldecoder.cli.jobs import Job, Jobs
    from pixeldecoder.execution import Execution
    from pixeldecoder.pipeline import PixelDecoderPipeline
    from pixeldecoder.plan import Limits


def word(name: str) -> Any:
    """What help calls an argument's value."""
    return tyro.conf.arg(metavar=name)


Source = Annotated[Path, tyro.conf.Positional, word("SOURCE")]
Output = Annotated[Path, tyro.conf.Positional, word("OUTPUT")]
Device = Literal["auto", "cpu", "cuda", "mps"]
OUTPUTS = ("output", "format", "overwrite", "metadata", "save_prompt_embeds", "save_latents")
"""Options that say what becomes of a picture, not how it is made."""


@dataclass(kw_only=True)
class ExecutionOptions:
    """Where a decoder runs, and how."""

    device: Device = "auto"
    """Where it runs; "auto": the fastest there is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; "auto": bfloat16, but float32 on a CPU that has no instructions for it."""
    seed: int = 0
    """Of all noise: the same seed gives the same image."""
    tile: Annotated[str, word("PIXELS")] = "auto"
    """Side of the tiles that a large image is decoded in, on one canvas of noise; "none": whole; "auto": tiles for
    what is larger than the decoder was trained on, or than the memory allows."""
    tile_overlap: Annotated[int | None, word("PIXELS")] = None
    """What neighbouring tiles share; by default 64."""
    chunk: Annotated[int | None, word("PATCHES")] = None
    """Patches at a time, apart from attention; by default what suits device and memory."""
    max_memory: Annotated[str | None, word("SIZE")] = None
    """Such as 6GB: of the process on a CPU, else of the device; by default what is free."""
    quantize: Literal["none", "int8", "float8", "float8-storage"] = "none"
    """Of the weights of the large matrix products: int8 on any device, float8 on NVIDIA GPUs from compute capability
    8.9 on (both by torchao), float8-storage to save memory alone."""
    attention: Annotated[str, word("KERNEL")] = "auto"
    """By diffusers' name ("flash", "sage", "_native_cudnn"...); "auto": what suits the device."""
    compile: bool = False
    """Let torch.compile fuse the blocks: minutes at first (kept in $PIXELDECODER_CACHE), faster from then on."""

    def check(self) -> None:
        """Raises ValueError for what can be seen to be wrong before anything is imported or loaded."""
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed}: expected a whole number from 0 to 2^63 - 1")
        if self.tile not in ("auto", "none") and not self.tile.isdecimal():
            raise ValueError(f'--tile {self.tile}: expected "auto", "none" or a side in pixels')
        if self.tile_overlap is not None and self.tile_overlap < 0:
            raise ValueError(f"--tile-overlap {self.tile_overlap}: expected 0 pixels or more")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"--chunk {self.chunk}: expected a chunk size of at least 1 patch")
        if self.max_memory is not None:
            check_memory(self.max_memory)

    def limits(self) -> "Limits":
        from pixeldecoder.plan import Limits

        return Limits(
            tile_size=int(self.tile) if self.tile.isdecimal() else None if self.tile == "none" else "auto",
            tile_overlap=self.tile_overlap,
            chunk_size=self.chunk,
            max_memory=int(self.max_memory) if self.max_memory and self.max_memory.isdecimal() else self.max_memory,
        )

    def execution(self, loras: Sequence[str] = ()) -> "Execution":
        from pixeldecoder.execution import Execution

        return Execution(
            self.device, self.dtype, self.quantize, self.attention, self.compile,
            tuple(lora_and_strength(lora) for lora in loras), self.limits(),
        )  # fmt: skip

    def generator(self) -> "torch.Generator":
        """On the CPU, so that a seed gives the same noise on every device."""
        import torch

        return torch.Generator().manual_seed(self.seed)

    def noise_generator(self) -> "torch.Generator":
        """Of the noise in the latents, not of the sampler's: another sigma shall not change the rest of the noise."""
        import torch

        return torch.Generator().manual_seed(self.seed + 1)


@dataclass(kw_only=True)
class Decoder(ExecutionOptions):
    """Which decoder runs, where, and how."""

    decoder: str = "nano"
    """"nano" (bundled), a diffusers folder, a checkpoint file, a Hub id or a released name."""
    steps: int | None = None
    """Sampling steps; by default what the decoder was made for (nano: 4)."""

    def check(self) -> None:
        super().check()
        check_positive(steps=self.steps)
        if self.decoder != "auto":
            check_decoder_name(self.decoder)

    def load(self, place: bool = True, loras: Sequence[str] = ()) -> "PixelDecoderPipeline":
        from pixeldecoder.errors import naming

        pipeline = self.execution(loras).load(self.decoder, place)
        if self.steps is not None:
            with naming(f"--steps {self.steps}"):
                pipeline.check_steps(self.steps)
        return pipeline

    def placed(self) -> tuple[str, str]:
        """The device and the dtype that "auto" stands for here."""
        from pixeldecoder.execution import torch_device, torch_dtype

        device = torch_device(self.device)
        return device, str(torch_dtype(self.dtype, device)).removeprefix("torch.")

    def call_kwargs(self) -> dict[str, Any]:
        """For the pipeline's call."""
        return {"num_inference_steps": self.steps} | vars(self.limits())


@dataclass(kw_only=True)
class Pictures(Decoder):
    """How pictures are written."""

    overwrite: bool = False
    """Replace what is there. Without it a file that is there is an error, and in a folder is not made again."""
    metadata: bool = True
    """Write into each picture how it was made, which `info` prints and `redo` follows: prompt, seed, settings, hashes
    and names of files."""

    index: ClassVar[int | None] = None
    """Set by `redo`: of the only picture of a batch that is wanted."""
    recorded: ClassVar[dict[str, Any]] = {}
    """Set by `redo`: what the picture says already, which shall not change by what has been moved since."""

    def inputs(self) -> Iterator[Path]:
        """Files that options name, none of which may be overwritten."""
        for field in fields(self):
            value = getattr(self, field.name)
            for one in value if isinstance(value, tuple) else (value,):
                if field.name not in OUTPUTS and isinstance(one, str | Path) and one:
                    yield Path(lora_and_strength(str(one))[0] if field.name == "lora" else one)

    def made(self, pipeline: "PixelDecoderPipeline", **facts: Any) -> dict[str, Any] | None:
        """How a picture was made, after the call that made it: what is not told is the default.

        Args:
            facts: of this picture; options take precedence over the command's own.
        """
        from pixeldecoder import __version__, provenance

        if not self.metadata:
            return None
        if self.recorded:
            return self.recorded | {"software": f"pixeldecoder {__version__}"}

        given = {
            field.name: [*value] if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
            for field in fields(self)
            if field.name not in OUTPUTS and (value := getattr(self, field.name)) != field.default
        }
        layout, config, (device, dtype) = pipeline.layout, pipeline.config, self.placed()
        made: dict[str, Any] = {
            "software": f"pixeldecoder {__version__}",
            "command": type(self).__name__.lower(),
            **given,
            **facts,
            "folder": os.getcwd(),
            "decoder": self.decoder,
            "decoder_sha256": provenance.weights_hash(self.decoder),
            "seed": self.seed,
            "steps": self.steps or config.default_num_inference_steps,
            "guidance_scale": config.default_guidance_scale,
            "device": device,
            "dtype": dtype,
        } | layout.options()
        if pipeline.guides() and "negative_prompt" not in made:
            made["negative_prompt"] = config.default_negative_prompt
        return made


def source_facts(path: Path) -> dict[str, str]:
    """What a picture says of its source."""
    from pixeldecoder.provenance import file_hash

    return {"source": str(path), "source_sha256": file_hash(path)}


@dataclass(kw_only=True)
class TextEncoder:
    """What encodes prompts for a decoder that reads text."""

    text_encoder: str = TEXT_ENCODER
    """Folder or Hub id of Gemma-2; it is loaded if the prompt is not in the cache ($PIXELDECODER_CACHE)."""
    text_device: Device = "auto"
    """Where it runs; "auto": where the decoder does."""
    text_quantization: Literal["none", "8bit", "4bit"] = "none"
    """Of its weights, by bitsandbytes."""

    def attach(self, pipeline: "PixelDecoderPipeline") -> None:
        from pixeldecoder.execution import torch_device
        from pixeldecoder.text import PromptEncoder

        pipeline.prompt_encoder = PromptEncoder(
            self.text_encoder,
            pipeline.device if self.text_device == "auto" else torch_device(self.text_device, "--text-device"),
            None if self.text_quantization == "none" else self.text_quantization,
            cache_folder() / "prompts",
        )


@dataclass(kw_only=True)
class Text(TextEncoder):
    """What a decoder that reads text is given."""

    prompt: str = ""
    """Describes the image; ignored by a decoder without text, such as nano."""
    prompt_embeds: Path | None = None
    """A .safetensors file with an encoded prompt, in place of the prompt and its 5 GB encoder."""
    save_prompt_embeds: Path | None = None
    """Write the encoded prompt to this .safetensors file."""

    def text_kwargs(self, pipeline: "PixelDecoderPipeline") -> dict[str, Any]:
        """Arguments for the decoder's call; encoded here, so that the text encoder is gone when the decoder runs."""
        from pixeldecoder.text import load_prompt_embeds, save_prompt_embeds

        width = pipeline.transformer.config.text_embed_dim
        if width is None:
            if self.save_prompt_embeds is not None:
                raise ValueError("--save-prompt-embeds: this decoder reads no text")
            return {}
        if pipeline.text_encoder is None:
            self.attach(pipeline)
        if self.prompt_embeds is not None:
            embeds = load_prompt_embeds(self.prompt_embeds)
            if embeds.ndim != 3 or embeds.shape[0] != 1 or embeds.shape[2] != width:
                raise ValueError(f"{self.prompt_embeds}: expected (1, T, {width}), got {tuple(embeds.shape)}")
            texts: dict[str, Any] = {"prompt_embeds": embeds}
            if pipeline.guides():
                texts["negative_prompt_embeds"], _ = pipeline.encode_prompt(
                    pipeline.config.default_negative_prompt, None, False
                )
        else:
            names = ("prompt_embeds", "negative_prompt_embeds")
            texts = dict(zip(names, pipeline.encode_prompt(self.prompt), strict=True))
        pipeline.prompt_encoder.unload()
        if self.save_prompt_embeds is not None:
            save_prompt_embeds(texts["prompt_embeds"].cpu(), self.save_prompt_embeds, self.prompt)
            print(self.save_prompt_embeds)
        return texts


@dataclass(kw_only=True)
class FilesToImages(Text, Pictures):
    """Files in, images out."""

    source: Source
    """A file, or a folder of them."""
    output: Output
    """An image (.png, .webp, .jpg), or a folder to write into."""
    format: Literal["png", "webp", "jpg"] = "png"
    """Of the images in an output folder."""
    lora: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, word("PATH[:STRENGTH]")] = ()
    """A LoRA of the decoder: a file, a folder or a Hub id, with a strength if it is not 1. May be given several times,
    and they add up."""

    def start(
        self,
        suffixes: tuple[str, ...],
        head: Callable[[Path], Any],
        check_size: Callable[["Job", Mapping[str, Any]], Any],
        count: Callable[[Any], int] = lambda head: 1,
    ) -> "tuple[Jobs, PixelDecoderPipeline] | None":
        """The inputs with their outputs, see `Jobs`, and the decoder, loaded after all that can be told without it;
        `None` if nothing is to be made.

        Args:
            check_size: of what an input becomes, by the network's configuration; raises ValueError.
        """
        from pixeldecoder.cli.jobs import Jobs
        from pixeldecoder.files import IMAGE_SUFFIXES, check_target

        self.check()
        for lora in self.lora:
            name = lora_and_strength(lora)[0]
            if not Path(name).exists() and hub_id(name) is None:
                there_is = f"there is none{or_from_hub(name)}"
                raise ValueError(f"--lora {lora}: expected a file, a folder or a Hub id (owner/name); {there_is}")
        inputs = [*self.inputs()]
        if self.save_prompt_embeds is not None:
            check_target(self.save_prompt_embeds, (".safetensors",), self.overwrite, inputs)
        if self.index is not None:
            count = lambda head: 1  # noqa: E731
        jobs = Jobs(
            self.source, self.output, suffixes, IMAGE_SUFFIXES, self.format, self.overwrite, head, count, inputs
        )
        if config := told_config(self.decoder):
            jobs.check(lambda job: check_size(job, config))
        if not jobs.jobs:
            jobs.finish()
            return None
        pipeline = self.load(loras=self.lora)
        jobs.check(lambda job: check_size(job, pipeline.transformer.config))
        return jobs, pipeline


def check_sigma(sigma: float | None) -> None:
    if sigma is not None and not 0 <= sigma <= 1:
        raise ValueError(f"--sigma {sigma}: expected a noise level in [0, 1]")


def check_positive(**options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")


def check_memory(size: str) -> None:
    from pixeldecoder.files import parse_size

    try:
        parse_size(size)
    except ValueError as error:
        raise ValueError(f"--max-memory {error}") from None


def json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"--pipeline-args {text:.200}: expected a JSON object")
    return found


def lora_and_strength(given: str) -> tuple[str, float]:
    """Of PATH or PATH:STRENGTH."""
    path, colon, number = given.rpartition(":")
    try:
        strength = float(number) if colon and not Path(given).exists() else 1.0
    except ValueError:  # the colon is the path's
        return given, 1.0
    if not math.isfinite(strength):
        raise ValueError(f"--lora {given}: expected a number as strength, got {number}")
    return (path if colon and not Path(given).exists() else given), strength
