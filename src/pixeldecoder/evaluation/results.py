"""An evaluation's folder in, what it holds out, and back: `study.json`, rows and images; not what is damaged."""

import json
import math
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import safe_open

from pixeldecoder.evaluation.methods import Case, Setting, slug
from pixeldecoder.evaluation.metrics import WAYS
from pixeldecoder.files import write_whole


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


_NO_METRICS = {"image", "file", *Setting.__dataclass_fields__}


def _setting(content: dict[str, Any]) -> Setting:
    """Raises KeyError or TypeError for what is none."""
    setting = Setting(**{name: content[name] for name in Setting.__dataclass_fields__})
    numbers = isinstance(setting.steps, int | None) and _is_number(setting.sigma) and _is_number(setting.told)
    if not (isinstance(setting.method, str) and isinstance(setting.stop, str | None) and numbers):
        raise TypeError(f"no setting: {content}")
    return setting


def _is_number(value: Any) -> bool:
    """Or nothing."""
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
