"""Pictures or prompts in; every method's images of them, `results.csv` and `study.json` out.

An image is a function of its picture's name, its setting and the seed alone, and its row is written after it: so what
was interrupted goes on, any number of processes share the work, and more metrics are added to images that are there.
"""

import csv
import json
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from tqdm import tqdm

import pixeldecoder
from pixeldecoder.errors import require
from pixeldecoder.evaluation.methods import (
    BASELINES,
    Case,
    Method,
    Setting,
    Workspace,
    baseline_method,
    decoder_method,
    latents_path,
    read_facts,
    slug,
)
from pixeldecoder.evaluation.metrics import METRICS, find_metrics, load_metrics, measure
from pixeldecoder.evaluation.results import (
    append_line,
    image_path,
    is_whole,
    read_rows,
    read_study,
    study_settings,
    write_json,
)
from pixeldecoder.files import load_image, save_image, to_image, to_tensor, write_whole
from pixeldecoder.flow import Frame
from pixeldecoder.latents import load_autoencoder
from pixeldecoder.ldm import parse_stop, partly_denoise
from pixeldecoder.pictures import UNREADABLE, Folder, Record, Shards, shrink
from pixeldecoder.pipeline import PixelDecoderPipeline

PATCH = 256
"""Side in pixels of the patches of the patch FID."""


@dataclass(kw_only=True)
class Study:
    """What is compared, on what.

    Args:
        source: a folder of pictures; shards (`.tar`, as WebDataset takes them); or a `.txt` file, a prompt a line.
        output: folder of the images, the tables and the report.
        decoders: by name as `PixelDecoderPipeline.from_pretrained` takes it, what loads each, when its turn comes.
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
            ValueError: settings that do not fit each other, the source, what the output folder holds, or a package of
                the `evaluate` extra that is missing.
        """
        shards = ("braceexpand", "webdataset") if self.source.endswith(".tar") else ()
        require("evaluate", "evaluate", "jinja2", "matplotlib", "torchmetrics", *shards)
        self.state = PartialState(cpu=self.device == "cpu")
        known = find_metrics(self.metrics, self.weights)
        methods = self._methods()
        self.cases = self._list_cases()
        study = self._open_folder([setting for settings, _ in methods for setting in settings])
        skipped = {m.name: "for prompts alone" for m in known if m.needs == "prompt" and not self.prompts}
        skipped |= {m.name: "for pictures alone" for m in known if m.needs in ("truth", "set") and self.prompts}
        scores, missing = load_metrics(
            (m for m in known if m.name not in skipped), torch.device(self.device), self.weights
        )
        skipped |= missing
        sets = {m.name: scores.pop(m.name) for m in known if m.needs == "set" and m.name in scores}
        for name, reason in skipped.items():
            self._tell(f"skipped {name}: {reason}")
        if self.state.is_main_process:
            study["better"] = study.get("better", {}) | {metric.name: metric.better for metric in known}
            write_json(self.output / "study.json", study)
        if self.prompts:
            self._generate()
        else:
            self._cut_truths()
        todo = len(self.cases) * sum(len(settings) for settings, _ in methods)
        with tqdm(total=todo, desc="images", disable=not self.state.is_main_process) as bar:
            for settings, load in methods:
                self._run_method(settings, load, scores, bar)
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self._write(sets, skipped)
        self.state.wait_for_everyone()

    def _tell(self, line: str) -> None:
        if self.state.is_main_process:
            print(line)

    # What there is to do, and on what.

    def _methods(self) -> list[tuple[list[Setting], Callable[[], Method]]]:
        """Settings, with what loads their method when its turn comes, so that one at a time is in memory."""
        if not self.decoders and not self.baselines:
            raise ValueError("nothing to evaluate: give a decoder or a baseline")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit {self.limit}: expected at least 1")
        found: list[tuple[list[Setting], Callable[[], Method]]] = []
        scales, frames = {}, []
        stops, sigmas = dict.fromkeys(self.stops), dict.fromkeys(self.sigmas)  # each once, in order
        for name, load in self.decoders.items():
            facts = read_facts(name, load)
            scales[name] = facts.scale
            frames.append(facts.frame)
            settings = []
            for steps in dict.fromkeys(self.steps or (facts.steps,)):
                facts.check(steps)
                if self.prompts:
                    settings += [Setting(name, steps, stop=stop) for stop in stops]
                    continue
                for sigma in sigmas:
                    settings.append(Setting(name, steps, sigma))
                    if self.as_if_clean and sigma > 0:
                        settings.append(Setting(name, steps, sigma, 0.0))
            found.append((settings, partial(self._load_decoder, load)))
        if len(set(scales.values())) > 1:
            listed = ", ".join(f"{name} {scale}x" for name, scale in scales.items())
            raise ValueError(f"decoders of different scale do not fit in one table: {listed}: evaluate them separately")
        self.scale = next(iter(scales.values()), self.scale)
        for sigma in self.sigmas:
            if not 0 <= sigma <= 1:
                raise ValueError(f"sigma {sigma}: expected a noise level in [0, 1]")
        for stop in self.stops:
            parse_stop(stop)
        if self.scale < 1:
            raise ValueError(f"scale {self.scale}: expected at least 1")
        cell = 16 * self.scale
        if self.crop is not None and (self.crop < cell or self.crop % cell):
            raise ValueError(f"crop {self.crop}: expected a multiple of {cell} pixels, a cell of the latents")
        if self.prompts and self.pipe is None:
            raise ValueError("prompts need a latent model that follows them: give a diffusers pipeline")
        first = []
        for name in dict.fromkeys(self.baselines):
            kind = name.split(":")[0]
            if name not in ("bicubic", "lanczos", "vae") and not (kind in ("upscale", "spandrel") and ":" in name):
                raise ValueError(f'no baseline "{name}": expected one of {", ".join(BASELINES)}')
            of_latents = kind not in ("bicubic", "lanczos")
            if self.prompts and not of_latents:
                raise ValueError(f"baseline {name}: a prompt has no small picture to enlarge: take vae")
            if of_latents and not self.prompts and self.vae is None:
                raise ValueError(f"baseline {name} needs an autoencoder: give its folder or Hub id")
            noise = sigmas if of_latents and not self.prompts else (None,)
            first.append(([Setting(name, sigma=sigma) for sigma in noise], partial(self._load_baseline, name, frames)))
        return first + found  # the quick ones, and their errors, first

    def _list_cases(self) -> list[Case]:
        """What there is to decode, by name alone."""
        source = Path(self.source)
        self.records: Callable[[], Iterable[Record]] = tuple
        self.unreadable: dict[str, str] = {}
        if self.prompts:
            try:
                lines = [line.strip() for line in source.read_text().splitlines() if line.strip()]
            except UnicodeDecodeError as error:
                raise ValueError(f"{source}: expected text in UTF-8: {error}") from None
            if not lines:
                raise ValueError(f"{source}: expected a prompt in each line, found none")
            return [Case(line, line) for line in list(dict.fromkeys(lines))[: self.limit]]
        if source.suffix == ".tar":
            shards = Shards(self.source)
            self.unreadable, self.records = shards.skipped.reasons, shards.once
        elif source.exists():
            folder = Folder(source)
            self.unreadable, self.records = folder.skipped.reasons, lambda: folder.items
        else:
            raise ValueError(f"{source}: no such folder, and neither shards (.tar) nor prompts (.txt)")
        least = self.crop or 16 * self.scale
        captions = {}
        for record in islice(self.records(), self.limit):
            if min(record.size) < least:
                width, height = record.size
                raise ValueError(
                    f"{record.name} is {width} x {height} pixels, smaller than the crop of {least}: take a smaller "
                    "crop, or the picture out"
                )
            captions[record.name] = record.caption
        return [Case(name, caption) for name, caption in captions.items()]

    def _mine(self) -> list[Case]:
        """This process's share of what can be read."""
        share = self.cases[self.state.process_index :: self.state.num_processes]
        return [case for case in share if case.name not in self.unreadable]

    def _open_folder(self, settings: list[Setting]) -> dict[str, Any]:
        """What `study.json` holds, or shall hold; refuses to mix what does not belong together in the output folder."""
        # Through JSON, as what is there went.
        identity = json.loads(
            json.dumps(
                self.identity
                | {"source": self.source, "seed": self.seed, "crop": self.crop, "scale": self.scale, "vae": self.vae}
                | {"pipe_kwargs": self.pipe_kwargs}
            )
        )
        study = read_study(self.output) or {"identity": identity}
        # A run without baselines of the autoencoder need not name it.
        study["identity"]["vae"] = study["identity"].get("vae") or self.vae
        identity["vae"] = self.vae or study["identity"]["vae"]
        if different := [key for key in identity if study["identity"].get(key) != identity[key]]:
            key = different[0]
            raise ValueError(
                f"{self.output} holds an evaluation with {key} {study['identity'].get(key)}, not {identity[key]}: take "
                "another folder"
            )
        finished = study_settings(study)
        self.rows = read_rows(self.output)
        before = list(dict.fromkeys([*finished, *(setting for setting, _ in self.rows)]))
        # As the tables had them, then what is new; baselines first.
        every = dict.fromkeys([*finished, *settings, *before])
        self.settings = sorted(every, key=lambda setting: setting.steps is not None)
        folders: dict[str, Setting] = {}
        for setting in self.settings:
            other = folders.setdefault(slug(str(setting)), setting)
            if other != setting:
                raise ValueError(
                    f'two settings, of {other.method} and of {setting.method}, would both be called "{setting}" in the '
                    f"tables of {self.output}: rename one, or take another folder"
                )
        if before:
            added = [setting for setting in settings if setting not in before]
            self._tell(f"{self.output} holds {'; '.join(map(str, before))}")
            self._tell(f"this run adds {'; '.join(map(str, added)) or 'no setting'}")
        self.state.wait_for_everyone()  # all have read it, before one writes
        return study

    # What is done, and what is written of it.

    def _load_decoder(self, load: Callable[[], PixelDecoderPipeline]) -> Method:
        pipeline = load()
        return decoder_method(
            pipeline, None if self.prompts else self.encoder(pipeline), self.call_kwargs, self._making()
        )

    def _load_baseline(self, name: str, frames: list[Frame]) -> Method:
        vae = (
            None
            if self.vae is None or name in ("bicubic", "lanczos")
            else load_autoencoder(self.vae).to(self.device).eval()
        )
        return baseline_method(name, vae, frames[0] if frames else "flow", self._making())

    def _making(self) -> Workspace:
        return Workspace(self.output, self.prompts, self.seed, self.scale, self.device)

    def _generate(self) -> None:
        """Latents for every stop, in full runs for those that are not there."""
        assert self.pipe is not None
        pipe = None
        for case in tqdm(self._mine(), desc="latents", disable=not self.state.is_main_process):
            for stop in self.stops:
                own = self.baselines and not is_whole(latents_path(self.output, case))
                if is_whole(latents_path(self.output, case, stop)) and not own:
                    continue
                if pipe is None:
                    pipe = self.pipe()
                    pipe.set_progress_bar_config(disable=True)
                generator = self._making().generator(case)
                taken = partly_denoise(
                    pipe, stop, finish=bool(own), prompt=case.caption, generator=generator, **self.pipe_kwargs
                )
                if taken.images is not None:
                    save_image(taken.images[0], latents_path(self.output, case))
                tensors = {"latents": taken.latents.cpu().contiguous(), "sigma": torch.tensor(taken.sigma)}
                write_whole(latents_path(self.output, case, stop), partial(save_file, tensors))

    def _cut_truths(self) -> None:
        """Cut the truths that are not there yet out of the pictures: one is read once, whatever is made of it."""
        missing = {case.name: case for case in self._mine() if not is_whole(self._truth_path(case))}
        with tqdm(total=len(missing), desc="crops", disable=not missing or not self.state.is_main_process) as bar:
            for record in self.records() if missing else ():
                if (case := missing.pop(record.name, None)) is not None:
                    self._cut_truth(record, case)
                    bar.update()
                if not missing:
                    break

    def _cut_truth(self, record: Record, case: Case) -> None:
        try:
            image = record.open().convert("RGB")
        except UNREADABLE as error:
            self.unreadable[case.name] = str(error)
            self._append({"unreadable": case.name, "reason": str(error)})
            return
        cell = 16 * self.scale
        width, height = (self.crop or side // cell * cell for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        save_image(image.crop((left, top, left + width, top + height)), self._truth_path(case))

    def _truth_path(self, case: Case) -> Path:
        return image_path(self.output, "truth", case.file)

    def _run_method(
        self, settings: list[Setting], load: Callable[[], Method], scores: dict[str, Any], bar: tqdm
    ) -> None:
        run: Method | None = None
        for case in self._mine():
            opened = None
            for setting in settings:
                bar.update(self.state.num_processes)
                row, path = self.rows.get((setting, case.name)), image_path(self.output, setting, case.file)
                if row is not None and not is_whole(path):
                    row = None
                if row is not None and scores.keys() <= row.keys():
                    continue
                opened = opened or self._opened(case)
                if row is None:
                    run = run or load()
                    image, seconds = run(opened, setting)
                    save_image(to_image(image), path)
                    row = {"image": case.name, "file": case.file, "seconds": seconds} | asdict(setting)
                image = to_tensor(load_image(path)).to(self.device)  # as 8 bits hold it
                for name in scores:
                    if name not in row:
                        with suppress(MemoryError):  # left out, so that another run tries again
                            row[name] = measure(name, scores[name], image, opened.truth, case.caption, case.name)
                self._append(row)

    def _opened(self, case: Case) -> Case:
        """With its pictures, if it has any."""
        if self.prompts:
            return case
        truth = to_tensor(load_image(self._truth_path(case))).to(self.device)
        return replace(case, truth=truth, small=shrink(truth, self.scale))

    def _append(self, row: dict[str, Any]) -> None:
        append_line(self.output / f"rows-{self.state.process_index}.jsonl", row)

    def _write(self, sets: dict[str, Any], skipped: dict[str, str]) -> None:
        """The table and the study of all that the folder holds, from this run or another."""
        rows = read_rows(self.output, self.unreadable)
        if not rows:
            name, reason = next(iter(self.unreadable.items()))
            raise ValueError(f"{self.source}: no picture can be read, such as {name}: {reason}")
        study = read_study(self.output) or {}
        better = {name: study["better"][name] for name in [*METRICS, *study["better"]] if name in study["better"]}
        metrics = [name for name in better if any(name in row for row in rows.values())]
        order = {setting: index for index, setting in enumerate(self.settings)}
        chosen = sorted((key for key in rows if key[0] in order), key=lambda key: (order[key[0]], key[1]))
        columns = ["image", "file", *Setting.__dataclass_fields__, "seed", "crop", "scale", *metrics, "seconds"]

        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                table = csv.DictWriter(file, columns, extrasaction="ignore")
                table.writeheader()
                same = {"seed": self.seed, "crop": self.crop, "scale": self.scale}
                table.writerows({**same, **rows[key]} for key in chosen)

        write_whole(self.output / "results.csv", write)
        files: dict[Setting, list[str]] = {}
        for key in chosen:
            files.setdefault(key[0], []).append(rows[key]["file"])
        seen = {image for _, image in rows}
        # What an earlier run found of all pictures together, of as many as there are now; and what this one finds.
        images = max(map(len, files.values()))
        counts = {name: count for name, count in study.get("set_images", {}).items() if count == images}
        compared = {name: values for name, values in study.get("sets", {}).items() if name in counts}
        compared |= {name: self._compare_sets(name, make, files, skipped) for name, make in sets.items()}
        study |= {
            "settings": [asdict(setting) for setting in files],
            "better": better,
            "sets": compared,
            "set_images": dict.fromkeys(compared, images),
            "skipped": skipped,
            "unreadable": {name: reason for name, reason in self.unreadable.items() if name not in seen},
            "made_by": f"pixeldecoder {pixeldecoder.__version__}, PyTorch {torch.__version__}, {self.device}",
        }
        write_json(self.output / "study.json", study)

    def _compare_sets(
        self, name: str, make: Callable[..., Any], files: dict[Setting, list[str]], skipped: dict[str, str]
    ) -> dict[str, float | None]:
        """FID or KID of every setting that has all pictures: of fewer it would be another quantity."""
        values: dict[str, float | None] = {}
        every = max(files.values(), key=len)
        try:
            torch.manual_seed(self.seed)  # KID draws subsets
            count = sum(len(_patches(name, self.output, "truth", file)) for file in every)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the memory that features take
                accumulator = make(**({"subset_size": min(1000, count)} if name == "kid" else {})).to(self.device)
            for file in every:
                accumulator.update(_patches(name, self.output, "truth", file).to(self.device), real=True)
            for setting in (setting for setting, own in files.items() if own == every):
                accumulator.reset()
                for file in every:
                    accumulator.update(_patches(name, self.output, setting, file).to(self.device), real=False)
                value = accumulator.compute()
                values[str(setting)] = float(value[0] if isinstance(value, tuple) else value)
        except (ValueError, RuntimeError) as error:
            skipped[name] = str(error).splitlines()[0][:200]
            print(f"skipped {name}: {skipped[name]}")
        return values


def _patches(metric: str, output: Path, setting: Setting | str, file: str) -> torch.Tensor:
    """A picture as FID takes it, (B, 3, H, W) uint8; in patches for the patch FID."""
    image = (to_tensor(load_image(image_path(output, setting, file))) * 127.5 + 127.5).round().byte()
    if metric != "patch_fid":
        return image
    return image.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, PATCH, PATCH)
