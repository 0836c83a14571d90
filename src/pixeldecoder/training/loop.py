"""A configuration in, a trained decoder out: batches, updates, checkpoints."""

import json
import math
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from tqdm import tqdm

from pixeldecoder.files import sweep_once, write_whole
from pixeldecoder.heap import keep_freed_memory
from pixeldecoder.sources import Folder, Shards
from pixeldecoder.training.checkpoints import Checkpoints, export, is_main
from pixeldecoder.training.config import Prior, Run, Student, Teacher, check
from pixeldecoder.training.data import load_source
from pixeldecoder.training.distill import StudentStage
from pixeldecoder.training.log import Log, tell
from pixeldecoder.training.parts import Average, Stage, TrainingError
from pixeldecoder.training.teacher import PriorStage, TeacherStage
from pixeldecoder.training.validate import load_validation, validate

STAGES: dict[type[Run], Callable[[Any, Accelerator], Stage]] = {
    Prior: PriorStage,
    Teacher: TeacherStage,
    Student: StudentStage,
}
NOISE = (
    "Mismatch dtype between input and weight",  # of RMSNorm under autocast, whose weight shall stay float32
    "torch.distributed is disabled, unavailable or uninitialized",  # one process writes its checkpoints alone
    "`broadcast_buffers` is deprecated",  # its successor does not leave buffers alone
)
"""Warnings of torch about what is meant to be so."""


def train(config: Run, stage: Callable[[Any, Accelerator], Stage] | None = None) -> Path:
    """Run a stage to its end, from where its output folder left off.

    Args:
        stage: makes it of the configuration; by default that of the method which the configuration's class names.

    Returns:
        The folder of the last checkpoint.

    Raises:
        ValueError: a configuration that cannot be run; the message says what was expected.
        TrainingError: a run in the output folder with other settings, a loss that is not finite, or a checkpoint that
            cannot be written or does not fit.
    """
    check(config)
    sweep_once(config.output)  # of a run that was killed at its end, of which nothing else is left to write
    checkpoints = Checkpoints(config)
    changed = checkpoints.changes()
    source = load_source(config)
    try:
        with warnings.catch_warnings():
            for message in NOISE:
                warnings.filterwarnings("ignore", message=message)
            return _train(config, stage or STAGES[type(config)], checkpoints, changed, source)
    except KeyboardInterrupt:
        last = checkpoints.existing()[-1:]
        tell(f"stopped: the same command goes on from {last[0]}" if last else "stopped before the first checkpoint")
        raise
    finally:
        if source.skipped.reasons and is_main():
            tell(str(source.skipped))
            with suppress(OSError):
                text = json.dumps(source.skipped.reasons, indent=1)
                write_whole(config.output / "skipped.json", lambda path: path.write_text(text))


def _train(
    config: Run,
    make: Callable[[Any, Accelerator], Stage],
    checkpoints: Checkpoints,
    changed: list[str],
    source: Folder | Shards,
) -> Path:
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
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)  # of fresh weights, alike in every process
    stage = make(config, accelerator)
    average = Average(stage.model, config.ema_decay)
    architecture = dict(stage.model.config)
    step, position, before = checkpoints.load(stage.parts, average, architecture, samples)
    progress = max(step / config.steps, before / config.minutes)
    if step:
        going = "going on from" if progress < 1 else "nothing to train at"
        tell(f"{config.output}: {going} step {step} of {config.steps}" + "".join(f"; {change}" for change in changed))
    last = checkpoints.existing()[-1:]
    if progress < 1:
        stream = stage.batches(source, position)
        validation = load_validation(config, stage.model, source, accelerator.device) if config.validate_every else None
        log = Log(config, accelerator, step)
    hidden = not is_main() or progress >= 1
    bar = tqdm(total=config.steps, initial=step, disable=hidden, dynamic_ncols=True, delay=0)
    try:
        begun = seconds(accelerator.device)
        ended = progress >= 1
        while not ended:
            current = list(islice(stream, accumulated))
            terms = stage.update(current, step, progress)
            if (number := stage.model_update(step)) is not None:
                average.update(number)
            step, position = step + 1, current[-1].position
            minutes = before + (seconds(accelerator.device) - begun) / 60
            if min(config.minutes, config.piece) < math.inf:  # the processes' clocks differ
                minutes = accelerator.reduce(torch.tensor(minutes, device=accelerator.device), "mean").item()
            progress = max(step / config.steps, minutes / config.minutes)
            ended = progress >= 1 or minutes - before >= config.piece
            bar.update()
            log.add(step, terms, bar, config.batch_size, ended)
            if step % config.checkpoint_every == 0 or ended:
                last = [checkpoints.save(stage.parts, average, architecture, step, position, samples, minutes)]
            if validation is not None and step % config.validate_every == 0:
                log.validation(step, bar, lambda: validate(config, stage, average, validation))
            if ended:
                log.close()
    except (TrainingError, OSError) as error:
        kept = f"the last checkpoint is {last[0]}" if last else "there is no checkpoint yet"
        raise TrainingError(f"{error}; {kept}") from error
    finally:
        bar.close()
    if config.export is not None and progress >= 1:
        export(config, stage, average)
        tell(f"exported to {config.export}")
    return last[0]


def seconds(device: torch.device) -> float:
    """A clock: of a CPU the time that this process computes on each thread."""
    return time.process_time() / torch.get_num_threads() if device.type == "cpu" else time.monotonic()
