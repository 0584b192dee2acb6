"""``fedamole tables`` and ``fedamole figures``: from metrics files to what people look at."""

import argparse
from pathlib import Path

from fedamole.artifacts import replacing
from fedamole.config import parse
from fedamole.results import read_metrics
from fedamole.stages import ResultsStage


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add both commands to the command line."""
    tables = subparsers.add_parser("tables", help="draw up the result tables (csv, md, tex, html)")
    _add_options(tables)
    tables.set_defaults(command=run_tables)
    figures = subparsers.add_parser("figures", help="draw the figures (svg, pdf, png, csv)")
    _add_options(figures)
    figures.set_defaults(command=run_figures)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--settings", required=True, metavar="JSON", help="settings of the stage (ResultsStage)"
    )
    parser.add_argument(
        "--metrics",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help="metrics files, one per scenario, seed and method, in any order",
    )
    parser.add_argument(
        "--out-dir", required=True, type=Path, metavar="DIR", help="folder for the files"
    )


def run_tables(args: argparse.Namespace) -> None:
    """Write the tables named by :func:`fedamole.results.table_names`."""
    from fedamole.tables import table_files

    settings = parse(ResultsStage, args.settings, "--settings")
    metrics = read_metrics(args.metrics, settings)
    for name, text in table_files(metrics, settings).items():
        _write(args.out_dir / name, text.encode())


def run_figures(args: argparse.Namespace) -> None:
    """Write the figures named by :func:`fedamole.results.figure_names`."""
    from fedamole.figures import figure_files

    settings = parse(ResultsStage, args.settings, "--settings")
    metrics = read_metrics(args.metrics, settings)
    for name, content in figure_files(metrics, settings):
        _write(args.out_dir / name, content)


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as scratch:
        scratch.write_bytes(content)
