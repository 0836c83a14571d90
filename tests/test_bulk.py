"""Rows in, exactly one output for each out, whatever is killed on the way."""

import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.bulk import output as output_module
from pixeldecoder.bulk.decoder import Decoder
from pixeldecoder.bulk.output import MANIFEST, Output, Sink
from pixeldecoder.bulk.rows import find_rows, read_row
from pixeldecoder.bulk.settings import Settings, row_seed
from pixeldecoder.files import read_made
from pixeldecoder.plan import Limits


@pytest.fixture(autouse=True)
def _there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def latents(index: int) -> torch.Tensor:
    """(16, h, w), of 2 to 4 cells a side."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(16, 2 + index % 3, 2 + index // 3 % 3, generator=generator)


def npy(index: int) -> bytes:
    file = io.BytesIO()
    np.save(file, latents(index).numpy())
    return file.getvalue()


def png(size: tuple[int, int] = (20, 16), colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def folder(indices, path: str = "in") -> list[str]:
    """Files of latents; the ids of their rows."""
    Path(path, "deep").mkdir(parents=True, exist_ok=True)
    ids = [f"deep/{index:04}" if index % 5 == 0 else f"{index:04}" for index in indices]
    for index, id in zip(indices, ids, strict=True):
        save_file({"latents": latents(index)}, Path(path, f"{id}.safetensors"))
    return ids


def shard(path: str, members: dict[str, bytes]) -> bytes:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return Path(path).read_bytes()


def shards(indices, path: str = "in", size: int = 50) -> list[str]:
    for number, start in enumerate(range(0, len(indices), size)):
        shard(f"{path}/s{number}.tar", {f"{index:04}.npy": npy(index) for index in indices[start : start + size]})
    return [f"s{position // size}/{index:04}" for position, index in enumerate(indices)]


def tables(indices, path: str = "in") -> list[str]:
    """Latents as lists, in two files of several row groups."""
    Path(path).mkdir()
    half = len(indices) // 2
    for number, part in enumerate((indices[:half], indices[half:])):
        rows = [{"id": f"row/{index}", "latents": latents(index).tolist()} for index in part]
        pq.write_table(pa.Table.from_pylist(rows), f"{path}/{number}.parquet", row_group_size=40)
    return [f"row/{index}" for index in indices]


def rows(source: str = "in", **options) -> list[dict]:
    return find_rows(source, **options).to_pylist()


def ids(source: str = "in", **options) -> list[str]:
    return [row["id"] for row in rows(source, **options)]


# Sources


def test_rows_of_a_folder():
    folder(range(3))
    Path("in/photo.JPG").write_bytes(png())
    for other in "in/.hidden.png", "in/.git/a.png", "in/notes.txt", "in/out/a-1234.png":
        Path(other).parent.mkdir(exist_ok=True)
        Path(other).write_bytes(png())
    assert ids(output="in/out") == ["0001", "0002", "deep/0000", "photo"]
    assert ids(output="in/out", limit=2) == ["0001", "0002"]
    assert ids(f"file://{os.getcwd()}/in", output="in/out") == ids("in/", output=f"{os.getcwd()}/in/out/") != ids()
    assert ids("in/000{1..2}.safetensors") == ids("in/*.safetensors") == ["0001", "0002"]
    assert ids("in/photo.JPG") == ["photo"]
    first, *_, photo = rows(output="in/out")
    assert torch.equal(read_row(first)[1].tensor[0], latents(1)) and read_row(photo) == (png(), None)


def test_rows_of_shards():
    facts = json.dumps({"sigma": 0.25, "prompt": "a lighthouse", "more": [1]}).encode()
    save_file({"latents": latents(2)}, "one.safetensors")
    members = {"x/0.npy": npy(0), "x/0.json": facts, "x/1.txt": b"words alone", "2.png": png()}
    members |= {"2.latents.safetensors": Path("one.safetensors").read_bytes(), "3.cls": b"7", "3.png": png()}
    shard("in/a.tar", members | {"4.json": b'{"sigma": 2}', "4.npy": npy(4)})
    shard("in/deep/b.tar", {"x/0.npy": npy(5)})
    found = {row["id"]: row for row in rows()}
    assert list(found) == ["a/x/0", "a/x/1", "a/2", "a/3", "a/4", "deep/b/x/0"]
    assert (found["a/x/0"]["sigma"], found["a/x/0"]["prompt"]) == (0.25, "a lighthouse")
    for id, index in ("a/x/0", 0), ("a/2", 2), ("deep/b/x/0", 5):
        assert torch.equal(read_row(found[id])[1].tensor[0], latents(index))
    assert read_row(found["a/3"]) == (png(), None)
    assert found["a/x/1"]["error"] == "neither a picture nor latents among .txt" and found["a/x/1"]["suffix"] == ""
    assert found["a/4"]["error"] == '.json: expected "sigma" in [0, 1], got 2'
    assert ids("in/a.tar") == list(found)[:5] and ids("in/{a,deep/b}.tar", limit=1) == ["a/x/0"]


def test_rows_of_tables():
    plain = latents(0).numpy()
    fixed = pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack([plain, plain + 1]))
    pq.write_table(pa.table({"latents": fixed, "sigma": [0.5, None], "other": [1, 2]}), "a.parquet", row_group_size=1)
    pq.write_table(pa.table({"latents": [npy(3), b"junk", None]}), "b.parquet")
    pq.write_table(pa.table({"image": [{"bytes": png(), "path": "x"}], "id": [17]}), "c.parquet")
    pq.write_table(pa.table({"latents": [[[[1.0, 2.0]]], [[[1.0], [1.0, 2.0]]], [[[]]]]}), "d.parquet")
    found = {row["id"]: row for row in rows("*.parquet")}
    numbered = [f"{name}/0000000{index}" for name, count in (("a", 2), ("b", 3), ("d", 3)) for index in range(count)]
    assert list(found) == [*numbered[:5], "17", *numbered[5:]]
    assert [found[f"a/0000000{index}"]["sigma"] for index in (0, 1)] == [0.5, None]
    assert np.array_equal(read_row(found["a/00000001"])[1].tensor[0], plain + 1)
    assert torch.equal(read_row(found["b/00000000"])[1].tensor[0], latents(3))
    assert read_row(found["17"]) == (png(), None)
    assert read_row(found["d/00000000"])[1].tensor.tolist() == [[[[1.0, 2.0]]]]
    for id in "b/00000001", "b/00000002", "d/00000001", "d/00000002":
        with pytest.raises(ValueError, match=r'not a readable file|expected numbers|"latents"'):
            read_row(found[id])


@pytest.mark.parametrize("cut", ["within a sample", "between samples", "no tar file"])
def test_a_shard_that_ends_early_is_named_and_what_is_whole_is_used(cut):
    whole = shard("in/a.tar", {f"{index}.{kind}": npy(index) for index in range(4) for kind in ("npy", "txt")})
    sample = whole.index(b"2.npy")
    end = {"within a sample": sample + 700, "between samples": sample, "no tar file": 0}[cut]
    Path("in/a.tar").write_bytes(whole[:end] or b"nothing of the kind")
    shard("in/b.tar", {"0.npy": npy(0)})
    *first, broken, last = rows()
    assert [row["id"] for row in first] == (
        [] if cut == "no tar file" else ["a/0"] if cut == "between samples" else ["a/0", "a/1"]
    )
    assert broken["id"] == "a" and re.match(rf"cannot be read after its first {len(first)} rows: ", broken["error"])
    assert (last["id"], last["error"]) == ("b/0", None)


def test_tables_that_cannot_be_read_are_named():
    tables(range(10))
    Path("in/0.parquet").write_bytes(Path("in/0.parquet").read_bytes()[:-20])
    pq.write_table(pa.table({"text": ["a"]}), "in/2.parquet")
    first, *_, last = rows()
    assert first["id"] == "0" and first["error"].startswith("cannot be read after its first 0 rows: ")
    assert last["error"].endswith('expected a column "latents" or "image", got text') and len(rows()) == 7


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none", "none: no such file or folder"),
        ("empty", r"empty: expected .tar, .parquet, or .safetensors, .npy, .*, found 1 .txt"),
        ("empty/a.txt", r"empty/a.txt: expected .tar, .parquet, or .*, got \['.*/a.txt'\]"),
        ("empty/*.png", r"empty/\*.png: expected .*, got nothing"),
        ("mixed", r"mixed: holds 1 pictures or latents, 1 \.tar: name those of one kind, such as mixed/\*\.tar"),
        ("twice", "twice: several rows have one id, 'a' in .*/a.npy and .*/a.png: an output is named by its row's id"),
        ("again/*", "again/.*: several rows have one id, 'x' in .*/a.parquet and .*/b.parquet: an"),
        ("mixed/b.tar", "mixed/b.tar: no rows in it"),
        ("nowhere://x", "nowhere://x: Protocol not known: nowhere"),
    ],
)
def test_sources_that_cannot_be(source, message):
    for path in "empty/a.txt", "mixed/a.png", "twice/a.png", "twice/a.npy":
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(png())
    shard("mixed/b.tar", {})
    Path("again").mkdir()
    for name in "ab":
        pq.write_table(pa.table({"id": ["x", name], "image": [png(), png()]}), f"again/{name}.parquet")
    with pytest.raises(ValueError, match=f"^{message}"):
        find_rows(source)


# Outputs


def test_names_of_outputs_are_as_different_as_ids_and_lead_nowhere_else():
    given = ["a", "a/b", "../a", "/a", "a//b", ".a", "a.b", "a.", "ä", "a b", "a%20b", "a:b", "x" * 300, "x" * 301, ""]
    for kind in "files", "webdataset":
        names = [Output("out", kind, "png", "12345678").name(id) for id in given]
        assert len(set(names)) == len(given) and all(name.endswith("-12345678") for name in names)
        for name in names:
            assert not any(part.startswith(".") for part in name.split("/")) and not name.startswith("/")
            assert max(map(len, name.split("/"))) < 240
            assert kind == "files" or "." not in name
    assert Output("out", "files", "png", "12345678").name("deep/a.v2") == "deep/a.v2-12345678"


def manifest_part(output: Output, part: str, rows: dict[str, tuple[str, float]]) -> None:
    table = [{"id": id, "status": status, "time": at} for id, (status, at) in rows.items()]
    output.put(f"manifest/{part}.parquet", output_module._parquet(pa.Table.from_pylist(table, MANIFEST)))


def test_what_was_not_finished_is_undone():
    output = Output("out", "webdataset", "png", "12345678")
    output.begin({"steps": 1}).close()
    for part in "a_000000", "a_000001":
        manifest_part(output, part, {part: ("done", 1.0)})
        output.put(f"images/{part}.tar", b"x")
    output.put("checkpoint/a_000000.parquet", b"committed")
    output.put("checkpoint/a_000001.pending.parquet", b"torn")
    Path("out/images/.0123abcd.89abcdef.5.tar").write_bytes(b"being written")
    output.begin({"steps": 1}).close()
    left = {path.relative_to("out").as_posix() for path in Path("out").rglob("*") if path.is_file()}
    assert left == {
        "run.lock", "settings.json", "manifest/a_000000.parquet", "images/a_000000.tar", "checkpoint/a_000000.parquet",
    }  # fmt: skip
    assert output.manifest("id").to_pylist() == [{"id": "a_000000"}]


def test_the_last_try_counts():
    output = Output("out", "files", "png", "12345678")
    manifest_part(output, "a", {"x": ("failed", 1.0), "y": ("done", 1.0), "gone": ("failed", 1.0)})
    manifest_part(output, "b", {"x": ("failed", 2.0)})
    manifest_part(output, "c", {"x": ("done", 3.0), "z": ("done", 3.0)})
    output.drop(["gone"])
    told = sorted((row["id"], row["status"]) for row in output.manifest("id", "status").to_pylist())
    assert told == [("x", "done"), ("y", "done"), ("z", "done")]
    output.drop([])
    assert len(output.manifest("id")) == 3


def test_folders_that_are_not_ours_and_settings_of_another_run():
    output = Output("out", "files", "png", "12345678")
    Path("file").write_text("")
    Path("full").mkdir()
    Path("full/letter.txt").write_text("")
    output.begin({"steps": 2}).close()  # nothing was made
    output.begin({"steps": 1, "seed": 0}).close()
    manifest_part(output, "a", {"x": ("done", 1.0)})
    for url, settings, message in (
        ("file", {}, "file is a file: expected a folder as output"),
        ("full", {}, "full holds other files, such as letter.txt: give a folder of its own"),
        ("out", {"steps": 4, "seed": 0}, "out was made with steps 1, not 4: give another folder, or the same settings"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            Output(url, "files", "png", "87654321").begin(settings)
    assert (
        sorted(os.listdir("full")) == ["letter.txt"] and json.loads(Path("out/settings.json").read_text())["steps"] == 1
    )
    Path("out/settings.json").write_text("[")
    with pytest.raises(ValueError, match="expected the settings of the run that made out"):
        output.check({})


def test_nobody_writes_for_a_run_that_another_has_taken_over_from(monkeypatch):
    monkeypatch.setattr(output_module, "PATIENCE", 0.2)
    old, new = (Output("out", "files", "png", "12345678") for _ in range(2))
    old.begin({}).close()
    old.join()  # a writer, which lives on
    with pytest.raises(ValueError, match=r"^out: another run is at work there: wait for it, or end it$"):
        new.begin({})
    output_module._JOINED.pop(old.run).close()
    lock = new.begin({})
    with pytest.raises(RuntimeError, match="another run has taken over"):
        old.join()
    new.join()
    with open("out/run.lock") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    output_module._JOINED.pop(new.run).close()
    lock.close()


# The command


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "pixeldecoder", "bulk", "in", "out", "--actors", "2", "--steps", "1", *words]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0"}


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*words), env=ENVIRONMENT, capture_output=True, text=True, timeout=900)


def told(status: str = "done") -> dict[str, dict]:
    """What the manifest says, by id; each once."""
    table = pq.read_table("out/manifest").to_pylist()
    assert len({row["id"] for row in table}) == len(table)
    return {row["id"]: row for row in table if row["status"] == status}


def pictures(sink: str) -> dict[str, Image.Image]:
    """All that were written, by id; each once, and where the manifest says."""
    found: list[tuple[str, str, bytes]] = []
    files = [path.as_posix() for path in Path("out").rglob("*") if path.is_file() and "images" in path.parts]
    assert not any("/." in path for path in files)
    if sink == "files":
        by_output = {row["output"]: id for id, row in told().items()}
        for path in files:
            where = path.removeprefix("out/")
            found.append((by_output[where], where, Path(path).read_bytes()))
            assert read_made(Path(path))["id"] == by_output[where]
    for path in files if sink == "parquet" else ():
        for row in pq.read_table(path).to_pylist():
            found.append((row["id"], f"{path.removeprefix('out/')}:{row['name']}", row["image"]))
    for path in files if sink == "webdataset" else ():
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name in [name.removesuffix(".json") for name in members if name.endswith(".json")]:
            facts = json.loads(members[f"{name}.json"])
            found.append((facts["id"], f"{path.removeprefix('out/')}:{name}", members[f"{name}.png"]))
    assert len({id for id, _, _ in found}) == len(found)
    assert {(id, where) for id, where, _ in found} == {(id, row["output"]) for id, row in told().items()}
    return {id: Image.open(io.BytesIO(data)) for id, _, data in found}


def check_pictures(sink: str, expected: dict[str, int], every: int = 1) -> None:
    """Each equal to a single decode with its seed; `expected` are indices of latents by id."""
    found = pictures(sink)
    assert set(found) == set(expected)
    torch.set_num_threads(1)
    pipeline = PixelDecoderPipeline.from_pretrained("nano", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for id in list(expected)[::every]:
        seed = told()[id]["seed"]
        assert seed == row_seed(0, id)
        image = pipeline(latents(expected[id]), num_inference_steps=1, generator=torch.Generator().manual_seed(seed))
        assert np.array_equal(np.asarray(found[id]), np.asarray(image.images[0])), id
        assert found[id].size == (told()[id]["width"], told()[id]["height"])


def workers(driver: int) -> list[int]:
    """Processes of actors."""
    children = psutil.Process(driver).children(recursive=True)
    return [child.pid for child in children if child.is_running() and "MapWorker" in " ".join(child.cmdline()[:1])]


def parts() -> int:
    return len(list(Path("out/manifest").glob("[!.]*.parquet"))) if Path("out/manifest").is_dir() else 0


def until(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def kill_all(sink: str, size: int) -> subprocess.CompletedProcess:
    """An actor in mid-run, then the driver, then an actor of the run that goes on."""
    words = command("--sink", sink, "--shard-size", str(size), "--dtype", "float32")
    driver = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: parts() >= 1, driver)
    os.kill(workers(driver.pid)[0], signal.SIGKILL)
    before = parts()
    until(lambda: parts() >= before + 1, driver)
    driver.kill()
    driver.communicate()
    driver = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    before = parts()
    until(lambda: parts() >= before + 1, driver)
    os.kill(workers(driver.pid)[0], signal.SIGKILL)
    out, err = driver.communicate(timeout=900)
    return subprocess.CompletedProcess(words, driver.returncode, out, err)


def test_exactly_one_output_for_each_input_after_crashes():
    """The small version of the next."""
    indices = range(60)
    expected = dict(zip(shards(indices, size=25), indices, strict=True))
    result = kill_all("webdataset", 4)
    assert result.returncode == 0 and "60 done, 0 failed, 0 skipped of 60 rows" in result.stdout, result
    check_pictures("webdataset", expected, every=7)
    assert not Path("out/checkpoint").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("source", "sink"), [(folder, "files"), (shards, "webdataset"), (tables, "parquet")])
def test_500_inputs_after_crashes(source, sink):
    indices = range(500)
    expected = dict(zip(source(indices), indices, strict=True))
    result = kill_all(sink, 16)
    assert result.returncode == 0 and "500 done, 0 failed, 0 skipped of 500 rows" in result.stdout, result
    check_pictures(sink, expected)


def bad(count: int) -> dict[str, str]:
    """Files among those of a folder that cannot be decoded, by id, with the reason."""
    kinds = [
        ("npy", b"\x93NUMPY", "not a readable array of numbers"),
        ("safetensors", b"{", "not a readable file of tensors, or truncated"),
        ("png", png()[:60], "not a readable image"),
        ("jpg", b"<svg/>", "not a picture of a known format"),
        ("png", png((8, 8)), "expected an image of at least 16 x 16 pixels, got 8 x 8"),
        ("npy", _array(np.zeros((4, 2, 2), np.float32)), r"expected latents of shape (B, 16, h, w), got (1, 4, 2, 2)"),
        ("npy", _array(np.zeros((2, 16, 2, 2), np.float32)), "holds 2 latents: expected those of one image"),
        ("npy", _array(np.full((16, 2, 2), np.nan, np.float32)), "expected finite latents"),
        ("npy", _array(np.zeros(7, np.float32)), "expected latents (C, h, w) or (B, C, h, w), got (7,)"),
        ("pt", b"cos\nsystem\n(S'true'\ntR.", "refused"),
    ]
    for index, (suffix, data, _) in enumerate(kinds[:count]):
        Path("in", f"bad{index}.{suffix}").write_bytes(data)
    return {f"bad{index}": reason for index, (_, _, reason) in enumerate(kinds[:count])}


def _array(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def bad_rows_among(good: int) -> tuple[dict[str, int], dict[str, str]]:
    return dict(zip(folder(range(good)), range(good), strict=True)), bad(10)


def settings(sink: str, format: str = "png", url: str = "out") -> Settings:
    return Settings(
        decoder="nano", load=lambda: PixelDecoderPipeline.from_pretrained("nano", dtype=torch.float32), limits=Limits,
        device="cpu", output=Output(url, sink, format, "12345678"), seed=0, steps=1, sigma=None, latent_space=None,
        prompt="", metadata=True,
    )  # fmt: skip


def decode_here(sink: str, format: str = "png") -> None:
    """Without Ray: one actor, one write."""
    torch.set_num_threads(1)
    chosen = settings(sink, format)
    lock = chosen.output.begin({})
    results = list(Decoder(chosen)(find_rows("in")))
    Sink(chosen.output, 64).write(results, SimpleNamespace(kwargs={"write_uuid": "run"}, task_idx=0))
    output_module._JOINED.pop(chosen.output.run).close()
    lock.close()


@pytest.mark.parametrize("sink", ["files", "webdataset", "parquet"])
def test_a_bad_row_stops_no_other(sink):
    expected, reasons = bad_rows_among(6)
    decode_here(sink)
    failed = told("failed")
    assert set(failed) == set(reasons) and set(told()) == set(expected)
    for id, reason in reasons.items():
        assert reason in failed[id]["reason"] and failed[id]["output"] is None
    for row in (failed | told()).values():
        assert row["device"] == "cpu" and row["node"] and row["seconds"] > 0 and Path(row["url"]).is_file()
    check_pictures(sink, expected, every=2)


@pytest.mark.parametrize("sink", ["files", "webdataset", "parquet"])
def test_a_store_without_folders_and_locks(sink):
    """Of fsspec's, as s3 is: whole objects alone."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    expected = dict(zip(folder(range(3)), range(3), strict=True))
    for path in Path("in").rglob("*.safetensors"):
        store.pipe_file(f"/bucket/{path}", path.read_bytes())
    torch.set_num_threads(1)
    chosen = settings(sink, url="memory://bucket/out")
    assert chosen.output.begin({"steps": 1}) is None
    results = list(Decoder(chosen)(find_rows("memory://bucket/in", "memory://bucket/out")))
    Sink(chosen.output, 64).write(results, SimpleNamespace(kwargs={"write_uuid": "run"}, task_idx=0))
    store.get("/bucket/out", "out", recursive=True)
    check_pictures(sink, expected)
    assert told()["0001"]["url"] == "memory:///bucket/in/0001.safetensors"
    with pytest.raises(ValueError, match="was made with steps 1, not 2"):
        Output("memory://bucket/out", sink, "png", "87654321").check({"steps": 2})
    (part,) = chosen.output.parts()  # as if the run had been killed before it was done
    pending = part.replace("manifest", "checkpoint").replace(".parquet", ".pending.parquet")
    store.pipe_file(pending, b"")
    Output("memory://bucket/out", sink, "png", "12345678").begin({"steps": 1})
    assert not chosen.output.parts() and not store.exists(pending)
    assert not [path for path in store.find("/bucket/out/images") if not path.endswith(".png")]
    with pytest.raises(RuntimeError, match="another run has taken over"):
        chosen.output.join()


def test_pictures_are_encoded_and_what_holds_neither_is_skipped():
    photo = Image.effect_noise((24, 20), 80).convert("RGB")
    file = io.BytesIO()
    photo.save(file, "PNG")
    shard("in/a.tar", {"0.png": file.getvalue(), "0.json": b'{"sigma": 0.2}', "1.txt": b"words"})
    decode_here("parquet", "webp")
    assert told("skipped")["a/1"]["reason"] == "neither a picture nor latents among .txt"
    (image,) = pictures("parquet").values()
    pipeline = PixelDecoderPipeline.from_pretrained("nano", dtype=torch.float32)
    seed = row_seed(0, "a/0")
    generator, noise = (torch.Generator().manual_seed(number) for number in (seed, seed + 1))
    expected = pipeline.upscale(photo, 0.2, noise, num_inference_steps=1, generator=generator).images[0]
    assert image.format == "WEBP" and image.size == expected.size == (96, 80)
    assert np.abs(np.asarray(image, np.float32) - np.asarray(expected, np.float32)).mean() < 3  # WebP's own loss


@pytest.mark.slow
def test_10_bad_rows_among_500_are_tried_again_when_asked():
    expected, reasons = bad_rows_among(490)
    words = ("--dtype", "float32", "--shard-size", "16")
    result = run(*words)
    assert result.returncode == 2 and "out: 490 done, 10 failed, 0 skipped of 500 rows" in result.stdout, result
    lines = result.stderr.splitlines()
    assert lines[-1] == "pixeldecoder: 10 of 500 rows failed: see above; --retry-failed tries them again"
    failed = told("failed")
    assert set(failed) == set(reasons) and all(f"{id}: {failed[id]['reason']}" in lines for id in reasons)
    check_pictures("files", expected, every=10)
    before = {path: path.stat().st_mtime_ns for path in Path("out/images").rglob("*.png")}
    again = run(*words)  # nothing to do, and so without Ray
    assert again.returncode == 2 and "500 of them in earlier runs; 0 in " in again.stdout
    Path("in/bad1.safetensors").unlink()  # one is repaired, one is gone
    save_file({"latents": latents(77)}, "in/bad1.safetensors")
    Path("in/bad0.npy").unlink()
    again = run(*words, "--retry-failed")
    assert again.returncode == 2 and "491 done, 8 failed, 0 skipped of 499 rows, 490 of them in earl" in again.stdout
    assert set(told("failed")) == {f"bad{index}" for index in range(2, 10)}
    check_pictures("files", expected | {"bad1": 77}, every=10)
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())


def refused(*words: str) -> str:
    """The one line of a command that made nothing."""
    result = run(*words)
    assert result.returncode == 2 and not result.stdout, result
    return result.stderr.splitlines()[-1]


def test_what_is_refused_before_anything_is_made():
    folder(range(2))
    line = refused("--ray-address", "127.0.0.1:9")
    assert re.fullmatch(r"pixeldecoder: --ray-address 127\.0\.0\.1:9: no cluster answers there \(.*refused.*\)", line)
    assert refused("--ray-address", "here") == ('pixeldecoder: --ray-address here: expected HOST:PORT or "auto"')
    assert refused("--shard-size", "0") == "pixeldecoder: --shard-size 0: expected at least 1"
    assert not Path("out/images").exists() and not Path("out/manifest").exists()
    manifest_part(Output("out", "files", "png", "12345678"), "a", {"0001": ("done", 1.0)})
    assert refused("--seed", "1") == (
        "pixeldecoder: out was made with seed 0, not 1: give another folder, or the same settings"
    )


@pytest.mark.slow
def test_actors_that_cannot_load_say_why():
    folder(range(2))
    line = refused("--latent-space", "rgb")
    assert line.startswith('pixeldecoder: no latent space "rgb": expected one of flux, ')
    line = refused("--steps", "5")
    assert line.startswith("pixeldecoder: --steps 5: a distilled decoder takes 1 to 4 steps, got 5")
    assert run().returncode == 0  # nothing was made with 5


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_what_is_written_counts():
    """On a file system of its own, of 60 kB."""
    expected = dict(zip(folder(range(40)), range(40), strict=True))
    Path("out").mkdir()
    mount = "mount -t tmpfs -o size={} none out && "
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*mounted, mount.format("60k") + "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    words = " ".join(command("--shard-size", "4", "--dtype", "float32"))
    script = (
        mount.format("60k") + f"{words}; echo code $?; find out -name '.*' -type f; mount -o remount,size=9m out; "
        f"find out -name '*.png' | wc -l; {words}; cp -r out full"
    )
    result = subprocess.run([*mounted, script], env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    first, *_ = [line for line in result.stderr.splitlines() if line.startswith("pixeldecoder: ")]
    assert "No space left on device" in first
    assert first.endswith("stopped; what is written counts, and the same command goes on from there")
    code, made, summary = result.stdout.splitlines()
    assert code == "code 2" and 0 < int(made) < 40, result
    assert "40 done, 0 failed, 0 skipped of 40 rows" in summary
    shutil.rmtree("out")
    Path("full").rename("out")
    check_pictures("files", expected, every=10)


def test_a_dry_run_tells_what_it_would_take_and_makes_nothing():
    shards(range(40))
    result = run("--dry-run", "--price", "2", "--actors", "4", "--limit", "30")
    assert result.returncode == 0, result
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"judged by 8 rows; the largest of them: \d+ x \d+ px, whole, .* GB of memory", lines[0])
    for line, count in zip(lines[1:], (1, 4, 8), strict=True):
        assert re.fullmatch(rf"{count} x cpu: about [\d.]+ (s|min|h), 0\.\d\d at 2 an hour for each", line)
    assert "in: 30 rows" in result.stderr and not Path("out").exists()


@pytest.mark.slow
def test_memory_is_flat_over_5000_rows():
    """Of the driver and of its actors, once a fifth is done."""
    pq.write_table(pa.table({"latents": [npy(index) for index in range(5000)]}), "in.parquet", row_group_size=100)
    words = [word if word != "in" else "in.parquet" for word in command("--sink", "parquet")]
    driver = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    held: dict[int, list[int]] = {}
    until(lambda: parts() >= 5000 // 64 // 5, driver)
    while driver.poll() is None and parts() < 5000 // 64:
        for pid in driver.pid, *workers(driver.pid):
            held.setdefault(pid, []).append(psutil.Process(pid).memory_info().rss)
        time.sleep(0.5)
    assert driver.wait(300) == 0
    assert len(held) == 3
    for pid, values in held.items():
        fifth = len(values) // 5
        early, late = (float(np.median(part)) for part in (values[:fifth], values[-fifth:]))
        assert late < 1.1 * early, (pid == driver.pid, early, late)
