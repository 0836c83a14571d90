"""A source and an output in; each input with what it becomes, and one loop in which a bad file stops no other, out."""

import errno
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pixeldecoder.errors import explain, printable
from pixeldecoder.files import IMAGE_SUFFIXES, check_new, check_writable, is_folder

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Errors that the next file would meet, too."""


@dataclass
class Job:
    """One input."""

    source: Path
    targets: list[Path]
    """What it becomes, in order."""
    head: Any
    """What its head says."""


class Jobs:
    """The inputs of a command.

    Where the source is a folder, subfolders are walked and mirrored; hidden files, and the output's folder, are not
    its; what cannot be done is kept for the end, and what is there already is not made again. All of it is found before
    anything is loaded.

    Args:
        source: a file, or a folder of them.
        output: a file with one of `output_suffixes`; or a folder, there or not, which gets files of the inputs' names.
        format: suffix of the files in an output folder, without its dot.
        overwrite: replace outputs that are there.
        head: reads what can be told of an input without loading it; raises ValueError if it cannot be used.
        count: how many outputs an input becomes, by its head.
        inputs: further files that the command reads, and so must not overwrite.

    Raises:
        ValueError: no such input, or an output that cannot be.
    """

    def __init__(
        self,
        source: Path,
        output: Path,
        suffixes: tuple[str, ...],
        output_suffixes: tuple[str, ...],
        format: str,
        overwrite: bool,
        head: Callable[[Path], Any],
        count: Callable[[Any], int] = lambda head: 1,
        inputs: Iterable[Path] = (),
    ):
        if not source.exists():
            raise ValueError(f"{source}: no such file or folder")
        self.several, into = source.is_dir(), is_folder(output)
        if self.several:
            paths = self._walk(source, output, suffixes)
            base = source
        elif source.suffix.lower() not in suffixes:
            raise ValueError(f"{source}: expected one of {', '.join(suffixes)}, got {source.suffix or 'no suffix'!r}")
        else:
            paths, base = [source], source.parent
        if self.several and (output.is_file() or not into):
            why = " is a file" if output.is_file() else ""
            raise ValueError(f"{output}{why}: a folder of inputs needs a folder as output, whose name has no suffix")
        if not into and output.suffix.lower() not in output_suffixes:
            kind = "an image" if output_suffixes == IMAGE_SUFFIXES else "a file"
            raise ValueError(f"{output}: expected {kind} ending in {', '.join(output_suffixes)}, or a folder")
        check_writable(output)
        stems = {path: path.relative_to(base).with_name(path.stem) for path in paths}
        if twice := [stem for stem, times in Counter(stems.values()).items() if times > 1]:
            raise ValueError(f"{source}: several files would become {twice[0]}.{format}: rename one")

        self.jobs: list[Job] = []
        self.failures: dict[Path, str] = {}
        self.total = len(paths)
        for path in paths:
            with self._failing(path):
                said = head(path)
                if count(said) > 1 and not into:
                    raise ValueError(f"{path}: {count(said)} images cannot go into {output}: give a folder as output")
                names = [stems[path]] if count(said) == 1 else _numbered(stems[path], count(said))
                self.jobs.append(
                    Job(path, [_named(output, name, format) for name in names] if into else [output], said)
                )
        if len(self.jobs) > 1:
            self._part_batches(output, format, stems)
        in_place = self.several and f".{format}" in suffixes and os.path.realpath(output) == os.path.realpath(source)
        self._check_targets({*paths, *inputs}, overwrite, output if in_place else None)

    def _walk(self, source: Path, output: Path, suffixes: tuple[str, ...]) -> list[Path]:
        paths: list[Path] = []
        left_out: Counter[str] = Counter()
        seen = {os.path.realpath(source), os.path.realpath(output)}  # so that no link leads round and round
        for folder, folders, names in os.walk(source, followlinks=True):
            inside = {name: os.path.realpath(Path(folder, name)) for name in sorted(folders) if name[0] != "."}
            folders[:] = [name for name, real in inside.items() if real not in seen]
            seen.update(inside.values())
            for path in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
                if path.suffix.lower() in suffixes and path.is_file():
                    paths.append(path)
                else:
                    left_out[path.suffix.lower() or "without suffix"] += 1
        if left_out:
            kinds = ", ".join(f"{times} {kind}" for kind, times in left_out.most_common())
            _tell(f"{source}: left out {_files(left_out.total())} of other kinds: {kinds}")
        if not paths:
            raise ValueError(f"{source}: expected files ending in {', '.join(suffixes)}, found none")
        return sorted(paths)

    def _part_batches(self, output: Path, format: str, stems: dict[Path, Path]) -> None:
        """A batch whose numbered names meet those of other files takes its whole name: a.npy_000 beside a_000."""
        times = Counter(target for job in self.jobs for target in job.targets)
        for job in self.jobs:
            if len(job.targets) > 1 and any(times[target] > 1 for target in job.targets):
                names = _numbered(stems[job.source].with_name(job.source.name), len(job.targets))
                job.targets = [_named(output, name, format) for name in names]
        times = Counter(target for job in self.jobs for target in job.targets)
        if twice := [target for target, several in times.items() if several > 1]:
            raise ValueError(f"several files would become {twice[0]}: rename one")

    def _check_targets(self, inputs: set[Path], overwrite: bool, in_place: Path | None) -> None:
        there = {(status.st_dev, status.st_ino) for path in inputs if path.exists() for status in [path.stat()]}
        wanted = []
        for job in self.jobs:
            for target in job.targets:
                if os.path.exists(target) and (target.stat().st_dev, target.stat().st_ino) in there:
                    raise ValueError(f"{target} would overwrite its input: give another output")
        if in_place:
            raise ValueError(f"{in_place}: outputs among the inputs would be inputs next time: give another folder")
        for job in self.jobs:
            with self._failing(job.source):
                for target in job.targets:
                    check_writable(target)
                    if target.is_dir():
                        raise ValueError(f"{target} is a folder")
                    if not self.several:
                        check_new(target, overwrite)
                if overwrite or not all(target.exists() for target in job.targets):
                    wanted.append(job)
        if skipped := len(self.jobs) - len(wanted) - len([job for job in self.jobs if job.source in self.failures]):
            _tell(f"skipped {_files(skipped)} whose outputs are there (--overwrite makes them again)")
        self.jobs = wanted

    def check(self, usable: Callable[[Job], Any]) -> None:
        """Leave out, as failures, what `usable` raises a ValueError about."""
        jobs, self.jobs = self.jobs, []
        for job in jobs:
            with self._failing(job.source):
                usable(job)
                self.jobs.append(job)

    def run(self, make: Callable[[Job], None]) -> None:
        """Each job under a progress bar.

        Raises:
            ValueError: files of a folder could not be used; they have been named with their reasons.
        """
        bar = tqdm(total=len(self.jobs), desc="files", disable=len(self.jobs) < 2)
        try:
            for job in self.jobs:
                with self._failing(job.source):
                    make(job)
                bar.update()
        except BaseException:
            bar.delay = 0  # a line that was written has shown it: what is told next has a line of its own
            raise
        finally:
            bar.close()
        self.finish()

    def finish(self) -> None:
        """As at the end of `run`."""
        if self.failures:
            for path, reason in self.failures.items():
                _tell(reason if str(path) in reason else f"{path}: {reason}")
            raise ValueError(f"{len(self.failures)} of {_files(self.total)} could not be used: see above")

    def _failing(self, path: Path) -> "_Failing":
        return _Failing(self, path)


class _Failing:
    """Keeps what a file of a folder fails of, for the end; a single file's is raised."""

    def __init__(self, jobs: Jobs, path: Path):
        self.jobs, self.path = jobs, path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if not self.jobs.several or not isinstance(error, Exception) or isinstance(error, ImportError):
            return False
        if isinstance(error, OSError) and error.errno in FULL:
            return False
        reason = explain(error, "")
        if reason is None:  # a fault of ours
            return False
        self.jobs.failures[self.path] = reason
        return True


def _named(output: Path, name: Path, format: str) -> Path:
    return output / name.with_name(f"{name.name}.{format}")


def _numbered(name: Path, count: int) -> list[Path]:
    return [name.with_name(f"{name.name}_{index:03}") for index in range(count)]


def _files(count: int) -> str:
    return f"{count} file" + ("s" if count != 1 else "")


def _tell(line: str) -> None:
    tqdm.write(printable(line), file=sys.stderr)
