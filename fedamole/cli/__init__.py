"""The command line: one subcommand per rule of the workflow and per task of a user."""

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from fedamole import __version__
from fedamole.errors import FedamoleError

# Module -> its commands; those of the workflow, then those for people.
MODULES = {
    "backbone": ("prepare-backbone",),
    "data": ("partition", "tokenize"),
    "init_server": ("init-server",),
    "clients": ("train-clients", "evaluate-clients"),
    "server": ("aggregate", "assign"),
    "gather": ("gather",),
    "costs": ("gather-costs",),
    "describe": ("describe-study",),
    "results": ("tables", "figures"),
    "show": ("show",),
    "data_show": ("data",),
    "plan": ("plan",),
    "doctor": ("doctor",),
    "submit": ("submit", "cancel"),
    "status": ("status",),
    "prune": ("prune",),
    "cache": ("cache",),
    "pool": ("pool",),
    "schema": ("schema",),
}


LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
# Commands whose output a person may cut short, for example with `| head`.
FOR_PEOPLE = (
    "show",
    "data",
    "plan",
    "doctor",
    "submit",
    "cancel",
    "status",
    "prune",
    "cache",
    "pool",
    "schema",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns
    -------
    int
        0; 2 for a mistake the user can correct; 130 if interrupted.
    """
    try:
        _set_up_logging()
        # A scheduler ends a job with SIGTERM; unwinding the stack removes scratch files.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        arguments = _parse(argv)
        if arguments.subcommand in FOR_PEOPLE:
            _run_for_people(arguments)
        else:
            arguments.command(arguments)
    except FedamoleError as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; what a command does not know goes to Snakemake if it says so."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(given[0] if given else None)
    arguments, rest = parser.parse_known_args(given)
    if rest and not getattr(arguments, "passes_on", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.passed_on = rest
    return arguments


def _set_up_logging() -> None:
    """Say what a job does, and keep the libraries quiet.

    Raises
    ------
    FedamoleError
        If FEDAMOLE_LOG is no level.
    """
    level = os.environ.get("FEDAMOLE_LOG") or "INFO"
    if level.upper() not in LEVELS:
        raise FedamoleError(f"FEDAMOLE_LOG {level!r} is unknown; allowed: {', '.join(LEVELS)}")
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # Said once per job by a library two layers down, about an attribute that nobody here reads.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed")
    # The libraries below report every file they look for, or every letter they draw.
    for name in ("httpx", "httpcore", "huggingface_hub", "filelock", "DeepSpeed", "fontTools"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It prints its warnings itself, such as every retry where there is no network.
    logging.getLogger("huggingface_hub").propagate = False


def _run_for_people(arguments: argparse.Namespace) -> None:
    """Run a command that prints; it is done when its reader, such as `head`, has left."""
    try:
        arguments.command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would fail again at its end, with what is still in the buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(text: str) -> None:
    """Print what ended a command; of several ranks of one job, the first does it for all."""
    if os.environ.get("RANK", "0") != "0":
        return
    for line in text.splitlines():
        print(f"fedamole: {line}", file=sys.stderr)


def _parser(command: str | None = None) -> argparse.ArgumentParser:
    """Build the parser from the modules of this package.

    Parameters
    ----------
    command
        The command that will be parsed: its module is the only one to import. All are where it is
        none of theirs.
    """
    parser = argparse.ArgumentParser(
        prog="fedamole",
        description="Federated fine-tuning of language models with a mixture of LoRA experts. "
        "The workflow calls the commands down to `figures`; the others are for people.",
    )
    parser.add_argument("--version", action="version", version=f"fedamole {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", dest="subcommand")
    named = [module for module, commands in MODULES.items() if command in commands]
    for name in named or MODULES:
        import_module(f"fedamole.cli.{name}").register(subparsers)
    return parser
