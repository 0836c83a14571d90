"""Files in, the hashes by which they are known again out: of a source, and of a decoder's weights."""

import functools
import hashlib
import os
from pathlib import Path

from pixeldecoder.hub import hub_id
from pixeldecoder.presets import HUB_REPOSITORY, NANO, PRESETS

LENGTH = 16
"""Hexadecimal digits that are kept: enough to tell files apart, short enough to be read."""
WEIGHTS = (".safetensors", ".onnx", ".data")
"""Suffixes of files that hold weights; ".data": an ONNX graph's that are too large for it."""


def file_hash(path: Path) -> str:
    """The start of a file's SHA-256."""
    return _hash(path, path.stat().st_mtime_ns, path.stat().st_size).hexdigest()[:LENGTH]


def weights_hash(decoder: str) -> str | None:
    """Of the weights of a decoder, by its name: its checkpoint's, or of all of its folder's together; `None` where they
    are not on this machine."""
    path = _weights(decoder)
    if path is None:
        return None
    if path.is_file():
        return file_hash(path)
    whole = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.suffix in WEIGHTS):
        whole.update(os.fsencode(file.relative_to(path).as_posix()))
        whole.update(_hash(file, file.stat().st_mtime_ns, file.stat().st_size).digest())
    return whole.hexdigest()[:LENGTH]


def _weights(decoder: str) -> Path | None:
    """The file or folder that a decoder's name stands for."""
    if decoder == "nano":
        return NANO
    path = Path(os.path.expanduser(decoder))
    if path.exists():
        return path

    from huggingface_hub import snapshot_download, try_to_load_from_cache

    if decoder in PRESETS:
        file = try_to_load_from_cache(HUB_REPOSITORY, PRESETS[decoder].filename)
        return Path(file) if isinstance(file, str) else None
    if (repository := hub_id(decoder)) is None:
        return None
    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (OSError, ValueError):
        return None


@functools.lru_cache(maxsize=64)
def _hash(path: Path, changed: int, size: int) -> "hashlib._Hash":
    """Once for each state of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")
