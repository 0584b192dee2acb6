"""Text of a table: the same numbers as Markdown, LaTeX and HTML, the same bytes every time."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Literal

from fedamole.markup import HTML, LATEX, MARKDOWN, Markup, escape_latex

PERCENT = 100
MANY_COLUMNS = 6
STYLE = (
    "body{font-family:sans-serif;margin:2em}"
    "table{border-collapse:collapse;border-top:2px solid;border-bottom:2px solid}"
    "th{border-bottom:1px solid}"
    "th,td{padding:.3em .8em;text-align:right}"
    "th:first-child,td:first-child{text-align:left}"
)


@dataclass(frozen=True)
class Cell:
    """A number of a table.

    Attributes
    ----------
    mean
        The value, or the mean over seeds; not a number prints ``n/a``.
    std
        Sample standard deviation over seeds; None for a single seed.
    """

    mean: float
    std: float | None = None


def over_seeds(values: Sequence[float]) -> Cell:
    """Mean and sample standard deviation; one value has no deviation, nor has what is no number."""
    mean = fmean(values)
    return Cell(mean, stdev(values) if len(values) > 1 and not math.isnan(mean) else None)


@dataclass(frozen=True)
class Column:
    """A column of a printed table.

    Attributes
    ----------
    title
        Text of the head; it may break at a newline.
    cells
        Row, such as a method -> number, in the unit that is printed.
    best
        Which numbers are better; None ranks nothing.
    gain
        Gain of the reference method, as a fraction; None leaves the field empty, not a number
        prints ``n/a``.
    spec
        Format of the numbers, as Python writes it; default: the decimals of the table.
    below
        Label of a line below the gain -> fraction; a field without one stays empty.
    """

    title: str
    cells: dict[str, Cell]
    best: Literal["highest", "lowest"] | None = None
    gain: float | None = None
    spec: str | None = None
    below: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Listing:
    """A table whose lines are no methods: texts and numbers under a head, none of them ranked.

    Attributes
    ----------
    head
        Titles.
    lines
        One entry per title; None leaves a field empty.
    """

    head: Sequence[str]
    lines: Sequence[Sequence[str | Cell | None]]


# What can be printed.
Table = Sequence[Column] | Listing


@dataclass(frozen=True)
class _Texts:
    """A table as it is printed: blocks of lines, the first of them the head; which are numbers."""

    blocks: list[list[list[str]]]
    is_number: list[bool]


def markdown(
    table: Table,
    reference: str,
    decimals: int,
    notes: Sequence[str] = (),
    grid: str | None = None,
) -> str:
    """GitHub table: best numbers bold, second best underlined, the gain last; notes below.

    Parameters
    ----------
    table
        What to print.
    reference
        Method whose gain is given.
    decimals
        Decimals of the numbers.
    notes
        Texts below the table.
    grid
        Title of the rows of a table that is ranked as a whole; None: the rows are methods, and each
        column is ranked for itself.
    """
    texts = _texts(table, reference, decimals, grid, MARKDOWN)
    (head,), *blocks = texts.blocks
    rule = ["---:" if number else ":---" for number in texts.is_number]
    lines = [head, rule, *(line for block in blocks for line in block)]
    rows = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return rows + "".join(f"\n{text}\n" for text in notes)


def latex(table: Table, reference: str, decimals: int, grid: str | None = None) -> str:
    """``tabular`` for booktabs: best numbers bold, second best underlined, the gain at the end.

    Needs no other package. A table of many columns is set small. See :func:`markdown`.
    """
    texts = _texts(table, reference, decimals, grid, LATEX)
    rows = "\\midrule\n".join(
        "".join(" & ".join(line) + " \\\\\n" for line in block) for block in texts.blocks
    )
    layout = "".join("r" if number else "l" for number in texts.is_number)
    tabular = f"\\begin{{tabular}}{{{layout}}}\n\\toprule\n{rows}\\bottomrule\n\\end{{tabular}}\n"
    if len(layout) <= MANY_COLUMNS:
        return tabular
    return f"{{\\footnotesize\\setlength{{\\tabcolsep}}{{3pt}}%\n{tabular}}}\n"


def latex_notes(notes: Sequence[str]) -> str:
    """Small lines below a ``tabular``."""
    return "".join(f"\\par{{\\footnotesize {escape_latex(text)}\\par}}\n" for text in notes)


def html_table(
    table: Table,
    reference: str,
    decimals: int,
    notes: Sequence[str] = (),
    grid: str | None = None,
) -> str:
    """HTML ``table``: best numbers bold, second best underlined, the gain last; notes below.

    See :func:`markdown`.
    """
    texts = _texts(table, reference, decimals, grid, HTML)
    (head,), *blocks = texts.blocks
    rows = [f"<tr><th>{'</th><th>'.join(head)}</th></tr>"]
    rows += [f"<tr><td>{'</td><td>'.join(line)}</td></tr>" for block in blocks for line in block]
    below = "".join(f"<p>{html.escape(text)}</p>\n" for text in notes)
    return "<table>\n" + "\n".join(rows) + "\n</table>\n" + below


def html_page(title: str, tables: Mapping[str, str], style: str = STYLE) -> str:
    """Page that holds tables under their titles; it needs no other file."""
    parts = [f"<h2>{html.escape(name)}</h2>\n{table}" for name, table in tables.items()]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{style}</style></head>\n<body>\n{''.join(parts)}</body>\n</html>\n"
    )


def _texts(table: Table, reference: str, decimals: int, grid: str | None, markup: Markup) -> _Texts:
    """Print a table in a format."""
    if isinstance(table, Listing):
        return _listed(table, decimals, markup)
    corner = markup.text("method" if grid is None else grid)
    head = [corner, *(markup.title(column.title) for column in table)]
    body = _body(table, decimals, grid is not None, markup)
    blocks = [[head], body, _below(table, reference, decimals, markup)]
    return _Texts([block for block in blocks if block], [False, *(True for _ in table)])


def _listed(table: Listing, decimals: int, markup: Markup) -> _Texts:
    """Print texts as they are, and numbers with their deviation."""

    def printed(entry: str | Cell | None) -> str:
        if isinstance(entry, Cell):
            mean = _signed(number(entry.mean, decimals), markup)
            return mean + _deviation(entry, f".{decimals}f", markup)
        return markup.text(entry or "")

    body = [[printed(entry) for entry in line] for line in table.lines]
    columns = list(zip(*table.lines, strict=True))
    is_number = [not any(isinstance(entry, str) for entry in column) for column in columns]
    return _Texts([[[markup.text(text) for text in table.head]], body], is_number)


def _body(
    columns: Sequence[Column], decimals: int, together: bool, markup: Markup
) -> list[list[str]]:
    """One line of texts per row: its name, its numbers."""
    rankings = [_ranking([column], decimals) for column in columns]
    if together:
        rankings = [_ranking(columns, decimals)] * len(columns)
    printed = [
        _print(column, ranking, decimals, markup)
        for column, ranking in zip(columns, rankings, strict=True)
    ]
    return [[markup.text(row), *(texts[row] for texts in printed)] for row in columns[0].cells]


def _below(
    columns: Sequence[Column], reference: str, decimals: int, markup: Markup
) -> list[list[str]]:
    """Give the lines below: the gain, and what stands under it; none that no column has."""
    gain = f"gain of {reference}\nover the best other"
    fields = [
        ({} if column.gain is None else {gain: column.gain}) | dict(column.below)
        for column in columns
    ]
    labels = list(dict.fromkeys([gain, *(label for found in fields for label in found)]))
    return [
        [
            markup.text(label),
            *(
                _percent(found[label], decimals, markup) if label in found else ""
                for found in fields
            ),
        ]
        for label in labels
        if any(label in found for found in fields)
    ]


def _percent(value: float, decimals: int, markup: Markup) -> str:
    if math.isnan(value):
        return "n/a"
    return markup.percent.format(number(PERCENT * value, decimals, sign="+"))


def _ranking(columns: Sequence[Column], decimals: int) -> list[str]:
    """Printed numbers from the best to the worst, each once; none if there is nothing to rank.

    Ranked as printed: two numbers that a reader cannot tell apart are marked alike.
    """
    cells = [(column, cell) for column in columns for cell in column.cells.values()]
    if columns[0].best is None or len(cells) < 2:
        return []
    known = {
        formatted(cell.mean, _spec(column, decimals))
        for column, cell in cells
        if not math.isnan(cell.mean)
    }
    return sorted(known, key=float, reverse=columns[0].best == "highest")


def _print(column: Column, ranking: Sequence[str], decimals: int, markup: Markup) -> dict[str, str]:
    """Map each row to its marked number in a column."""
    spec = _spec(column, decimals)
    patterns = dict(zip(ranking, (markup.best, markup.second), strict=False))
    means = {row: formatted(cell.mean, spec) for row, cell in column.cells.items()}
    return {
        row: patterns.get(means[row], "{}").format(_signed(means[row], markup))
        + _deviation(cell, spec, markup)
        for row, cell in column.cells.items()
    }


def _signed(text: str, markup: Markup) -> str:
    """A printed number with the minus of a format."""
    return markup.minus + text[1:] if text.startswith("-") else text


def _spec(column: Column, decimals: int) -> str:
    """Format of the numbers of a column."""
    return column.spec or f".{decimals}f"


def _deviation(cell: Cell, spec: str, markup: Markup) -> str:
    """What follows a mean over seeds; nothing for a single number."""
    return "" if cell.std is None else markup.plus_minus + formatted(cell.std, spec)


def number(value: float, decimals: int, sign: Literal["-", "+"] = "-") -> str:
    """Print a number with fixed decimals; zero never has a minus, and what is no number is n/a."""
    return formatted(value, f"{sign}.{decimals}f")


def formatted(value: float, spec: str) -> str:
    """Print a number as Python does; zero never has a minus, and what is no number is n/a."""
    if math.isnan(value):
        return "n/a"
    text = format(value, spec)
    return text if float(text) else format(0.0, spec)
