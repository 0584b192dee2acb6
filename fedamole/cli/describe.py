"""``fedamole describe-study``: the settings of a study as they hold, for its report."""

import argparse
from pathlib import Path

from fedamole.artifacts import replacing
from fedamole.config import parse
from fedamole.stages import StudyStage


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "describe-study", help="write down all settings of a study, defaults included (yaml, html)"
    )
    parser.add_argument(
        "--settings", required=True, metavar="JSON", help="settings of the stage (StudyStage)"
    )
    parser.add_argument(
        "--out-config", required=True, type=Path, metavar="FILE", help="config file for it"
    )
    parser.add_argument(
        "--out-page", required=True, type=Path, metavar="FILE", help="page for it (html)"
    )
    parser.set_defaults(command=run_describe_study)


def run_describe_study(args: argparse.Namespace) -> None:
    """Write the settings as a config file and as a page."""
    from fedamole.study_page import study_page, study_yaml

    config = parse(StudyStage, args.settings, "--settings").config
    for path, text in ((args.out_config, study_yaml(config)), (args.out_page, study_page(config))):
        with replacing(path) as scratch:
            scratch.write_text(text, encoding="utf-8")
