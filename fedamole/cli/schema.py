"""The command that describes the config file: to editors as JSON schema, to people as Markdown."""

import argparse
from pathlib import Path

from fedamole.artifacts import replacing
from fedamole.config_reference import config_reference, config_schema, with_reference
from fedamole.errors import FedamoleError


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser("schema", help="describe the config file")
    parser.add_argument(
        "--markdown", action="store_true", help="a reference for people instead of JSON schema"
    )
    parser.add_argument(
        "--into", type=Path, metavar="FILE", help="put the reference between the marks of FILE"
    )
    parser.set_defaults(command=run_schema)


def run_schema(args: argparse.Namespace) -> None:
    """Print the JSON schema, which editors complete and check configs with, or the reference."""
    if args.into:
        _update(args.into)
    else:
        print(config_reference() if args.markdown else config_schema(), end="")


def _update(path: Path) -> None:
    """Renew the reference inside a Markdown file."""
    try:
        text = with_reference(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FedamoleError(f"{path}: cannot be read ({error.strerror})") from error
    except FedamoleError as error:
        raise FedamoleError(f"{path}: {error}") from error
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
