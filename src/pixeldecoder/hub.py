"""A Hub id in; a folder, or one clear error, out. And where this package keeps what it has fetched or made."""

import logging
import os
import re
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

PREFIX = "hub:"
"""Before a Hub id that must not be taken for a path."""
CHECKPOINTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".gguf")
"""Suffixes of files, which no repository is meant by."""


def hub_id(name: str) -> str | None:
    """The repository that is meant by "hub:owner/name", or by "owner/name" where no folder here is called "owner";
    `None` for what may be a path, such as "./folder", "folder/", "~/folder", or a checkpoint's."""
    bare = name.removeprefix(PREFIX)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", bare, re.ASCII) is None:
        return None
    is_path = Path(bare).parent.is_dir() or Path(bare).suffix.lower() in CHECKPOINTS
    return None if bare == name and is_path else bare


def repository(name: str) -> str:
    """As `hub_id`, and says that the Hub is asked for it.

    Raises:
        ValueError: for what may be a path.
    """
    found = hub_id(name)
    if found is None:
        raise ValueError(f"{name}: no such folder or file{or_from_hub(name)}")
    logger.info(f"{found}: not here, so https://huggingface.co or its cache is asked")
    return found


def or_from_hub(name: str) -> str:
    """What to add to "no such folder", if it may have been meant for the Hub."""
    return f" (from the Hub: {PREFIX}{name})" if hub_id(PREFIX + name) else ""


def is_code(encoder: str) -> bool:
    """Whether the name of an encoder reads "module:function": no path here, and not marked as a Hub id."""
    return ":" in encoder and not encoder.startswith(PREFIX) and not Path(encoder).exists()


def is_command(source: str) -> bool:
    """Whether a source of shards would have WebDataset run a command: braces may hide that, so what is no path must
    begin with another scheme in plain sight."""
    return ":" in source and ".tar" in source and not re.match(r"(?!pipe:)[a-z0-9]+://", source, re.IGNORECASE)


def download(name: str, patterns: list[str] | None = None, **kwargs: Any) -> Path:
    """Files of a Hub repository, by default all, as a folder.

    Args:
        kwargs: for `snapshot_download`: `revision`, `token`, `cache_dir`, ...

    Raises:
        ValueError: a name that may be a path, no such repository, or it cannot be reached; the message says what to do.
    """
    from huggingface_hub import snapshot_download

    found = repository(name)
    try:
        return Path(snapshot_download(found, allow_patterns=patterns, **kwargs))
    except (OSError, ValueError) as error:  # ValueError: neither a folder here nor a Hub id
        raise unreachable(name, error) from None


def unreachable(name: str, error: Exception) -> ValueError:
    """For a Hub id that could not be loaded."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(
        f"{name} could not be loaded from https://huggingface.co ({reason}), and there is no such folder here. Without "
        "a network, download it elsewhere and give the path of its file or folder; a private or gated one needs "
        "`hf auth login`"
    )


def cache_folder() -> Path:
    """$PIXELDECODER_CACHE, or pixeldecoder in the user's cache folder."""
    base = os.environ.get("PIXELDECODER_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "pixeldecoder"
    return Path(os.path.expanduser(base))
