"""Rows of an evaluation in, the report's tables out: means with intervals, the best of them, win rates."""

import math
from typing import Any, NamedTuple

import numpy as np

from pixeldecoder.evaluation.judge import is_answer, verdicts
from pixeldecoder.evaluation.methods import Setting
from pixeldecoder.evaluation.metrics import METRICS, Metric

RESAMPLES = 2000
"""How often the bootstrap draws the images anew."""
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
        return number(self.value) + (f" [{', '.join(map(number, self.interval))}]" if self.interval else "")


class Table(NamedTuple):
    title: str
    columns: list[str]
    rows: dict[str, list[Cell]]


def scores_of(rows: Rows, setting: Setting, metric: str) -> np.ndarray:
    return np.array([row[metric] for row in rows[setting].values() if row.get(metric) is not None])


def interval(values: np.ndarray, share: float = 0.95) -> tuple[float, float]:
    """Bootstrap confidence interval of the mean: percentiles of the means of resampled images."""
    means = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def score_tables(rows: Rows, metrics: list[Metric], study: dict[str, Any]) -> list[Table]:
    grouped = {name for names in GROUPS.values() for name in names}
    groups = {title: [m for m in metrics if m.name in names] for title, names in GROUPS.items()}
    groups["Perception"] = [m for m in metrics if m.name not in grouped]
    most = max(map(len, rows.values()))
    tables = []
    for title, members in groups.items():
        table = Table(title, headings(members), {str(setting): [] for setting in rows})
        for metric in members:
            values = {setting: scores_of(rows, setting, metric.name) for setting in rows}
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
    tables.append(Table("All pictures together", headings([METRICS[name] for name in sets]), together))
    seconds = {setting: scores_of(rows, setting, "seconds") for setting in rows}
    times = {str(setting): [Cell(float(np.median(s))), Cell(len(s))] for setting, s in seconds.items() if len(s)}
    tables.append(Table("Time", ["Seconds, median", "Images"], times))
    return [table for table in tables if table.columns]


def judge_tables(answers: list[dict[str, Any]]) -> list[Table]:
    answers = [answer for answer in answers if is_answer(answer)]
    tables = []
    for model in dict.fromkeys(answer["model"] for answer in answers):
        rows = {}
        for (a, b), verdict in verdicts([answer for answer in answers if answer["model"] == model]).items():
            score = verdict["score"]
            rate = Cell(float(score.mean()), interval(score)) if len(score) else Cell()
            counts = [Cell(int((score == value).sum())) for value in (1, 0.5, 0)]
            others = [Cell(int(verdict[name].sum())) for name in ("contradiction", "unanswered")]
            rows[f"{a} against {b}"] = [rate, *counts, *others]
        columns = ["Win rate, ties as half", "Wins", "Ties", "Losses", "Ties by contradiction", "Without an answer"]
        tables.append(Table(f"Preferred by {model}, in both orders", columns, rows))
    return tables


def headings(metrics: list[Metric]) -> list[str]:
    return [f"{metric.title} {ARROWS[metric.better]}" for metric in metrics]


def number(value: float | int | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.2f}" if abs(value) >= 2 else f"{value:.3f}"
