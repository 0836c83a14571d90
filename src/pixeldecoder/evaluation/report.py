"""What an evaluation left in a folder in; one self-contained HTML file, and the same as Markdown, out."""

import base64
import csv
import io
import json
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pixeldecoder.evaluation.judge import verdicts
from pixeldecoder.evaluation.methods import Setting, slug
from pixeldecoder.evaluation.metrics import METRICS, Metric, find_metrics, load_metrics, luma, measure, texture_map
from pixeldecoder.evaluation.run import image_path, read_lines
from pixeldecoder.files import load_image, side_by_side, to_image, to_tensor, write_whole

RESAMPLES = 2000
"""Of the bootstrap."""
CROP = 320
"""Side in pixels of the crops that are shown."""
SHOWN = 3
"""Worst and best pictures shown of each decoder."""
GROUPS = {
    "Fidelity": ("psnr", "psnr_y", "ssim", "ssim_y", "ms_ssim"),
    "Colour, spectrum, texture": (
        "ciede2000", "colour_shift", "spectral_error", "texture", "texture_flat", "texture_textured", "border",
    ),
}  # fmt: skip
ARROWS = {"higher": "↑", "lower": "↓", "zero": "→ 0", "one": "→ 1"}

Row = dict[str, Any]


class Cell(NamedTuple):
    value: float | int | None = None
    interval: tuple[float, float] | None = None
    best: bool = False

    def __str__(self) -> str:
        return _number(self.value) + (f" [{', '.join(map(_number, self.interval))}]" if self.interval else "")


class Table(NamedTuple):
    title: str
    columns: list[str]
    rows: dict[str, list[Cell]]


class Shown(NamedTuple):
    """One place, as everybody shows it; all pictures are of one size."""

    title: str
    pictures: dict[str, Image.Image]
    file: str = ""
    """Of the Markdown's picture."""

    @property
    def size(self) -> tuple[int, int]:
        return next(iter(self.pictures.values())).size

    @property
    def layers(self) -> dict[str, str]:
        """As `data:` URIs."""
        found = {}
        for label, picture in self.pictures.items():
            buffer = io.BytesIO()
            picture.save(buffer, format="webp", quality=95)
            found[label] = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return found


def write_report(output: Path) -> None:
    """`report.html`, `report.md` and the pictures that it shows, from what an evaluation left in a folder.

    Raises:
        ValueError: no evaluation there.
    """
    if not (output / "results.csv").exists():
        raise ValueError(f"{output}: expected a finished evaluation, found no results.csv")
    study = json.loads((output / "study.json").read_text())
    settings = [Setting(**setting) for setting in study["settings"]]
    rows = _read(output / "results.csv")
    metrics = [_metric(name) for name in rows[0] if name not in _FIXED]
    tables = _tables(settings, rows, metrics, study) + _judge_tables(read_lines(output / "judge.jsonl"))
    cases = _cases(output, settings, rows, metrics)
    context = {
        "title": "Evaluation",
        "summary": _summary(study, rows),
        "tables": tables,
        "plots": _plots(settings, rows, metrics),
        "cases": cases,
        "notes": [f"{name}: skipped: {reason}" for name, reason in study["skipped"].items()]
        + [f"{name}: not readable: {reason}" for name, reason in study["unreadable"].items()],
    }
    _write(output / "report.html", context)
    _write_markdown(output, context)


def write_comparison(first: Path, second: Path, output: Path, weights: dict[str, Path]) -> dict[str, float | None]:
    """Two images of one size as one HTML file; metrics of the second, the first taken for the truth.

    Raises:
        ValueError: not readable, or of different size.
    """
    images = [load_image(path) for path in (first, second)]
    if images[0].size != images[1].size:
        sizes = " and ".join(f"{image.width} x {image.height}" for image in images)
        raise ValueError(f"{first} and {second}: expected two images of one size, got {sizes}")
    truth, image = map(to_tensor, images)
    scores, skipped = load_metrics(find_metrics((), weights), torch.device("cpu"), weights)
    values = {name: measure(name, score, image, truth, "", second.name) for name, score in scores.items()}
    metrics = [METRICS[name] for name in values]
    pictures = {first.name: images[0], second.name: images[1], "texture": _texture_picture(image, truth)}
    title = f"{second.name} against {first.name}"
    context = {
        "title": title,
        "summary": f"{second} against {first}",
        "tables": [Table("Metrics", _headings(metrics), {second.name: [Cell(v) for v in values.values()]})],
        "cases": [Shown(title, pictures)],
        "notes": [f"{name}: skipped: {reason}" for name, reason in skipped.items()],
    }
    _write(output, context)
    return values


_FIXED = {"image", "file", *Setting.__dataclass_fields__, "seed", "crop", "scale", "seconds", "setting"}


def _read(path: Path) -> list[Row]:
    """Numbers where there are any, `None` for empty cells."""
    with path.open(newline="") as file:
        rows: list[Row] = list(csv.DictReader(file))
    for row in rows:
        for key, text in row.items():
            if key in ("image", "file", "method", "stop"):
                row[key] = text or None
            else:
                row[key] = None if text == "" else int(text) if key == "steps" else float(text)
        row["setting"] = Setting(**{key: row[key] for key in Setting.__dataclass_fields__})
    return rows


def _metric(name: str) -> Metric:
    return METRICS.get(name) or find_metrics([name], {})[0]


def _values(rows: list[Row], setting: Setting, metric: str) -> np.ndarray:
    return np.array([row[metric] for row in rows if row["setting"] == setting and row[metric] is not None])


def interval(values: np.ndarray, share: float = 0.95) -> tuple[float, float]:
    """Bootstrap confidence interval of the mean: percentiles of the means of resampled images."""
    means = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def _tables(settings: list[Setting], rows: list[Row], metrics: list[Metric], study: dict[str, Any]) -> list[Table]:
    grouped = {name for names in GROUPS.values() for name in names}
    groups = {title: [m for m in metrics if m.name in names] for title, names in GROUPS.items()}
    groups["Perception"] = [m for m in metrics if m.name not in grouped]
    tables = []
    for title, members in groups.items():
        table = Table(title, _headings(members), {str(setting): [] for setting in settings})
        for metric in members:
            values = {setting: _values(rows, setting, metric.name) for setting in settings}
            means = {setting: v.mean() for setting, v in values.items() if len(v)}
            best = min(metric.badness(mean) for mean in means.values()) if len(means) > 1 else None
            for setting in settings:
                mean = means.get(setting)
                table.rows[str(setting)].append(
                    Cell(mean, interval(values[setting]), metric.badness(mean) == best) if mean is not None else Cell()
                )
        tables.append(table)
    sets = {_metric(name): values for name, values in study["sets"].items()}
    together = {str(setting): [Cell(values[i]) for values in sets.values()] for i, setting in enumerate(settings)}
    tables.append(Table("All pictures together", _headings(list(sets)), together))
    seconds = {setting: _values(rows, setting, "seconds") for setting in settings}
    times = {str(setting): [Cell(float(np.median(s))), Cell(len(s))] for setting, s in seconds.items() if len(s)}
    tables.append(Table("Time", ["Seconds, median", "Images"], times))
    return [table for table in tables if table.columns]


def _judge_tables(answers: list[dict[str, Any]]) -> list[Table]:
    tables = []
    for model in dict.fromkeys(answer["model"] for answer in answers):
        rows = {}
        for (a, b), found in verdicts([answer for answer in answers if answer["model"] == model]).items():
            score = found["score"]
            counts = [Cell(int((score == value).sum())) for value in (1, 0.5, 0)]
            contradictions = Cell(int(found["contradiction"].sum()))
            rows[f"{a} against {b}"] = [Cell(float(score.mean()), interval(score)), *counts, contradictions]
        columns = ["Win rate, ties as half", "Wins", "Ties", "Losses", "Ties by contradiction"]
        tables.append(Table(f"Preferred by {model}, in both orders", columns, rows))
    return tables


def _headings(metrics: list[Metric]) -> list[str]:
    return [f"{metric.title} {ARROWS[metric.better]}" for metric in metrics]


def _number(value: float | int | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.2f}" if abs(value) >= 2 else f"{value:.3f}"


def _summary(study: dict[str, Any], rows: list[Row]) -> str:
    identity = study["identity"]
    crop = "whole" if identity["crop"] is None else f"centre crops of {identity['crop']} px"
    return (
        f"{len({row['image'] for row in rows})} images of {identity['source']}, {crop}, {identity['scale']}x, "
        f"seed {identity['seed']}; {study['made_by']}. Means over images with 95 % confidence intervals (bootstrap, "
        f"{RESAMPLES} resamples of the images)."
    )


def _headline(metrics: list[Metric]) -> list[Metric]:
    """What plots and cases go by: what is seen first, then fidelity, then texture."""
    order = ("lpips", "squeezenet", "dists", "musiq", "psnr", "texture")
    return sorted((m for m in metrics if m.name in order), key=lambda m: order.index(m.name))


def _plots(settings: list[Setting], rows: list[Row], metrics: list[Metric]) -> str:
    """Quality against steps, sigma and time, as SVG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    chosen = _headline(metrics)[:3]
    axes = [name for name in ("steps", "sigma") if len({getattr(s, name) for s in settings} - {None}) > 1] + ["seconds"]
    if not chosen:
        return ""
    figure = Figure(figsize=(4 * len(axes), 3 * len(chosen)), layout="constrained")
    grid = figure.subplots(len(chosen), len(axes), squeeze=False)
    for metric, line in zip(chosen, grid, strict=True):
        for name, plot in zip(axes, line, strict=True):
            curves: dict[str, list[tuple[float, float, float, float]]] = {}
            for setting in settings:
                values, seconds = _values(rows, setting, metric.name), _values(rows, setting, "seconds")
                x = float(np.median(seconds)) if name == "seconds" and len(seconds) else getattr(setting, name, None)
                if x is None or not len(values):
                    continue
                # Settings that differ in nothing but what is on the axis are one curve.
                label = str(setting if name == "seconds" else Setting(**{**vars(setting), name: None}))
                curves.setdefault(label, []).append((x, values.mean(), *interval(values)))
            for label, points in curves.items():
                x, y, low, high = np.array(sorted(points)).T
                plot.errorbar(x, y, [y - low, high - y], marker="o", markersize=4, capsize=2, label=label)
            plot.set_xlabel({"seconds": "seconds (median)"}.get(name, name))
            plot.set_ylabel(f"{metric.title} {ARROWS[metric.better]}")
            if name == "seconds":
                plot.set_xscale("log")
            if metric is chosen[0]:
                plot.legend(fontsize=6)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _cases(output: Path, settings: list[Setting], rows: list[Row], metrics: list[Metric]) -> list[Shown]:
    """Of each decoder's first setting, the worst and the best pictures, with everybody's crop where it is worst."""
    headline = _headline(metrics)
    cases = []
    files = {(row["setting"], row["image"]): row for row in rows}
    decoders = {s.method: s for s in reversed(settings) if s.steps is not None} or {settings[0].method: settings[0]}
    for main in reversed(decoders.values()):
        order = [row for row in rows if row["setting"] == main]
        if headline:
            metric = headline[0]
            order = [row for row in order if row[metric.name] is not None]
            order.sort(key=lambda row: -metric.badness(row[metric.name]))
        worst, best = order[:SHOWN], order[max(SHOWN, len(order) - SHOWN) :][::-1]
        for kind, row in [("worst", row) for row in worst] + [("best", row) for row in best]:
            others = [s for s in settings if (s, row["image"]) in files]
            pictures = {str(s): load_image(image_path(output, s, row["file"])) for s in others}
            truth = image_path(output, "truth", row["file"])
            image = to_tensor(pictures[str(main)])
            if truth.exists():
                original = to_tensor(load_image(truth))
                pictures = {"original": to_image(original)} | pictures
                pictures[f"texture of {main}"] = _texture_picture(image, original)
                error = (image - original).square().mean(dim=1, keepdim=True)
            else:
                error = torch.zeros_like(image[:, :1])
            box = _worst_place(error)
            value = f", {headline[0].title} {_number(row[headline[0].name])}" if headline else ""
            crops = {label: picture.crop(box) for label, picture in pictures.items()}
            file = f"{kind}-{slug(str(main))}-{row['file']}.webp"
            cases.append(Shown(f"{kind} of {main}: {row['image']}{value}", crops, file))
    return cases


def _worst_place(error: torch.Tensor) -> tuple[int, int, int, int]:
    """The crop with the largest error; of equals the most central one."""
    height, width = error.shape[-2:]
    side = (min(CROP, height), min(CROP, width))
    sums = F.avg_pool2d(error, side, stride=16)[0, 0]
    if sums.max() == sums.min():
        top, left = (height - side[0]) // 2, (width - side[1]) // 2
    else:
        top, left = (16 * int(i) for i in np.unravel_index(int(sums.argmax()), sums.shape))
    return left, top, left + side[1], top + side[0]


def _texture_picture(image: torch.Tensor, truth: torch.Tensor) -> Image.Image:
    """The truth in grey; red where high frequencies were invented, blue where they were lost, full at 12 dB."""
    ours, true = texture_map(image, truth)
    excess = (10 * torch.log10(ours / true) / 12).clamp(-1, 1)[None, None]
    excess = F.interpolate(excess, size=truth.shape[-2:], mode="nearest")
    grey = luma(truth) * 0.7
    red, blue = excess.clamp(min=0) * 0.6, (-excess).clamp(min=0) * 0.6
    return to_image(torch.cat([grey + red, grey, grey + blue], dim=1) * 2 - 1)


def _write(path: Path, context: dict[str, Any]) -> None:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {}  # its own sorts: the original, or the first method, comes first
    template = environment.from_string(Path(__file__).with_name("report.html").read_text())
    write_whole(path, lambda file: file.write_text(template.render(context)))


def _write_markdown(output: Path, context: dict[str, Any]) -> None:
    lines = ["# Evaluation", "", context["summary"], ""]
    for table in context["tables"]:
        lines += [f"## {table.title}", "", f"| | {' | '.join(table.columns)} |"]
        lines.append("| --- " * (len(table.columns) + 1) + "|")
        for label, cells in table.rows.items():
            lines.append(f"| {label} | {' | '.join(f'**{cell}**' if cell.best else str(cell) for cell in cells)} |")
        lines.append("")
    if context["plots"]:
        write_whole(output / "plots.svg", lambda file: file.write_text(context["plots"]))
        lines += ["![Quality against steps, sigma and time](plots.svg)", ""]
    for case in context["cases"]:
        strip, path = side_by_side(*case.pictures.values()), output / "pictures" / case.file
        write_whole(path, partial(strip.save, quality=85))
        lines += [f"**{case.title}**: {'; '.join(case.pictures)}", "", f"![{case.title}](pictures/{path.name})", ""]
    lines += [f"- {note}" for note in context["notes"]]
    write_whole(output / "report.md", lambda file: file.write_text("\n".join(lines).rstrip() + "\n"))
