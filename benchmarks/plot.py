"""Pictures of results, as SVG beside the JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

mpl.rcParams["svg.hashsalt"] = "kvfold"  # the same figures give the same file


def plot_comparisons(path: Path) -> Path:
    """The ratios of a file of comparisons, with their least and greatest, against a line at 1. Returns the picture's
    path."""
    known = [entry for entry in json.loads(path.read_text())["comparisons"] if entry["ratio_median"] is not None]
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(known)), layout="constrained")
    axes = figure.subplots()
    for row, entry in enumerate(known):
        median = entry["ratio_median"]
        spread = [[median - entry["ratio_min"]], [entry["ratio_max"] - median]]
        axes.barh(row, median, xerr=spread, color="tab:blue", alpha=0.7, capsize=3)
        axes.text(
            0.01,
            row,
            f" {entry['ours']:.4g} / {entry['peer']:.4g} {entry['unit']}",
            va="center",
            transform=axes.get_yaxis_transform(),
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(known)), [entry["name"] for entry in known])
    axes.invert_yaxis()
    axes.set_xlabel("ours / peer: median, least and greatest of the rounds")
    return _save(figure, path)


def plot_growth(path: Path) -> Path:
    """One panel for each series of a file of step times. Returns the picture's path."""
    series: Sequence[Mapping[str, Any]] = json.loads(path.read_text())["growth"]
    figure = Figure(figsize=(4.5 * len(series), 3.8), layout="constrained")
    for axes, entry in zip(figure.subplots(1, len(series), squeeze=False)[0], series, strict=True):
        points = entry["points"]
        values = [point["value"] for point in points]
        medians = [point["step_ms_median"] for point in points]
        spread = [
            [point["step_ms_median"] - point["step_ms_min"] for point in points],
            [point["step_ms_max"] - point["step_ms_median"] for point in points],
        ]
        axes.errorbar(values, medians, yerr=spread, marker="o", capsize=3, label="step")
        axes.plot(values, [point["floor_ms"] for point in points], marker=".", linestyle="--", label="floor")
        axes.set_title(entry["title"], fontsize=10)
        axes.set_xlabel(entry["variable"])
        axes.set_ylabel("ms")
        axes.set_ylim(bottom=0)
        axes.legend()
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    picture = path.with_suffix(".svg")
    figure.savefig(picture, metadata={"Date": None})
    return picture
