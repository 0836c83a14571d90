"""Disks that are full or read-only, folders that vanish, users without a home, streams that are closed."""

import os
import shutil

import pytest
from PIL import Image

SLOW = pytest.mark.slow
FAST = ["--device", "cpu", "--dtype", "float32", "--steps", "1"]


def decode(things, output="out"):
    return ["decode", things / "latents", output, "--decoder", things / "decoder", *FAST]


def encode(things, output="out"):
    return ["encode", things / "photos", output, "--device", "cpu"]


def convert(things, output="out.safetensors"):
    return ["convert", things / "with-text", output]


def export(things, output="out"):
    return ["export", things / "decoder", output, "--format", "pt2"]


def one_line(result, *told: str) -> None:
    """Exit code 2, and in the last line what is told; no traceback."""
    code, _, error = result
    last = [line for line in error.splitlines() if not line.startswith("listed")][-1]
    assert code == 2 and last.startswith("pixeldecoder: ") and "Traceback" not in error, result
    assert any(part in last for part in told), last


def mounted(result):
    if result[0] == 98:
        pytest.skip("no file system can be mounted here")
    return result


@pytest.mark.parametrize("command", [encode, *(pytest.param(slow, marks=SLOW) for slow in (decode, convert, export))])
def test_full_disk(zygote, things, here, command):
    """Of 8 kB; nothing half written stays on it, and with room enough the same command makes all."""
    (here / "disk").mkdir()
    target = "disk/out" if command is not convert else "disk/out.safetensors"
    words = command(things, target)
    result = mounted(zygote.run(here, *words, small_disk="8k:disk", listed="disk"))
    one_line(result, "No space left on device")
    names = [name for name in result[2].splitlines()[-1].split()[1:] if "/." in name]
    assert not names
    assert zygote.run(here, *words)[0] == 0


@pytest.mark.parametrize("command", [convert, *(pytest.param(slow, marks=SLOW) for slow in (decode, encode, export))])
def test_files_that_may_not_grow(zygote, things, here, command):
    words = command(things)
    one_line(zygote.run(here, *words, file_size="3000"), "too large")
    assert not [path for path in here.rglob("*") if path.is_file()]
    assert zygote.run(here, *words)[0] == 0


@pytest.mark.parametrize("command", [decode, pytest.param(encode, marks=SLOW), pytest.param(convert, marks=SLOW)])
def test_read_only(zygote, things, here, command):
    (here / "disk").mkdir()
    target = "disk/out" if command is not convert else "disk/out.safetensors"
    one_line(mounted(zygote.run(here, *command(things, target), read_only="disk")), "may not be written to")
    assert not any((here / "disk").iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another")
def test_a_folder_of_another_user(zygote, things, here):
    (here / "closed").mkdir(mode=0o755)
    for command in decode, encode:
        one_line(zygote.run(here, *command(things, "closed/out"), user="65534"), "may not be written to")
    unreadable = here / "z.safetensors"
    shutil.copy(things / "latents/0.safetensors", unreadable)
    unreadable.chmod(0)
    words = ["decode", unreadable, "a.png", "--decoder", things / "decoder", *FAST]
    one_line(zygote.run(here, *words, user="65534"), "ermission denied")
    assert not any((here / "closed").iterdir()) and not (here / "a.png").exists()


def test_no_home(zygote, things, here):
    """Of a user whom nobody knows; the cache cannot be written either."""
    user = {"user": "54321"} if os.geteuid() == 0 else {}
    for command in decode, encode:
        result = zygote.run(
            here, *command(things, command.__name__), without=("HOME", "USER", "LOGNAME", "PIXELDECODER_CACHE"),
            env={"XDG_CACHE_HOME": "/proc/none"}, **user,
        )  # fmt: skip
        assert result[0] == 0, result
    assert len(os.listdir(here / "decode")) == 3


@SLOW
def test_folders_that_vanish(zygote, things, here):
    """The output's is made again, and inputs that are gone are told; both while the command runs."""
    shutil.copytree(things / "latents", here / "in")
    for index in range(3, 40):
        shutil.copy(things / "latents/0.safetensors", here / "in" / f"{index}.safetensors")
    words = ["decode", "in", "out", "--decoder", things / "decoder", *FAST]
    run = zygote.start(here, *words)
    while not (here / "out/0.png").exists():
        pass
    shutil.rmtree(here / "out", ignore_errors=True)
    shutil.rmtree(here / "in")
    result = run.end()
    one_line(result, "files could not be used: see above")
    assert "no such file" in result[2]
    for path in here.rglob("*.png"):
        Image.open(path).load()


@SLOW
def test_a_clock_that_jumps(zygote, things, here):
    assert zygote.run(here, *decode(things, "usual"))[0] == 0
    assert zygote.run(here, *decode(things, "wild"), wild_clock="")[0] == 0
    for index in range(3):
        assert Image.open(here / f"usual/{index}.png") == Image.open(here / f"wild/{index}.png")


def test_streams(zygote, things, here):
    """Closed, full, of a terminal that knows no accents, and without any terminal, as all of these runs are."""
    assert zygote.run(here, *decode(things, "a"), closed_stdout="")[0] == 0
    assert zygote.run(here, *decode(things, "é"), ascii_stdout="")[1].splitlines()[0] == "\\xe9/0.png"
    assert len(os.listdir(here / "a")) == len(os.listdir(here / "é")) == 3
    for words in ["--version"], ["plan", "512", "512", "--device", "cpu"]:
        one_line(zygote.run(here, *words, full_stdout=""), "No space left on device")
    assert zygote.run(here, "--help", without=("TERM", "COLUMNS"))[0] == 0


@pytest.mark.parametrize("fault", [{"file_size": "3000"}, pytest.param({"user": "54321"}, marks=SLOW)])
def test_prompts_that_cannot_be_kept(zygote, here, things, fault):
    """Are told, and the picture is made; a kept one that is damaged is made anew."""
    from conftest import TINY, tiny_pipeline
    from families import save_gemma

    if os.geteuid() != 0 and "user" in fault:
        pytest.skip("only root may become another")
    tiny_pipeline(**TINY).save_pretrained(here / "decoder")
    save_gemma(here / "gemma")
    for path in here.rglob("*"):
        path.chmod(0o777 if path.is_dir() else 0o666)
    words = [
        "decode", things / "latents/0.safetensors", "--decoder", "decoder", "--text-encoder", "gemma", "--prompt", "a",
        *FAST,
    ]  # fmt: skip
    cache = {"PIXELDECODER_CACHE": str(here / "cache")}
    (here / "cache").mkdir(mode=0o755)
    code, _, error = zygote.run(here, *words, "a.png", env=cache, **({} if "file_size" in fault else fault))
    if "user" in fault:
        assert code == 0 and "the encoded prompt is not kept" in error, error
        return
    kept = next(here.rglob("cache/prompts/*.safetensors"))
    kept.write_bytes(kept.read_bytes()[:50])
    code, _, error = zygote.run(here, *words, "b.png", env=cache)
    assert code == 0 and "encoded anew" in error, error
    assert Image.open(here / "a.png") == Image.open(here / "b.png") and len(kept.read_bytes()) > 50
