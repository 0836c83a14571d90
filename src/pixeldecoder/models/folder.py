"""What the networks share as diffusers models: weights fit or are refused, and `AutoModel` opens their folders."""

import json
import os
from pathlib import Path
from typing import Any

from pixeldecoder.files import read_json
from pixeldecoder.hub import repository


class FolderMixin:
    """Stands before diffusers' `ModelMixin` and `ConfigMixin`, which loaders look for by name in a network's module."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> Any:
        """As diffusers' `from_pretrained`, which leaves out weights that the configuration has no place for.

        Raises:
            ValueError: missing or unexpected tensors, which are listed.
        """
        wanted = kwargs.pop("output_loading_info", False)
        source = os.path.expanduser(pretrained_model_name_or_path)
        source = source if os.path.exists(source) else repository(str(source))
        config = os.path.join(source, kwargs.get("subfolder") or "", "config.json")
        # diffusers would take a text for a Hub id, and ask for it.
        if os.path.isfile(config) and read_json(Path(config)).get("aux_rgb_base"):
            raise ValueError(
                f"{config}: an older nano's, whose base was aux_rgb_base: load the bundled one, or train anew by "
                "recipes/nano.py"
            )
        model, info = super().from_pretrained(source, output_loading_info=True, **kwargs)
        if getattr(model, "hf_quantizer", None) is None:  # which stores tensors under other names
            check_fit(pretrained_model_name_or_path, missing=info["missing_keys"], unexpected=info["unexpected_keys"])
        return (model, info) if wanted else model

    def to_json_string(self) -> str:
        """With the module and the class that `AutoModel` takes with `trust_remote_code=True`."""
        config = json.loads(super().to_json_string())
        config["auto_map"] = {"AutoModel": f"pixeldecoder.{type(self).__name__}"}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | Path, *args, **kwargs) -> None:
        """config.json, and the module that it names."""
        super().save_config(save_directory, *args, **kwargs)
        line = f"from pixeldecoder import {type(self).__name__}  # noqa: F401\n"
        (Path(save_directory) / "pixeldecoder.py").write_text(line)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs) -> tuple[dict, dict, dict]:
        """Without "auto_map", of which diffusers warns as unexpected."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)


def check_fit(source: object, **problems: list[str]) -> None:
    """Refuse weights that are not those of a network.

    Raises:
        ValueError: some list of names is not empty; its keyword says what is wrong with them.
    """
    if any(problems.values()):
        found = "; ".join(
            f"{len(names)} {what.replace('_', ' ')}: {listing(names)}" for what, names in problems.items() if names
        )
        raise ValueError(f"{source}: the tensors do not fit the network: {found}")


def listing(names: list[str]) -> str:
    """The first names, in order."""
    return ", ".join(sorted(names)[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
