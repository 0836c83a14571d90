"""A prompt in, a large picture out: `generate`."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from pixeldecoder.cli.options import (
    Output,
    Pictures,
    Text,
    check_positive,
    json_object,
    word,
)
from pixeldecoder.hub import hub_id, or_from_hub


@dataclass(kw_only=True)
class Generate(Text, Pictures):
    """Prompt to image: any diffusers pipeline, stopped early, then the decoder.

    Example: pixeldecoder generate "a lighthouse at dusk" image.png --model Tongyi-MAI/Z-Image --stop-at 46
    """

    description: Annotated[str, tyro.conf.Positional, word("PROMPT")]
    """What to make: for the latent model, and for the decoder if it reads text."""
    output: Output
    """An image (.png, .webp, .jpg), or a folder to write into, each image under its seed, or the next number that is
    free."""
    model: str
    """Folder or Hub id of a diffusers pipeline."""
    decoder: str = "auto"
    """As in `decode`; "auto": the released decoder of the model's latent space, which is fetched from the Hub at first,
    as is Gemma-2, which reads prompts for it (8 GB together; the licence is non-commercial)."""
    prompt: str = ""
    """For the decoder alone, in place of PROMPT."""
    stop_at: Annotated[str, word("STOP")] = "auto"
    """Where the latent model stops: a step (24), a share of its steps (0.85), "sigma=0.1", or "auto": where the paper
    stops this family."""
    latent_space: str | None = None
    """By name (flux, flux2, sd3, sdxl, qwenimage), if the model's autoencoder does not tell."""
    negative_prompt: str | None = None
    """For the latent model."""
    height: Annotated[int | None, word("PIXELS")] = None
    """Of the latent model's image; the output is 4 times larger. By default the model's."""
    width: Annotated[int | None, word("PIXELS")] = None
    """Of the latent model's image, likewise."""
    latent_steps: int | None = None
    """Steps of the latent model; by default the model's."""
    latent_guidance_scale: float | None = None
    """Of the latent model; by default the model's."""
    images: int = 1
    """How many, with seeds that count on."""
    lora: str | None = None
    """LoRA for the latent model: a file, a folder or a Hub id."""
    pipeline_args: Annotated[str, word("JSON")] = "{}"
    """Everything else for the pipeline's call: '{"max_sequence_length": 256}'."""
    compare: bool = False
    """Let the latent model finish, decode with its own VAE too, and save both side by side."""
    save_latents: Path | None = None
    """Write latents and sigma to this .safetensors file, which `decode` takes."""
    offload: bool = False
    """Keep on the device only the model that is running."""

    def check(self) -> None:
        from pixeldecoder.files import IMAGE_SUFFIXES, check_target, check_writable, is_folder

        super().check()
        check_positive(images=self.images, height=self.height, width=self.width, latent_steps=self.latent_steps)
        if not is_folder(self.output):
            if self.images > 1 and self.index is None:
                raise ValueError(f"{self.output}: expected an image for one, for several a folder")
            check_target(self.output, IMAGE_SUFFIXES, self.overwrite, self.inputs())
        else:
            check_writable(self.output)
        for path in (self.save_latents, self.save_prompt_embeds):
            if path is not None:
                check_target(path, (".safetensors",), self.overwrite, self.inputs())
        for option, name in ("--model", self.model), ("--lora", self.lora):
            if name is not None and not Path(name).exists() and hub_id(name) is None:
                there_is = f"there is none{or_from_hub(name)}"
                raise ValueError(f"{option} {name}: expected a folder or a Hub id (owner/name); {there_is}")

    def run(self) -> None:
        self.check()
        extra = json_object(self.pipeline_args)

        import torch
        from PIL import Image
        from safetensors.torch import save_file

        from pixeldecoder.execution import load_diffusion_pipeline, torch_device, torch_dtype
        from pixeldecoder.files import is_folder, save_image, write_whole
        from pixeldecoder.ldm import check_decoder, generate, parse_stop, pipeline_latent_space
        from pixeldecoder.pictures import side_by_side

        parse_stop(self.stop_at)
        device = torch_device(self.device)
        pipe = load_diffusion_pipeline(self.model, torch_dtype(self.dtype, device), extra)
        if self.lora is not None:
            load_latent_lora(pipe, self.lora)
        space = pipeline_latent_space(pipe, self.latent_space)
        if self.decoder == "auto":
            self.decoder = space.preset
        decoder = self.load(place=not self.offload)
        check_decoder(decoder, space)
        self.prompt = self.prompt or self.description
        text = self.text_kwargs(decoder)
        if not self.offload:
            pipe.to(device)
        given = {
            "negative_prompt": self.negative_prompt,
            "height": self.height,
            "width": self.width,
            "num_inference_steps": self.latent_steps,
            "guidance_scale": self.latent_guidance_scale,
        }
        try:
            result = generate(
                pipe, decoder, self.description, stop_at=self.stop_at, seed=self.seed, latent_space=self.latent_space,
                compare=self.compare, offload=self.offload, num_images_per_prompt=self.images,
                decoder_kwargs=self.call_kwargs() | text,
                **{key: value for key, value in given.items() if value is not None} | extra,
            )  # fmt: skip
        except (TypeError, AttributeError) as error:
            if not extra:
                raise
            raise ValueError(f"--pipeline-args {self.pipeline_args}: {type(pipe).__name__}: {error}") from None
        taken = result.taken
        if self.save_latents is not None:
            tensors = {"latents": taken.latents.cpu().contiguous(), "sigma": torch.tensor(taken.sigma)}
            write_whole(self.save_latents, partial(save_file, tensors, metadata={"latent_space": space.name}))
            print(self.save_latents)
        print(f"{type(pipe).__name__}: {taken.step} of {taken.steps} steps, sigma {taken.sigma:.4f}", file=sys.stderr)
        for index, image in enumerate(result.images):
            if self.index not in (None, index):
                continue
            if taken.images is not None:
                image = side_by_side(taken.images[index].resize(image.size, Image.Resampling.LANCZOS), image)
            target = self._free_name(self.seed + index) if is_folder(self.output) else self.output
            facts = {"index": index} if self.images > 1 else {}
            made = self.made(
                decoder, **facts, model=self.model, sigma=taken.sigma, stopped=f"{taken.step} of {taken.steps} steps",
                size=[*image.size],
            )  # fmt: skip
            save_image(image, target, made)
            print(target)

    def _free_name(self, number: int) -> Path:
        """Counted on from the seed: nothing that is there is replaced."""
        while not self.overwrite and (self.output / f"{number}.png").exists():
            number += 1
        return self.output / f"{number}.png"


def load_latent_lora(pipe: Any, name: str) -> None:
    """Onto a latent model; diffusers' own warnings tell what does not fit."""
    import peft  # noqa: F401
    from diffusers.utils import logging

    from pixeldecoder.execution import lora_file

    path, level = lora_file(name), logging.get_verbosity()
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"--lora {name}: {type(pipe).__name__} takes none")
    logging.set_verbosity_warning()
    try:
        pipe.load_lora_weights(path)
    except (ValueError, OSError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"--lora {name}: not a LoRA of {type(pipe).__name__}: {error}") from None
    finally:
        logging.set_verbosity(level)
