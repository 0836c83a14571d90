"""An evaluation's folder in, what it holds out, and back: `study.json`, rows and images; not what is damaged."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open

import pixeldecoder
from pixeldecoder.evaluation.methods import Case, Setting, slug
from pixeldecoder.evaluation.metrics import METRICS, WAYS
from pixeldecoder.files import write_whole


@dataclass(frozen=True)
class Results:
    """What a folder holds when a run begins, and where the run's own rows go."""

    output: Path
    study: dict[str, Any]
    """As `study.json` has it."""
    rows: dict[tuple[Setting, str], dict[str, Any]]
    """By setting and picture."""
    settings: list[Setting]
    """All that are or will be there, in the order of the tables."""
    process: int
    """Number of the process, each of which has a file of its own."""

    def append(self, row: dict[str, Any]) -> None:
        append_line(self.output / f"rows-{self.process}.jsonl", row)


def open_results(
    output: Path, identity: dict[str, Any], settings: list[Setting], process: int, tell: Callable[[str], None]
) -> Results:
    """What is in a folder, and what a run adds to it.

    Args:
        identity: what must be the same in all runs of a folder; an autoencoder ("vae") that is `None` is any.
        settings: of this run.
        tell: is given a line on what is there, and one on what is added.

    Raises:
        ValueError: the folder holds what does not belong together with this run.
    """
    identity = json.loads(json.dumps(identity))  # as what is there went
    study = read_study(output) or {"identity": identity}
    # A run without baselines of the autoencoder need not name it.
    study["identity"]["vae"] = study["identity"].get("vae") or identity["vae"]
    identity["vae"] = identity["vae"] or study["identity"]["vae"]
    if different := [key for key in identity if study["identity"].get(key) != identity[key]]:
        key = different[0]
        raise ValueError(
            f"{output} holds an evaluation with {key} {study['identity'].get(key)}, not {identity[key]}: take another "
            "folder"
        )
    finished = study_settings(study)
    rows = read_rows(output)
    before = list(dict.fromkeys([*finished, *(setting for setting, _ in rows)]))
    # As the tables had them, then what is new; baselines first.
    every = sorted(dict.fromkeys([*finished, *settings, *before]), key=lambda setting: setting.steps is not None)
    every = _told_apart(every, before)
    if before:
        added = [setting for setting in settings if setting not in before]
        tell(f"{output} holds {'; '.join(map(str, before))}")
        tell(f"this run adds {'; '.join(map(str, added)) or 'no setting'}")
    return Results(output, study, rows, every, process)


def _told_apart(settings: list[Setting], before: list[Setting]) -> list[Setting]:
    """Each method by a name of its own, which a folder keeps: of two alike the later one with more of its path."""
    labels: dict[str, str] = {}
    for setting in [*before, *settings]:
        taken = {slug(label) for label in labels.values()}
        if setting.method not in labels:
            names = [setting.label] if setting.label else setting.labels()
            label = next((name for name in names if slug(name) not in taken), setting.method)
            labels[setting.method] = label if slug(label) not in taken else f"{label} {len(labels) + 1}"
    return [replace(setting, label=labels[setting.method]) for setting in settings]


def write_results(
    results: Results,
    unreadable: dict[str, str],
    compare: Callable[[dict[Setting, list[str]]], dict[str, dict[str, float | None]]],
    skipped: dict[str, str],
    device: str,
) -> None:
    """`results.csv` and `study.json` of all that the folder holds, from this run or another.

    Args:
        unreadable: why pictures cannot be read; what other processes found is added.
        compare: from the images' files of every setting, its metrics of all pictures together; adds to `skipped`.
        skipped: why metrics are left out.

    Raises:
        ValueError: no picture can be read.
    """
    output = results.output
    rows = read_rows(output, unreadable)
    study = read_study(output) or {}
    if not rows:
        name, reason = next(iter(unreadable.items()))
        raise ValueError(f"{study['identity']['source']}: no picture can be read, such as {name}: {reason}")
    better = {name: study["better"][name] for name in [*METRICS, *study["better"]] if name in study["better"]}
    metrics = [name for name in better if any(name in row for row in rows.values())]
    order = {setting: index for index, setting in enumerate(results.settings)}
    chosen = sorted((key for key in rows if key[0] in order), key=lambda key: (order[key[0]], key[1]))
    columns = ["image", "file", *_FIELDS, "seed", "crop", "scale", *metrics, "seconds"]

    def write(path: Path) -> None:
        with path.open("w", newline="", errors="backslashreplace") as file:
            table = csv.DictWriter(file, columns, extrasaction="ignore")
            table.writeheader()
            same = {name: study["identity"][name] for name in ("seed", "crop", "scale")}
            table.writerows({**same, **rows[key]} for key in chosen)

    write_whole(output / "results.csv", write)
    files: dict[Setting, list[str]] = {}
    for key in chosen:
        files.setdefault(key[0], []).append(rows[key]["file"])
    seen = {image for _, image in rows}
    # What an earlier run computed of all pictures together, of as many as there are now; and what this one does.
    images = max(map(len, files.values()))
    counts = {name: count for name, count in study.get("set_images", {}).items() if count == images}
    compared = {name: values for name, values in study.get("sets", {}).items() if name in counts} | compare(files)
    study |= {
        "settings": [asdict(setting) for setting in files],
        "better": better,
        "sets": compared,
        "set_images": dict.fromkeys(compared, images),
        "skipped": skipped,
        "unreadable": {name: reason for name, reason in unreadable.items() if name not in seen},
        "made_by": f"pixeldecoder {pixeldecoder.__version__}, PyTorch {torch.__version__}, {device}",
    }
    write_json(output / "study.json", study)


def image_path(output: Path, setting: Setting | str, file: str) -> Path:
    return output / "images" / slug(str(setting)) / f"{file}.png"


def is_whole(path: Path) -> bool:
    """Whether what an earlier run wrote, a picture or latents, is there and undamaged."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):  # its header tells how long it must be
                return True
        with Image.open(path) as image:
            image.verify()
            return True
    except Exception:  # whatever damage makes of a file
        return False


def read_study(output: Path) -> dict[str, Any] | None:
    """What an evaluation keeps in a folder beside images and rows; `None` if there is none.

    Raises:
        ValueError: it is damaged; the message names the file.
    """
    path = output / "study.json"
    try:
        study = json.loads(path.read_bytes())
        names = ("identity", "better", "sets", "set_images", "skipped", "unreadable")
        kinds = {"settings": list} | dict.fromkeys(names, dict)
        wrong = [name for name, kind in kinds.items() if not isinstance(study.get(name, kind()), kind)]
        wrong += sorted({"source", "seed", "crop", "scale"} - study["identity"].keys())
        wrong += [name for name, way in study.get("better", {}).items() if way not in WAYS]
        wrong += [name for name, values in study.get("sets", {}).items() if not all(map(_is_number, values.values()))]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} missing or not as expected")
        study_settings(study)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{path}: not what an evaluation writes ({reason}): take another folder") from None
    return study


def read_finished(output: Path) -> dict[str, Any]:
    """As `read_study`.

    Raises:
        ValueError: there is no finished evaluation.
    """
    study = read_study(output) or {}
    if not (study.get("settings") and study.keys() >= {"better", "sets", "skipped", "unreadable", "made_by"}):
        raise ValueError(f"{output}: expected the folder of a finished evaluation")
    return study


def study_settings(study: dict[str, Any]) -> list[Setting]:
    return [_setting(content) for content in study.get("settings", ())]


def read_rows(output: Path, unreadable: dict[str, str] | None = None) -> dict[tuple[Setting, str], dict[str, Any]]:
    """What the processes wrote, by setting and picture; without what is damaged."""
    rows: dict[tuple[Setting, str], dict[str, Any]] = {}
    for path in sorted(output.glob("rows-*.jsonl")):
        for row in read_lines(path):
            if isinstance(name := row.get("unreadable"), str):
                if unreadable is not None:
                    unreadable[name] = str(row.get("reason"))
                continue
            try:
                setting, name, file = _setting(row), row["image"], row["file"]
                numbers = [row["seconds"], *(row[key] for key in row.keys() - _NO_METRICS)]
                if file == Case(name, "").file and all(map(_is_number, numbers)):
                    rows.setdefault((setting, name), {}).update(row)
            except (KeyError, TypeError, AttributeError):
                continue
    return rows


_FIELDS = [name for name in Setting.__dataclass_fields__ if name != "label"]
_NO_METRICS = {"image", "file", *_FIELDS, "label"}


def _setting(content: dict[str, Any]) -> Setting:
    """Raises KeyError or TypeError for what is no setting."""
    setting = Setting(**{name: content[name] for name in _FIELDS}, label=str(content.get("label", "")))
    numbers = isinstance(setting.steps, int | None) and _is_number(setting.sigma) and _is_number(setting.told)
    if not (isinstance(setting.method, str) and isinstance(setting.stop, str | None) and numbers):
        raise TypeError(f"no setting: {content}")
    return setting


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, or `None`."""
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON objects, a line each; without what an interruption tore, or what is none."""
    contents = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            contents.append(content)
    return contents


def append_line(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(max(0, file.tell() - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(content).encode() + b"\n")


def write_json(path: Path, content: Any) -> None:
    write_whole(path, lambda file: file.write_text(json.dumps(content, indent=1)))
