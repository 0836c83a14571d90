"""Runs of the command in processes that start in milliseconds: forks of one in which all is imported."""

import contextlib
import ctypes
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path


def closed_stdout(_: str) -> None:
    """As Python starts where the shell said >&-."""
    sys.stdout.close()
    sys.stdout = None


def ascii_stdout(_: str) -> None:
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), "ascii", write_through=True)


def full_stdout(_: str) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def file_size(limit: str) -> None:
    """Python ignores the signal, and sees an error as of a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))


def user(number: str) -> None:
    """One who owns nothing; 54321 is in no list of users."""
    os.setgroups([])
    os.setgid(int(number))
    os.setuid(int(number))


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, 0x44000, None):  # mounts of its own
        raise OSError(ctypes.get_errno(), "no mounts")
    if libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()):
        raise OSError(ctypes.get_errno(), "mount")


def small_disk(told: str) -> None:
    """SIZE:FOLDER."""
    size, folder = told.split(":")
    _mount("none", folder, "tmpfs", 0, f"size={size}")


def read_only(folder: str) -> None:
    _mount(folder, folder, "", 4096)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", folder.encode(), None, 4096 | 32 | 1, None):
        raise OSError(ctypes.get_errno(), "mount")


def wild_clock(_: str) -> None:
    """Steps of up to a year, back and forth."""
    real, rng = time.time, random.Random(0)
    time.time = lambda: real() + rng.uniform(-3e7, 3e7)


def serve() -> None:
    """Requests from stdin, one line of JSON each: a run to start, or a process to wait for."""
    import torch  # noqa: F401  # as all that follow, for the forks

    import pixeldecoder.ldm  # noqa: F401
    from pixeldecoder.cli import main

    sys.path.insert(0, str(Path(__file__).parents[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        if "wait" in told:
            print(os.waitstatus_to_exitcode(os.waitpid(told["wait"], 0)[1]), flush=True)
            continue
        process = os.fork()
        if process:
            print(process, flush=True)
            continue
        code = 99
        try:
            os.setsid()
            os.chdir(told["folder"])
            os.environ.update(told["env"])
            for name in told["without"]:
                os.environ.pop(name, None)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, name in (1, "stdout"), (2, "stderr"):
                os.dup2(os.open(told[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
            for name, value in told["faults"].items():
                globals()[name](value)
            code = main(told["words"])
            if told["listed"]:
                names = sorted(str(path) for path in Path(told["listed"]).rglob("*"))
                print("listed", *names, file=sys.stderr)
        except OSError as error:
            print(repr(error), file=sys.stderr)
            code = 98 if "mount" in str(error) else 99
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in sys.stdout, sys.stderr:
                if stream is not None:
                    stream.flush()
            os._exit(code)


@dataclass
class Run:
    """A command that runs."""

    zygote: "Zygote"
    process: int
    folder: Path

    def kill(self, number: int) -> None:
        os.kill(self.process, number)
        self.zygote.ask({"wait": self.process})
        # Its workers, which notice by themselves, shall not write into the next run's folder.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)

    def end(self) -> tuple[int, str, str]:
        """Exit code, and what it said."""
        code = int(self.zygote.ask({"wait": self.process}))
        return code, *(self.folder.parent.joinpath(f".{self.folder.name}.{n}").read_text() for n in ("out", "err"))


class Zygote:
    def __init__(self) -> None:
        self.child = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.child.stdout.readline() == "ready\n"

    def ask(self, told: dict) -> str:
        self.child.stdin.write(json.dumps(told) + "\n")
        self.child.stdin.flush()
        return self.child.stdout.readline()

    def start(self, folder: Path, *words: object, env=(), without=(), listed: str = "", **faults: str) -> Run:
        """A command in a folder.

        Args:
            without: variables of the environment that are not set.
            listed: a folder whose content is told at the end of stderr, by one who sees its mounts.
            faults: functions of this file, and what they are told.
        """
        process = self.ask(
            {
                "words": [str(word) for word in words], "folder": str(folder), "env": dict(env),
                "without": list(without), "faults": faults, "listed": listed,
                "stdout": str(folder.parent / f".{folder.name}.out"),
                "stderr": str(folder.parent / f".{folder.name}.err"),
            }
        )  # fmt: skip
        return Run(self, int(process), folder)

    def run(self, folder: Path, *words: object, **given) -> tuple[int, str, str]:
        return self.start(folder, *words, **given).end()

    def close(self) -> None:
        self.child.stdin.close()
        self.child.wait()


if __name__ == "__main__":
    serve()
