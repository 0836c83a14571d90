"""Pictures or prompts in; every method's images of them, `results.csv` and `study.json` out.

An image is a function of its picture's name, its setting and the seed alone, and its row is written after it: so what
was interrupted goes on, any number of processes share the work, and more metrics are added to images that are there.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from tqdm import tqdm

from pixeldecoder import __version__
from pixeldecoder.autoencoders import load_autoencoder
from pixeldecoder.errors import require
from pixeldecoder.evaluation.cases import Cases, Source, cut_truths, list_cases, opened
from pixeldecoder.evaluation.methods import (
    BASELINES,
    Case,
    Facts,
    Method,
    Setting,
    Workspace,
    baseline_method,
    decoder_method,
    latents_path,
    read_facts,
)
from pixeldecoder.evaluation.metrics import Metric, find_metrics, load_metrics, measure
from pixeldecoder.evaluation.results import Results, image_path, is_whole, open_results, write_json, write_results
from pixeldecoder.evaluation.sets import compare_sets
from pixeldecoder.files import save_image, write_whole
from pixeldecoder.flow import Frame
from pixeldecoder.ldm import partly_denoise
from pixeldecoder.pictures import read, to_image, to_tensor
from pixeldecoder.pipeline import PixelDecoderPipeline
from pixeldecoder.provenance import weights_hash

Methods = list[tuple[list[Setting], Callable[[], Method]]]
"""Settings, with what loads their method when its turn comes, so that one at a time is in memory."""


@dataclass(frozen=True, kw_only=True)
class Decoders:
    """What is evaluated.

    Args:
        load: by name as `PixelDecoderPipeline.from_pretrained` takes it, what loads each, when its turn comes.
        encoder: for a decoder, what makes the latents of pictures; `None`: its own encoder.
        steps: sampling steps; none: what each was made for.
        as_if_clean: decode noisy latents also as if they were clean.
        call_kwargs: for the decoders' calls.
    """

    load: dict[str, Callable[[], PixelDecoderPipeline]] = field(default_factory=dict)
    encoder: Callable[[PixelDecoderPipeline], Any] = lambda pipeline: None
    steps: tuple[int, ...] = ()
    as_if_clean: bool = False
    call_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """What people would use instead.

    Args:
        names: of `BASELINES`.
        vae: autoencoder of those that need one, by folder or Hub id.
        scale: of their images, if there is no decoder.
    """

    names: tuple[str, ...] = ()
    vae: str | None = None
    scale: int = 4


@dataclass(frozen=True, kw_only=True)
class LatentModel:
    """What makes latents of prompts: `load` loads the diffusers pipeline, `kwargs` are for its call."""

    load: Callable[[], Any] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared, on what.

    Args:
        output: folder of the images, the tables and the report.
        metrics: by name; none: those that need no weights, and those whose weights are given.
        weights: of metrics, by name and path.
        device: of the baselines and the metrics.
        identity: whatever else an image depends on; a folder goes on only with the same.
    """

    source: Source
    output: Path
    decoders: Decoders = Decoders()
    baselines: Baselines = Baselines()
    latent_model: LatentModel = LatentModel()
    metrics: tuple[str, ...] = ()
    weights: dict[str, Path] = field(default_factory=dict)
    seed: int = 0
    device: str = "cpu"
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> PartialState:
        """Which of how many processes this is."""
        return PartialState(cpu=self.device == "cpu")

    def run(self) -> None:
        """Do what is not there yet.

        Raises:
            ValueError: settings that do not fit each other, the source, what the output folder holds, or a package of
                the `evaluate` extra that is missing.
        """
        shards = ("braceexpand", "webdataset") if self.source.path.endswith(".tar") else ()
        require("evaluate", "evaluate", "jinja2", "matplotlib", "torchmetrics", *shards)
        metrics = find_metrics(self.metrics, self.weights)
        facts = self._facts()
        scale = facts[0].scale if facts else self.baselines.scale
        self.source.check(16 * scale)
        workspace = Workspace(self.output, self.source.prompts, self.seed, scale, self.device)
        # The quick ones, and their errors, first.
        methods = self._baselines(facts[0].frame if facts else "flow", workspace) + self._decoders(facts, workspace)
        cases = list_cases(self.source, 16 * scale, self.output)
        settings = [setting for settings, _ in methods for setting in settings]
        results = open_results(self.output, self._identity(scale), settings, self.state.process_index, self._tell)
        named = {setting: setting for setting in results.settings}
        methods = [([named[setting] for setting in settings], load) for settings, load in methods]
        self.state.wait_for_everyone()  # all have read it, before one writes
        scores, sets, skipped = self._load_metrics(metrics)
        if self.state.is_main_process:
            better = results.study.get("better", {}) | {metric.name: metric.better for metric in metrics}
            write_json(self.output / "study.json", results.study | {"better": better})
        if self.source.prompts:
            self._generate(cases, workspace)
        else:
            cut_truths(cases, self.source.crop, 16 * scale, results, self.state)
        todo = len(cases.every) * len(settings)
        with tqdm(total=todo, desc="images", disable=not self.state.is_main_process) as bar:
            for settings, load in methods:
                self._run_method(settings, load, cases, scores, results, workspace, bar)
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            compare = partial(compare_sets, sets, self.output, self.seed, self.device, skipped)
            write_results(results, cases.unreadable, compare, skipped, self.device)
        self.state.wait_for_everyone()

    def _tell(self, line: str) -> None:
        if self.state.is_main_process:
            print(line)

    def _identity(self, scale: int) -> dict[str, Any]:
        return self.identity | {
            "source": self.source.path,
            "seed": self.seed,
            "crop": self.source.crop,
            "scale": scale,
            "vae": self.baselines.vae,
            "pipe_kwargs": self.latent_model.kwargs,
        }

    def _facts(self) -> list[Facts]:
        """Of the decoders, which have one scale."""
        if not self.decoders.load and not self.baselines.names:
            raise ValueError("nothing to evaluate: give a decoder or a baseline")
        facts = {name: read_facts(name, load) for name, load in self.decoders.load.items()}
        if len({fact.scale for fact in facts.values()}) > 1:
            listed = ", ".join(f"{name} {fact.scale}x" for name, fact in facts.items())
            raise ValueError(f"decoders of different scale do not fit in one table: {listed}: evaluate them separately")
        if not facts and self.baselines.scale < 1:
            raise ValueError(f"scale {self.baselines.scale}: expected at least 1")
        if self.source.prompts and self.latent_model.load is None:
            raise ValueError("prompts need a latent model that follows them: give a diffusers pipeline")
        return list(facts.values())

    def _decoders(self, facts: list[Facts], workspace: Workspace) -> Methods:
        methods: Methods = []
        for (name, load), fact in zip(self.decoders.load.items(), facts, strict=True):
            settings = []
            for steps in dict.fromkeys(self.decoders.steps or (fact.steps,)):
                fact.check(steps)
                if workspace.prompts:
                    settings += [Setting(name, steps, stop=stop) for stop in dict.fromkeys(self.source.stops)]
                    continue
                for sigma in dict.fromkeys(self.source.sigmas):
                    settings.append(Setting(name, steps, sigma))
                    if self.decoders.as_if_clean and sigma > 0:
                        settings.append(Setting(name, steps, sigma, 0.0))
            methods.append((settings, partial(self._load_decoder, load, workspace)))
        return methods

    def _load_decoder(self, load: Callable[[], PixelDecoderPipeline], workspace: Workspace) -> Method:
        pipeline = load()
        encoder = None if workspace.prompts else self.decoders.encoder(pipeline)
        return decoder_method(pipeline, encoder, self.decoders.call_kwargs, workspace)

    def _baselines(self, frame: Frame, workspace: Workspace) -> Methods:
        methods: Methods = []
        for name in dict.fromkeys(self.baselines.names):
            kind = name.split(":")[0]
            if name not in ("bicubic", "lanczos", "vae") and not (kind in ("upscale", "spandrel") and ":" in name):
                raise ValueError(f'no baseline "{name}": expected one of {", ".join(BASELINES)}')
            of_latents = kind not in ("bicubic", "lanczos")
            if workspace.prompts and not of_latents:
                raise ValueError(f"baseline {name}: a prompt has no small picture to enlarge: take vae")
            if of_latents and not workspace.prompts and self.baselines.vae is None:
                raise ValueError(f"baseline {name} needs an autoencoder: give its folder or Hub id")
            sigmas = dict.fromkeys(self.source.sigmas) if of_latents and not workspace.prompts else (None,)
            vae = self.baselines.vae if of_latents else None
            settings = [Setting(name, sigma=sigma) for sigma in sigmas]
            methods.append((settings, partial(self._load_baseline, name, vae, frame, workspace)))
        return methods

    def _load_baseline(self, name: str, vae: str | None, frame: Frame, workspace: Workspace) -> Method:
        loaded = None if vae is None else load_autoencoder(vae).to(self.device).eval()
        return baseline_method(name, loaded, frame, workspace)

    def _made(self, setting: Setting, case: Case) -> dict[str, Any]:
        """How a picture of this evaluation was made."""
        made = {name: value for name, value in asdict(setting).items() if value not in (None, "")}
        if setting.method in self.decoders.load:
            made["decoder_sha256"] = weights_hash(setting.method)
        made |= {name: value for name, value in self.identity.items() if value is not None}
        return {
            "software": f"pixeldecoder {__version__}", "command": "evaluate", "image": case.name, **made,
            "seed": self.seed, "device": self.device,
        }  # fmt: skip

    def _load_metrics(self, metrics: list[Metric]) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
        """What computes those of single pictures, what those of all together, and why others are left out."""
        prompts = self.source.prompts
        skipped = {m.name: "for prompts alone" for m in metrics if m.needs == "prompt" and not prompts}
        skipped |= {m.name: "for pictures alone" for m in metrics if m.needs in ("truth", "set") and prompts}
        usable = [metric for metric in metrics if metric.name not in skipped]
        scores, missing = load_metrics(usable, torch.device(self.device), self.weights)
        skipped |= missing
        sets = {m.name: scores.pop(m.name) for m in metrics if m.needs == "set" and m.name in scores}
        for name, reason in skipped.items():
            self._tell(f"skipped {name}: {reason}")
        return scores, sets, skipped

    def _generate(self, cases: Cases, workspace: Workspace) -> None:
        """Latents for every stop, in full runs for those that are not there."""
        assert self.latent_model.load is not None
        pipe = None
        for case in tqdm(cases.share(self.state), desc="latents", disable=not self.state.is_main_process):
            for stop in self.source.stops:
                own = self.baselines.names and not is_whole(latents_path(self.output, case))
                if is_whole(latents_path(self.output, case, stop)) and not own:
                    continue
                if pipe is None:
                    pipe = self.latent_model.load()
                    pipe.set_progress_bar_config(disable=True)
                generator = workspace.generator(case)
                taken = partly_denoise(
                    pipe, stop, finish=bool(own), prompt=case.caption, generator=generator, **self.latent_model.kwargs
                )
                if taken.images is not None:
                    save_image(taken.images[0], latents_path(self.output, case))
                tensors = {"latents": taken.latents.cpu().contiguous(), "sigma": torch.tensor(taken.sigma)}
                write_whole(latents_path(self.output, case, stop), partial(save_file, tensors))

    def _run_method(
        self,
        settings: list[Setting],
        load: Callable[[], Method],
        cases: Cases,
        scores: dict[str, Any],
        results: Results,
        workspace: Workspace,
        bar: tqdm,
    ) -> None:
        method: Method | None = None
        for case in cases.share(self.state):
            pictured = None
            for setting in settings:
                bar.update(self.state.num_processes)
                row, path = results.rows.get((setting, case.name)), image_path(self.output, setting, case.file)
                if row is not None and not is_whole(path):
                    row = None
                if row is not None and scores.keys() <= row.keys():
                    continue
                pictured = pictured or opened(case, workspace)
                if row is None:
                    method = method or load()
                    image, seconds = method(pictured, setting)
                    save_image(to_image(image), path, self._made(setting, case))
                    row = {"image": case.name, "file": case.file, "seconds": seconds} | asdict(setting)
                image = to_tensor(read(path).flattened()).to(self.device)  # as 8 bits hold it
                for name in scores:
                    if name not in row:
                        with suppress(MemoryError):  # left out, so that another run tries again
                            row[name] = measure(name, scores[name], image, pictured.truth, case.caption, case.name)
                results.append(row)
