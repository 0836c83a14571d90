"""The command around its commands: what it says and returns when something is wrong, its help, its start."""

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pixeldecoder import __version__, cli, execution
from pixeldecoder.cli import main
from pixeldecoder.cli.main import COMMANDS, be_quiet
from pixeldecoder.cli.parsing import parse
from pixeldecoder.errors import EXTRAS, blaming, explain
from pixeldecoder.plan import duration


@pytest.fixture(autouse=True)
def _there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def one_line(capsys) -> str:
    """What was said, which is one line on stderr."""
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("pixeldecoder: ") and error.count("\n") == 1, error
    return error.removeprefix("pixeldecoder: ").rstrip()


def raising(error):
    def run(self):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("this and\n  that"), "this and that"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (SafetensorError("Error while serializing: I/O error"), "Error while serializing: I/O error"),
        (MemoryError(), "out of memory: try --max-memory (such as 6GB) or a smaller --tile (MemoryError)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory: try --max-memory"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "out of memory: try --max-memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "out of memory: try --max-memory"),
        (RuntimeError("could not create a primitive"), "out of memory: try --max-memory"),
        (OSError(12, "Cannot allocate memory"), "out of memory: try --max-memory"),
        (ModuleNotFoundError("No module named 'jinja2'", name="jinja2"), "pip install 'pixeldecoder[evaluate]'"),
        (ModuleNotFoundError("No module named 'yaml.x'", name="yaml.x"), "pip install 'pixeldecoder[train]'"),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), "pip install 'pixeldecoder[lora]'"),
        (ModuleNotFoundError("No module named 'foo'", name="foo"), "No module named 'foo'"),
        (ImportError("AutoencoderX requires the sentencepiece library"), "requires the sentencepiece library"),
        (torch._inductor.exc.InvalidCxxCompiler(), "--compile does not work here: No working C++ compiler found"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, line, monkeypatch, capsys):
    monkeypatch.setattr(cli.demo.Demo, "run", raising(error))
    assert main(["demo"]) == 2
    assert line in one_line(capsys)


def test_the_allocators_own_error(monkeypatch, capsys):
    monkeypatch.setattr(cli.demo.Demo, "run", lambda self: torch.empty(2**60, dtype=torch.int8))
    assert main(["demo"]) == 2
    assert one_line(capsys).startswith("out of memory: try --max-memory")


def test_training_has_other_remedies(monkeypatch, capsys):
    for error, line in (
        (MemoryError(), "out of memory: try a smaller --micro-batch-size (MemoryError)"),
        (
            ModuleNotFoundError("No module named 'peft'", name="peft"),
            "No module named 'peft': pip install 'pixeldecoder[train]'",
        ),
    ):
        monkeypatch.setattr(
            sys.modules["pixeldecoder.cli.main"], "run_training", lambda *_, error=error: raising(error)(None)
        )
        for args in ["train", "teacher"], ["distill"]:
            assert main(args) == 2
            assert one_line(capsys) == line


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    for error in ZeroDivisionError(), RuntimeError("a tensor of another size"), KeyError("name"):
        monkeypatch.setattr(cli.demo.Demo, "run", raising(error))
        with pytest.raises(type(error)):
            main(["demo"])


def test_ctrl_c(monkeypatch, capsys):
    monkeypatch.setattr(cli.demo.Demo, "run", raising(KeyboardInterrupt()))
    assert main(["demo"]) == 130
    assert one_line(capsys) == "interrupted"


@pytest.mark.parametrize("args", [["--help"], ["plan", "--help"], ["--version"]])
def test_a_closed_pipe_is_silent(args):
    child = subprocess.Popen(
        [sys.executable, "-m", "pixeldecoder", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait() == 128 + 13
    child.stderr.close()


def test_every_module_of_an_extra_names_it():
    """A package's modules are called like itself, but for these."""
    called = {"open_clip_torch": "open_clip", "pyyaml": "yaml"}
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for extra, modules in EXTRAS.items():
        names = [
            re.split(r"[>\[]", package)[0].replace("-", "_") for package in project["optional-dependencies"][extra]
        ]
        modules_of = {called.get(name, name) for name in names} - {"pixeldecoder", "torch"}
        assert sorted(modules) == sorted(modules_of)
    assert set(project["optional-dependencies"]) == {*EXTRAS, "test"}


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("", "no command; expected one of demo, decode,"),
        ("decod a b", 'no command "decod", did you mean "decode"? Expected one of demo, decode,'),
        ("--seed 1 decode", 'no command "--seed"'),
        ("decode", "Missing from pixeldecoder decode: SOURCE OUTPUT (see pixeldecoder decode --help)"),
        ("plan 100", "Missing from pixeldecoder plan: HEIGHT (see pixeldecoder plan --help)"),
        ("train", "Missing from pixeldecoder train: {prior,teacher} (see pixeldecoder train --help)"),
        ("decode a b c", "Unrecognized options: c (see pixeldecoder decode --help)"),
        ("decode a b --sgima 3", "Unrecognized options: --sgima, 3; Perhaps you meant: --sigma FLOAT (see"),
        (
            "train teacher --data.sorce x",
            "Unrecognized options: --data.sorce, x; Perhaps you meant: --data.source STR (see",
        ),
        ("decode a b --steps x", "Error parsing --steps: no type matching INT could be instantiated from ['x']. (see"),
        ("decode a b --sigma", "Missing value for argument '--sigma'. Expected 1 values. (see"),
        ("decode a b --dtype int", "invalid choice 'int' for argument '--dtype'. Expected one of ('auto', 'float32',"),
        ("train teacher --recipe none", "--recipe none: expected paper or nano"),
        ("train teacher --recipe", "argument --recipe: expected one argument (see pixeldecoder train teacher --help)"),
        ("distill --config none.yaml", "none.yaml"),
    ],
)
def test_a_command_line_that_is_wrong(args, line, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")  # the box that tyro draws is narrower than its lines
    monkeypatch.setattr("tyro._fmtlib._FORCE_UTF8_BOXES", True)
    assert main(args.split()) == 2
    assert line in one_line(capsys)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_whatever_the_frame_is_drawn_with(encoding):
    child = subprocess.run(
        [sys.executable, "-m", "pixeldecoder", "decode", "a", "b", "--sgima", "1"],
        capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert child.returncode == 2 and child.stdout == ""
    assert child.stderr == (
        "pixeldecoder: Unrecognized options: --sgima, 1; Perhaps you meant: --sigma FLOAT "
        "(see pixeldecoder decode --help)\n"
    )


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("decode z.pt a.png --seed 99999999999999999999999", "--seed 99999999999999999999999: expected a whole number"),
        (f"decode z.pt a.png --seed {2**63}", f"--seed {2**63}: expected a whole number"),
        ("decode z.pt a.png --seed -1", "--seed -1: expected a whole number from 0 to 2^63 - 1"),
        ("decode z.pt a.png --steps 0", "--steps 0: expected at least 1"),
        ("decode z.pt a.png --sigma nan", "--sigma nan: expected a noise level in [0, 1]"),
        ("decode z.pt a.png --tile -5", '--tile -5: expected "auto", "none" or a side in pixels'),
        ("decode z.pt a.png --chunk 0", "--chunk 0: expected a chunk size of at least 1 patch"),
        ("decode z.pt a.png --sigma 1.01", "--sigma 1.01: expected a noise level in [0, 1]"),
        ("decode z.pt a.png --sigma -0.01", "--sigma -0.01: expected a noise level in [0, 1]"),
        ("decode z.pt a.png --tile-overlap -1", "--tile-overlap -1: expected 0 pixels or more"),
        ("decode z.pt a.png --max-memory 0GB", '--max-memory 0GB: expected bytes, or a size such as "6GB"'),
        ("decode z.pt a.png --max-memory 6XB", '--max-memory 6XB: expected bytes, or a size such as "6GB"'),
        ("decode z.pt a.png --decoder nanoo", 'no decoder "nanoo": no such folder or file: expected "nano", a folder'),
        ("decode z.pt a.png --lora none", "--lora none: expected a file, a folder or a Hub id (owner/name)"),
        ("decode z.pt a.png --save-prompt-embeds p.pt", "p.pt: expected a file ending in .safetensors"),
        ("decode none.pt a.png", "none.pt: no such file or folder"),
        ("upscale none.png a.png", "none.png: no such file or folder"),
        ("upscale text.png a.png", "text.png: not a readable image"),
        ("upscale text.png a.png --sigma 2", "--sigma 2.0: expected a noise level in [0, 1]"),
        ("encode none.png a.safetensors", "none.png: no such file or folder"),
        ("encode text.png a.png", "a.png: expected a file ending in .safetensors, or a folder"),
        ("generate cat a.gif --model no/model", "a.gif: expected a file ending in .png, .webp, .jpg, .jpeg"),
        ("generate cat a.png --model nothere", "--model nothere: expected a folder or a Hub id (owner/name)"),
        ("generate cat a.png --model no/model --lora x", "--lora x: expected a folder or a Hub id (owner/name)"),
        ("generate cat a.png --model no/model --height 0", "--height 0: expected at least 1"),
        ("generate cat a.png --model no/model --latent-steps 0", "--latent-steps 0: expected at least 1"),
        ("generate cat a.png --model no/model --width 0", "--width 0: expected at least 1"),
        ("generate cat a.png --model no/model --images 2", "a.png: expected an image for one, for several a folder"),
        (
            "generate cat a.png --model no/model --save-prompt-embeds p.pt",
            "p.pt: expected a file ending in .safetensors",
        ),
        ("generate cat a.png --model no/model --images 0", "--images 0: expected at least 1"),
        ("generate cat a.png --model no/model --save-latents z", "z: expected a file ending in .safetensors"),
        ("generate cat a.png --model no/model --pipeline-args {", "--pipeline-args {: expected a JSON object"),
        ("generate cat a.png --model no/model --pipeline-args []", "--pipeline-args []: expected a JSON object"),
        ("plan 0 100", "0 x 100 px, batch 1: expected at least 1"),
        ("plan 10000000000000 32", "10000000000000 x 32 px: expected at most 16777216 px a side"),
        ("plan 100 100 --batch 0", "100 x 100 px, batch 0: expected at least 1"),
        ("plan 100 100 --seed 1", "Unrecognized options: --seed, 1"),
        ("plan 100 100 --compile", "Unrecognized options: --compile"),
        ("convert none.pth folder", "none.pth: no such file or folder"),
        ("convert text.png a.pth", "a.pth: a reference checkpoint becomes a folder: give a name without suffix"),
        ("convert text.png decoder-v1.5", "text.png: refused: it is no file of plain tensors"),
        ("convert here there", "there: expected a file ending in .pth, .safetensors"),
        ("demo --decoder no/where", "the demo's latents are nano's"),
        ("demo --output text.png", "text.png is not a folder"),
        ("benchmark --steps 0", "--steps 0: expected at least 1"),
        ("evaluate here --scale 0", "--scale 0: expected at least 1"),
        ("evaluate here --seed -1", "--seed -1: expected a whole number"),
        ("convert here a.pt", "a.pt: expected a file ending in .pth, .safetensors"),
        ("convert text.png here", "here exists: give a new folder"),
        ("benchmark --repeats 0", "--repeats 0: expected at least 1"),
        ("benchmark --max-memory x", "--max-memory x: expected bytes"),
        ("benchmark --decoder x", 'no decoder "x"'),
        ("benchmark --output text.png", "text.png/benchmark.json: "),
        ("evaluate here --output text.png", "text.png/report.html: "),
        ("evaluate here --limit 0", "--limit 0: expected at least 1"),
        ("evaluate here --crop 0", "--crop 0: expected at least 1"),
        ("evaluate here --steps 4 0", "--steps 0: expected at least 1"),
        ("compare text.png text.png", "text.png: not a readable image"),
        ("compare text.png text.png --output here", "here: expected a file ending in .html"),
        ("judge here --url u --model m --limit 0", "--limit 0: expected at least 1"),
        ("evaluate here --decoders x", 'no decoder "x"'),
        ("evaluate here --tile x", "--tile x: expected"),
        ("evaluate here --pipeline-args 1", "--pipeline-args 1: expected a JSON object"),
    ],
)
def test_inputs_that_are_wrong(args, line, capsys):
    os.mkdir("here")
    Path("text.png").write_text("no picture")
    torch.save(torch.zeros(16, 2, 3), "z.pt")
    before = sorted(os.listdir())
    assert main(args.split()) == 2
    assert line in one_line(capsys)
    assert sorted(os.listdir()) == before


def test_nothing_heavy_is_imported_to_say_no():
    """Nor to help, nor for what reads files without a tensor in them."""
    Path("text.png").write_text("no picture")
    lines = [
        "--version", "--help", "decode --help", "train teacher --help", "distill --help", "decode none.pt a.png",
        "upscale none.png a.png", "upscale text.png a.png", "encode text.png z.safetensors", "plan 0 0",
        "plan 100 100 --tile x", "decode text.png a.png --decoder x", "train teacher --recipe x",
        "evaluate x --seed -1", "generate cat a.png --model none", "convert none.pth x", "demo --decoder x",
        "benchmark --steps 0",
    ]  # fmt: skip
    code = "import sys; from pixeldecoder.cli import main\nfor line in sys.argv[1:]: main(line.split())\n"
    code += "sys.exit(str({'torch', 'diffusers', 'transformers'} & set(sys.modules) or ''))"
    child = subprocess.run([sys.executable, "-c", code, *lines], capture_output=True, text=True)
    assert child.returncode == 1 and child.stderr.endswith("\n\n")  # '', so none of them
    assert child.stderr.count("pixeldecoder: ") == len(lines) - 5


def test_libraries_are_silent():
    """With every extra installed, on what the package brings: stderr holds our own line alone."""
    save_file({"latents": torch.randn(16, 2, 3)}, "z.safetensors")
    child = subprocess.run(
        [sys.executable, "-m", "pixeldecoder", "decode", "z.safetensors", "a.png", "--steps", "1"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.stdout == "a.png\n" and child.returncode == 0
    assert re.fullmatch(r"96 x 64 px, whole, \d+ patches at a time, [\d.]+ GB of memory\n", child.stderr), child.stderr


def test_our_own_warnings_are_not(capsys, monkeypatch):
    ours = logging.getLogger("pixeldecoder.text")
    monkeypatch.setattr(cli.demo.Demo, "run", lambda self: ours.warning("the prompt was cut"))
    assert main(["demo"]) == 0
    assert capsys.readouterr().err == "the prompt was cut\n"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pixeldecoder {__version__}\n"
    assert main(["--help"]) == 0
    assert "pixeldecoder --version" in capsys.readouterr().out


def help_of(name, capsys) -> str:
    assert main([*name.split(), "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", [*COMMANDS, "train prior", "train teacher"])
def test_help(name, capsys, monkeypatch):
    """Every argument has a text, in flowing lines; what is required comes first; no file that a wheel has not."""
    monkeypatch.setenv("COLUMNS", "1000" if name in set(COMMANDS) - {"distill"} else "110")  # one column
    text = help_of(name, capsys)
    rows = re.findall(r"^[│ ] (\S.*?)(?: {2,}|\s*[│ ]\n[│ ] {5,})(\S.*?) *[│ ]$", text, re.MULTILINE)
    if name in set(COMMANDS) - {"distill"}:  # whose settings are in parts
        assert len(rows) == len(dataclasses.fields(COMMANDS[name])) + 1 - {"plan": 2, "serve": 1}.get(name, 0)
    assert all(re.search(r"[a-z]", told.partition("(")[0]) for _, told in rows), rows
    assert "docs/" not in text and "(default: None)" not in text and "(default: )" not in text
    kinds = [("required" in told, called) for called, told in rows if called.startswith("--")]
    assert kinds == sorted(kinds, key=lambda kind: not kind[0])
    assert "Example: pixeldecoder" in text or name.startswith(("train ", "distill"))


def test_help_of_what_is_easily_mixed_up(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(help_of("generate", capsys).replace("│", "").split())
    assert "PROMPT What to make: for the latent model, and for the decoder if it reads text." in text
    assert "--prompt STR For the decoder alone, in place of PROMPT." in text
    assert "LoRA for the latent model" in text and "usage: pixeldecoder generate" in text
    text = " ".join(help_of("decode", capsys).replace("│", "").split())
    assert "--lora PATH[:STRENGTH] A LoRA of the decoder" in text
    text = help_of("plan", capsys)
    assert "WIDTH HEIGHT" in text and "--seed" not in text and "--compile" not in text


@dataclasses.dataclass(kw_only=True)
class Base:
    late: int = 3
    """A text that
    is broken; "and": so on."""
    nothing: int | None = None
    """By default nothing."""
    something: int | None = 1
    """Or nothing."""


@dataclasses.dataclass(kw_only=True)
class Own(Base):
    """Own."""

    mine: float = 0.5
    """Mine."""
    needed: str
    """Needed."""
    unseen: int = dataclasses.field(default=7, init=False)


def test_options(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse(Own, ["--help"], "own")
    text = capsys.readouterr().out
    assert 'A text that is broken; "and": so on. (default: 3)' in text and "By default nothing.  " in text
    assert text.index("--needed") < text.index("--mine") < text.index("--late") and "unseen" not in text
    assert parse(Own, ["--needed", "x", "--nothing", "4"], "own") == Own(needed="x", nothing=4)
    assert parse(Own, ["--needed", "x", "--something", "None"], "own").something is None
    default = Own(needed="y", mine=2.5, late=9)
    assert parse(Own, ["--late", "1"], "own", default) == Own(needed="y", mine=2.5, late=1)
    with pytest.raises(ValueError, match=r"^Error parsing --nothing.*\(see own --help\)$"):
        parse(Own, ["--needed", "x", "--nothing", "None"], "own")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.234, "0.23 s"), (4.96, "5 s"), (44.9, "45 s"), (89, "89 s"), (90, "1.5 min"), (203, "3.4 min"),
        (1860, "31 min"), (5399, "90 min"), (5400, "1.5 h"), (360_000, "100 h"),
    ],
)  # fmt: skip
def test_durations_that_people_read(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("size", ["6GB", "1.5GB", ".5gb", "512MiB", "900000", "10KB"])
def test_sizes_of_memory(size):
    assert cli.options.check_memory(size) is None


@pytest.mark.parametrize("size", ["", "0", "0.0GB", "GB", "1.5", "-1GB", "6TB"])
def test_what_is_no_size_of_memory(size):
    with pytest.raises(ValueError, match="expected bytes"):
        cli.options.check_memory(size)


@pytest.mark.parametrize(
    ("given", "path", "strength"),
    [
        ("a", "a", 1.0), ("a:0.5", "a", 0.5), ("a:-2", "a", -2.0), ("a:b", "a:b", 1.0), ("C:a:0.5", "C:a", 0.5),
        ("there:0.5", "there:0.5", 1.0), ("there:0.5:0.25", "there:0.5", 0.25), ("0.5", "0.5", 1.0),
    ],
)  # fmt: skip
def test_a_lora_and_its_strength(given, path, strength):
    Path("there:0.5").touch()
    assert cli.options.lora_and_strength(given) == (path, strength)


def test_the_file_of_a_lora():
    """A file itself, a folder's only one, or the one of the usual name among several."""
    for name in "one/x.safetensors", "many/a.safetensors", "many/pytorch_lora_weights.safetensors", "many/note.txt":
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert execution.lora_file("many/a.safetensors") == Path("many/a.safetensors")
    assert execution.lora_file("one") == Path("one/x.safetensors")
    assert execution.lora_file("many") == Path("many/pytorch_lora_weights.safetensors")


def test_a_latent_model_that_takes_no_lora():
    Path("x.safetensors").touch()
    with pytest.raises(ValueError, match=r"--lora x.safetensors: object takes none"):
        cli.generate.load_latent_lora(object(), "x.safetensors")


@pytest.mark.parametrize(
    ("there", "fastest"), [({"cuda", "mps"}, "cuda"), ({"cuda"}, "cuda"), ({"mps"}, "mps"), (set(), "cpu")]
)
def test_devices(there, fastest, monkeypatch):
    """The fastest, or the one that is wanted, if there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    assert execution.torch_device("auto") == fastest and execution.torch_device("cpu") == "cpu"
    for name in "cuda", "mps":
        if name in there:
            assert execution.torch_device(name) == name
        else:
            usable = ", ".join(device for device in ("cuda", "mps", "cpu") if device in {*there, "cpu"})
            with pytest.raises(ValueError, match=f"^--text-device {name}: this machine has none; available: {usable}$"):
                execution.torch_device(name, "--text-device")


def test_types_of_weights(monkeypatch):
    """By default bfloat16 where there are instructions for it; else what is asked for."""
    for vectors, tiles, found in (
        (False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)
    ):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda vectors=vectors: vectors)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
        assert execution.torch_dtype("auto", "cpu") == found
        assert execution.torch_dtype("auto", "cuda") == execution.torch_dtype("auto", "mps") == torch.bfloat16
        for name in "float32", "bfloat16", "float16":
            assert execution.torch_dtype(name, "cpu") == getattr(torch, name)


def test_layouts():
    assert vars(cli.options.ExecutionOptions().limits()) == dict(
        tile_size="auto", tile_overlap=None, chunk_size=None, max_memory=None
    )
    given = cli.options.ExecutionOptions(tile="96", tile_overlap=8, chunk=5, max_memory="1000")
    assert vars(given.limits()) == dict(tile_size=96, tile_overlap=8, chunk_size=5, max_memory=1000)
    given = cli.options.ExecutionOptions(tile="none", max_memory="1.5GB")
    assert vars(given.limits()) == dict(tile_size=None, tile_overlap=None, chunk_size=None, max_memory="1.5GB")


@pytest.mark.parametrize("error", [AttributeError, IndexError, KeyError, RuntimeError, TypeError])
def test_what_is_blamed_on_a_folder(error):
    expected = f"^here could not be read: {error.__name__}: .?why.?$"
    with pytest.raises(ValueError, match=expected), blaming("here could not be read"):
        raise error("why")


@pytest.mark.parametrize("error", [RuntimeError("unable to allocate 3 GiB"), ZeroDivisionError("why"), OSError("why")])
def test_what_is_not(error):
    with pytest.raises(type(error)) as found, blaming("here could not be read"):
        raise error
    assert found.value is error


def test_messages_that_go_on_and_on_are_cut():
    long = "x" * 999
    assert explain(MemoryError(long), "decode").endswith(f"({long[:200]})")
    assert explain(torch._inductor.exc.InductorError(RuntimeError(long), ""), "decode").count("x") < 320
    assert explain(OSError(long), "decode") == long and explain(ValueError(), "decode") == "ValueError"


def test_libraries_are_told_to_be_silent(monkeypatch):
    """Unless one has said otherwise; a progress bar shows what takes longer than two seconds."""
    names = "DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "TQDM_DELAY"
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    be_quiet()
    assert [os.environ[name] for name in names] == ["critical", "info", "2"]
    for name in "accelerate", "bitsandbytes", "torchao", "torch.utils._pytree":
        assert not logging.getLogger(name).isEnabledFor(logging.WARNING)


def test_the_command_leaves_logging_as_it_was(capsys):
    before = list(logging.getLogger("pixeldecoder").handlers)
    for args in ["--version"], ["none"]:
        main(args)
        assert logging.getLogger("pixeldecoder").handlers == before


@pytest.mark.parametrize(
    ("args", "kind", "settings"),
    [
        (["train", "teacher"], "Teacher", {"steps": 30_000, "seed": 3}),
        (["train", "teacher", "--recipe", "nano"], "Teacher", {"batch_size": 32, "encoder": "nano"}),
        (["train", "prior", "--config", "c.yaml"], "Prior", {"steps": 5, "repa_weight": 0.5}),
        (["train", "teacher", "--config", "c.yaml", "--steps", "6", "--recipe", "nano"], "Teacher",
         {"steps": 6, "batch_size": 32}),
        (["distill", "--recipe=nano", "--config=c.yaml"], "Student", {"steps": 5, "ema_decay": 0.95}),
    ],
)  # fmt: skip
def test_settings_of_training(args, kind, settings, monkeypatch, capsys):
    """The recipe's, then the file's, then the command line's."""
    found = []
    monkeypatch.setattr("pixeldecoder.training.loop.train", lambda config: found.append(config) or "there")
    Path("c.yaml").write_text("steps: 5")
    assert main([*args, "--seed", "3"]) == 0 and capsys.readouterr().out == "there\n"
    assert type(found[0]).__name__ == kind and settings.items() <= vars(found[0]).items() and found[0].seed == 3


def test_a_benchmark_as_asked_for(monkeypatch, capsys):
    from pixeldecoder import benchmark

    asked = []
    monkeypatch.setattr(benchmark, "benchmark", lambda *args: asked.append(args) or {"rows": []})
    monkeypatch.setattr(benchmark, "plot", lambda report, path: asked.append((report, path)))
    options = ["--steps", "2", "--repeats", "5", "--max-memory", "2GB", "--sizes", "64", "96", "--device", "cpu"]
    assert main(["benchmark", "--configs", "float32", "bfloat16", *options, "--output", "out"]) == 0
    assert asked == [
        (["float32", "bfloat16"], [64, 96], "nano", "cpu", 2, 5, "2GB"),
        ({"rows": []}, Path("out/benchmark.png")),
    ]
    assert json.loads(Path("out/benchmark.json").read_text()) == {"rows": []}
    assert capsys.readouterr().out == "out/benchmark.json\n"


def test_an_evaluation_as_asked_for(monkeypatch, capsys):
    from pixeldecoder.evaluation import report, study
    from pixeldecoder.evaluation.cases import Source
    from pixeldecoder.evaluation.study import Baselines, LatentModel

    given, written = {}, []

    class Study:
        def __init__(self, **kwargs):
            given.update(kwargs)
            self.state = SimpleNamespace(is_main_process=True)

        def run(self):
            pass

    monkeypatch.setattr(study, "Study", Study)
    monkeypatch.setattr(report, "write_report", written.append)
    options = (
        "--output out --baselines lanczos vae --steps 4 2 --sigmas 0 0.4 --as-if-clean --crop 64 --limit 3 --scale 2 "
        "--vae v --stops 5 auto --metrics psnr --seed 9 --device cpu --dtype float32 --tile 64 --tile-overlap 8 "
        '--chunk 3 --encoder nano --quantize int8 --pipeline-args {"a":1} --weights fid f.pt'
    )
    assert main(["evaluate", "photos", *options.split()]) == 0
    expected = dict(
        source=Source(path="photos", sigmas=(0.0, 0.4), crop=64, limit=3, stops=("5", "auto")), output=Path("out"),
        baselines=Baselines(names=("lanczos", "vae"), scale=2, vae="v"), metrics=("psnr",), seed=9, device="cpu",
        weights={"fid": Path("f.pt")}, latent_model=LatentModel(load=None, kwargs={"a": 1}),
        identity=dict(encoder="nano", model=None, tile="64", tile_overlap=8, quantize="int8", attention="auto",
                      dtype="torch.float32"),
    )  # fmt: skip
    assert {name: given[name] for name in expected} == expected
    decoders = given["decoders"]
    assert list(decoders.load) == ["nano"] and decoders.steps == (4, 2) and decoders.as_if_clean
    assert decoders.call_kwargs == dict(tile_size=64, tile_overlap=8, chunk_size=3, max_memory=None)
    assert written == [Path("out")] and capsys.readouterr().out == f"{Path('out/report.html')}\n"


def test_the_home_folder(monkeypatch, tmp_path):
    """Where a shell leaves it alone; not within a text."""
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []
    command = SimpleNamespace(run=lambda: None)
    monkeypatch.setattr(
        sys.modules["pixeldecoder.cli.main"], "parse", lambda kind, words, prog: seen.extend(words) or command
    )
    words = ["~/z.npy", "--decoder=~/dec", "--lora", "~/a:0.5", "--prompt", "a ~/b ~", "~", "~other/x"]
    assert main(["decode", *words]) == 0
    home = str(tmp_path)
    assert seen == [f"{home}/z.npy", f"--decoder={home}/dec", "--lora", f"{home}/a:0.5", *words[4:]]


def test_a_command_line_is_read_without_numpy():
    code = "import sys, pixeldecoder.cli; sys.exit(bool({'numpy', 'PIL', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_ctrl_c_while_libraries_are_imported():
    Path("tyro.py").write_text("raise KeyboardInterrupt")
    child = subprocess.run([sys.executable, "-c", "import pixeldecoder.cli"], capture_output=True, text=True)
    assert (child.returncode, child.stdout, child.stderr) == (130, "", "pixeldecoder: interrupted\n")
