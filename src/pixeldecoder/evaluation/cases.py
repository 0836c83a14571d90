"""A folder, shards or prompts in, what there is to decode out; and each picture's truth, its centre crop."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from accelerate import PartialState
from tqdm import tqdm

from pixeldecoder.evaluation.methods import Case, Workspace
from pixeldecoder.evaluation.results import Results, image_path, is_whole
from pixeldecoder.files import save_image
from pixeldecoder.hub import is_command
from pixeldecoder.ldm import parse_stop
from pixeldecoder.pictures import UNREADABLE, read, shrink, to_tensor
from pixeldecoder.sources import Folder, Record, Shards


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is decoded.

    Args:
        path: a folder of pictures; shards (`.tar`, as WebDataset takes them); or a `.txt` file, a prompt a line.
        crop: side of the centre crops in pixels; `None`: whole pictures.
        limit: how many pictures or prompts, from the first.
        sigmas: noise levels of the latents, for pictures.
        stops: where the latent model stops, for prompts.
    """

    path: str
    crop: int | None = None
    limit: int | None = None
    sigmas: tuple[float, ...] = (0.0,)
    stops: tuple[str, ...] = ("auto",)

    @property
    def prompts(self) -> bool:
        return self.path.endswith(".txt")

    def check(self, cell: int) -> None:
        """`cell`: side in pixels of what crops must be a multiple of. Raises ValueError for a number out of bounds."""
        if is_command(self.path):
            raise ValueError(
                f"{self.path:.100}: a command, and an evaluation runs none: expected files or URLs of shards"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit {self.limit}: expected at least 1")
        for sigma in self.sigmas:
            if not 0 <= sigma <= 1:
                raise ValueError(f"sigma {sigma}: expected a noise level in [0, 1]")
        for stop in self.stops:
            parse_stop(stop)
        if self.crop is not None and (self.crop < cell or self.crop % cell):
            raise ValueError(f"crop {self.crop}: expected a multiple of {cell} pixels, a cell of the latents")


@dataclass(frozen=True)
class Cases:
    """What there is to decode, by name alone."""

    every: list[Case]
    records: Callable[[], Iterable[Record]] = tuple
    """The pictures, anew at each call."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Why pictures cannot be read, by name; it grows as they are read."""

    def share(self, state: PartialState) -> list[Case]:
        """This process's share of what can be read."""
        own = self.every[state.process_index :: state.num_processes]
        return [case for case in own if case.name not in self.unreadable]


def list_cases(source: Source, cell: int, output: Path) -> Cases:
    """The names and captions of pictures, without those in `output`, or the prompts.

    Raises:
        ValueError: nothing there, or a picture smaller than the crop.
    """
    path = Path(source.path)
    if source.prompts:
        try:
            lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected text in UTF-8: {error}") from None
        if not lines:
            raise ValueError(f"{path}: expected a prompt in each line, found none")
        return Cases([Case(line, line) for line in list(dict.fromkeys(lines))[: source.limit]])
    pictures: Shards | Folder
    if path.suffix == ".tar":
        pictures = Shards(source.path)
        records: Callable[[], Iterable[Record]] = pictures.once
    elif path.exists():
        pictures = folder = Folder(path, output=output)
        records = lambda: folder.items  # noqa: E731
    else:
        raise ValueError(f"{path}: no such folder, and neither shards (.tar) nor prompts (.txt)")
    least = source.crop or cell
    captions = {}
    for record in islice(records(), source.limit):
        if min(record.size) < least:
            width, height = record.size
            raise ValueError(
                f"{record.name} is {width} x {height} pixels, smaller than the crop of {least}: take a smaller crop, "
                "or the picture out"
            )
        captions[record.name] = record.caption
    return Cases([Case(*item) for item in captions.items()], records, pictures.skipped.reasons)


def cut_truths(cases: Cases, crop: int | None, cell: int, results: Results, state: PartialState) -> None:
    """Cut the truths that are not there yet out of the pictures: one is read once, whatever is made of it."""
    paths = {case.name: image_path(results.output, "truth", case.file) for case in cases.share(state)}
    missing = {name: path for name, path in paths.items() if not is_whole(path)}
    with tqdm(total=len(missing), desc="crops", disable=not missing or not state.is_main_process) as bar:
        for record in cases.records() if missing else ():
            if record.name in missing:
                path = missing.pop(record.name)
                try:
                    image = record.open()
                except UNREADABLE as error:
                    cases.unreadable[record.name] = str(error)
                    results.append({"unreadable": record.name, "reason": str(error)})
                else:
                    width, height = (crop or side // cell * cell for side in image.size)
                    left, top = (image.width - width) // 2, (image.height - height) // 2
                    save_image(image.crop((left, top, left + width, top + height)), path)
                bar.update()
            if not missing:
                break


def opened(case: Case, workspace: Workspace) -> Case:
    """With its pictures, if it has any."""
    if workspace.prompts:
        return case
    truth = to_tensor(read(image_path(workspace.output, "truth", case.file)).flattened()).to(workspace.device)
    return replace(case, truth=truth, small=shrink(truth, workspace.scale))
