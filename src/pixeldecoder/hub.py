"""A Hub id in; a folder, or one clear error, out. And where this package keeps what it has fetched or made."""

import os
import re
from pathlib import Path
from typing import Any


def is_hub_id(name: str) -> bool:
    """Whether it reads "owner/name", which "./folder", "../folder", "folder/" and "~/folder" do not."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def download(name: str, patterns: list[str] | None = None, **kwargs: Any) -> Path:
    """Files of a Hub repository, by default all, as a folder.

    Args:
        kwargs: for `snapshot_download`: `revision`, `token`, `cache_dir`, ...

    Raises:
        ValueError: no such repository, or it cannot be reached; the message says what to do.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **kwargs))
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
    return Path(base).expanduser()
