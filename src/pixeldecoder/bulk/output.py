"""Rows with their pictures in; files, shards or tables out, each whole or not at all, and a manifest of every row."""

import fcntl
import hashlib
import io
import json
import os
import tarfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem
from ray.data.block import BlockAccessor
from ray.data.checkpoint import CheckpointConfig, CheckpointManager
from ray.data.datasource import BlockBasedFileDatasink

from pixeldecoder.bulk.rows import filesystem, is_local
from pixeldecoder.files import sweep, write_whole

Kind = Literal["files", "webdataset", "parquet"]

MANIFEST = pa.schema(
    {
        "id": pa.string(),
        "status": pa.string(),  # "done", "failed", or "skipped": neither a picture nor latents
        "reason": pa.string(),  # why it is not done
        "output": pa.string(),  # a file in the output folder; of a shard or a table, ":" and the key or id in it
        "seed": pa.int64(),
        "width": pa.int32(),  # of the image in pixels
        "height": pa.int32(),
        "seconds": pa.float64(),  # of its worker that it took
        "device": pa.string(),
        "node": pa.string(),  # the machine
        "time": pa.float64(),  # when it was finished, in seconds since 1970
        "url": pa.string(),  # of the file that it was read from
    }
)
"""What is told of each row, whatever became of it."""
RESULT = MANIFEST.append(pa.field("image", pa.binary()))
"""With the file of its picture."""
LONGEST_NAME = 160
"""Bytes of a part of a row's id that are kept in a file's name."""
PATIENCE = 60.0
"""Seconds that processes of a run that was killed may take to end."""


@dataclass(frozen=True)
class Output:
    """A folder of outputs, as its writers know it. It can be pickled, and so sent to them.

    In it are `images`, `manifest` (Parquet, a part for each shard), `settings.json`, `run.lock`, and until a run is
    finished `checkpoint`, which Ray Data keeps: parts that are pending there do not count.
    """

    url: str
    kind: Kind
    format: str
    """Suffix of the pictures, without its dot."""
    settings: str
    """Hash of what decides how pictures look."""
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Who writes at present: nobody does for a run that another has taken over from."""

    def path(self, *names: str) -> str:
        return "/".join((filesystem(self.url)[1], *names))

    def check(self, settings: dict[str, Any]) -> None:
        """Raises ValueError if the folder is no output of ours, or has rows that were made with other settings."""
        fs, root = filesystem(self.url)
        path = self.path("settings.json")
        if fs.isfile(root):
            raise ValueError(f"{self.url} is a file: expected a folder as output")
        if not fs.isdir(root):
            return
        if not fs.exists(path):
            others = [PurePosixPath(other).name for other in fs.ls(root, detail=False)]
            if others and others != ["run.lock"]:  # of a run that was killed at its very start
                raise ValueError(f"{self.url} holds other files, such as {others[0]}: give a folder of its own")
            return
        try:
            there = json.loads(fs.cat_file(path))
            if not isinstance(there, dict):
                raise ValueError(f"got {there!r:.100}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: expected the settings of the run that made {self.url}: {error}") from None
        other = [name for name in sorted({**there, **settings}) if there.get(name) != settings.get(name)]
        if other and self.parts():
            told = ", ".join(
                f"{name:.50} {there.get(name)!r:.100}, not {settings.get(name)!r:.100}" for name in other[:5]
            )
            raise ValueError(f"{self.url} was made with {told}: give another folder, or the same settings")

    def begin(self, settings: dict[str, Any]) -> IO[str] | None:
        """Take the folder, once all writers of a run that was killed have ended, and undo what it did not finish.

        Returns:
            What holds the lock until it is closed; `None` where there are no locks, as in object stores.

        Raises:
            ValueError: as `check`, or another run is at work there.
        """
        self.check(settings)
        fs, root = filesystem(self.url)
        fs.makedirs(root, exist_ok=True)
        lock = None
        if is_local(fs):
            lock = _locked(Path(self.path("run.lock")), alone=True)
            if lock is None:
                raise ValueError(f"{self.url}: another run is at work there: wait for it, or end it")
            lock.truncate(0)
            lock.write(self.run)
            lock.flush()
        else:
            self.put("run.lock", self.run.encode())
        self.put("settings.json", json.dumps(settings, indent=2).encode())
        for pending in _list(fs, self.path("checkpoint"), ".pending.parquet"):
            part = PurePosixPath(pending).name.removesuffix(".pending.parquet")
            names = ("images", f"{part}.tar"), ("images", f"{part}.parquet"), ("manifest", f"{part}.parquet")
            for path in (self.path(*name) for name in names):
                if fs.exists(path):
                    fs.rm(path)
            fs.rm(pending)
        if is_local(fs):
            sweep(Path(root), alone=True)
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_SH)
        return lock

    def join(self) -> None:
        """For each writer: the folder stays taken while its process lives.

        Raises:
            RuntimeError: another run has taken it.
        """
        fs, _ = filesystem(self.url)
        if self.run in _JOINED:
            return
        path = self.path("run.lock")
        if is_local(fs):
            lock = _locked(Path(path), alone=False)
            if lock is not None and lock.read() == self.run:
                _JOINED[self.run] = lock
                return
        elif fs.cat_file(path) == self.run.encode():
            return
        raise RuntimeError(f"{self.url}: another run has taken over")

    def put(self, name: str, data: bytes) -> None:
        """Whole or not at all."""
        fs, path = filesystem(self.url)[0], self.path(name)
        if is_local(fs):
            write_whole(Path(path), lambda file: file.write_bytes(data))
        else:
            fs.pipe_file(path, data)  # which is so in object stores

    def name(self, id: str) -> str:
        """Of a row's picture, without suffix: no two ids have the same, and none leads out of the folder."""
        parts = []
        for part in id.split("/"):
            # In a shard a dot would begin the suffix.
            part = quote(part, safe=" ()+,;=@[]{}!$&'~").replace(".", "%2E" if self.kind == "webdataset" else ".")
            if len(part) > LONGEST_NAME:
                part = f"{part[:LONGEST_NAME]}%{hashlib.sha256(part.encode()).hexdigest()[:16]}"
            parts.append(f"%2E{part[1:]}" if part.startswith(".") else part or "%")
        return f"{'/'.join(parts)}-{self.settings}"

    def manifest(self, *columns: str) -> pa.Table:
        """Those columns of all rows that count; "__filename" is the part that a row is in.

        Raises:
            ValueError: a part is damaged.
        """
        fs = arrow_filesystem(filesystem(self.url)[0])

        def read(parts: list[str]) -> pa.Table:
            table = pyarrow.dataset.dataset(parts, MANIFEST, "parquet", fs).to_table(columns=list(columns))
            table.validate(full=True)
            return table

        try:
            return read(self.parts())
        except (pa.ArrowException, OSError) as error:
            for part in self.parts():
                with _naming_damaged(part):
                    read([part])
            raise ValueError(f"{self.url}: its manifest cannot be read: {error}") from None

    def parts(self) -> list[str]:
        """Files of the manifest."""
        return _list(filesystem(self.url)[0], self.path("manifest"), ".parquet")

    def rows_in(self, part: str) -> int:
        with _naming_damaged(part), filesystem(self.url)[0].open(part) as file:
            return pq.read_metadata(file).num_rows

    def drop(self, ids: Iterable[str]) -> None:
        """Leave out of the manifest, once a row has been tried again, what it said before, and rows that are no more.

        Args:
            ids: of the latter.
        """
        fs, _ = filesystem(self.url)
        gone = set(ids)
        table = self.manifest("id", "time", "__filename")
        tried = table.group_by("id").aggregate([("time", "max"), ("time", "count")])
        tried = tried.filter(pc.greater(tried["time_count"], 1))
        latest = dict(zip(tried["id"].to_pylist(), tried["time_max"].to_pylist(), strict=True))
        for path in (
            table.filter(pc.is_in(table["id"], pa.array([*latest, *gone], pa.string())))["__filename"]
            .unique()
            .to_pylist()
        ):
            with _naming_damaged(path):
                part = pq.read_table(io.BytesIO(fs.cat_file(path)))
                part.validate(full=True)
            rows = zip(part["id"].to_pylist(), part["time"].to_pylist(), strict=True)
            kept = part.filter(pa.array([id not in gone and time == latest.get(id, time) for id, time in rows]))
            self.put(f"manifest/{PurePosixPath(path).name}", _parquet(kept))


class Sink(BlockBasedFileDatasink):
    """Writes what an actor made: pictures first, then the part of the manifest that tells of them.

    Ray Data notes a part as pending before it is written and as done afterwards; `Output.begin` undoes what is pending.
    """

    def __init__(self, output: Output, shard_size: int):
        fs, _ = filesystem(output.url)
        path = output.path("manifest")
        super().__init__(path, filesystem=arrow_filesystem(fs), file_format="parquet", min_rows_per_file=shard_size)
        self.output = output

    def write_block(self, block: BlockAccessor, block_index: int, ctx: Any) -> None:
        output, table = self.output, block.to_arrow().cast(RESULT)
        output.join()
        part = self.filename_provider.get_filename_for_task(ctx.kwargs["write_uuid"], ctx.task_idx)
        stem = part.removesuffix(".parquet")
        places: list[str | None] = [None] * len(table)
        made = {
            row: output.name(id)
            for row, (id, image) in enumerate(zip(table["id"].to_pylist(), table["image"], strict=True))
            if image.is_valid
        }
        if output.kind == "files":
            for row, name in made.items():
                places[row] = file = f"images/{name}.{output.format}"
                output.put(file, table["image"][row].as_py())
        elif made:
            file = f"images/{stem}.{'tar' if output.kind == 'webdataset' else 'parquet'}"
            output.put(file, self._shard(table, made))
            for row, name in made.items():
                places[row] = f"{file}:{name}"
        manifest = table.drop(["image", "output"]).append_column("output", pa.array(places, pa.string()))
        output.put(f"manifest/{part}", _parquet(manifest.select(MANIFEST.names)))

    def _shard(self, table: pa.Table, made: dict[int, str]) -> bytes:
        rows = table.take(list(made))
        names = pa.array(list(made.values()))
        if self.output.kind == "parquet":
            facts = rows.select(["id", "seed", "width", "height", "image"])
            return _parquet(facts.add_column(1, "name", names))
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for row, name in zip(rows.to_pylist(), made.values(), strict=True):
                facts = {key: row[key] for key in ("id", "seed", "width", "height")}
                for suffix, data in (self.output.format, row["image"]), ("json", json.dumps(facts).encode()):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        return file.getvalue()


class Settled(CheckpointManager):
    """What is done already is left out of what Ray Data reads: there is nothing for it to filter."""

    def load_checkpoint(self, data_file_dir: Any = None, data_file_filesystem: Any = None) -> tuple[None, int]:
        return None, 0


def checkpoint(output: Output) -> CheckpointConfig:
    """By which Ray Data commits each part in two phases."""
    fs, _ = filesystem(output.url)
    return CheckpointConfig(
        "id", output.path("checkpoint"), override_filesystem=arrow_filesystem(fs), checkpoint_manager_cls=Settled
    )


def arrow_filesystem(fs: Any) -> FileSystem:
    return LocalFileSystem() if is_local(fs) else PyFileSystem(FSSpecHandler(fs))


@contextmanager
def _naming_damaged(part: str) -> Iterator[None]:
    """Of a part of the manifest, as ValueError: no run of ours leaves one, but a disk may."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{part}: damaged ({reason}): delete it, and its rows are made again") from None


def _parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def _list(fs: Any, folder: str, suffix: str) -> list[str]:
    fs.invalidate_cache()
    names = fs.ls(folder, detail=False) if fs.isdir(folder) else []
    return sorted(name for name in names if name.endswith(suffix) and PurePosixPath(name).name[0] != ".")


_JOINED: dict[str, IO[str]] = {}
"""Locks of the runs that this process writes for."""


def _locked(path: Path, alone: bool) -> IO[str] | None:
    """A file that is locked until it is closed, against all, or against those that want it alone; `None` if it is so
    by another, who is waited for if it is wanted alone."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    until = time.monotonic() + (PATIENCE if alone else 0)
    while True:
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > until:
                file.close()
                return None
            time.sleep(0.1)
