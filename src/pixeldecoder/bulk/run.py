"""Rows and an output in; every row decoded once, by actors of Ray Data, and counts of what became of them out."""

import builtins
import contextlib
import functools
import logging
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from tqdm import tqdm

from pixeldecoder.bulk.output import Output, Sink, checkpoint
from pixeldecoder.bulk.settings import Settings
from pixeldecoder.errors import explain

LARGEST_PIECE = 16
"""Rows that an actor gets at a time, and makes again if it is lost."""
OBJECT_STORE = 512 * 2**20
"""Bytes that a local Ray keeps in shared memory; what is more goes to its disk."""
REACHABLE = 10.0
"""Seconds that a cluster may take to answer."""
POLL = 2.0
"""Seconds between looks at the manifest, for the progress bar, if these are quick."""


class Actor:
    """`Decoder`, which needs PyTorch: neither the driver nor those that read and write wait for that."""

    def __init__(self, settings: Settings):
        from pixeldecoder.bulk.decoder import Decoder

        self.decoder = Decoder(settings)

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        return self.decoder(rows)


class Source(Datasource):
    """Rows that are known, in pieces: an actor reads what they stand for when it decodes them."""

    def __init__(self, rows: pa.Table, actors: int):
        super().__init__()
        self.rows, self.piece = rows, max(1, min(LARGEST_PIECE, len(rows) // (4 * actors)))

    def estimate_inmemory_data_size(self) -> int:
        return self.rows.nbytes

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        tasks = []
        for start in range(0, len(self.rows), self.piece):
            # Copied: a slice would be sent with all that it was cut from.
            piece = self.rows.take(list(range(start, min(start + self.piece, len(self.rows)))))
            metadata = BlockMetadata(num_rows=len(piece), size_bytes=piece.nbytes, input_files=None, exec_stats=None)
            tasks.append(ReadTask(functools.partial(iter, [piece]), metadata, piece.schema))
        return tasks


def decode_rows(
    rows: pa.Table,
    settings: Settings,
    given: dict[str, Any],
    shard_size: int = 64,
    actors: int | None = None,
    address: str | None = None,
    retry_failed: bool = False,
    whole: bool = True,
) -> Counter[str]:
    """Decode what is not in the output yet.

    Args:
        rows: of `ROW`, from `find_rows`.
        given: what decides how pictures look, as it is kept in the output folder.
        shard_size: rows to a shard, and to a part of the manifest.
        actors: that decode, each with a GPU or a share of this machine's cores; by default as many as there are GPUs.
        address: of a Ray cluster; by default one is started on this machine, for the time of the call.
        retry_failed: decode once more what failed before.
        whole: `rows` are all of the source.

    Returns:
        How many rows of `rows` are "done", "failed" and "skipped", earlier runs included, and how many are "new".

    Raises:
        ValueError: an output that cannot be used, or an unreachable cluster.
        OSError: nothing more could be written; what is written counts.
    """
    output = settings.output
    lock = output.begin(given)
    try:
        before = output.manifest("id", "status")
        failed = pc.equal(before["status"], "failed")
        settled = before.filter(pc.invert(failed)) if retry_failed else before
        todo = rows.filter(pc.invert(pc.is_in(rows["id"], settled["id"])))
        if len(todo):
            with _started(address, actors, settings.device) as (count, resources):
                _run(todo, settings, shard_size, count, resources)
        gone = before.filter(failed)["id"] if retry_failed and whole else pa.array([], pa.string())
        output.drop(gone.filter(pc.invert(pc.is_in(gone, rows["id"]))).to_pylist())
        after = output.manifest("id", "status")
    finally:
        if lock is not None:
            lock.close()
    counts = Counter(after.filter(pc.is_in(after["id"], rows["id"]))["status"].to_pylist())
    counts["new"] = len(todo)
    return counts


def _run(rows: pa.Table, settings: Settings, shard_size: int, actors: int, resources: dict[str, float]) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.checkpoint_config = checkpoint(settings.output)
    light = {"num_cpus": 0.25}
    dataset = ray.data.read_datasource(Source(rows, actors), num_cpus=0.25).map_batches(
        Actor, fn_constructor_args=(settings,), compute=ray.data.ActorPoolStrategy(size=actors),
        batch_size=None, batch_format="pyarrow", **resources,
    )  # fmt: skip
    try:
        with _quiet() as screen, _progress(settings.output, len(rows), screen):
            dataset.write_datasink(Sink(settings.output, shard_size), ray_remote_args=light)
    except ray.exceptions.RayError as error:
        raise _cause(error) or error from None


def _cause(error: BaseException) -> Exception | None:
    """What Ray wraps, if it is something that a user can mend."""
    cause: Any = error
    while isinstance(cause, ray.exceptions.RayError):
        inner = getattr(cause, "cause", None) or cause.__cause__
        if isinstance(cause, ray.exceptions.ActorDiedError):  # which has it as text alone
            name, _, said = str(cause).strip().splitlines()[-1].partition(": ")
            kind = getattr(builtins, name, None)
            inner = kind(said) if isinstance(kind, type) and issubclass(kind, Exception) else None
        cause = inner
    if not isinstance(cause, Exception) or explain(cause, "") is None:
        return None
    if isinstance(cause, OSError):
        return OSError(f"{cause}: stopped; what is written counts, and the same command goes on from there")
    return cause


@contextlib.contextmanager
def _started(address: str | None, actors: int | None, device: str) -> Iterator[tuple[int, dict[str, float]]]:
    """Ray, until the block ends; the number of actors, and what each of them takes."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    threads = 1
    if address is None:
        cores = os.cpu_count() or 1
        threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // (actors or 1)))
        options |= {
            "num_cpus": max(cores, (actors or 1) * threads) + 2,  # beside the actors there are those who read and write
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE,
            "_node_ip_address": "127.0.0.1",
        }
    else:
        _check_reachable(address)
    try:
        ray.init(address or "local", **options)
    except (ConnectionError, RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
        raise ValueError(f"Ray at {address or 'this machine'}: {' '.join(str(error).split())[:300]}") from None
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0)) if device in ("auto", "cuda") else 0
        if device == "cuda" and not gpus and address is None:
            raise ValueError("--device cuda: this machine has none")
        if gpus and address is None and (actors or 0) > gpus:
            raise ValueError(f"--actors {actors}: each has a GPU of its own, and this machine has {gpus}")
        on_gpu = gpus or device == "cuda"  # which a cluster that grows may have later
        yield actors or gpus or 1, {"num_gpus": 1, "num_cpus": 1} if on_gpu else {"num_cpus": threads}
    finally:
        with _quiet():  # an actor's error may still arrive, after what is told of it
            ray.shutdown()


def _check_reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdecimal():
        raise ValueError(f'--ray-address {address}: expected HOST:PORT or "auto"')
    try:
        socket.create_connection((host, int(port)), REACHABLE).close()
    except OSError as error:
        raise ValueError(f"--ray-address {address}: no cluster answers there ({error})") from None


@contextlib.contextmanager
def _quiet() -> Iterator[IO[str]]:
    """Ray's own lines, which its logs have, too, stay off both streams; the screen is given."""
    streams = {1: sys.stdout, 2: sys.stderr}
    for stream in streams.values():
        stream.flush()
    kept = {number: os.dup(number) for number in streams}
    with open(os.devnull, "w") as nowhere:
        for number in streams:
            os.dup2(nowhere.fileno(), number)
    try:
        with os.fdopen(kept[2], "w", closefd=False) as file:
            yield file
    finally:
        for number, stream in streams.items():
            stream.flush()
            os.dup2(kept[number], number)
            os.close(kept[number])


@contextlib.contextmanager
def _progress(output: Output, total: int, screen: IO[str]) -> Iterator[None]:
    """A bar of the rows that count, by the parts of the manifest."""
    seen, ended = set(output.parts()), threading.Event()
    with tqdm(total=total, desc="rows", unit="row", smoothing=0.1, file=screen) as bar:

        def look() -> None:
            for part in set(output.parts()) - seen:
                seen.add(part)
                bar.update(output.rows_in(part))

        def watch() -> None:
            pause = POLL
            while not ended.wait(pause):
                begun = time.monotonic()
                with contextlib.suppress(OSError):
                    look()
                bar.update(0)  # its time
                pause = max(POLL, 10 * (time.monotonic() - begun))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            look()
