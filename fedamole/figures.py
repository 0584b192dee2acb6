"""Figures of a study as files, in the style of the house; the same metrics give the same bytes.

The middle of ``fedamole figures``: metrics in, the bytes of svg, png and csv files out. What each
figure shows is in :mod:`fedamole.drawing`, the numbers behind it in :mod:`fedamole.figure_data`.
"""

# ruff: noqa: TID253 -- the command imports this module only when it draws

import io
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

from fedamole.drawing import draw_assignment, draw_classes, draw_experts, draw_rounds
from fedamole.figure_data import Rows, assignment_rows, classes_rows, experts_rows, rounds_rows
from fedamole.results import Metrics, csv_text, with_experts
from fedamole.stages import ResultsStage

PNG_DOTS_PER_INCH = 200

STYLE: dict[str, Any] = {
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "figure.titlesize": 8,
    "figure.dpi": PNG_DOTS_PER_INCH,
    "savefig.dpi": PNG_DOTS_PER_INCH,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    # Without a salt the ids inside an svg are random.
    "svg.hashsalt": "fedamole",
}


def figure_files(metrics: Metrics, settings: ResultsStage) -> Iterator[tuple[str, bytes]]:
    """Draw all figures, one after another.

    Yields
    ------
    tuple[str, bytes]
        File name (:func:`fedamole.results.figure_names`, in that order) and content.
    """
    yield from _files("rounds", rounds_rows(metrics, settings), draw_rounds)
    for slug in [slug for slugs in settings.scenarios.values() for slug in slugs]:
        # The partition is the same for all methods; read_metrics made sure.
        partition = classes_rows(metrics.run(slug, settings.methods[0]))
        yield from _files(f"{slug}-classes", partition, draw_classes)
        for method in with_experts(settings):
            run = metrics.run(slug, method)
            yield from _files(f"{slug}-{method}-experts", experts_rows(run), draw_experts)
            yield from _files(f"{slug}-{method}-assignment", assignment_rows(run), draw_assignment)


def _files(name: str, rows: Rows, draw: Callable[[Rows], Figure]) -> Iterator[tuple[str, bytes]]:
    """Draw one figure and give its three files."""
    # "default" first: a matplotlibrc of the user must not change a byte.
    with matplotlib.style.context(["default", STYLE]):
        figure = draw(rows)
        pictures = {suffix: render(figure, suffix) for suffix in ("svg", "png")}
    for suffix, content in pictures.items():
        yield f"{name}.{suffix}", content
    yield f"{name}.csv", csv_text(rows).encode()


def render(figure: Figure, suffix: str) -> bytes:
    """Bytes of a picture, svg or png, without date and version."""
    stream = io.BytesIO()
    hidden = {"svg": ("Date", "Creator"), "png": ("Software",)}[suffix]
    figure.savefig(stream, format=suffix, metadata=dict.fromkeys(hidden))
    return stream.getvalue()
