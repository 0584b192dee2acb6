"""The command that tells a person what a study found, and where it is."""

import argparse
from pathlib import Path

from fedamole.config import read_yaml, with_base
from fedamole.errors import FedamoleError


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser("show", help="print the main table of a study and where it is")
    parser.add_argument("--configfile", type=Path, required=True)
    parser.set_defaults(command=run_show)


def run_show(args: argparse.Namespace) -> None:
    """Print the main table and the places of tables, figures and report."""
    config = read_yaml(args.configfile)
    if not isinstance(config, dict):
        raise FedamoleError(f"{args.configfile}: holds no settings")
    config = with_base(config, [args.configfile.parent], str(args.configfile))
    results = Path(config.get("results", "results"), config.get("study") or "")
    table = results / "tables" / "main.md"
    if not table.is_file():
        raise FedamoleError(
            f"{table}: does not exist yet; "
            f"run: snakemake --configfile {args.configfile} --cores all"
        )
    print(f"\n{table.read_text(encoding='utf-8').strip()}\n")
    print(
        f"tables   {results / 'tables'} (csv, md, tex, html; clients.md has the clients one by one)"
    )
    print(f"figures  {results / 'figures'} (svg, pdf, png, csv)")
    report = results / "report.html"
    if report.is_file():
        print(f"report   {report} (open it in a browser)")
