"""Networks that train in, checkpoints from which a run goes on out, and at its end the decoder it made."""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from pixeldecoder.files import write_folder
from pixeldecoder.models.encoder import TinyLatentEncoder
from pixeldecoder.pipeline import PixelDecoderPipeline
from pixeldecoder.presets import NANO
from pixeldecoder.training.config import FREE, Run, changes, load_yaml, to_dict, write_yaml
from pixeldecoder.training.parts import Average, Part, Stage, TrainingError

PARTIAL = ".partial"


class Checkpoints:
    """Folders `step_00001000` in the run's folder: networks, optimizers, average, step and data position.

    There is no other state: learning rates and random numbers follow from the step and the samples' numbers.
    """

    def __init__(self, config: Run):
        self.config = config
        self.stage = type(config).__name__.lower()
        self.folder = config.output / "checkpoints"

    def existing(self) -> list[Path]:
        """Complete ones, oldest first."""
        return sorted(path for path in self.folder.glob("step_*") if path.suffix != PARTIAL)

    def changes(self) -> list[str]:
        """What this run sets otherwise than the newest checkpoint's, of what it may; needs no network.

        Raises:
            TrainingError: the checkpoint is of another stage, or was made with settings that must stay.
        """
        if not (existing := self.existing()):
            return []
        stage = _progress(existing[-1])["stage"]
        if stage != self.stage:
            raise TrainingError(f"{existing[-1]} is a {stage}'s, not a {self.stage}'s: give another output folder")
        differing = changes(load_yaml(existing[-1] / "config.yaml"), to_dict(self.config))
        if fixed := [f"{name}: {change}" for name, change in differing.items() if name not in FREE]:
            raise TrainingError(
                f"{self.config.output} holds a run with other settings ({'; '.join(fixed)}): give those again to go on "
                "with it, or another output folder"
            )
        return [f"{name}: {change}" for name, change in differing.items() if name not in ("output", "architecture")]

    def save(
        self,
        parts: dict[str, Part],
        average: Average,
        architecture: dict[str, Any],
        step: int,
        position: int,
        samples: int,
        minutes: float,
    ) -> Path:
        """Write, rename, and delete the oldest.

        Args:
            architecture: arguments of the network.
            position: of the data, in batches of so many `samples`.
            minutes: of training that the steps took.

        Raises:
            TrainingError: it could not be written, for example on a full disk; older ones are kept.
        """
        target = self.folder / f"step_{step:08}"
        partial = target.with_suffix(PARTIAL)
        try:
            if is_main():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            barrier()
            dcp.save(self._state(parts, average), checkpoint_id=partial, no_dist=not dist.is_initialized())
            if is_main():
                write_yaml(self.config, partial / "config.yaml")
                progress = {
                    "stage": self.stage,
                    "step": step,
                    "position": position,
                    "samples": samples,
                    "minutes": minutes,
                    "architecture": _plain(architecture),
                }
                (partial / "progress.json").write_text(json.dumps(progress, indent=1))
                for file in partial.rglob("*"):
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
                for old in self.existing()[: -self.config.keep_checkpoints]:
                    shutil.rmtree(old)
            barrier()
        except (Exception, CheckpointException) as error:  # DCP wraps what went wrong in a class that is no Exception
            if is_main():
                shutil.rmtree(partial, ignore_errors=True)
            _pass_on_interrupt(error)
            raise TrainingError(f"could not write {target}: {_reason(error)}") from error
        return target

    def load(
        self, parts: dict[str, Part], average: Average, architecture: dict[str, Any], samples: int
    ) -> tuple[int, int, float]:
        """The newest one into `parts` and `average`.

        Returns:
            Its step, the position of the data in batches of so many `samples`, and the minutes it took; zeros if there
            is none.

        Raises:
            TrainingError: it is of another architecture.
        """
        if not (existing := self.existing()):
            return 0, 0, 0.0
        progress = _progress(existing[-1])
        if progress["architecture"] != (architecture := _plain(architecture)):
            names = [k for k in architecture if architecture[k] != progress["architecture"].get(k)]
            raise TrainingError(
                f"{existing[-1]} is of another architecture (other {', '.join(names)}): give another output folder, "
                "or the model that it was made with"
            )
        state = self._state(parts, average)
        try:
            dcp.load(state, checkpoint_id=existing[-1], no_dist=not dist.is_initialized())
        except (Exception, CheckpointException) as error:
            _pass_on_interrupt(error)
            raise TrainingError(
                f"{existing[-1]} does not fit this run ({_reason(error)}): another stage, LoRA or "
                "trained part? Give another output folder"
            ) from error
        for name, part in parts.items():
            set_state_dict(
                part.module,
                part.optimizer,
                model_state_dict=state[name],
                optim_state_dict=state[f"{name}.optimizer"],
            )
        position = -(-progress["position"] * progress["samples"] // samples)
        return progress["step"], position, progress.get("minutes", 0.0)

    def _state(self, parts: dict[str, Part], average: Average) -> dict[str, Any]:
        state: dict[str, Any] = {"average": average.values}  # loaded in place
        for name, part in parts.items():
            state[name], state[f"{name}.optimizer"] = get_state_dict(part.module, part.optimizer)
        return state


def export(config: Run, stage: Stage, average: Average) -> None:
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
            model = type(stage.model).from_config(stage.model.config)
            model.load_state_dict(state)
            pipeline = stage.pipeline(model.eval())
            encoder = getattr(config, "encoder", "") if isinstance(pipeline, PixelDecoderPipeline) else ""
            if encoder == "nano":  # small enough to go with it
                pipeline.register_modules(encoder=TinyLatentEncoder.from_pretrained(NANO / "encoder"))
            if encoder:
                pipeline.register_to_config(encoder_name=encoder)
            save = partial(pipeline.save_pretrained, max_shard_size="5GB")

        def write(folder: Path) -> None:
            save(folder)
            write_yaml(config, folder / "training.yaml")

        write_folder(config.export, write)


def full_state(module: nn.Module) -> dict[str, Any]:
    """Whole tensors on the CPU, on the main process; all processes must call it."""
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _progress(checkpoint: Path) -> dict[str, Any]:
    """What `save` wrote of a checkpoint.

    Raises:
        TrainingError: it is damaged, or of an earlier version.
    """
    path = checkpoint / "progress.json"
    try:
        found = json.loads(path.read_text())
        missing = [name for name in ("stage", "step", "position", "samples", "architecture") if name not in found]
    except (ValueError, TypeError) as error:
        raise TrainingError(f"{path}: damaged ({error}): delete {checkpoint} to go on from an older one") from None
    if missing:
        raise TrainingError(
            f"{path} does not tell {', '.join(missing)}: it is of an earlier version: give another output folder"
        )
    return found


def _plain(architecture: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON."""
    return json.loads(json.dumps({k: v for k, v in architecture.items() if k[:1] != "_"}))


def _pass_on_interrupt(error: BaseException) -> None:
    """DCP wraps Ctrl-C, too."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else ()
    if any(isinstance(failure, KeyboardInterrupt) for failure, _ in failures):
        raise KeyboardInterrupt from None


def _reason(error: BaseException) -> str:
    """One line of what went wrong, in the first process where it did."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:300] or type(error).__name__


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
