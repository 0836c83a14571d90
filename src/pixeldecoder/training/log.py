"""A step's terms in, `log.jsonl`, a progress bar, charts and validation pictures out."""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from pixeldecoder.files import write_whole
from pixeldecoder.plan import measured_peak
from pixeldecoder.training.checkpoints import is_main
from pixeldecoder.training.config import Run, to_dict, write_yaml


class Log:
    """`log.jsonl`, the progress bar, a tracker's charts, validation pictures, and at the end `curves.png`."""

    def __init__(self, config: Run, accelerator: Accelerator, step: int):
        self.config, self.accelerator = config, accelerator
        self.path = config.output / "log.jsonl"
        self.terms: dict[str, list[float]] = {}
        self.since = time.monotonic()
        if accelerator.is_main_process:
            config.output.mkdir(parents=True, exist_ok=True)
            write_yaml(config, config.output / "config.yaml")
            # What an interrupted run logged after its last checkpoint comes again.
            lines, torn = read_log(self.path)
            if torn:
                tell(f"{self.path}: left out {torn} damaged line{'s' if torn > 1 else ''}")
            kept = [json.dumps(line) for line in lines if line["step"] <= step]
            write_whole(self.path, lambda path: path.write_text("".join(f"{line}\n" for line in kept)))
        if config.tracker != "none":
            flat = {k: v for k, v in to_dict(config).items() if isinstance(v, (int, float, str, bool))}
            accelerator.init_trackers("pixeldecoder", flat)

    def add(self, step: int, terms: dict[str, float], bar: tqdm, samples: int, last: bool = False) -> None:
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(value)
        if step % self.config.log_every and not last:
            return
        count = max(map(len, self.terms.values()))
        values = {name: sum(found) / len(found) for name, found in self.terms.items()}
        values["samples_per_second"] = samples * count / max(1e-9, time.monotonic() - self.since)
        values["memory_gb"] = measured_peak(self.accelerator.device) / 1e9
        bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()})
        self._write(step, values)
        self.terms, self.since = {}, time.monotonic()

    def validation(self, step: int, bar: tqdm, validate: Callable[[], dict]) -> None:
        """What cannot be validated is told; the run goes on."""
        begun, failed, result = time.monotonic(), "", {}
        try:
            result = validate()
        except (RuntimeError, ValueError) as error:  # such as too little memory
            if self.config.fsdp:
                raise  # the other processes wait for this one in the middle of it
            failed = " ".join(str(error).split())[:300]
        # Not training.
        self.since += time.monotonic() - begun
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


def tell(text: str) -> None:
    """A line above the progress bar, of the main process."""
    if is_main():
        tqdm.write(text, file=sys.stderr)


def read_log(path: Path) -> tuple[list[dict[str, float]], int]:
    """The lines of a log, and the number of those that a full disk or a power cut damaged."""
    lines, torn = [], 0
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            sound = isinstance(line, dict) and "step" in line and all(type(x) in (int, float) for x in line.values())
        except (ValueError, RecursionError):
            sound = False
        if sound:
            lines.append(line)
        else:
            torn += 1
    return lines, torn


def plot(log: Path, target: Path) -> None:
    """Every logged value over the steps."""
    import matplotlib.figure

    lines, _ = read_log(log)
    names = [name for name in dict.fromkeys(key for line in lines for key in line) if name != "step"]
    if not names:
        return
    figure = matplotlib.figure.Figure(figsize=(12, 3 * math.ceil(len(names) / 3)), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(math.ceil(len(names) / 3), 3, index + 1)
        axes.plot([line["step"] for line in lines if name in line], [line[name] for line in lines if name in line])
        axes.set_title(name)
        axes.grid(alpha=0.3)
    write_whole(target, lambda path: figure.savefig(path, dpi=100))
