"""A source in, its rows out, each one picture or latents to be read later: a folder, WebDataset shards, Parquet."""

import functools
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from pixeldecoder.files import LATENT_SUFFIXES, Latents, expand_braces, load_latents, parse_latents
from pixeldecoder.pictures import SUFFIXES

ROW = pa.schema(
    {
        "id": pa.string(),  # a folder's: the file's name from there, without suffix; a shard's: its name / the sample's
        "url": pa.string(),  # of the file that it is in
        "suffix": pa.string(),  # of the file or the member, ".parquet" of a table's row
        "offset": pa.int64(),  # bytes before the member; a table's row group
        "size": pa.int64(),  # bytes of the member; the row in that group
        "sigma": pa.float64(),
        "prompt": pa.string(),
        "error": pa.string(),  # what is wrong with it, as far as that is known already
    }
)
"""What is told of a row before it is read."""
FILES = (*LATENT_SUFFIXES, *SUFFIXES)
SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
"""WebDataset's: the key and the extension of a member."""
SCANNED = 8
"""Files whose heads are read at a time."""


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Where a path or an fsspec URL leads; raises ValueError if nothing is installed that goes there."""
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: {error}") from None
    return fs, path.rstrip("/") or path


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def find_rows(source: str, output: str | None = None, limit: int | None = None) -> pa.Table:
    """All rows of a source, of the schema `ROW`, in the order of their files.

    Args:
        source: a folder, searched with its subfolders but not what is hidden, of pictures and latents, of shards or of
            tables; one file of these; or several, by `{000..041}` or `*`. A path, or any URL of fsspec's.
        output: a folder that is not searched.
        limit: stop after so many rows.

    Raises:
        ValueError: no such source, nothing in it, files of several kinds, or two rows of one id.
    """
    fs, paths, root = _files(source, output)
    tables: list[pa.Table] = []
    if {_kind(path) for path in paths} == {""}:
        rows = ({"id": _stem(path, root), "url": _url(fs, path), "suffix": _suffix(path)} for path in paths[:limit])
        tables.append(pa.Table.from_pylist(list(rows), ROW))
    else:
        with ThreadPoolExecutor(SCANNED) as pool:
            for start in range(0, len(paths), SCANNED):
                tables += pool.map(lambda path: _scan(fs, path, _stem(path, root)), paths[start : start + SCANNED])
                if limit is not None and sum(map(len, tables)) >= limit:
                    break
    table = pa.concat_tables(tables).slice(0, limit).combine_chunks()
    if not len(table):
        raise ValueError(f"{source}: no rows in it")
    counts = table.group_by("id").aggregate([("url", "count")])
    twice = counts.filter(pc.greater(counts["url_count"], 1))["id"].to_pylist()
    if twice:
        places = table.filter(pc.equal(table["id"], twice[0]))["url"].unique().to_pylist()
        more = f", and {len(twice) - 1} other ids" if len(twice) > 1 else ""
        raise ValueError(
            f"{source}: several rows have one id, {twice[0]!r} in {' and '.join(places)[:300]}{more}: an output is "
            "named by its row's id, so give each one of its own"
        )
    return table


def _files(source: str, output: str | None) -> tuple[fsspec.AbstractFileSystem, list[str], str]:
    """The files of a source, all of one kind, and the folder that ids begin after."""
    if "{" in source:
        several = [filesystem(url) for url in expand_braces(source)]
        fs, paths = several[0][0], [path for _, path in several]
    else:
        fs, path = filesystem(source)
        if any(sign in path for sign in "*?["):
            paths = sorted(fs.glob(path))
        elif fs.isfile(path):
            paths = [path]
        elif fs.isdir(path):
            return fs, _walk(fs, path, source, output), path
        else:
            raise ValueError(f"{source}: no such file or folder")
    if not paths or not all(_kind(path) or _suffix(path) in FILES for path in paths):
        raise ValueError(f"{source}: expected .tar, .parquet, or {', '.join(FILES)}, got {paths[:3] or 'nothing'}")
    _check_kinds(source, paths)
    return fs, paths, str(PurePosixPath(paths[0]).parent)


def _walk(fs: fsspec.AbstractFileSystem, root: str, source: str, output: str | None) -> list[str]:
    out = None
    if output is not None:
        there, path = filesystem(output)
        out = f"{path}/" if type(there) is type(fs) else None
    paths, left_out = [], Counter[str]()
    for path in sorted(fs.find(root)):
        hidden = any(part.startswith(".") for part in PurePosixPath(path).relative_to(root).parts)
        if hidden or (out is not None and path.startswith(out)):
            continue
        if _kind(path) or _suffix(path) in FILES:
            paths.append(path)
        else:
            left_out[_suffix(path) or "without suffix"] += 1
    if not paths:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(5)) or "none"
        raise ValueError(f"{source}: expected .tar, .parquet, or {', '.join(FILES)}, found {kinds}")
    _check_kinds(source, paths)
    return paths


def _check_kinds(source: str, paths: list[str]) -> None:
    kinds = Counter(_kind(path) or "pictures or latents" for path in paths)
    if len(kinds) > 1:
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        raise ValueError(f"{source}: holds {found}: name those of one kind, such as {source.rstrip('/')}/*.tar")


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def _kind(path: str) -> str:
    return _suffix(path) if _suffix(path) in (".tar", ".parquet") else ""


def _stem(path: str, root: str) -> str:
    return PurePosixPath(path).relative_to(root).with_suffix("").as_posix()


def _url(fs: fsspec.AbstractFileSystem, path: str) -> str:
    return path if is_local(fs) else fs.unstrip_protocol(path)


def _scan(fs: fsspec.AbstractFileSystem, path: str, stem: str) -> pa.Table:
    """The rows of a shard or a table; what cannot be read of it is one row more, called as the file is, which fails."""
    rows: list[dict[str, Any]] = []
    try:
        with fs.open(path) as file:
            for row in _samples(file) if _kind(path) == ".tar" else _table_rows(file):
                rows.append(row | {"id": f"{stem}/{row['id']}" if row.pop("within", True) else row["id"]})
    except Exception as error:  # each library has its own for a file that is none
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        rows.append({"id": stem, "error": f"cannot be read after its first {len(rows)} rows: {reason}"})
    url = _url(fs, path)
    return pa.Table.from_pylist([row | {"url": url} for row in rows], ROW)


def _samples(file: Any) -> Iterator[dict[str, Any]]:
    """Of a WebDataset shard; of one that ends early, those that are whole for certain."""
    key, members = "", dict[str, tarfile.TarInfo]()
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            match = SAMPLE.fullmatch(member.name) if member.isfile() else None
            if match is None or PurePosixPath(member.name).name.startswith("."):
                continue
            if match[1] != key and members:
                yield _sample(tar, key, members)
                members = {}
            key = match[1]
            members[match[2].lower()] = member
            tar.members = []  # type: ignore[attr-defined]  # which would all be kept
        file.seek(tar.offset)
        if len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
            raise ValueError("the shard ends early, without a tar file's end")
        if members:
            yield _sample(tar, key, members)


def _sample(tar: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
    row: dict[str, Any] = {"id": key}
    suffix, member = next(
        ((suffix, members[name]) for suffix in FILES for name in members if f".{name}".endswith(suffix)), ("", None)
    )
    if member is None:
        return row | {"suffix": "", "error": f"neither a picture nor latents among .{', .'.join(sorted(members))}"}
    row |= {"suffix": suffix, "offset": member.offset_data, "size": member.size}
    try:
        if "json" in members and (content := tar.extractfile(members["json"])) is not None:
            row |= _facts(json.loads(content.read()))
    except (ValueError, RecursionError) as error:
        row["error"] = f".json: {error}"
    return row


def _facts(said: Any) -> dict[str, Any]:
    """What a row says of how it is to be decoded."""
    if not isinstance(said, dict):
        raise ValueError(f"expected an object, got {said!r:.100}")
    sigma, prompt = said.get("sigma"), said.get("prompt")
    if sigma is not None and (not isinstance(sigma, int | float) or not 0 <= sigma <= 1):
        raise ValueError(f'expected "sigma" in [0, 1], got {sigma!r:.100}')
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f'expected "prompt" to be a text, got {prompt!r:.100}')
    return {"sigma": None if sigma is None else float(sigma), "prompt": prompt}


def _table_rows(file: Any) -> Iterator[dict[str, Any]]:
    table = pq.ParquetFile(file)
    names = table.schema_arrow.names
    if "latents" not in names and "image" not in names:
        raise ValueError(f'expected a column "latents" or "image", got {", ".join(names)[:200]}')
    number = 0
    for group in range(table.num_row_groups):
        told = table.read_row_group(group, [name for name in ("id", "sigma", "prompt") if name in names])
        for place, said in enumerate(told.to_pylist() or [{}] * table.metadata.row_group(group).num_rows):
            given = said.get("id")
            row = {"id": f"{number:08}" if given is None else str(given), "within": given is None}
            row |= {"suffix": ".parquet", "offset": group, "size": place}
            try:
                row |= _facts(said)
            except ValueError as error:
                row["error"] = str(error)
            yield row
            number += 1


def read_row(row: dict[str, Any]) -> tuple[bytes | None, Latents | None]:
    """The picture's file, or the latents, of a row of `ROW`.

    Raises:
        ValueError: it cannot be used.
        OSError: it cannot be read.
    """
    suffix = row["suffix"]
    if suffix == ".parquet":
        return _from_table(row)
    fs, path = filesystem(row["url"])
    whole = row["offset"] is None
    if whole and is_local(fs) and suffix in LATENT_SUFFIXES:
        return None, load_latents(Path(path))
    data = fs.cat_file(path) if whole else fs.cat_file(path, row["offset"], row["offset"] + row["size"])
    if not whole and len(data) < row["size"]:
        raise ValueError(f"{row['url']} ends early")
    return (None, parse_latents(data, suffix)) if suffix in LATENT_SUFFIXES else (data, None)


@functools.lru_cache(maxsize=1)
def _row_group(url: str, group: int) -> pa.Table:
    """The rows of one are decoded one after another."""
    fs, path = filesystem(url)
    with fs.open(path) as file:
        table = pq.ParquetFile(file)
        name = "latents" if "latents" in table.schema_arrow.names else "image"
        return table.read_row_group(group, [name])


def _from_table(row: dict[str, Any]) -> tuple[bytes | None, Latents | None]:
    table = _row_group(row["url"], row["offset"])
    (name,) = table.column_names
    scalar = table[name][row["size"]]
    value = scalar.to_numpy() if hasattr(scalar, "to_numpy") else scalar.as_py()
    if name == "image":
        data = value.get("bytes") if isinstance(value, dict) else value  # as Hugging Face's data sets have it
        if not isinstance(data, bytes):
            raise ValueError(f'expected the bytes of a picture as "image", got {type(data).__name__}')
        return data, None
    if isinstance(value, bytes):
        return None, parse_latents(value, ".npy" if value.startswith(b"\x93NUMPY") else ".safetensors")
    try:
        array = np.asarray(value, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f'expected numbers (C, h, w) as "latents": {error}') from None
    if array.ndim not in (3, 4) or not array.size:
        raise ValueError(f'expected numbers (C, h, w) as "latents", got {array.shape}')

    import torch

    return None, Latents(torch.from_numpy(array.copy()).reshape(-1, *array.shape[-3:]))
