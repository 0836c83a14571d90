"""What an evaluation left in a folder in; one self-contained HTML file, and the same as Markdown, out."""

import base64
import io
import math
import re
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pixeldecoder.charts import scale_log
from pixeldecoder.errors import require
from pixeldecoder.evaluation.judge import is_answer, verdicts
from pixeldecoder.evaluation.methods import Setting, slug
from pixeldecoder.evaluation.metrics import METRICS, Metric, find_metrics, load_metrics, luma, measure, texture_map
from pixeldecoder.evaluation.study import image_path, read_finished, read_lines, read_rows, study_settings
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

Rows = dict[Setting, dict[str, dict[str, Any]]]
"""Of each setting, by picture."""


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
    main: str
    """Whose picture the slider opens on, against the first."""
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
        "tables": _tables(rows, metrics, study) + _judge_tables(read_lines(output / "judge.jsonl")),
        "plots": _plots(rows, metrics),
        "cases": _cases(output, rows, metrics),
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
    images = [load_image(path) for path in (first, second)]
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
    pictures = {**dict(zip(names, images, strict=True)), "texture": _texture_picture(image, truth)}
    title = f"{names[1]} against {names[0]}"
    context = {
        "title": title,
        "summary": f"{second} against {first}",
        "tables": [Table("Metrics", _headings(metrics), {names[1]: [Cell(v) for v in values.values()]})],
        "cases": [Shown(title, pictures, names[1])],
        "notes": [f"{name}: skipped: {reason}" for name, reason in skipped.items()],
    }
    _write(output, context)
    return values


def _metric(name: str, way: Any) -> Metric:
    return METRICS.get(name) or Metric(name, way, lambda device, weights: None, name)


def _values(rows: Rows, setting: Setting, metric: str) -> np.ndarray:
    return np.array([row[metric] for row in rows[setting].values() if row.get(metric) is not None])


def interval(values: np.ndarray, share: float = 0.95) -> tuple[float, float]:
    """Bootstrap confidence interval of the mean: percentiles of the means of resampled images."""
    means = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def _tables(rows: Rows, metrics: list[Metric], study: dict[str, Any]) -> list[Table]:
    grouped = {name for names in GROUPS.values() for name in names}
    groups = {title: [m for m in metrics if m.name in names] for title, names in GROUPS.items()}
    groups["Perception"] = [m for m in metrics if m.name not in grouped]
    most = max(map(len, rows.values()))
    tables = []
    for title, members in groups.items():
        table = Table(title, _headings(members), {str(setting): [] for setting in rows})
        for metric in members:
            values = {setting: _values(rows, setting, metric.name) for setting in rows}
            means = {setting: v.mean() for setting, v in values.items() if len(v)}
            # An amount that is right (of texture, say) may be of the wrong thing: it makes nobody the best.
            ranked = [s for s in means if len(rows[s]) == most] if metric.better in ("higher", "lower") else []
            best = min(metric.badness(means[setting]) for setting in ranked) if len(ranked) > 1 else None
            for setting in rows:
                cell = Cell()
                if (mean := means.get(setting)) is not None:
                    is_best = setting in ranked and metric.badness(mean) == best
                    cell = Cell(mean, interval(values[setting]), is_best)
                table.rows[str(setting)].append(cell)
        tables.append(table)
    sets = {name: values for name, values in study["sets"].items() if name in METRICS}
    together = {str(setting): [Cell(values.get(str(setting))) for values in sets.values()] for setting in rows}
    tables.append(Table("All pictures together", _headings([METRICS[name] for name in sets]), together))
    seconds = {setting: _values(rows, setting, "seconds") for setting in rows}
    times = {str(setting): [Cell(float(np.median(s))), Cell(len(s))] for setting, s in seconds.items() if len(s)}
    tables.append(Table("Time", ["Seconds, median", "Images"], times))
    return [table for table in tables if table.columns]


def _judge_tables(answers: list[dict[str, Any]]) -> list[Table]:
    answers = [answer for answer in answers if is_answer(answer)]
    tables = []
    for model in dict.fromkeys(answer["model"] for answer in answers):
        rows = {}
        for (a, b), found in verdicts([answer for answer in answers if answer["model"] == model]).items():
            score = found["score"]
            rate = Cell(float(score.mean()), interval(score)) if len(score) else Cell()
            counts = [Cell(int((score == value).sum())) for value in (1, 0.5, 0)]
            others = [Cell(int(found[name].sum())) for name in ("contradiction", "unanswered")]
            rows[f"{a} against {b}"] = [rate, *counts, *others]
        columns = ["Win rate, ties as half", "Wins", "Ties", "Losses", "Ties by contradiction", "Without an answer"]
        tables.append(Table(f"Preferred by {model}, in both orders", columns, rows))
    return tables


def _headings(metrics: list[Metric]) -> list[str]:
    return [f"{metric.title} {ARROWS[metric.better]}" for metric in metrics]


def _number(value: float | int | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.2f}" if abs(value) >= 2 else f"{value:.3f}"


def _summary(study: dict[str, Any], images: int) -> str:
    identity = study["identity"]
    crop = "whole" if identity["crop"] is None else f"centre crops of {identity['crop']} px"
    return (
        f"{images} images of {identity['source']}, {crop}, {identity['scale']}x, seed {identity['seed']}; "
        f"{study['made_by']}. Means over images with 95 % confidence intervals (bootstrap, {RESAMPLES} resamples of "
        "the images). Bold: the best mean, but not of amounts (→ 0, → 1), which a picture of noise may have right."
    )


def _headline(metrics: list[Metric]) -> list[Metric]:
    """What plots and cases go by: what is seen first, then fidelity, then texture; else the first there is."""
    order = ("lpips", "squeezenet", "dists", "musiq", "psnr", "texture")
    return sorted((m for m in metrics if m.name in order), key=lambda m: order.index(m.name)) or metrics[:1]


MARKERS = "osv^D*PXp<>h"


def _plots(rows: Rows, metrics: list[Metric]) -> str:
    """Quality against steps, sigma and time, as SVG; a colour is a method, a marker one of its curves in a column."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    chosen = _headline(metrics)[:3]
    axes = [name for name in ("steps", "sigma") if len({getattr(s, name) for s in rows} - {None}) > 1] + ["seconds"]
    if not chosen:
        return ""
    methods = list(dict.fromkeys(setting.method for setting in rows))
    colours = colormaps["tab10" if len(methods) <= 10 else "turbo"]
    figure = Figure(figsize=(4 * len(axes), 3 * len(chosen) + 0.15 * len(rows)), layout="constrained")
    grid = figure.subplots(len(chosen), len(axes), squeeze=False)
    for name, column in zip(axes, grid.T, strict=True):
        # Settings that differ in nothing but what is on the axis are one curve.
        curves = {s: s if name == "seconds" else Setting(**{**vars(s), name: None}) for s in rows}
        legend = {}
        for curve in dict.fromkeys(curves.values()):
            number = methods.index(curve.method)
            alike = [other for other in dict.fromkeys(curves.values()) if other.method == curve.method]
            style = {
                "color": colours(number if len(methods) <= 10 else number / (len(methods) - 1)),
                "marker": MARKERS[alike.index(curve) % len(MARKERS)],
            }
            for metric, plot in zip(chosen, column, strict=True):
                points = []
                for setting in (s for s in rows if curves[s] == curve):
                    values, seconds = _values(rows, setting, metric.name), _values(rows, setting, "seconds")
                    x = np.median(seconds) if name == "seconds" and len(seconds) else getattr(setting, name, None)
                    if x is not None and len(values):
                        points.append((x, values.mean(), *interval(values)))
                if points:
                    x, y, low, high = np.array(sorted(points)).T
                    # "$" would begin a formula.
                    legend[str(curve).replace("$", r"\$")] = plot.errorbar(
                        x, y, [y - low, high - y], markersize=4, capsize=2, **style
                    )
        for metric, plot in zip(chosen, column, strict=True):
            plot.set_xlabel({"seconds": "seconds (median)"}.get(name, name))
            plot.set_ylabel(f"{metric.title} {ARROWS[metric.better]}")
            if name == "steps":
                plot.xaxis.get_major_locator().set_params(integer=True)
            if name == "seconds" and plot.lines:
                scale_log(plot.xaxis)
        # Below all, so that it lies on nothing. A space first, as matplotlib leaves out what begins with "_".
        labels = [f" {label}" for label in legend]
        column[-1].legend(legend.values(), labels, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of signs in names that its font has not
        figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _cases(output: Path, rows: Rows, metrics: list[Metric]) -> list[Shown]:
    """Of each decoder's first setting, the worst and the best pictures, with everybody's crop where it is worst."""
    headline = _headline(metrics)
    cases = []
    decoders = {s.method: s for s in reversed(rows) if s.steps is not None} or {s.method: s for s in list(rows)[:1]}
    for main in reversed(decoders.values()):
        order = list(rows[main].values())
        if headline:
            metric = headline[0]
            order = [row for row in order if row.get(metric.name) is not None]
            order.sort(key=lambda row: -metric.badness(row[metric.name]))
        worst, best = order[:SHOWN], order[max(SHOWN, len(order) - SHOWN) :][::-1]
        for kind, row in [("worst", row) for row in worst] + [("best", row) for row in best]:
            others = [setting for setting, own in rows.items() if row["image"] in own]
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
            cases.append(Shown(f"{kind} of {main}: {row['image']}{value}", crops, str(main), file))
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
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {}  # its own sorts: the original, or the first method, comes first
    template = environment.from_string(Path(__file__).with_name("report.html").read_text())
    write_whole(path, lambda file: file.write_text(template.render(context)))


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
    write_whole(output / "report.md", lambda file: file.write_text("\n".join(lines).rstrip() + "\n"))


def _plain(text: str) -> str:
    """Names of pictures and methods are whatever they are: one line, that Markdown and HTML take as it stands."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|#~])", r"\\\1", text)
