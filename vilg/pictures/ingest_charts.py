"""Histograms of what an ingest kept and dropped."""

import io
from typing import Any

import numpy as np
from matplotlib.figure import Figure

KEPT, HERE, ELSEWHERE = "#0072B2", "#D55E00", "#c3c7cf"


def histogram_png(histogram: dict[str, Any]) -> bytes:
    """PNG of one histogram of an ingest's report: kept, dropped by this filter and by others, stacked; thresholds."""
    edges = np.array(histogram["edges"], float)
    figure = Figure(figsize=(6.4, 3), layout="constrained", dpi=110)
    axes = figure.subplots()
    bottom = np.zeros(len(edges) - 1)
    for key, label, colour in (
        ("kept", "kept", KEPT),
        ("dropped_here", "dropped by this filter", HERE),
        ("dropped_elsewhere", "dropped by another filter", ELSEWHERE),
    ):
        counts = np.array(histogram[key], float)
        if counts.any():
            axes.bar(edges[:-1], counts, np.diff(edges), bottom, align="edge", color=colour, label=label,
                     edgecolor="white", linewidth=0.4)
            bottom += counts
    for threshold in histogram["thresholds"]:
        axes.axvline(threshold, color="#1f2937", linestyle="--", linewidth=1)
        axes.annotate(f"{threshold:g}", (threshold, 1), (3, -2), xycoords=("data", "axes fraction"), va="top",
                      textcoords="offset points", fontsize=8)
    if histogram["logarithmic"]:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel=histogram["unit"], ylabel="pairs")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
