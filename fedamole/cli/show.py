"""The command that tells a person what a study found, and where it is."""

import argparse
from pathlib import Path

from fedamole.errors import FedamoleError


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser("show", help="print the first table of a study and where it is")
    parser.add_argument("--configfile", type=Path, required=True)
    parser.set_defaults(command=run_show)


def run_show(args: argparse.Namespace) -> None:
    """Print the first table and the places of tables, figures and report."""
    from fedamole.cli.study import first_shown, read_config
    from fedamole.results import figures, tables
    from fedamole.stages import results_stage

    config = read_config(args.configfile)
    first, output, settings = first_shown(config), Path(config.output), results_stage(config)
    if not first.is_file():
        raise FedamoleError(
            f"{first}: does not exist yet; "
            f"run: snakemake --configfile {args.configfile} --cores all"
        )
    if shown := tables(settings):
        print(f"\n{first.read_text(encoding='utf-8').strip()}\n")
        clients = "; clients.md has the clients one by one" * ("clients" in shown)
        print(f"tables   {output / 'tables'} (csv, md, tex, html{clients})")
    if figures(settings):
        print(f"figures  {output / 'figures'} (svg, pdf, png, csv)")
    report = output / "report.html"
    if report.is_file():
        print(f"report   {report} (open it in a browser)")
