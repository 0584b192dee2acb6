"""Tables of a study, each as csv, Markdown, LaTeX and HTML.

The middle of ``fedamole tables``: metrics in, texts out. The same metrics give the same bytes. Each
table is worked out in a module of its own; here it gets its files.
"""

from collections.abc import Callable, Mapping, Sequence

from fedamole.assignment_table import (
    assignment_columns,
    assignment_rows,
    measured_assignments,
)
from fedamole.clients_table import clients_columns, clients_rows
from fedamole.comparison import note
from fedamole.main_table import loss_columns, main_rows, rivals_note, score_columns
from fedamole.overhead_table import overhead_columns, overhead_notes, overhead_rows
from fedamole.privacy_tables import client_epsilon_columns, epsilon_columns
from fedamole.published_table import published_listing, published_notes, published_rows
from fedamole.rendering import Table, html_page, html_table, latex, latex_notes, markdown
from fedamole.results import Metrics, csv_text, slugs_of, tables
from fedamole.settings.output import TableName
from fedamole.significance import (
    significance,
    significance_columns,
    significance_notes,
    significance_rows,
)
from fedamole.spread_table import spread_columns, spread_rows
from fedamole.stages import ResultsStage
from fedamole.sweep_table import sweep_columns, sweep_grid, sweep_notes, sweep_rows


def table_files(metrics: Metrics, settings: ResultsStage) -> dict[str, str]:
    """Render all tables.

    Returns
    -------
    dict[str, str]
        File name (:func:`fedamole.results.table_names`) -> text.
    """
    files: dict[str, str] = {}
    for name in tables(settings):
        files |= RENDERED[name](metrics, settings)
    return files


def _main(metrics: Metrics, settings: ResultsStage) -> dict[str, str]:
    """Render the table of methods and scenarios."""
    scores, losses = score_columns(metrics, settings), loss_columns(metrics, settings)
    blocks = [block for block in (scores, losses, epsilon_columns(metrics, settings)) if block]
    columns = [column for block in blocks for column in block]
    reference, decimals = settings.tables.reference, settings.tables.decimals
    notes = _compared(metrics, settings) + rivals_note(settings)
    texts = [latex(block, reference, decimals) for block in blocks]
    return {
        "main.html": html_page(
            "Methods and scenarios",
            {"Methods and scenarios": html_table(columns, reference, decimals, notes)},
        ),
        "main.csv": csv_text(main_rows(metrics, settings)),
        "main.md": markdown(columns, reference, decimals, notes),
        "main.tex": "\n".join(texts) + latex_notes(notes),
    }


def _clients(metrics: Metrics, settings: ResultsStage) -> dict[str, str]:
    """Render the tables of single clients."""
    clients = clients_columns(metrics, settings) | client_epsilon_columns(metrics, settings)
    remarks = {
        title: note(metrics, settings, [slug], "mean, worst, std")
        for title, slug in zip(clients, slugs_of(settings), strict=False)
    }
    files = {"clients.csv": csv_text(clients_rows(metrics, settings))}
    return files | titled("clients", "Client by client", clients, settings, remarks)


def _spread(metrics: Metrics, settings: ResultsStage) -> dict[str, str]:
    """Render the tables of the spread over clients."""
    columns = spread_columns(metrics, settings)
    remarks = {
        title: note(metrics, settings, slugs, name)
        for title, (name, slugs) in zip(columns, settings.scenarios.items(), strict=True)
    }
    files = {"spread.csv": csv_text(spread_rows(metrics, settings))}
    return files | titled("spread", "Spread over clients", columns, settings, remarks)


def _significance(metrics: Metrics, settings: ResultsStage) -> dict[str, str]:
    """Render the tables of tests of the reference method."""
    found = significance(metrics, settings)
    columns = significance_columns(found, settings)
    remarks = {name: significance_notes(metrics, settings, name) for name in columns}
    files = {"significance.csv": csv_text(significance_rows(found, settings))}
    return files | titled("significance", "Significance", columns, settings, remarks)


def _assignments(metrics: Metrics, settings: ResultsStage) -> dict[str, str]:
    """Render the tables of assignments."""
    measured = measured_assignments(metrics, settings)
    files = {"assignments.csv": csv_text(assignment_rows(measured, settings))}
    return files | titled("assignments", "Assignments", assignment_columns(measured), settings)


def _sweep(metrics: Metrics, settings: ResultsStage) -> dict[str, str]:
    """Render the tables of a sweep."""
    columns, remarks = sweep_columns(metrics, settings), sweep_notes(metrics, settings)
    files = {"sweep.csv": csv_text(sweep_rows(metrics, settings))}
    return files | titled("sweep", "Sweep", columns, settings, remarks, sweep_grid(settings))


def _overhead(metrics: Metrics, settings: ResultsStage) -> dict[str, str]:
    """Render the tables of costs."""
    columns, remarks = overhead_columns(metrics.costs), overhead_notes(metrics.costs)
    files = {"overhead.csv": csv_text(overhead_rows(metrics.costs))}
    return files | titled("overhead", "Overhead", columns, settings, remarks)


def _published(metrics: Metrics, settings: ResultsStage) -> dict[str, str]:
    """Render the table of published numbers."""
    title = "Published numbers"
    listing, remarks = published_listing(metrics, settings), published_notes(settings)
    files = {"published.csv": csv_text(published_rows(metrics, settings))}
    return files | titled("published", title, {title: listing}, settings, {title: remarks})


def _compared(metrics: Metrics, settings: ResultsStage) -> list[str]:
    """Say of each scenario on how many clients it is compared, where these are not all."""
    return [
        line
        for name, slugs in settings.scenarios.items()
        for line in note(metrics, settings, slugs, name)
    ]


def titled(
    name: str,
    heading: str,
    tables: Mapping[str, Table],
    settings: ResultsStage,
    notes: Mapping[str, Sequence[str]] | None = None,
    grid: str | None = None,
) -> dict[str, str]:
    """Render several tables, each under its title and over its notes, into one file per format.

    See :func:`fedamole.rendering.markdown` for ``grid``.
    """
    reference, decimals = settings.tables.reference, settings.tables.decimals
    below = {title: (notes or {}).get(title, ()) for title in tables}
    page = {
        title: html_table(columns, reference, decimals, below[title], grid)
        for title, columns in tables.items()
    }
    return {
        f"{name}.html": html_page(heading, page),
        f"{name}.md": "\n".join(
            f"**{title}**\n\n{markdown(columns, reference, decimals, below[title], grid)}"
            for title, columns in tables.items()
        ),
        f"{name}.tex": "\n".join(
            f"% {title}\n{latex(columns, reference, decimals, grid)}{latex_notes(below[title])}"
            for title, columns in tables.items()
        ),
    }


RENDERED: dict[TableName, Callable[[Metrics, ResultsStage], dict[str, str]]] = {
    "main": _main,
    "clients": _clients,
    "spread": _spread,
    "significance": _significance,
    "assignments": _assignments,
    "sweep": _sweep,
    "overhead": _overhead,
    "published": _published,
}
