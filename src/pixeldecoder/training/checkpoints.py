"""Networks that train in, checkpoints from which a run goes on out, and at its end the decoder it made."""

import io
import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from diffusers.utils import logging
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, ReadItem
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

logger = logging.get_logger(__name__)

PARTIAL = ".partial"


class Checkpoints:
    """Folders `step_00001000` in the run's folder: networks, optimizers, average, step and data position.

    There is no other state: learning rates and random numbers follow from the step and the samples' numbers.
    """

    def __init__(self, config: Run):
        self.config = config
        self.stage = type(config).__name__.lower()
        self.folder = config.output / "checkpoints"
        self.damaged: set[Path] = set()

    def existing(self) -> list[Path]:
        """Complete ones that were not found damaged, oldest first."""
        paths = self.folder.glob("step_*")
        return sorted(path for path in paths if path.suffix != PARTIAL and path not in self.damaged)

    def changes(self) -> list[str]:
        """What this run sets otherwise than the newest checkpoint's, of what it may; needs no network.

        Raises:
            TrainingError: the checkpoint is of another stage, was made with settings that must stay, or is damaged and
                the only one.
        """
        settings = None
        while settings is None:
            if not (existing := self.existing()):
                return []
            try:
                stage, settings = _progress(existing[-1])["stage"], load_yaml(existing[-1] / "config.yaml")
            except ValueError as error:
                self._leave_out(existing[-1], str(error))
        if stage != self.stage:
            raise TrainingError(f"{existing[-1]} is a {stage}'s, not a {self.stage}'s: give another output folder")
        differing = changes(settings, to_dict(self.config))
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
                for left in self.folder.glob(f"*{PARTIAL}"):  # by a run that was killed, at this step or another
                    shutil.rmtree(left, ignore_errors=True)
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
                self.damaged.discard(target)
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
        """The newest one that is not damaged into `parts` and `average`.

        Returns:
            Its step, the position of the data in batches of so many `samples`, and the minutes it took; zeros if there
            is none.

        Raises:
            TrainingError: it is of another architecture, or none can be read.
        """
        architecture, state = _plain(architecture), self._state(parts, average)
        loaded = False
        while not loaded:
            if not (existing := self.existing()):
                return 0, 0, 0.0
            progress = _progress(existing[-1])
            if progress["architecture"] != architecture:
                names = [k for k in architecture if architecture[k] != progress["architecture"].get(k)]
                raise TrainingError(
                    f"{existing[-1]} is of another architecture (other {', '.join(names)}): give another output "
                    "folder, or the model that it was made with"
                )
            try:
                with (existing[-1] / ".metadata").open("rb") as file:
                    Metadata(file).load()
                planner = Planner()
                dcp.load(state, checkpoint_id=existing[-1], planner=planner, no_dist=not dist.is_initialized())
                loaded = True
            except (Exception, CheckpointException) as error:
                _pass_on_interrupt(error)
                # The settings are the same: what does not fit them is damaged, or another version's.
                self._leave_out(existing[-1], f"{existing[-1]} cannot be read ({_reason(error)})")
        for name, part in parts.items():
            set_state_dict(
                part.module,
                part.optimizer,
                model_state_dict=state[name],
                optim_state_dict=state[f"{name}.optimizer"],
            )
        position = -(-progress["position"] * progress["samples"] // samples)
        return progress["step"], position, progress.get("minutes", 0.0)

    def _leave_out(self, damaged: Path, why: str) -> None:
        """Go on from an older one.

        Raises:
            TrainingError: there is none.
        """
        self.damaged.add(damaged)
        if not (older := self.existing()):
            raise TrainingError(
                f"{why}, and there is no older checkpoint to go on from: give another output folder, or delete "
                f"{self.folder} to begin anew"
            )
        if is_main():
            logger.warning(f"{why}: going on from {older[-1].name}")

    def _state(self, parts: dict[str, Part], average: Average) -> dict[str, Any]:
        state: dict[str, Any] = {"average": average.values}  # loaded in place
        for name, part in parts.items():
            state[name], state[f"{name}.optimizer"] = get_state_dict(part.module, part.optimizer)
        return state


class Metadata(pickle.Unpickler):
    """Reads what DCP pickles of a checkpoint, and nothing that could run code, before DCP itself does."""

    def find_class(self, module: str, name: str) -> Any:
        known = name in METADATA.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        )
        if not known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs: it may be an attack")
        return super().find_class(module, name)


METADATA = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "_MEM_FORMAT_ENCODING", "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
        "StorageMeta", "TensorProperties", "TensorStorageMetadata",
    ),
}  # fmt: skip
"""Classes in a checkpoint's metadata, by module: PyTorch 2.6 to 2.13's."""


class Planner(DefaultLoadPlanner):
    """DCP's, which would unpickle whatever a number's place holds."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises for what is no plain value
        value.seek(0)
        super().load_bytes(read_item, value)


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
        ValueError: it is damaged, or of an earlier version.
    """
    path = checkpoint / "progress.json"
    try:
        found = json.loads(path.read_text())
        kinds = dict(stage=str, step=int, position=int, samples=int, architecture=dict)
        missing = [name for name, kind in kinds.items() if not isinstance(found.get(name), kind)]
        if not isinstance(found.get("minutes", 0.0), int | float):
            missing.append("minutes")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path}: damaged ({why})") from None
    if missing:
        raise ValueError(f"{path} does not tell {', '.join(missing)}: it is damaged, or of an earlier version")
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
