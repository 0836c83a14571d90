"""A configuration in, a trained decoder out: batches, updates, checkpoints, and what people watch."""

import json
import math
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from pixeldecoder.files import to_image, write_folder, write_whole
from pixeldecoder.flow import SampleRandom, add_noise
from pixeldecoder.models.encoder import TinyLatentEncoder
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.pictures import UNREADABLE, Folder, Record, Shards, bucket, psnr, shrink
from pixeldecoder.plan import held_memory, memory_budget
from pixeldecoder.presets import NANO
from pixeldecoder.training.checkpoints import Checkpoints, full_state, is_main
from pixeldecoder.training.config import Conditioned, Run, Student, check, to_dict, write_yaml
from pixeldecoder.training.data import Batch, batches, batches_in_memory, bucket_sizes, crop, side_multiple
from pixeldecoder.training.distill import StudentStage
from pixeldecoder.training.parts import Average, TrainingError, autocast
from pixeldecoder.training.teacher import TeacherStage

VALIDATION_SIGMAS = (0.0, 0.4, 0.8)
NOISE = (
    "Mismatch dtype between input and weight",  # of RMSNorm under autocast, whose weight shall stay float32
    "torch.distributed is disabled, unavailable or uninitialized",  # one process writes its checkpoints alone
    "`broadcast_buffers` is deprecated",  # its successor does not leave buffers alone
)
"""Warnings of torch about what is meant to be so."""


def train(config: Run) -> Path:
    """Run a stage to its last step, from where its output folder left off.

    Returns:
        The folder of the last checkpoint.

    Raises:
        ValueError: a configuration that cannot be run; the message says what was expected.
        TrainingError: a run in the output folder with other settings, a loss that is not finite, or a checkpoint that
            cannot be written or does not fit.
    """
    check(config)
    checkpoints = Checkpoints(config)
    changed = checkpoints.changes()
    source = load_source(config)
    try:
        with warnings.catch_warnings():
            for message in NOISE:
                warnings.filterwarnings("ignore", message=message)
            return _train(config, checkpoints, changed, source)
    except KeyboardInterrupt:
        last = checkpoints.existing()[-1:]
        tell(f"stopped: the same command goes on from {last[0]}" if last else "stopped before the first checkpoint")
        raise
    finally:
        if source.skipped.reasons and is_main():
            tell(str(source.skipped))
            with suppress(OSError):
                (config.output / "skipped.json").write_text(json.dumps(source.skipped.reasons, indent=1))


def _train(config: Run, checkpoints: Checkpoints, changed: list[str], source: Folder | Shards) -> Path:
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.output,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    samples = config.micro_batch_size * accelerator.num_processes
    accumulated, rest = divmod(config.batch_size, samples)
    if rest or not accumulated:
        raise ValueError(
            f"batch_size {config.batch_size}: expected a multiple of micro_batch_size x processes, "
            f"{config.micro_batch_size} x {accelerator.num_processes}"
        )
    torch.manual_seed(config.seed)  # of fresh weights, alike in every process
    stage = StudentStage(config, accelerator) if isinstance(config, Student) else TeacherStage(config, accelerator)  # type: ignore[arg-type]
    average = Average(stage.model, config.ema_decay)
    architecture = dict(stage.model.config)
    step, position = checkpoints.load(stage.parts, average, architecture, samples)
    if step:
        going = "going on from" if step < config.steps else "nothing to train at"
        tell(f"{config.output}: {going} step {step} of {config.steps}" + "".join(f"; {change}" for change in changed))
    last = checkpoints.existing()[-1:]
    if step < config.steps:
        stream = load_batches(config, stage.model, source, accelerator, position)
        validation = load_validation(config, stage.model, source, accelerator.device) if config.validate_every else None
        log = Log(config, accelerator, step)
    hidden = not is_main() or step >= config.steps
    bar = tqdm(total=config.steps, initial=step, disable=hidden, dynamic_ncols=True, delay=0)
    try:
        while step < config.steps:
            current = list(islice(stream, accumulated))
            terms = stage.update(current, step)
            if (number := stage.model_update(step)) is not None:
                average.update(number)
            step, position = step + 1, current[-1].position
            bar.update()
            log.add(step, terms, bar, config.batch_size)
            if step % config.checkpoint_every == 0 or step == config.steps:
                last = [checkpoints.save(stage.parts, average, architecture, step, position, samples)]
            if validation is not None and step % config.validate_every == 0:
                log.validation(step, bar, lambda: validate(config, stage, average, validation))
            if step == config.steps:
                log.close()
    except (TrainingError, OSError) as error:
        kept = f"the last checkpoint is {last[0]}" if last else "there is no checkpoint yet"
        raise TrainingError(f"{error}; {kept}") from error
    finally:
        bar.close()
    if config.export is not None:
        export(config, stage, average)
        tell(f"exported to {config.export}")
    return last[0]


def tell(text: str) -> None:
    """A line above the progress bar, of the main process."""
    if is_main():
        tqdm.write(text, file=sys.stderr)


def load_source(config: Run) -> Folder | Shards:
    data = config.data
    if not data.source:
        raise ValueError("data.source: expected a folder of images or WebDataset shards")
    if (folder := Path(data.source)).is_dir():
        return Folder(folder, data.captions)
    if ".tar" not in data.source:
        what = "expected a folder, or .tar shards" if folder.exists() else "no such folder"
        raise ValueError(f"data.source {data.source}: {what}")
    if data.in_memory:
        raise ValueError("data.in_memory: expected a folder, got shards")
    return Shards(data.source)


def load_batches(
    config: Run,
    model: PixelDecoderTransformer2DModel,
    source: Folder | Shards,
    accelerator: Accelerator,
    position: int,
) -> Iterator[Batch]:
    data = config.data
    sizes = load_sizes(config, model)
    source.require(sizes, side_multiple(model.config))
    share = dict(
        seed=config.seed,
        device=accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start=position,
    )
    if data.in_memory:
        assert isinstance(source, Folder)
        total = sum(3 * math.prod(record.size) for record in source.items)
        free = memory_budget(accelerator.device) - held_memory(accelerator.device)
        if total > free:
            raise ValueError(
                f"data.in_memory: {len(source)} pictures take {total / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: "
                "give --data.no-in-memory, and they are read and shrunk as they are needed"
            )
        return batches_in_memory(source, data.resolution, config.micro_batch_size, **share)  # type: ignore[arg-type]
    return batches(source, sizes, config.micro_batch_size, **share, workers=data.workers)  # type: ignore[arg-type]


def load_sizes(config: Run, model: PixelDecoderTransformer2DModel) -> list[tuple[int, int]]:
    """Widths and heights of the crops."""
    data = config.data
    widest = 1.0 if data.in_memory else data.max_aspect_ratio
    return bucket_sizes(data.resolution, side_multiple(model.config), widest)


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


@torch.no_grad()
def validate(config: Run, stage: StudentStage | TeacherStage, average: Average, batch: Batch) -> dict:
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


def validation_columns(config: Run, stage: StudentStage | TeacherStage, batch: Batch) -> dict[str, torch.Tensor]:
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


def export(config: Run, stage: StudentStage | TeacherStage, average: Average) -> None:
    """The averaged weights as a diffusers folder, or as a LoRA's file."""
    assert config.export is not None
    with average.applied():
        state = full_state(stage.model)
        if not is_main():
            return
        pipeline = stage.pipeline(stage.model)
        if config.lora.rank:
            from peft import get_peft_model_state_dict

            layers = get_peft_model_state_dict(stage.model, state_dict=state)
            save = partial(pipeline.save_lora_weights, transformer_lora_layers=layers)
        else:
            model = PixelDecoderTransformer2DModel.from_config(stage.model.config)
            model.load_state_dict(state)
            pipeline = stage.pipeline(model.eval())
            encoder = getattr(config, "encoder", "")
            if encoder == "nano":  # small enough to go with it
                pipeline.register_modules(encoder=TinyLatentEncoder.from_pretrained(NANO / "encoder"))
            if encoder:
                pipeline.register_to_config(encoder_name=encoder)
            save = partial(pipeline.save_pretrained, max_shard_size="5GB")

        def write(folder: Path) -> None:
            save(folder)
            write_yaml(config, folder / "training.yaml")

        write_folder(config.export, write)


class Log:
    """`log.jsonl`, the progress bar, a tracker's charts, validation pictures, and at the end `curves.png`."""

    def __init__(self, config: Run, accelerator: Accelerator, step: int):
        self.config, self.accelerator = config, accelerator
        self.path = config.output / "log.jsonl"
        self.terms: dict[str, list[float]] = {}
        self.since = time.time()
        if accelerator.is_main_process:
            config.output.mkdir(parents=True, exist_ok=True)
            write_yaml(config, config.output / "config.yaml")
            # What an interrupted run logged after its last checkpoint comes again; a line may be cut short.
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            write_whole(self.path, lambda path: path.write_text("".join(f"{line}\n" for line in kept)))
        if config.tracker != "none":
            flat = {k: v for k, v in to_dict(config).items() if isinstance(v, (int, float, str, bool))}
            accelerator.init_trackers("pixeldecoder", flat)

    def add(self, step: int, terms: dict[str, float], bar: tqdm, samples: int) -> None:
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(value)
        if step % self.config.log_every and step != self.config.steps:
            return
        count = max(map(len, self.terms.values()))
        values = {name: sum(found) / len(found) for name, found in self.terms.items()}
        values["samples_per_second"] = samples * count / max(1e-9, time.time() - self.since)
        values["memory_gb"] = memory(self.accelerator.device) / 1e9
        bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()})
        self._write(step, values)
        self.terms, self.since = {}, time.time()

    def validation(self, step: int, bar: tqdm, validate: Callable[[], dict]) -> None:
        """What cannot be validated is told; the run goes on."""
        begun, failed, result = time.time(), "", {}
        try:
            result = validate()
        except (RuntimeError, ValueError) as error:  # such as too little memory
            if self.config.fsdp:
                raise  # the other processes wait for this one in the middle of it
            failed = " ".join(str(error).split())[:300]
        # Not training.
        self.since += time.time() - begun
        bar.unpause()
        if failed:
            tell(f"step {step}: no validation: {failed}")
            return
        grid = result.pop("grid")
        if self.accelerator.is_main_process:
            write_whole(self.config.output / "validation" / f"step_{step:08}.png", grid.save)
        if result:
            tell(f"step {step}: " + "  ".join(f"{name} {value:.2f}" for name, value in result.items()))
        self._write(step, result)

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        if self.config.tracker != "none":
            self.accelerator.log(values, step=step)

    def close(self) -> None:
        if self.config.tracker != "none":
            self.accelerator.end_training()
        if self.accelerator.is_main_process:
            plot(self.path, self.config.output / "curves.png")


def plot(log: Path, target: Path) -> None:
    """Every logged value over the steps."""
    import matplotlib.figure

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    names = [name for name in dict.fromkeys(key for line in lines for key in line) if name != "step"]
    if not names:
        return
    figure = matplotlib.figure.Figure(figsize=(12, 3 * math.ceil(len(names) / 3)), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(math.ceil(len(names) / 3), 3, index + 1)
        axes.plot([line["step"] for line in lines if name in line], [line[name] for line in lines if name in line])
        axes.set_title(name)
        axes.grid(alpha=0.3)
    figure.savefig(target, dpi=100)


def memory(device: torch.device) -> int:
    """Peak bytes: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
