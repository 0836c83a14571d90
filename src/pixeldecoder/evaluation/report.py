"""What an evaluation left in a folder in; one self-contained HTML file, and the same as Markdown, out."""

import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pixeldecoder.errors import require
from pixeldecoder.evaluation.figures import CropComparison, compare_crops, plot_scores, texture_picture
from pixeldecoder.evaluation.metrics import METRICS, Metric, find_metrics, load_metrics, measure
from pixeldecoder.evaluation.results import read_finished, read_lines, read_rows, study_settings
from pixeldecoder.evaluation.tables import RESAMPLES, Cell, Rows, Table, headings, judge_tables, score_tables
from pixeldecoder.files import write_whole
from pixeldecoder.pictures import read, side_by_side, to_tensor


def write_report(output: Path) -> None:
    """`report.html`, `report.md` and the pictures that it shows, from what an evaluation left in a folder.

    Raises:
        ValueError: no evaluation there, a damaged one, or a package of the `evaluate` extra is missing.
    """
    require("the report", "evaluate", "jinja2", "matplotlib")
    study = read_finished(output)
    rows: Rows = {setting: {} for setting in study_settings(study)}
    for (setting, image), row in read_rows(output).items():
        if setting in rows:
            rows[setting][image] = row
    every = [row for own in rows.values() for row in own.values()]
    metrics = [_metric(name, way) for name, way in study["better"].items() if any(name in row for row in every)]
    images = len({image for own in rows.values() for image in own})
    context = {
        "title": "Evaluation",
        "summary": _summary(study, images),
        "tables": score_tables(rows, metrics, study) + judge_tables(read_lines(output / "judge.jsonl")),
        "plots": plot_scores(rows, metrics),
        "cases": compare_crops(output, rows, metrics),
        "notes": [f"{name}: skipped: {reason}" for name, reason in study["skipped"].items()]
        + [f"{name}: not readable: {reason}" for name, reason in study["unreadable"].items()]
        + [
            f"{setting}: {len(own)} of {images} images: its numbers are of other images than the others'"
            for setting, own in rows.items()
            if len(own) < images
        ],
    }
    _write(output / "report.html", context)
    _write_markdown(output, context)


def write_comparison(first: Path, second: Path, output: Path, weights: dict[str, Path]) -> dict[str, float | None]:
    """Two images of one size as one HTML file; metrics of the second, the first taken for the truth.

    Raises:
        ValueError: not readable, of different size, or a package of the `evaluate` extra is missing.
    """
    require("compare", "evaluate", "jinja2", "torchmetrics")
    images = [read(path).flattened() for path in (first, second)]
    if images[0].size != images[1].size:
        sizes = " and ".join(f"{image.width} x {image.height}" for image in images)
        raise ValueError(f"{first} and {second}: expected two images of one size, got {sizes}")
    truth, image = map(to_tensor, images)
    scores, skipped = load_metrics(find_metrics((), weights), torch.device("cpu"), weights)
    values: dict[str, float | None] = dict.fromkeys(scores)
    for name, score in scores.items():
        with suppress(MemoryError):  # which was told
            values[name] = measure(name, score, image, truth, "", second.name)
    metrics = [METRICS[name] for name in values]
    names = [str(path) if first.name == second.name else path.name for path in (first, second)]
    pictures = {**dict(zip(names, images, strict=True)), "texture": texture_picture(image, truth)}
    title = f"{names[1]} against {names[0]}"
    context = {
        "title": title,
        "summary": f"{second} against {first}",
        "tables": [Table("Metrics", headings(metrics), {names[1]: [Cell(v) for v in values.values()]})],
        "cases": [CropComparison(title, pictures, names[1])],
        "notes": [f"{name}: skipped: {reason}" for name, reason in skipped.items()],
    }
    _write(output, context)
    return values


def _metric(name: str, way: Any) -> Metric:
    return METRICS.get(name) or Metric(name, way, lambda device, weights: None, name)


def _summary(study: dict[str, Any], images: int) -> str:
    identity = study["identity"]
    crop = "whole" if identity["crop"] is None else f"centre crops of {identity['crop']} px"
    return (
        f"{images} images of {identity['source']}, {crop}, {identity['scale']}x, seed {identity['seed']}; "
        f"{study['made_by']}. Means over images with 95 % confidence intervals (bootstrap, {RESAMPLES} resamples of "
        "the images). Bold: the best mean, but not of amounts (→ 0, → 1), which a picture of noise may have right."
    )


def _write(path: Path, context: dict[str, Any]) -> None:
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {}  # its own sorts: the original, or the first method, comes first
    template = environment.from_string(Path(__file__).with_name("report.html").read_text())
    write_whole(path, lambda file: file.write_text(template.render(context), errors="backslashreplace"))


def _write_markdown(output: Path, context: dict[str, Any]) -> None:
    lines = ["# Evaluation", "", _plain(context["summary"]), ""]
    for table in context["tables"]:
        lines += [f"## {_plain(table.title)}", "", f"| | {' | '.join(map(_plain, table.columns))} |"]
        lines.append("| --- " * (len(table.columns) + 1) + "|")
        for label, cells in table.rows.items():
            shown = [f"**{cell}**" if cell.best else str(cell) for cell in cells]
            lines.append(f"| {_plain(label)} | {' | '.join(shown)} |")
        lines.append("")
    if context["plots"]:
        write_whole(output / "plots.svg", lambda file: file.write_text(context["plots"]))
        lines += ["![Quality against steps, sigma and time](plots.svg)", ""]
    for case in context["cases"]:
        strip, path = side_by_side(*case.pictures.values()), output / "pictures" / case.file
        write_whole(path, partial(strip.save, quality=85))
        title = _plain(case.title)
        lines += [f"**{title}**: {_plain('; '.join(case.pictures))}", "", f"![{title}](pictures/{path.name})", ""]
    lines += [f"- {_plain(note)}" for note in context["notes"]]
    text = "\n".join(lines).rstrip() + "\n"
    write_whole(output / "report.md", lambda file: file.write_text(text, errors="backslashreplace"))


def _plain(text: str) -> str:
    """A text, such as the name of a picture, in one line that Markdown and HTML show as it stands."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|#~])", r"\\\1", text)
