"""What each figure shows, drawn from tidy rows, sized for one column of a paper."""

# ruff: noqa: TID253 -- the command imports fedamole.figures only when it draws

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedamole.drawing_parts import (
    COLOURS,
    COLUMN_INCHES,
    INK,
    MOST_COLUMNS_WITH_NUMBERS,
    PAGE_INCHES,
    colour,
    draw_matrix,
    legend_columns,
    line_style,
    origin,
    shorten,
    some_ticks,
    unique,
    write_numbers,
)
from fedamole.figure_data import COMMON, Rows
from fedamole.records import METRIC_LABELS
from fedamole.registry import lookup

MOST_ROWS_WITH_NUMBERS = 40


# Metric per round


def draw_rounds(rows: Rows) -> Figure:
    """Score and evaluation loss per round; a pair of panels per scenario, a line per method."""
    scenarios, methods = unique(rows, "scenario"), unique(rows, "method")
    columns = min(len(scenarios), 3)
    bands = -(-len(scenarios) // columns)
    width = COLUMN_INCHES if columns == 1 else PAGE_INCHES
    per_line = legend_columns(methods, width)
    legend_lines = -(-len(methods) // per_line)
    height = 0.7 + (3.3 if bands == 1 else 2.5) * bands + 0.13 * max(0, legend_lines - 2)
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(2 * bands, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for index, scenario in enumerate(scenarios):
        band, column = divmod(index, columns)
        own = [row for row in rows if row["scenario"] == scenario]
        upper, lower = grid[2 * band, column], grid[2 * band + 1, column]
        _draw_rounds_panel(upper, own, "score", scale=100)
        _draw_rounds_panel(lower, own, "eval_loss", scale=1)
        upper.set(title=scenario, ylabel=f"{METRIC_LABELS[own[0]['metric']]} (%)")
        lower.set_ylabel("eval loss (nats/token)")
        _label_rounds(lower, own)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=per_line)
    figure.suptitle("Metric per round, mean over clients")
    return figure


def _draw_rounds_panel(axes: Axes, rows: Rows, what: str, scale: float) -> None:
    """Draw a line per method and, right of the last round, the range of its clients."""
    axes.set_visible(True)
    axes.grid(axis="y")
    last = _last_round(rows)
    for index, method in enumerate(unique(rows, "method")):
        own = [row for row in rows if row["method"] == method]
        _draw_method(axes, own, what, scale, last)
        _draw_range(axes, own, what, scale, position=_beside(last, index))
    axes.axvline(_beside(last, -0.75), color="#BBBBBB", linewidth=0.6)
    ticks = MaxNLocator(nbins=6, integer=True).tick_values(1, last)
    axes.set_xticks([int(tick) for tick in ticks if 1 <= tick <= last])


def _last_round(rows: Rows) -> int:
    """Last round on the axis; at least 1, also if nothing was trained."""
    return max(1, *unique(rows, "round"))


def _beside(last: int, index: float) -> float:
    """Position on the axis of rounds of the range of the clients of the method with an index."""
    return last + 0.05 * max(last - 1, 1) * (index + 1.5)


def _label_rounds(axes: Axes, rows: Rows) -> None:
    """Name both parts of the axis: the rounds, and the ranges beside them."""
    last, methods = _last_round(rows), len(unique(rows, "method"))
    centres = {"round": (1 + last) / 2, "range of\nclients": _beside(last, (methods - 1) / 2)}
    for label, centre in centres.items():
        axes.annotate(
            label,
            (centre, 0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, -15),
            textcoords="offset points",
            ha="center",
            va="top",
        )


def _draw_method(axes: Axes, rows: Rows, what: str, scale: float, last: int) -> None:
    """Draw the mean over seeds, their range as a band; a dashed level for an untrained model."""
    method, rounds = rows[0]["method"], unique(rows, "round")
    seeds = [[scale * r[f"{what}_mean"] for r in rows if r["round"] == round_] for round_ in rounds]
    means = [fmean(values) for values in seeds]
    if not lookup(method).trains:
        axes.plot([1, _beside(last, -0.75)], means * 2, "--", color=colour(method), label=method)
        return
    axes.plot(
        rounds,
        means,
        label=method,
        markevery=max(1, len(rounds) // 8),
        **line_style(method),
    )
    lowest, highest = [min(values) for values in seeds], [max(values) for values in seeds]
    axes.fill_between(rounds, lowest, highest, color=colour(method), alpha=0.15, linewidth=0)


def _draw_range(axes: Axes, rows: Rows, what: str, scale: float, position: float) -> None:
    """Draw a bar from the lowest to the highest client of the last round, over all seeds."""
    final = [row for row in rows if row["round"] == rows[-1]["round"]]
    lowest = scale * min(row[f"{what}_lowest"] for row in final)
    highest = scale * max(row[f"{what}_highest"] for row in final)
    mean = scale * fmean(row[f"{what}_mean"] for row in final)
    style = line_style(rows[0]["method"])
    axes.plot([position, position], [lowest, highest], **style | {"marker": ""})
    axes.plot(position, mean, **style | {"linestyle": ""})


# Clients x classes


def draw_classes(rows: Rows) -> Figure:
    """Draw the examples of each class (rows) at each client (columns)."""
    labels, clients = unique(rows, "class"), unique(rows, "client")
    counts = np.array([row["examples"] for row in rows]).reshape(len(clients), len(labels)).T
    crowded = len(labels) > MOST_ROWS_WITH_NUMBERS
    height = 0.9 + max(0.6, len(labels) * (0.08 if crowded else 0.155))
    figure = Figure(figsize=(COLUMN_INCHES, height), layout="constrained")
    axes = figure.subplots()
    mesh = draw_matrix(axes, counts, float(counts.max()))
    if crowded or len(clients) > MOST_COLUMNS_WITH_NUMBERS:
        figure.colorbar(mesh, ax=axes, label="examples", fraction=0.05, pad=0.02)
    else:
        write_numbers(axes, counts, "{:.0f}")
    axes.set_yticks(range(len(labels)), [shorten(label, 26) for label in labels])
    axes.tick_params(axis="y", labelsize=4 if crowded else 6.5)
    axes.set_xlabel("client")
    figure.suptitle(f"Examples of each class at each client\n{rows[0]['scenario']}")
    return figure


# Experts per client


def draw_experts(rows: Rows) -> Figure:
    """Draw how many domain experts each client holds: circles over modules, a bar for the mean."""
    clients = unique(rows, "client")
    most = max(row["experts"] for row in rows)
    figure = Figure(figsize=(COLUMN_INCHES, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y")
    held = [[row["experts"] for row in rows if row["client"] == client] for client in clients]
    mode = max(numbers.count(number) for numbers in held for number in numbers)
    # Square points that fit between the neighbours, beside and above.
    largest = min(200, (150 / len(clients)) ** 2, (130 / (most + 1)) ** 2)
    for client, numbers in zip(clients, held, strict=True):
        if any(numbers):
            _draw_distribution(axes, client, numbers, area=largest / mode)
        elif len(clients) <= MOST_COLUMNS_WITH_NUMBERS:
            axes.text(client, 0.15, "not drawn", rotation=90, size=5.5, ha="center", va="bottom")
    _draw_bounds(axes, rows[0])
    axes.set(xlabel="client", ylabel="domain experts held, per module")
    axes.set_xticks(some_ticks(len(clients)))
    axes.set_xlim(-0.7, len(clients) - 0.3)
    axes.set_ylim(0, (rows[0]["max_experts"] or most) + 0.9)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("circle area: number of modules; bar: mean", size=6.5, color="#555555")
    modules = len(unique(rows, "module"))
    over = f"{modules} modules" if modules > 1 else "one module"
    figure.suptitle(f"Domain experts per client over {over}\n{origin(rows)}")
    return figure


def _draw_distribution(axes: Axes, client: int, held: Sequence[int], area: float) -> None:
    """Draw a circle per number of experts, ``area`` square points large for each module."""
    numbers = sorted(set(held))
    areas = [area * held.count(number) for number in numbers]
    axes.scatter([client] * len(numbers), numbers, s=areas, color=INK, alpha=0.55, linewidths=0)
    axes.plot([client - 0.3, client + 0.3], [fmean(held)] * 2, color=COLOURS[0], linewidth=1.5)


def _draw_bounds(axes: Axes, row: dict[str, Any]) -> None:
    """Draw the fewest and the most experts that a client may hold, where the metrics say."""
    for bound in (row["min_experts"], row["max_experts"]):
        if bound is not None:
            axes.axhline(bound, color="#777777", linestyle=":", linewidth=0.8)


# Assignment


def draw_assignment(rows: Rows) -> Figure:
    """Draw who holds which experts in a few modules, and what clients hold in common over all."""
    panels = unique(rows, "panel")
    matrices = {panel: _matrix(rows, panel) for panel in panels}
    modules = [panel for panel in panels if panel != COMMON]
    experts, clients = matrices[modules[0]].shape
    heights = [max(1.0, 0.075 * experts), min(2.3, 0.9 + 0.2 * clients)]
    figure = Figure(figsize=(COLUMN_INCHES, sum(heights) + 1.4), layout="constrained")
    ratios = [heights[0] + 0.8, heights[1] + 0.6]
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=ratios)[:, 0]
    grid = upper.subplots(1, len(modules), squeeze=False)[0]
    for axes, module in zip(grid, modules, strict=True):
        draw_matrix(axes, matrices[module], top=1.3)
        axes.set(title=_module_title(module), xlabel="client")
    grid[0].set_ylabel("domain expert")
    upper.suptitle(f"Experts that each client holds (dark)\n{origin(rows)}")
    _draw_common(lower.subplots(), matrices[COMMON])
    return figure


def _draw_common(axes: Axes, shares: np.ndarray) -> None:
    """Draw the share of experts that two clients hold in common; the diagonal says nothing."""
    between = shares.copy()
    np.fill_diagonal(between, np.nan)
    mesh = draw_matrix(axes, between, max(float(np.nanmax(between, initial=0.0)), 0.01))
    if len(shares) <= MOST_COLUMNS_WITH_NUMBERS:
        write_numbers(axes, between, "{:.2f}")
    else:
        axes.figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02)
    axes.set_aspect("equal")
    axes.set(xlabel="client", ylabel="client")
    axes.set_title("Share of experts held in common, all modules\n(held by both / held by either)")


def _module_title(name: str) -> str:
    """Shorten ``model.layers.3.self_attn.q_proj`` to its layer and its last part."""
    number = re.search(r"\.(\d+)\.", name)
    last = name.rsplit(".", 1)[-1]
    return f"layer {number[1]}\n{last}" if number else last


def _matrix(rows: Rows, panel: str) -> np.ndarray:
    """Values of a panel as a matrix, rows x columns."""
    own = [row for row in rows if row["panel"] == panel]
    width = 1 + max(row["column"] for row in own)
    return np.array([row["value"] for row in own]).reshape(-1, width)
