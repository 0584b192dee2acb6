"""Figures of a study as files, in the style of the house; the same metrics give the same bytes.

The middle of ``fedamole figures``: metrics in, the bytes of svg, pdf, png and csv files out. What
each figure shows is in the modules ``drawing*``, the numbers behind it in :mod:`figure_data` and
the modules ``figure_rows*``.
"""

# ruff: noqa: TID253 -- the command imports this module only when it draws

import io
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

from fedamole.drawing import draw_assignment, draw_classes, draw_experts, draw_rounds
from fedamole.drawing_bars import draw_bars
from fedamole.drawing_lines import draw_stability, draw_sweep
from fedamole.drawing_overhead import draw_overhead
from fedamole.drawing_parts import LEGEND_POINTS, TICK_POINTS, TITLE_POINTS
from fedamole.drawing_routing import draw_routing
from fedamole.errors import FedamoleError
from fedamole.figure_data import Rows, assignment_rows, classes_rows, experts_rows, rounds_rows
from fedamole.figure_rows_experts import routing_rows, stability_rows
from fedamole.figure_rows_scores import bars_rows, sweep_rows
from fedamole.overhead_table import overhead_bars
from fedamole.results import (
    FIGURE_FORMATS,
    Metrics,
    Run,
    csv_text,
    figure_kinds,
    figures_of,
    slugs_of,
    with_experts,
)
from fedamole.settings.output import FigureName
from fedamole.stages import ResultsStage

RowsOf = Callable[[Metrics, ResultsStage], Iterator[Rows]]

PNG_DOTS_PER_INCH = 200
# What a format says of when and by what it was made.
_DATED = {
    "svg": ("Date", "Creator"),
    "pdf": ("CreationDate", "Creator", "Producer"),
    "png": ("Software",),
}

STYLE: dict[str, Any] = {
    "font.size": 7,
    "axes.titlesize": TITLE_POINTS,
    "axes.labelsize": 7,
    "xtick.labelsize": TICK_POINTS,
    "ytick.labelsize": TICK_POINTS,
    "legend.fontsize": LEGEND_POINTS,
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
    # Outlines that publishers accept, in place of bitmaps of letters.
    "pdf.fonttype": 42,
    "hatch.linewidth": 0.5,
}


def figure_files(metrics: Metrics, settings: ResultsStage) -> Iterator[tuple[str, bytes]]:
    """Draw all figures, one after another.

    Yields
    ------
    tuple[str, bytes]
        File name (:func:`fedamole.results.figure_names`, in that order) and content.
    """
    for kind in figure_kinds(settings):
        rows_of, draw = DRAWN[kind]
        names = figures_of(kind, settings)
        for name, rows in zip(names, rows_of(metrics, settings), strict=True):
            yield from _files(name, rows, draw)


def _files(name: str, rows: Rows, draw: Callable[[Rows], Figure]) -> Iterator[tuple[str, bytes]]:
    """Draw one figure and give its files."""
    # "default" first: a matplotlibrc of the user must not change a byte.
    with matplotlib.style.context(["default", STYLE]):
        figure = draw(rows)
        pictures = {suffix: render(figure, suffix) for suffix in FIGURE_FORMATS if suffix != "csv"}
    for suffix, content in pictures.items():
        yield f"{name}.{suffix}", content
    yield f"{name}.csv", csv_text(rows).encode()


def render(figure: Figure, suffix: str) -> bytes:
    """Bytes of a picture, svg, pdf or png, without date and version."""
    stream = io.BytesIO()
    hidden = _DATED[suffix]
    figure.savefig(stream, format=suffix, metadata=dict.fromkeys(hidden))
    return stream.getvalue()


def _one_per_slug(rows_of: Callable[[Run], Rows]) -> RowsOf:
    """Rows of a figure of each scenario slug, the same for all methods."""

    def of_study(metrics: Metrics, settings: ResultsStage) -> Iterator[Rows]:
        for slug in slugs_of(settings):
            yield rows_of(metrics.run(slug, settings.methods[0]))

    return of_study


def _one_per_run(rows_of: Callable[[Run], Rows]) -> RowsOf:
    """Rows of a figure of each scenario slug and method with experts."""

    def of_study(metrics: Metrics, settings: ResultsStage) -> Iterator[Rows]:
        for slug in slugs_of(settings):
            for method in with_experts(settings):
                yield rows_of(metrics.run(slug, method))

    return of_study


def _one(rows_of: Callable[[Metrics, ResultsStage], Rows]) -> RowsOf:
    """Rows of the one figure of a study."""

    def of_study(metrics: Metrics, settings: ResultsStage) -> Iterator[Rows]:
        yield rows_of(metrics, settings)

    return of_study


def _overhead_bars(metrics: Metrics, settings: ResultsStage) -> Iterator[Rows]:
    """Rows of the figure of each scenario.

    Raises
    ------
    FedamoleError
        If nothing was measured in one of them.
    """
    bars = overhead_bars(metrics.costs)
    for scenario in settings.scenarios:
        rows = [row for row in bars if row["scenario"] == scenario]
        if not rows:
            raise FedamoleError(
                f"figure overhead: nothing was measured on {scenario}; costs are gathered from the "
                f"progress folder of the results, which may not have been copied with them"
            )
        yield rows


# Kind -> the rows of its figures, in the order of their names, and how they are drawn.
DRAWN: dict[FigureName, tuple[RowsOf, Callable[[Rows], Figure]]] = {
    "rounds": (_one(rounds_rows), draw_rounds),
    "bars": (_one(bars_rows), draw_bars),
    "sweep": (_one(sweep_rows), draw_sweep),
    "stability": (_one(stability_rows), draw_stability),
    "routing": (_one_per_run(routing_rows), draw_routing),
    "overhead": (_overhead_bars, draw_overhead),
    "classes": (_one_per_slug(classes_rows), draw_classes),
    "experts": (_one_per_run(experts_rows), draw_experts),
    "assignment": (_one_per_run(assignment_rows), draw_assignment),
}
