"""A name, a folder or a checkpoint file in, a pipeline out, and back: `LoadedPipeline`."""

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline, FlowMatchLCMScheduler
from diffusers.utils import logging

import pixeldecoder
from pixeldecoder.convert import check_arguments, load_reference_model, pipeline_settings
from pixeldecoder.files import read_json
from pixeldecoder.hub import PREFIX, download, repository, unreachable
from pixeldecoder.presets import (
    HUB_REPOSITORY,
    NANO,
    PRESETS,
    RELEASED_LICENSE,
    check_decoder_name,
    find_preset,
    sampled_like,
)
from pixeldecoder.sampler import teacher_scheduler

if TYPE_CHECKING:
    from pixeldecoder.pipeline import PixelDecoderPipeline

logger = logging.get_logger(__name__)

_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


class LoadedPipeline(DiffusionPipeline):
    """diffusers' loading and saving, for released names, checkpoint files and folders whose classes may move."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "PixelDecoderPipeline":
        """Load "nano" (bundled), a released name (from the Hub), a checkpoint file, a folder or a Hub id.

        Args:
            pretrained_model_name_or_path: see above; released names are the keys of `pixeldecoder.presets.PRESETS`.
            kwargs: `dtype`, and whatever diffusers' `from_pretrained` takes. For a checkpoint file also `preset=` (a
                released name) and arguments of the model that its tensors do not tell.

        Raises:
            ValueError: a name that is none of these, or a file that is no checkpoint.
        """
        name = str(pretrained_model_name_or_path)
        if "torch_dtype" in kwargs and "dtype" not in kwargs:  # its name until diffusers 0.42, which warns of it
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        if name in PRESETS:
            from huggingface_hub import hf_hub_download

            hub = {key: kwargs.pop(key) for key in _HUB_KWARGS if key in kwargs}
            try:
                path = hf_hub_download(repository(PREFIX + HUB_REPOSITORY), PRESETS[name].filename, **hub)
            except OSError as error:
                raise unreachable(f"{HUB_REPOSITORY}/{PRESETS[name].filename}", error) from None
            return cls.from_single_file(path, preset=name, **kwargs)
        if name == "nano":
            with _quiet_bars():
                return super().from_pretrained(NANO, **kwargs)
        path = Path(os.path.expanduser(name))
        if path.is_file():
            return cls.from_single_file(path, **kwargs)
        check_decoder_name(name)
        if getattr(kwargs.get("dtype"), "itemsize", 2) == 1:
            raise ValueError(
                f"{name}: nothing computes in {kwargs['dtype']}: give dtype=torch.bfloat16, and to save memory "
                "pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn) afterwards"
            )
        if not path.is_dir():
            pipeline = super().from_pretrained(name, **kwargs)
        else:
            kwargs["local_files_only"] = True
            for file in (path / "model_index.json", *path.glob("*/*config.json")):
                read_json(file)  # diffusers would take a text for a Hub id, and ask for it
            try:
                pipeline = super().from_pretrained(str(path), **kwargs)
            except OSError as error:
                reason = " ".join(str(error).split())[:300]
                raise ValueError(f"{name} could not be loaded: {reason}") from error
        if pipeline.config.license:
            _print_license(name, pipeline.config.license)
        return pipeline

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> Path:
        """A Hub repository, as a folder: all of it, as its classes are here and need no code from it."""
        hub = {key: kwargs[key] for key in _HUB_KWARGS if kwargs.get(key) is not None}
        return download(pretrained_model_name, **hub)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """As diffusers', with the classes of this package where they are now, whatever a folder calls their modules."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config["_class_name"] = cls.__name__
        for name, value in config.items():
            if _is_ours(value):
                config[name] = [getattr(pixeldecoder, value[1]).__module__, value[1]]
        return loaded

    def to_json_string(self) -> str:
        """As diffusers', with public names of this package's classes, which outlive a move of its files."""
        config = json.loads(super().to_json_string())
        for name, value in config.items():
            if _is_ours(value):
                config[name] = ["pixeldecoder", value[1]]
        config["_class_name"] = ["pipeline", "PixelDecoderPipeline"]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | Path, *args, **kwargs) -> None:
        """model_index.json, and the module that it names, for
        `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pipeline.py").write_text("from pixeldecoder import PixelDecoderPipeline  # noqa: F401\n")
        super().save_config(save_directory, *args, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "PixelDecoderPipeline":
        """As diffusers', with the same `prompt_encoder`."""
        new = super().from_pipe(pipeline, **kwargs)
        new.prompt_encoder = getattr(pipeline, "prompt_encoder", new.prompt_encoder)
        return new

    @classmethod
    def from_single_file(
        cls, path: str | Path, preset: str | None = None, dtype: torch.dtype | None = None, **overrides
    ) -> "PixelDecoderPipeline":
        """Load a checkpoint in the reference's format; see `pixeldecoder.convert.load_reference_model`.

        Weights in float8, in which nothing computes, come as bfloat16 unless `dtype` says otherwise.
        """
        path = Path(os.path.expanduser(path))
        transformer = load_reference_model(path, preset, dtype, **overrides)
        if any(parameter.dtype.itemsize == 1 for parameter in transformer.parameters()):
            transformer.to(torch.bfloat16)
        settings = file_settings(path, preset, is_prior=transformer.adapter is None)
        check_arguments(cls, settings, path)
        if "default_num_inference_steps" not in settings:
            logger.warning(f"{path}: nothing tells how it is sampled: taken for a student of 1 to 4 steps")
        if settings.get("license"):
            _print_license(str(path), settings["license"])
        return cls(transformer, **settings)


def file_settings(path: str | Path, preset: str | None, is_prior: bool) -> dict[str, Any]:
    """Arguments of the pipeline of a checkpoint file, its scheduler among them: what the file tells if we wrote it and
    no preset is named, else those of the release that it is, or is sampled like; else a student's scheduler alone.

    Raises:
        ValueError: as `pipeline_settings` and `find_preset`.
    """
    if not preset and (settings := pipeline_settings(path)):
        return settings
    known = find_preset(path, preset)
    like = known or sampled_like(path, is_prior)
    if like is None:
        return {"scheduler": FlowMatchLCMScheduler(shift=1.0)}
    settings = {
        "scheduler": FlowMatchLCMScheduler(shift=1.0) if like.distilled else teacher_scheduler(),
        "default_num_inference_steps": like.num_inference_steps,
        "default_guidance_scale": like.guidance_scale,
        "default_negative_prompt": like.negative_prompt,
    }
    if known is not None:
        settings |= dict(latent_space=known.latent_space, trained_size=known.trained_size, license=RELEASED_LICENSE)
    return settings


def _is_ours(value: Any) -> bool:
    """Whether a pipeline's configuration names, as [module, class], a public class of this package."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and value[1] in pixeldecoder.__all__


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """Without diffusers' progress bars."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@functools.cache
def _print_license(name: str, license: str) -> None:
    """Once for each checkpoint and process."""
    logger.warning(f"{name}: {license}")
