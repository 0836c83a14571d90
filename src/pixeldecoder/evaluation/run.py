"""Pictures or prompts in; every method's images of them, `results.csv` and `study.json` out.

An image is a function of its picture's name, its setting and the seed alone, and its row is written after it: so what
was interrupted goes on, any number of processes share the work, and more metrics are added to images that are there.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

import pixeldecoder
from pixeldecoder.evaluation.methods import (
    BASELINES,
    Case,
    Making,
    Run,
    Setting,
    baseline_run,
    decoder_run,
    frame_of,
    latents_path,
    slug,
)
from pixeldecoder.evaluation.metrics import METRICS, find_metrics, load_metrics, measure
from pixeldecoder.files import load_image, save_image, to_image, to_tensor, write_whole
from pixeldecoder.latents import Frame, load_autoencoder
from pixeldecoder.ldm import parse_stop, partly_denoise
from pixeldecoder.pipeline import PixelDecoderPipeline
from pixeldecoder.training.data import UNREADABLE, Folder, Record, Shards
from pixeldecoder.training.degrade import shrink

PATCH = 256
"""Side in pixels of the patches of the patch FID."""


@dataclass(kw_only=True)
class Study:
    """What is compared, on what.

    Args:
        source: a folder of pictures; shards (`.tar`, as WebDataset takes them); or a `.txt` file, a prompt a line.
        output: folder of the images, the tables and the report.
        decoders: by name, what loads each.
        encoder: for a decoder, what makes its latents; `None`: its own encoder.
        baselines: of `BASELINES`.
        vae: autoencoder of the baselines that need one, by folder or Hub id.
        pipe: loads the latent diffusion pipeline, for prompts; `pipe_kwargs` are for its call.
        steps: sampling steps of the decoders; none: what each was made for.
        sigmas: noise levels of the latents, for pictures.
        stops: where the latent model stops, for prompts.
        as_if_clean: decode noisy latents also as if they were clean.
        crop: side of the centre crops in pixels; `None`: whole pictures.
        scale: of the baselines, if there is no decoder.
        limit: how many pictures or prompts, from the first.
        call_kwargs: for the decoders' calls.
        metrics: by name; none: those that need no weights, and those whose weights are given.
        weights: of metrics, by name and path.
        device: of the baselines and the metrics.
        identity: whatever else an image depends on; a folder goes on only with the same.
    """

    source: str
    output: Path
    decoders: dict[str, Callable[[], PixelDecoderPipeline]] = field(default_factory=dict)
    encoder: Callable[[PixelDecoderPipeline], Any] = lambda pipeline: None
    baselines: tuple[str, ...] = ()
    vae: str | None = None
    pipe: Callable[[], Any] | None = None
    pipe_kwargs: dict[str, Any] = field(default_factory=dict)
    steps: tuple[int, ...] = ()
    sigmas: tuple[float, ...] = (0.0,)
    stops: tuple[str, ...] = ("auto",)
    as_if_clean: bool = False
    crop: int | None = None
    scale: int = 4
    limit: int | None = None
    seed: int = 0
    call_kwargs: dict[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    weights: dict[str, Path] = field(default_factory=dict)
    device: str = "cpu"
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def prompts(self) -> bool:
        return self.source.endswith(".txt")

    def run(self) -> None:
        """Do what is not there yet.

        Raises:
            ValueError: settings that do not fit each other, the source, or what the output folder holds.
        """
        self.state = PartialState(cpu=self.device == "cpu")
        self.unreadable: dict[str, str] = {}
        known = find_metrics(self.metrics, self.weights)
        methods = self._methods()
        count = sum(1 for _ in self._records())
        self._check_folder()
        skipped = {m.name: "for prompts alone" for m in known if m.needs == "prompt" and not self.prompts}
        skipped |= {m.name: "for pictures alone" for m in known if m.needs in ("truth", "set") and self.prompts}
        scores, missing = load_metrics(
            (m for m in known if m.name not in skipped), torch.device(self.device), self.weights
        )
        skipped |= missing
        sets = {name: scores.pop(name) for name in list(scores) if METRICS[name].needs == "set"}
        for name, reason in skipped.items():
            if self.state.is_main_process:
                print(f"skipped {name}: {reason}")
        self.rows = read_rows(self.output)
        if self.prompts:
            self._generate()
        todo = count * sum(len(settings) for settings, _ in methods)
        with tqdm(total=todo, desc="images", disable=not self.state.is_main_process) as bar:
            for settings, load in methods:
                self._run_method(settings, load, scores, bar)
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self._write([setting for settings, _ in methods for setting in settings], list(scores), sets, skipped)
        self.state.wait_for_everyone()

    # What there is to do, and on what.

    def _methods(self) -> list[tuple[list[Setting], Callable[[], Run]]]:
        """Settings, with what loads their method when its turn comes, so that one at a time is in memory."""
        if not self.decoders and not self.baselines:
            raise ValueError("nothing to evaluate: give a decoder or a baseline")
        found: list[tuple[list[Setting], Callable[[], Run]]] = []
        scales, frames = {}, []
        for name, load in self.decoders.items():
            pipeline = load()
            config = pipeline.transformer.config
            scales[name] = config.scale
            frames.append(frame_of(pipeline))
            settings = []
            for steps in self.steps or (pipeline.config.default_num_inference_steps,):
                pipeline._set_times(steps, None, 512, 512, torch.device("cpu"))  # complains if it cannot
                if self.prompts:
                    settings += [Setting(name, steps, stop=stop) for stop in self.stops]
                    continue
                for sigma in self.sigmas:
                    settings.append(Setting(name, steps, sigma))
                    if self.as_if_clean and sigma > 0:
                        settings.append(Setting(name, steps, sigma, 0.0))
            found.append((settings, partial(self._load_decoder, load)))
            del pipeline
        if len(set(scales.values())) > 1:
            listed = ", ".join(f"{name} {scale}x" for name, scale in scales.items())
            raise ValueError(f"decoders of different scale do not fit in one table: {listed}: evaluate them separately")
        self.scale = next(iter(scales.values()), self.scale)
        for sigma in self.sigmas:
            if not 0 <= sigma <= 1:
                raise ValueError(f"sigma {sigma}: expected a noise level in [0, 1]")
        for stop in self.stops:
            parse_stop(stop)
        cell = 16 * self.scale
        if self.crop is not None and (self.crop < cell or self.crop % cell):
            raise ValueError(f"crop {self.crop}: expected a multiple of {cell} pixels, a cell of the latents")
        if self.prompts and self.pipe is None:
            raise ValueError("prompts need a latent model that follows them: give a diffusers pipeline")
        first = []
        for name in self.baselines:
            kind = name.split(":")[0]
            if name not in ("bicubic", "lanczos", "vae") and not (kind in ("upscale", "spandrel") and ":" in name):
                raise ValueError(f'no baseline "{name}": expected one of {", ".join(BASELINES)}')
            of_latents = kind not in ("bicubic", "lanczos")
            if self.prompts and not of_latents:
                raise ValueError(f"baseline {name}: a prompt has no small picture to enlarge: take vae")
            if of_latents and not self.prompts and self.vae is None:
                raise ValueError(f"baseline {name} needs an autoencoder: give its folder or Hub id")
            sigmas = self.sigmas if of_latents and not self.prompts else (None,)
            first.append(([Setting(name, sigma=sigma) for sigma in sigmas], partial(self._load_baseline, name, frames)))
        return first + found  # the quick ones, and their errors, first

    def _records(self) -> Iterator[Record]:
        source = Path(self.source)
        if self.prompts:
            lines = [line.strip() for line in source.read_text().splitlines() if line.strip()]
            if not lines:
                raise ValueError(f"{source}: expected a prompt in each line, found none")
            found: Any = [Record(line, line, (0, 0), Image.Image) for line in dict.fromkeys(lines)]
        elif source.suffix == ".tar" or not source.exists():
            if source.suffix != ".tar":
                raise ValueError(f"{source}: no such folder, and neither shards (.tar) nor prompts (.txt)")
            shards = Shards(self.source)
            self.unreadable, found = shards.skipped.reasons, shards.once()
        else:
            folder = Folder(source)
            self.unreadable, found = folder.skipped.reasons, folder.items
        least = self.crop or 16 * self.scale
        for index, record in enumerate(found):
            if index == self.limit:
                return
            if not self.prompts and min(record.size) < least:
                width, height = record.size
                raise ValueError(
                    f"{record.name} is {width} x {height} pixels, smaller than the crop of {least}: take a smaller "
                    "crop, or the picture out"
                )
            yield record

    def _cases(self) -> Iterator[Case]:
        """This process's share."""
        for index, record in enumerate(self._records()):
            if index % self.state.num_processes != self.state.process_index:
                continue
            case = Case(record.name, record.caption)
            if not self.prompts:
                try:
                    truth = to_tensor(record.open())
                except UNREADABLE as error:
                    if record.name not in self.unreadable:
                        self.unreadable[record.name] = str(error)
                        self._append({"unreadable": record.name, "reason": str(error)})
                    continue
                height, width = truth.shape[-2:]
                cell = 16 * self.scale
                wanted = [self.crop or side // cell * cell for side in (height, width)]
                top, left = (height - wanted[0]) // 2, (width - wanted[1]) // 2
                case.truth = truth[..., top : top + wanted[0], left : left + wanted[1]].to(self.device)
                case.small = shrink(case.truth, self.scale)
            yield case

    def _check_folder(self) -> None:
        """Refuse to mix what does not belong together in the output folder."""
        # Through JSON, as what is there went.
        identity = json.loads(
            json.dumps(
                self.identity
                | {"source": self.source, "seed": self.seed, "crop": self.crop, "scale": self.scale, "vae": self.vae}
                | {"pipe_kwargs": self.pipe_kwargs}
            )
        )
        path = self.output / "study.json"
        if path.exists():
            there = json.loads(path.read_text())["identity"]
            if different := [key for key in identity if there.get(key) != identity[key]]:
                key = different[0]
                raise ValueError(
                    f"{self.output} holds an evaluation with {key} {there.get(key)}, not {identity[key]}: take another "
                    "folder"
                )
        self.state.wait_for_everyone()
        if self.state.is_main_process and not path.exists():
            write_json(path, {"identity": identity})
        self.state.wait_for_everyone()

    # What is done, and what is written of it.

    def _load_decoder(self, load: Callable[[], PixelDecoderPipeline]) -> Run:
        pipeline = load()
        return decoder_run(pipeline, None if self.prompts else self.encoder(pipeline), self.call_kwargs, self._making())

    def _load_baseline(self, name: str, frames: list[Frame]) -> Run:
        vae = (
            None
            if self.vae is None or name in ("bicubic", "lanczos")
            else load_autoencoder(self.vae).to(self.device).eval()
        )
        return baseline_run(name, vae, frames[0] if frames else "flow", self._making())

    def _making(self) -> Making:
        return Making(self.output, self.prompts, self.seed, self.scale, self.device)

    def _generate(self) -> None:
        """Latents for every stop, in full runs for those that are not there."""
        assert self.pipe is not None
        pipe = None
        for case in tqdm(self._cases(), desc="latents", disable=not self.state.is_main_process):
            for stop in self.stops:
                own = self.baselines and not latents_path(self.output, case).exists()
                if latents_path(self.output, case, stop).exists() and not own:
                    continue
                if pipe is None:
                    pipe = self.pipe()
                    pipe.set_progress_bar_config(disable=True)
                generator = torch.Generator().manual_seed(self.seed + case.number)
                taken = partly_denoise(
                    pipe, stop, finish=bool(own), prompt=case.caption, generator=generator, **self.pipe_kwargs
                )
                if taken.images is not None:
                    save_image(taken.images[0], latents_path(self.output, case))
                tensors = {"latents": taken.latents.cpu().contiguous(), "sigma": torch.tensor(taken.sigma)}
                write_whole(latents_path(self.output, case, stop), partial(save_file, tensors))

    def _run_method(self, settings: list[Setting], load: Callable[[], Run], scores: dict[str, Any], bar: tqdm) -> None:
        run: Run | None = None
        for case in self._cases():
            if case.truth is not None and not (truth := image_path(self.output, "truth", case.file)).exists():
                save_image(to_image(case.truth), truth)
            for setting in settings:
                bar.update(self.state.num_processes)
                row = self.rows.setdefault((setting, case.name), {})
                path = image_path(self.output, setting, case.file)
                if path.exists() and row and all(name in row for name in scores):
                    continue
                if not path.exists() or not row:
                    run = run or load()
                    image, seconds = run(case, setting)
                    save_image(to_image(image), path)
                    row |= {"image": case.name, "file": case.file, "seconds": seconds} | asdict(setting)
                image = to_tensor(load_image(path)).to(self.device)  # as 8 bits hold it
                for name in scores:
                    if name not in row:
                        row[name] = measure(name, scores[name], image, case.truth, case.caption, case.name)
                self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        append_line(self.output / f"rows-{self.state.process_index}.jsonl", row)

    def _write(
        self, settings: list[Setting], metrics: list[str], sets: dict[str, Any], skipped: dict[str, str]
    ) -> None:
        self.rows = read_rows(self.output, self.unreadable)
        columns = ["seed", "crop", "scale", *(m for m in METRICS if m in metrics)]
        columns = [
            "image",
            "file",
            *asdict(settings[0]),
            *columns,
            *(m for m in metrics if m not in METRICS),
            "seconds",
        ]
        order = {setting: index for index, setting in enumerate(settings)}
        chosen = sorted((key for key in self.rows if key[0] in order), key=lambda key: (order[key[0]], key[1]))

        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                table = csv.DictWriter(file, columns, extrasaction="ignore")
                table.writeheader()
                study = {"seed": self.seed, "crop": self.crop, "scale": self.scale}
                table.writerows({**study, **self.rows[key]} for key in chosen)

        write_whole(self.output / "results.csv", write)
        files = [(key[0], self.rows[key]["file"]) for key in chosen]
        study = json.loads((self.output / "study.json").read_text())
        study |= {
            "settings": [asdict(setting) for setting in settings],
            "sets": {name: self._compare_sets(name, make, files, skipped) for name, make in sets.items()},
            "skipped": skipped,
            "unreadable": self.unreadable,
            "made_by": f"pixeldecoder {pixeldecoder.__version__}, PyTorch {torch.__version__}, {self.device}",
        }
        write_json(self.output / "study.json", study)

    def _compare_sets(
        self, name: str, make: Callable[..., Any], files: list[tuple[Setting, str]], skipped: dict[str, str]
    ) -> list[float | None]:
        """FID or KID of every setting."""
        values: list[float | None] = []
        settings = list(dict.fromkeys(setting for setting, _ in files))
        try:
            torch.manual_seed(self.seed)  # KID draws subsets
            count = sum(len(_patches(name, self.output, "truth", file)) for s, file in files if s == settings[0])
            accumulator = make(**({"subset_size": min(1000, count)} if name == "kid" else {})).to(self.device)
            for index, setting in enumerate(settings):
                accumulator.reset()
                for file in (file for s, file in files if s == setting):
                    if index == 0:
                        accumulator.update(_patches(name, self.output, "truth", file).to(self.device), real=True)
                    accumulator.update(_patches(name, self.output, setting, file).to(self.device), real=False)
                value = accumulator.compute()
                values.append(float(value[0] if isinstance(value, tuple) else value))
        except (ValueError, RuntimeError) as error:
            skipped[name] = str(error).splitlines()[0][:200]
            print(f"skipped {name}: {skipped[name]}")
            values = [None] * len(settings)
        return values


def image_path(output: Path, setting: Setting | str, file: str) -> Path:
    return output / "images" / slug(str(setting)) / f"{file}.png"


def read_rows(output: Path, unreadable: dict[str, str] | None = None) -> dict[tuple[Setting, str], dict[str, Any]]:
    """What the processes wrote, by setting and picture."""
    rows: dict[tuple[Setting, str], dict[str, Any]] = {}
    for path in sorted(output.glob("rows-*.jsonl")):
        for row in read_lines(path):
            if "unreadable" in row:
                if unreadable is not None:
                    unreadable[row["unreadable"]] = row["reason"]
                continue
            setting = Setting(**{name: row[name] for name in Setting.__dataclass_fields__})
            rows.setdefault((setting, row["image"]), {}).update(row)
    return rows


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON, a line each; without what an interruption tore."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def append_line(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(max(0, file.tell() - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(content).encode() + b"\n")


def write_json(path: Path, content: Any) -> None:
    write_whole(path, lambda file: file.write_text(json.dumps(content, indent=1)))


def _patches(metric: str, output: Path, setting: Setting | str, file: str) -> torch.Tensor:
    """A picture as FID takes it, (B, 3, H, W) uint8; in patches for the patch FID."""
    image = (to_tensor(load_image(image_path(output, setting, file))) * 127.5 + 127.5).round().byte()
    if metric != "patch_fid":
        return image
    return image.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, PATCH, PATCH)
