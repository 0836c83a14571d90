"""Rows and images of an evaluation in, the report's plots and crops side by side out."""

import base64
import io
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pixeldecoder.charts import scale_log
from pixeldecoder.evaluation.methods import Setting, slug
from pixeldecoder.evaluation.metrics import Metric
from pixeldecoder.evaluation.pixels import luma, texture_map
from pixeldecoder.evaluation.results import image_path
from pixeldecoder.evaluation.tables import ARROWS, Rows, interval, number, scores_of
from pixeldecoder.pictures import read, to_image, to_tensor

CROP = 320
"""Side in pixels of the crops that are shown."""
SHOWN = 3
"""Worst and best pictures shown of each decoder."""


class CropComparison(NamedTuple):
    """The same place in every method's image; all pictures are of one size."""

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
        uris = {}
        for label, picture in self.pictures.items():
            buffer = io.BytesIO()
            picture.save(buffer, format="webp", quality=95)
            uris[label] = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return uris


def headline_metrics(metrics: list[Metric]) -> list[Metric]:
    """What is plotted; the first ranks the pictures. Perception, then fidelity, then texture; else any metric."""
    order = ("lpips", "squeezenet", "dists", "musiq", "psnr", "texture")
    return sorted((m for m in metrics if m.name in order), key=lambda m: order.index(m.name)) or metrics[:1]


MARKERS = "osv^D*PXp<>h"


def plot_scores(rows: Rows, metrics: list[Metric]) -> str:
    """Quality against steps, sigma and time, as SVG; a colour is a method, a marker one of its curves in a column."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    chosen = headline_metrics(metrics)[:3]
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
                    values, seconds = scores_of(rows, setting, metric.name), scores_of(rows, setting, "seconds")
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


def compare_crops(output: Path, rows: Rows, metrics: list[Metric]) -> list[CropComparison]:
    """The worst and best pictures of each decoder's first setting: all methods' crops where its error is largest."""
    headline = headline_metrics(metrics)
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
            pictures = {str(s): read(image_path(output, s, row["file"])).flattened() for s in others}
            truth = image_path(output, "truth", row["file"])
            image = to_tensor(pictures[str(main)])
            if truth.exists():
                original = to_tensor(read(truth).flattened())
                pictures = {"original": to_image(original)} | pictures
                pictures[f"texture of {main}"] = texture_picture(image, original)
                error = (image - original).square().mean(dim=1, keepdim=True)
            else:
                error = torch.zeros_like(image[:, :1])
            box = _worst_place(error)
            value = f", {headline[0].title} {number(row[headline[0].name])}" if headline else ""
            crops = {label: picture.crop(box) for label, picture in pictures.items()}
            file = f"{kind}-{slug(str(main))}-{row['file']}.webp"
            cases.append(CropComparison(f"{kind} of {main}: {row['image']}{value}", crops, str(main), file))
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


def texture_picture(image: torch.Tensor, truth: torch.Tensor) -> Image.Image:
    """The truth in grey; red where high frequencies were invented, blue where they were lost, full at 12 dB."""
    ours, true = texture_map(image, truth)
    excess = (10 * torch.log10(ours / true) / 12).clamp(-1, 1)[None, None]
    excess = F.interpolate(excess, size=truth.shape[-2:], mode="nearest")
    grey = luma(truth) * 0.7
    red, blue = excess.clamp(min=0) * 0.6, (-excess).clamp(min=0) * 0.6
    return to_image(torch.cat([grey + red, grey, grey + blue], dim=1) * 2 - 1)
