"""A configuration in, a trained decoder out: batches, updates, checkpoints, and what people watch."""

import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from tqdm import tqdm

from pixeldecoder.evaluation.metrics import psnr
from pixeldecoder.files import to_image
from pixeldecoder.latents import add_noise
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.training.checkpoints import Checkpoints, full_state, is_main
from pixeldecoder.training.config import Run, Student, to_dict, write_yaml
from pixeldecoder.training.data import (
    UNREADABLE,
    Batch,
    Folder,
    SampleRandom,
    Shards,
    batches,
    batches_in_memory,
    bucket_sizes,
    crop,
)
from pixeldecoder.training.degrade import shrink
from pixeldecoder.training.distill import StudentStage
from pixeldecoder.training.parts import Average, TrainingError, autocast
from pixeldecoder.training.teacher import TeacherStage

VALIDATION_SIGMAS = (0.0, 0.4, 0.8)


def train(config: Run) -> Path:
    """Run a stage to its last step, from where its output folder left off.

    Returns:
        The folder of the last checkpoint.

    Raises:
        ValueError: a configuration that cannot be run; the message says what was expected.
        TrainingError: a loss that is not finite, or a checkpoint that cannot be written or does not fit.
    """
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.output,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    world = accelerator.num_processes
    accumulated, rest = divmod(config.batch_size, config.micro_batch_size * world)
    if rest or not accumulated:
        raise ValueError(
            f"batch_size {config.batch_size}: expected a multiple of micro_batch_size x processes, "
            f"{config.micro_batch_size} x {world}"
        )
    torch.manual_seed(config.seed)  # of fresh weights, alike in every process
    stage = StudentStage(config, accelerator) if isinstance(config, Student) else TeacherStage(config, accelerator)  # type: ignore[arg-type]
    average = Average(stage.model, config.ema_decay)
    checkpoints = Checkpoints(config, dict(stage.model.config))
    progress = checkpoints.load(stage.parts, average)
    step, position, before = progress["step"], progress["position"], progress["seconds"]
    source = load_source(config)
    stream = load_batches(config, stage.model, source, accelerator, position)
    validation = load_validation(config, stage.model, source, accelerator.device)
    log = Log(config, accelerator, step)
    bar = tqdm(total=config.steps, initial=step, disable=not accelerator.is_main_process, dynamic_ncols=True)
    begun = time.time()
    last = checkpoints.existing()[-1:]
    try:
        while step < config.steps:
            current = list(islice(stream, accumulated))
            terms = stage.update(current, step)
            if (number := stage.model_update(step)) is not None:
                average.update(number)
            step, position = step + 1, current[-1].position
            bar.update()
            log.add(step, terms, bar, accumulated * config.micro_batch_size * world)
            if step % config.checkpoint_every == 0 or step == config.steps:
                seconds = before + time.time() - begun
                last = [checkpoints.save(stage.parts, average, step, position, seconds)]
            if step % config.validate_every == 0 or step == config.steps:
                log.validation(step, validate(config, stage, average, validation))
        log.close()
    except (TrainingError, OSError) as error:
        kept = f"the last checkpoint is {last[0]}" if last else "there is no checkpoint yet"
        raise TrainingError(f"{error}; {kept}") from error
    finally:
        bar.close()
        if source.skipped.reasons and accelerator.is_main_process:
            names = ", ".join(list(source.skipped.reasons)[:10])
            tqdm.write(f"{len(source.skipped.reasons)} pictures could not be used: {names}")
    if config.export is not None:
        export(config, stage, average)
    return last[0]


def load_source(config: Run) -> Folder | Shards:
    data = config.data
    if not data.source:
        raise ValueError("data.source: expected a folder of images or WebDataset shards")
    if (folder := Path(data.source)).is_dir():
        return Folder(folder, data.captions)
    if ".tar" not in data.source:
        raise ValueError(f"data.source {data.source}: expected a folder, or .tar shards")
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
    data, network = config.data, model.config
    cell = network.scale * network.latent_downscale_factor if network.latent_channels else 1
    sizes = bucket_sizes(
        data.resolution, math.lcm(network.patch_size, cell), 1.0 if data.in_memory else data.max_aspect_ratio
    )
    share = dict(
        seed=config.seed,
        device=accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start=position,
    )
    if data.in_memory:
        assert isinstance(source, Folder)
        return batches_in_memory(source, data.resolution, config.micro_batch_size, **share)  # type: ignore[arg-type]
    return batches(source, sizes, config.micro_batch_size, **share, workers=data.workers)  # type: ignore[arg-type]


def load_validation(
    config: Run, model: PixelDecoderTransformer2DModel, source: Folder | Shards, device: torch.device
) -> Batch:
    """The same four squares whenever it is called, of the validation folder or else of the training data."""
    data, network = config.data, model.config
    records = iter(Folder(data.validation).items) if data.validation else source.records(config.seed)
    cell = network.scale * network.latent_downscale_factor if network.latent_channels else 1
    size = bucket_sizes(data.resolution, math.lcm(network.patch_size, cell), 1.0)[0]
    first = []
    for record in islice(records, 100):
        try:
            first.append((record, crop(record, size, Random(0))))
        except UNREADABLE as error:
            source.skipped.add(record.name, error)
        if len(first) == 4:
            break
    if not first:
        raise ValueError("no picture to validate on can be decoded")
    return Batch(
        image=torch.stack([image for _, image in first]).to(device).float() / 127.5 - 1,
        captions=[record.caption for record, _ in first],
        names=[record.name for record, _ in first],
        samples=list(range(len(first))),
        position=0,
    )


@torch.no_grad()
def validate(config: Run, stage: StudentStage | TeacherStage, average: Average, batch: Batch) -> dict:
    """Decodes of the averaged weights at several sigmas: their mean PSNR, and "grid", a picture of them all.

    A row for each image: the small picture enlarged, the decodes, the original; for a prior what its captions give.
    """
    image, model = batch.image, stage.model
    model.eval()
    pipeline = stage.pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    height, width = image.shape[-2:]
    result: dict = {}
    columns = []
    half = config.precision == "bfloat16" and not config.fsdp
    with average.applied(), autocast(image.device, half):
        whole = stage.conditions(batch, SampleRandom(0, batch.samples, "validation", image.device))

        def run(**kwargs) -> torch.Tensor:
            generator = [torch.Generator().manual_seed(n) for n in batch.samples]
            images = pipeline(
                prompt_embeds=whole.embeds,
                negative_prompt_embeds=whole.negative_embeds,
                generator=generator,
                output_type="pt",
                **kwargs,
            ).images
            return images.to(image.device).float() * 2 - 1

        if stage.conditions.encoder is None:
            columns.append(run(height=height, width=width))
        else:
            small = shrink(image, model.config.scale)
            bicubic = F.interpolate(small, size=(height, width), mode="bicubic").clamp(-1, 1)
            result["psnr_bicubic"] = psnr(bicubic, image)
            columns.append(bicubic)
            latents = stage.conditions.encoder(small)
            noise = SampleRandom(1, batch.samples, "validation", image.device).normal(*latents.shape[1:])
            for sigma in VALIDATION_SIGMAS:
                level = torch.full((len(image),), sigma, device=image.device)
                z = add_noise(latents, noise, level, getattr(config, "frame", "flow"))
                columns.append(run(latents=z, sigma=sigma))
                result[f"psnr_sigma_{sigma}"] = psnr(columns[-1], image)
    columns.append(image)
    model.train()
    rows = [torch.cat(list(row), dim=-1) for row in zip(*columns, strict=True)]
    result["grid"] = to_image(torch.cat(rows, dim=-2)[None])
    return result


def export(config: Run, stage: StudentStage | TeacherStage, average: Average) -> None:
    """The averaged weights as a diffusers folder, or as a LoRA's file."""
    assert config.export is not None
    with average.applied():
        state = full_state(stage.model)
        if not is_main():
            return
        if config.lora.rank:
            from peft import get_peft_model_state_dict

            layers = get_peft_model_state_dict(stage.model, state_dict=state)
            stage.pipeline(stage.model).save_lora_weights(config.export, layers)
        else:
            model = PixelDecoderTransformer2DModel.from_config(stage.model.config)
            model.load_state_dict(state)
            stage.pipeline(model.eval()).save_pretrained(config.export, max_shard_size="5GB")
    write_yaml(config, config.export / "training.yaml")


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
            # What an interrupted run logged after its last checkpoint comes again.
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            self.path.write_text("".join(f"{line}\n" for line in kept))
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

    def validation(self, step: int, result: dict) -> None:
        grid = result.pop("grid")
        if self.accelerator.is_main_process:
            folder = self.config.output / "validation"
            folder.mkdir(exist_ok=True)
            grid.save(folder / f"step_{step:08}.png")
            if result:
                tqdm.write(f"step {step}: " + "  ".join(f"{name} {value:.2f}" for name, value in result.items()))
        self._write(step, result)
        self.since = time.time()  # not training

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
