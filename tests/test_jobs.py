"""Inputs with what they become: nothing is lost, and a bad file stops no other."""

import os
from pathlib import Path

import pytest

from pixeldecoder.cli import jobs as jobs_module
from pixeldecoder.cli.jobs import Jobs
from pixeldecoder.files import IMAGE_SUFFIXES


@pytest.fixture(autouse=True)
def _there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def touch(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)


def read(path):
    """As many pictures as the name says, and none in what is called bad."""
    if "bad" in path.name:
        raise ValueError(f"{path}: not a readable image")
    return 2 if path.stem == "two" else 1


def jobs(source, output, overwrite=False, suffixes=IMAGE_SUFFIXES, inputs=()):
    return Jobs(
        Path(source), Path(output), suffixes, IMAGE_SUFFIXES, "png", overwrite, read, lambda count: count, inputs
    )


def pairs(*args, **kwargs):
    return [(str(job.source), *map(str, job.targets)) for job in jobs(*args, **kwargs).jobs]


def test_where_outputs_go():
    touch("photo.jpg", "two.jpg", "in/b.PNG", "in/a.jpg", "v1.5/old.png")
    assert pairs("photo.jpg", "large.webp") == [("photo.jpg", "large.webp")]
    assert pairs("photo.jpg", "new") == pairs("photo.jpg", "new/") == [("photo.jpg", "new/photo.png")]
    assert pairs("photo.jpg", "v1.5") == [("photo.jpg", "v1.5/photo.png")]  # it is there, whatever it is called
    assert pairs("two.jpg", "new") == [("two.jpg", "new/two_000.png", "new/two_001.png")]
    assert pairs("in", "out") == [("in/a.jpg", "out/a.png"), ("in/b.PNG", "out/b.png")]


def test_subfolders_are_mirrored(capsys):
    touch("in/a.jpg", "in/deep/er/a.jpg", "in/album.png/b.jpg", "in/out/old.png", "elsewhere/c.jpg")
    touch("in/._a.jpg", "in/.hidden/a.jpg", "in/notes.txt", "in/deep/more.TXT", "in/scan.bmp", "in/README")
    os.symlink("../../elsewhere", "in/deep/link")
    os.symlink("../..", "in/deep/round")
    assert pairs("in", "in/out") == [
        ("in/a.jpg", "in/out/a.png"),
        ("in/album.png/b.jpg", "in/out/album.png/b.png"),
        ("in/deep/er/a.jpg", "in/out/deep/er/a.png"),
        ("in/deep/link/c.jpg", "in/out/deep/link/c.png"),
    ]
    assert "in: left out 4 files of other kinds: 2 .txt, 1 without suffix, 1 .bmp\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("none.jpg", "a.png", "none.jpg: no such file or folder"),
        ("notes.txt", "a.png", "notes.txt: expected one of .png, .webp, .jpg, .jpeg, got '.txt'"),
        ("photo.jpg", "a.gif", "a.gif: expected an image ending in .png, .webp, .jpg, .jpeg, or a folder"),
        ("two.jpg", "a.png", "two.jpg: 2 images cannot go into a.png: give a folder as output"),
        ("bad.jpg", "a.png", "bad.jpg: not a readable image"),
        ("twice", "out", "twice: several files would become a.png: rename one"),
        ("empty", "out", "empty: expected files ending in .png, .webp, .jpg, .jpeg, found none"),
        ("one", "out.png", "out.png: a folder of inputs needs a folder as output, whose name has no suffix"),
        ("one", "notes", "notes is a file: a folder of inputs needs a folder as output, whose name has no suffix"),
        ("photo.jpg", "photo.jpg", "photo.jpg would overwrite its input: give another output"),
        ("one", "one", "one/a.png would overwrite its input: give another output"),
        ("jpegs", "jpegs", "jpegs: outputs among the inputs would be inputs next time: give another folder"),
        ("photo.jpg", "link.png", "link.png would overwrite its input: give another output"),
        ("photo.jpg", "one/a.png", "one/a.png exists: give another output, or --overwrite to replace it"),
        ("photo.jpg", "there", "there/photo.png exists: give another output, or --overwrite to replace it"),
        ("photo.jpg", "notes.txt/a.png", "notes.txt/a.png: {here}/notes.txt is not a folder"),
        ("photo.jpg", "notes/deep/a.png", "notes/deep/a.png: {here}/notes is not a folder"),
    ],
)
def test_bad_paths(source, output, message):
    touch("photo.jpg", "notes.txt", "notes", "twice/a.jpg", "twice/a.png", "one/a.png", "jpegs/a.jpg", "two.jpg")
    touch("bad.jpg", "there/photo.png")
    os.mkdir("empty")
    os.link("photo.jpg", "link.png")
    before = {path: path.is_file() and path.read_text() for path in Path().rglob("*")}
    with pytest.raises(ValueError, match=f"^{message.format(here=os.getcwd())}$".replace(".", r"\.")):
        jobs(source, output)
    assert {path: path.is_file() and path.read_text() for path in Path().rglob("*")} == before


@pytest.mark.parametrize("letter", ["x", "ä"])
def test_names_as_long_as_they_can_be(letter):
    touch("photo.jpg")
    length = 251 // len(letter.encode())
    assert pairs("photo.jpg", letter * length + ".png")
    with pytest.raises(ValueError, match=f"^{letter}+.png: a name of 25[67] bytes, expected at most 255$"):
        jobs("photo.jpg", letter * (length + 1) + ".png")
    touch(f"in/{'x' * 251}.jpg", "in/a.jpg")
    rest = Jobs(Path("in"), Path("out"), IMAGE_SUFFIXES, IMAGE_SUFFIXES, "webp", False, read)
    assert len(rest.jobs) == 1 and "expected at most 255" in next(iter(rest.failures.values()))


def test_inputs_are_not_overwritten_even_if_asked():
    touch("photo.jpg", "lora.png", "in/a.png", "in/b.jpg")
    for source, output in ("photo.jpg", "photo.jpg"), ("photo.jpg", "lora.png"), ("in", "in"), ("in/b.jpg", "in/a.png"):
        if (source, output) == ("in/b.jpg", "in/a.png"):
            assert pairs(source, output, overwrite=True) == [(source, output)]  # no input of this run
            continue
        with pytest.raises(ValueError, match=" would overwrite its input: give another output"):
            jobs(source, output, overwrite=True, inputs=[Path("lora.png"), Path("none")])


def test_what_is_there_is_not_made_again(capsys):
    touch("in/a.jpg", "in/b.jpg", "in/two.jpg", "out/a.png", "out/two_001.png")
    rest = [("in/b.jpg", "out/b.png"), ("in/two.jpg", "out/two_000.png", "out/two_001.png")]
    assert pairs("in", "out") == rest
    assert "skipped 1 file whose outputs are there (--overwrite makes them again)\n" in capsys.readouterr().err
    assert pairs("in", "out", overwrite=True) == [("in/a.jpg", "out/a.png"), *rest]
    assert "skipped" not in capsys.readouterr().err


def test_batches_that_meet_other_names():
    touch("in/two.jpg", "in/two_000.webp", "in/deep/two.jpg")
    assert pairs("in", "out") == [
        ("in/deep/two.jpg", "out/deep/two_000.png", "out/deep/two_001.png"),
        ("in/two.jpg", "out/two.jpg_000.png", "out/two.jpg_001.png"),
        ("in/two_000.webp", "out/two_000.png"),
    ]


def made(folder="out", files=("in/a.jpg", "in/b.jpg", "in/c.jpg")):
    touch(*files)
    return jobs("in", folder)


def test_a_bad_file_stops_no_other(capsys):
    touch("in/bad.jpg", "out/c.png")  # one by its head, one on its way, one for its output
    os.mkdir("out/d.png")
    done = []

    def make(job):
        if job.source.name == "a.jpg":
            raise ValueError("in/a.jpg: of another world")
        done.append(job.source.name)

    with pytest.raises(ValueError, match=r"^3 of 5 files could not be used: see above$"):
        made(files=("in/a.jpg", "in/b.jpg", "in/c.jpg", "in/d.jpg")).run(make)
    assert done == ["b.jpg"]
    assert [line for line in capsys.readouterr().err.splitlines() if line and "files:" not in line] == [
        "skipped 1 file whose outputs are there (--overwrite makes them again)",
        "in/bad.jpg: not a readable image", "in/d.jpg: out/d.png is a folder", "in/a.jpg: of another world",
    ]  # fmt: skip


def test_checks_on_the_way():
    """What a size turns out to be, once the decoder tells."""
    found = made()

    def usable(job):
        if job.source.name == "b.jpg":
            raise ValueError("too large")

    found.check(usable)
    assert [job.source.name for job in found.jobs] == ["a.jpg", "c.jpg"]
    assert found.failures == {Path("in/b.jpg"): "too large"}
    with pytest.raises(ValueError, match=r"^1 of 3 files could not be used"):
        found.finish()


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), ZeroDivisionError(), KeyboardInterrupt(), ModuleNotFoundError("peft")],
)
def test_what_ends_a_folder(error):
    """What the next file would meet, faults of ours, and people."""
    done = []

    def make(job):
        done.append(job)
        raise error

    with pytest.raises(type(error)):
        made().run(make)
    assert len(done) == 1


def test_a_single_files_error_is_raised_as_it_is():
    touch("a.jpg")
    with pytest.raises(ValueError, match=r"^why$"):
        jobs("a.jpg", "a.png").check(lambda job: (_ for _ in ()).throw(ValueError("why")))


def test_a_bar_is_for_several(monkeypatch):
    shown = []
    bar = jobs_module.tqdm
    monkeypatch.setattr(jobs_module, "tqdm", lambda **given: shown.append(not given["disable"]) or bar(**given))
    for files in ("in/a.jpg",), ("in/a.jpg", "in/b.jpg"):
        made(files=files).run(lambda job: None)
    assert shown == [False, True]
