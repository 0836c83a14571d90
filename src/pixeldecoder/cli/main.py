"""Files in, files out: the `pixeldecoder` command."""

import difflib
import logging
import os
import re
import sys
from typing import Any

import tyro

from pixeldecoder import __version__
from pixeldecoder.cli.benchmark import Benchmark
from pixeldecoder.cli.bulk import Bulk
from pixeldecoder.cli.convert import Convert, Export
from pixeldecoder.cli.decode import Decode, Encode, Upscale
from pixeldecoder.cli.demo import Demo
from pixeldecoder.cli.evaluate import Compare, Evaluate, Judge
from pixeldecoder.cli.generate import Generate
from pixeldecoder.cli.parsing import parse
from pixeldecoder.cli.plan import Plan
from pixeldecoder.cli.redo import Info, Redo
from pixeldecoder.cli.serve import Serve
from pixeldecoder.cli.train import Distill, Train, run_training
from pixeldecoder.errors import OUT_OF_MEMORY, explain, printable

COMMANDS: dict[str, type] = {
    "demo": Demo,
    "decode": Decode,
    "encode": Encode,
    "upscale": Upscale,
    "generate": Generate,
    "info": Info,
    "redo": Redo,
    "convert": Convert,
    "export": Export,
    "plan": Plan,
    "evaluate": Evaluate,
    "compare": Compare,
    "judge": Judge,
    "benchmark": Benchmark,
    "serve": Serve,
    "bulk": Bulk,
    "train": Train,
    "distill": Distill,
}


def be_quiet() -> None:
    """Libraries keep their warnings to themselves; before they are imported."""
    import warnings

    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for library in "DIFFUSERS", "TRANSFORMERS":
        os.environ.setdefault(f"{library}_VERBOSITY", "critical")
    os.environ.setdefault("TQDM_DELAY", "2")  # a bar for what takes longer
    for name in "accelerate", "bitsandbytes", "torchao", "torch.utils._pytree":
        logging.getLogger(name).setLevel(logging.ERROR)


ABOUT = f"""{__doc__}

`pixeldecoder COMMAND --help` tells a command's options, `pixeldecoder --version` the version."""


class Plain(logging.Formatter):
    """Messages alone."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).splitlines()))


def dispatch(args: list[str]) -> None:
    """Run a command."""
    # A shell leaves "~" alone where it is quoted, or after "=".
    home = os.path.expanduser("~")
    words = [re.sub(r"^(--[\w.-]+=)?~(?=/)", lambda found: f"{found[1] or ''}{home}", word) for word in args]
    name, *rest = words or [""]
    if name == "--version":
        print(f"pixeldecoder {__version__}")
    elif name in ("-h", "--help"):
        tyro.extras.subcommand_cli_from_dict(dict(COMMANDS), args=["--help"], prog="pixeldecoder", description=ABOUT)
    elif name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        wrong = f'no command "{name}"' if name else "no command"
        meant = f', did you mean "{close[0]}"? Expected' if close else "; expected"
        raise ValueError(f"{wrong}{meant} one of {', '.join(COMMANDS)} (see pixeldecoder --help)")
    # Their settings depend on a recipe and a file that must be read first.
    elif name == "distill":
        run_training("student", rest)
    elif name == "train" and rest[:1] in (["prior"], ["teacher"]):
        run_training(rest[0], rest[1:])
    else:
        command: Any = parse(COMMANDS[name], rest, f"pixeldecoder {name}")
        try:
            command.run()
        except RuntimeError as error:  # a kernel tells only when it runs what it cannot
            if getattr(command, "attention", "auto") == "auto" or OUT_OF_MEMORY.search(str(error)):
                raise
            raise ValueError(f"--attention {command.attention} cannot be used here: {error}") from error


def main(args: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0; 2 after one line on what a user can mend; 130 on Ctrl-C; 141 if the output's reader has gone.
    """
    args = sys.argv[1:] if args is None else args
    be_quiet()
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:  # closed, and its number free for a file that a library would write over
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # a file's name in a terminal that cannot show it
    ours, handler = logging.getLogger("pixeldecoder"), logging.StreamHandler()
    handler.setFormatter(Plain())
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    try:
        try:
            dispatch(args)
        except SystemExit as end:  # --help
            code = int(end.code or 0)
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:
            print("pixeldecoder: interrupted", file=sys.stderr)
            code = 130
        except Exception as error:
            line = explain(error, args[0] if args else "")
            if line is None:
                raise
            print(f"pixeldecoder: {line}", file=sys.stderr)
            code = 2
        else:
            code = 0
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout, sys.stderr)
        return 128 + 13  # as of a tool that dies of SIGPIPE
    except OSError as error:  # a full disk
        _discard(sys.stdout)
        print(f"pixeldecoder: what was to be printed could not be written: {error.strerror}", file=sys.stderr)
        return 2
    finally:
        ours.removeHandler(handler)
    return code


def _discard(*streams: Any) -> None:
    """What they hold: Python would complain of it once more when it flushes at its end."""
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def entry_point() -> None:
    sys.exit(main())
