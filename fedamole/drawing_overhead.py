"""The figure of costs: a panel for each measure, a bar for each method, sized for one column."""

# ruff: noqa: TID253 -- the command imports fedamole.figures only when it draws

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedamole.drawing import COLUMN_INCHES, colour, unique
from fedamole.figure_data import Rows

PANELS_A_LINE = 2
BAR_INCHES = 0.13
# Room for the number behind the longest bar, as a share of the axis.
NUMBER_ROOM = 0.38


def draw_overhead(rows: Rows) -> Figure:
    """Draw what methods cost in one scenario; with several seeds their deviation as a line.

    Parameters
    ----------
    rows
        Of one scenario, of :func:`fedamole.overhead_table.overhead_bars`.
    """
    measures, methods = unique(rows, "measure"), unique(rows, "method")
    lines = -(-len(measures) // PANELS_A_LINE)
    height = 0.45 + lines * (0.42 + BAR_INCHES * len(methods))
    figure = Figure(figsize=(COLUMN_INCHES, height), layout="constrained")
    grid = figure.subplots(lines, PANELS_A_LINE, squeeze=False, sharey=True)
    for axes in grid.flat[len(measures) :]:
        axes.set_visible(False)
    for axes, measure in zip(grid.flat, measures, strict=False):
        own = {row["method"]: row for row in rows if row["measure"] == measure}
        unit = next(iter(own.values()))["unit"]
        axes.set_title(f"{measure} ({unit})", loc="left", pad=2, size=6.5)
        _draw_bars(axes, [own.get(method) for method in methods], methods)
    figure.suptitle(f"Costs, means per client and round\n{rows[0]['scenario']}")
    return figure


def _draw_bars(axes: Axes, bars: list[dict[str, object] | None], methods: list[str]) -> None:
    """Draw a bar with its number for each method that has one, the first on top."""
    means = [_number(bar, "value_mean") for bar in bars]
    for place, (bar, method, mean) in enumerate(zip(bars, methods, means, strict=True)):
        if bar is None:
            axes.text(0, place, " n/a", size=5.5, color="#777777", va="center_baseline")
            continue
        deviation = _number(bar, "value_std")
        axes.barh(place, mean, height=0.72, color=colour(method))
        axes.errorbar(
            mean, place, xerr=deviation or None, color="#555555", linewidth=0.7, capsize=1.2
        )
        end = mean + deviation
        axes.annotate(
            _short(mean),
            (end, place),
            xytext=(2, 0),
            textcoords="offset points",
            size=5.5,
            va="center_baseline",
        )
    ends = [mean + _number(bar, "value_std") for mean, bar in zip(means, bars, strict=True)]
    axes.set_xlim(0, (max(ends) or 1.0) * (1 + NUMBER_ROOM))
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.set_yticks(range(len(methods)), methods)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3))


def _number(bar: dict[str, object] | None, key: str) -> float:
    """Give a number of a bar; 0 where there is none."""
    value = bar[key] if bar else None
    return value if isinstance(value, float) else 0.0


def _short(value: float) -> str:
    """Print three significant digits, without exponent."""
    if not value:
        return "0"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".") if value >= 0.001 else f"{value:.1g}"
