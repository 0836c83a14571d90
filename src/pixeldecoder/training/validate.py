"""A stage and its averaged weights in, decodes of a few pictures out: their PSNRs and a grid of them."""

import sys
from collections import defaultdict
from itertools import islice
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from pixeldecoder.flow import SampleRandom, add_noise
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.pictures import UNREADABLE, psnr, shrink, to_image
from pixeldecoder.sources import Folder, Record, Shards, bucket
from pixeldecoder.training.checkpoints import is_main
from pixeldecoder.training.config import Conditioned, Run
from pixeldecoder.training.data import Batch, crop, load_sizes, side_multiple
from pixeldecoder.training.parts import Average, Stage, autocast

VALIDATION_SIGMAS = (0.0, 0.4, 0.8)


@torch.no_grad()
def validate(config: Run, stage: Stage, average: Average, batch: Batch) -> dict:
    """Decodes of the averaged weights at several sigmas: the means of their PSNRs, and "grid", a picture of them all.

    A row for each image: the small picture enlarged, the decodes, the original; for a prior what its captions give.
    """
    half = config.precision == "bfloat16" and not config.fsdp
    stage.model.eval()
    try:
        with average.applied(), autocast(batch.image.device, half):
            columns = validation_columns(config, stage, batch)
    finally:
        stage.model.train()
    judged = {} if stage.conditions.encoder is None else columns
    psnrs = {f"psnr_{name.replace(' ', '_')}": mean_psnr(images, batch.image) for name, images in judged.items()}
    return psnrs | {"grid": labelled(columns | {"original": batch.image})}


def validation_columns(config: Run, stage: Stage, batch: Batch) -> dict[str, torch.Tensor]:
    """Images (B, 3, H, W) in [-1, 1] by what they are."""
    image, model, encoder = batch.image, stage.model, stage.conditions.encoder
    height, width = image.shape[-2:]
    condition = stage.conditions(batch, SampleRandom(0, batch.samples, "validation", image.device))
    text: dict[str, Any] = {"prompt_embeds": condition.embeds, "negative_prompt_embeds": condition.negative_embeds}
    if encoder is None:
        columns = {}
        inputs: dict[str, dict[str, Any]] = {"sample": {"height": height, "width": width}}
    else:
        small = shrink(image, model.config.scale)
        columns = {"bicubic": F.interpolate(small, size=(height, width), mode="bicubic").clamp(-1, 1)}
        assert isinstance(config, Conditioned)
        latents = encoder(small)
        noise = SampleRandom(1, batch.samples, "validation", image.device).normal(*latents.shape[1:])
        inputs = {
            f"sigma {sigma}": {
                "latents": add_noise(latents, noise, latents.new_tensor([sigma]), config.frame),
                "sigma": sigma,
            }
            for sigma in VALIDATION_SIGMAS
        }
    pipeline = stage.pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    # Nothing that depends on free memory: it differs between steps and processes, and training leaves little.
    layout: dict[str, Any] = dict(tile_size=None, max_memory=sys.maxsize, output_type="pt")
    groups = range(0, len(image), config.micro_batch_size)  # as many images at a time as training has room for
    total = len(inputs) * len(groups) * pipeline.config.default_num_inference_steps
    with tqdm(desc="validation", total=total, leave=False, disable=not is_main(), dynamic_ncols=True) as bar:

        def progress(*_: object) -> dict:
            bar.update()
            return {}

        for name, given in inputs.items():
            made = []
            for first in groups:
                some = slice(first, first + config.micro_batch_size)
                part: dict[str, Any] = {
                    n: v[some] if isinstance(v, torch.Tensor) else v for n, v in (given | text | layout).items()
                }
                generator = [torch.Generator().manual_seed(sample) for sample in batch.samples[some]]
                images = pipeline(**part, generator=generator, callback_on_step_end=progress).images
                made.append(images.to(image.device).float() * 2 - 1)
            columns[name] = torch.cat(made)
    return columns


def load_validation(
    config: Run, model: PixelDecoderTransformer2DModel, source: Folder | Shards, device: torch.device
) -> Batch:
    """The same four crops of one shape whenever it is called, of the validation folder or else of the training data."""
    sizes = load_sizes(config, model)
    chosen = Folder(config.data.validation) if config.data.validation else None
    if chosen is not None:
        chosen.require(sizes, side_multiple(model.config))
    by_size: dict[tuple[int, int], dict[str, Record]] = defaultdict(dict)
    for record in islice(chosen.items if chosen is not None else source.records(config.seed), 100):
        size = bucket(record.size, sizes)
        assert size is not None
        by_size[size][record.name] = record
    size, records = max(by_size.items(), key=lambda item: min(4, len(item[1])))
    first: list[tuple[Record, torch.Tensor]] = []
    for record in records.values():
        try:
            first.append((record, crop(record, size, Random(0))))
        except UNREADABLE as error:
            source.skipped.add(record.name, error)
        if len(first) == 4:
            break
    if not first:
        raise ValueError("no picture to validate on can be decoded: give --data.validation, or --validate-every 0")
    return Batch(
        image=torch.stack([image for _, image in first]).to(device).float() / 127.5 - 1,
        captions=[record.caption for record, _ in first],
        names=[record.name for record, _ in first],
        samples=list(range(len(first))),
        position=0,
    )


def mean_psnr(images: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean over images (B, 3, H, W) of each one's PSNR in dB."""
    return sum(psnr(one, other) for one, other in zip(images, truth, strict=True)) / len(images)


def labelled(columns: dict[str, torch.Tensor]) -> Image.Image:
    """Columns of images (B, 3, H, W), their names above them."""
    rows = [torch.cat(list(row), dim=-1) for row in zip(*columns.values(), strict=True)]
    grid = to_image(torch.cat(rows, dim=-2)[None])
    width = grid.width // len(columns)
    font = ImageFont.load_default(max(10, width // 24))
    head = 2 * int(font.size)
    picture = Image.new("RGB", (grid.width, head + grid.height), "white")
    picture.paste(grid, (0, head))
    for index, name in enumerate(columns):
        ImageDraw.Draw(picture).text(((index + 0.5) * width, head / 2), name, fill="black", font=font, anchor="mm")
    return picture
