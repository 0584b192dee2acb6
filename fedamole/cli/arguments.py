"""Arguments that several commands share."""

import argparse


def add_quorum(parser: argparse.ArgumentParser) -> None:
    """Add the share of clients that must report; files are not made with it."""
    parser.add_argument(
        "--quorum",
        type=float,
        help="share of the drawn clients that must report; default: that of the settings",
    )
