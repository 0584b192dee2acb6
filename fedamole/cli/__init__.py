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

MODULES = (
    "backbone",
    "data",
    "init_server",
    "clients",
    "server",
    "gather",
    "results",
    "show",
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
    logging.basicConfig(
        level=os.environ.get("FEDAMOLE_LOG", "INFO").upper(),
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
    )
    # Said once per job by a library two layers down, about an attribute that nobody here reads.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed")
    # The libraries below report every file they look for.
    for name in ("httpx", "httpcore", "huggingface_hub", "filelock", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # A scheduler ends a job with SIGTERM; unwinding the stack removes scratch files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except FedamoleError as error:
        for line in str(error).splitlines():
            print(f"fedamole: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fedamole: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output, such as `head`, has left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    """Build the parser from the modules of this package."""
    parser = argparse.ArgumentParser(
        prog="fedamole",
        description="Federated fine-tuning of language models with a mixture of LoRA experts. "
        "The workflow calls most of these commands; `pool`, `show` and `schema` are for people.",
    )
    parser.add_argument("--version", action="version", version=f"fedamole {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in MODULES:
        import_module(f"fedamole.cli.{name}").register(subparsers)
    return parser
