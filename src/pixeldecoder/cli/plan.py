"""An image's size in, what its decoding would take out: `plan`."""

import math
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from pixeldecoder.cli.options import Decoder, word


@dataclass(kw_only=True)
class Plan(Decoder):
    """What decoding an image would take, and how it would be done, without doing it.

    Example: pixeldecoder plan 4096 4096 --max-memory 6GB
    """

    width: Annotated[int, tyro.conf.Positional, word("WIDTH")]
    """Of the image in pixels."""
    height: Annotated[int, tyro.conf.Positional, word("HEIGHT")]
    """Of the image in pixels."""
    batch: int = 1
    """Images at a time."""
    seed: int = field(default=0, init=False)  # nothing is drawn
    compile: bool = field(default=False, init=False)  # the estimate knows nothing of it

    def run(self) -> None:
        self.check()
        if min(self.width, self.height, self.batch) < 1:
            raise ValueError(f"{self.width} x {self.height} px, batch {self.batch}: expected at least 1")

        import torch

        from pixeldecoder.errors import naming
        from pixeldecoder.execution import quantize, torch_device, torch_dtype
        from pixeldecoder.flow import student_times
        from pixeldecoder.plan import (
            Limits,
            duration,
            estimate_seconds,
            measure_rates,
            must_offload,
            plan,
            weight_bytes,
        )
        from pixeldecoder.presets import PRESETS

        kwargs = self.call_kwargs()
        device = torch.device(torch_device(self.device))
        if self.decoder in PRESETS:  # without its weights
            from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel

            preset = PRESETS[self.decoder]
            if preset.distilled and self.steps is not None:
                with naming(f"--steps {self.steps}"):
                    student_times(self.steps)
            with torch.device("meta"):
                model = PixelDecoderTransformer2DModel(**preset.config).to(torch_dtype(self.dtype, device.type))
            trained, steps, guidance = preset.trained_size, preset.num_inference_steps, preset.guidance_scale
            quantize(model, self.quantize)
        else:
            pipeline = self.load(place=False)
            model, config = pipeline.transformer, pipeline.config
            trained, steps, guidance = (
                config.trained_size, config.default_num_inference_steps, config.default_guidance_scale
            )  # fmt: skip
        config = model.config
        # As the pipeline rounds: whole latent cells, which are whole patches.
        cell = 1 if config.latent_channels is None else config.scale * config.latent_downscale_factor
        unit = math.lcm(cell, config.patch_size)
        height, width = (-(-side // unit) * unit for side in (self.height, self.width))
        if (width, height) != (self.width, self.height):
            print(f"{self.width} x {self.height} px: rounded up to multiples of {unit} px, whole latents and patches")
        steps = kwargs.pop("num_inference_steps") or steps
        offload = must_offload(model, device, self.max_memory)
        chosen = plan(
            model, height, width, self.batch, config.max_text_length if config.text_embed_dim else 0,
            Limits(**kwargs), trained_size=trained, device=device, offload=offload,
        )  # fmt: skip
        seconds = estimate_seconds(chosen, measure_rates(model, device), steps * (1 if guidance == 1 else 2))
        print(f"{chosen}, of it {weight_bytes(model) / 1e9:.2f} GB weights{', block by block' if offload else ''}")
        dtype = str(model.dtype).removeprefix("torch.")
        print(f"{steps} steps on {device.type} in {dtype}: about {duration(seconds)}")
